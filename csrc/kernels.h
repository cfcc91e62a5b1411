// The kernels of one instruction set, as a table. kernels.cpp is compiled once for each of them.
#pragma once

#include "types.h"

namespace corematching {

struct Kernels {
  const char* isa;

  int64_t (*decode_scratch)(const DecodeStep&);  // floats
  void (*decode_step)(const DecodeStep&);
  int64_t (*ffn_scratch)(int64_t batch, int64_t hidden, int64_t width, int64_t threads);  // floats
  void (*ffn)(const FfnCall&);
  void (*linear)(const LinearCall&);

  int64_t (*gemm_scratch)(const Gemm&);  // bytes
  void (*gemm)(const Gemm* gemms, int count);  // of one x; the first one's scratch is used
  int64_t (*attention_scratch)(const Attention&);  // bytes
  void (*attention)(const Attention&);
  int64_t (*prefill_layer_scratch)(const PrefillLayer&, const Prefill&);  // bytes
  void (*prefill_layer)(const PrefillLayer&, const Prefill&);
  void (*normalize)(const Normalize&);
  void (*rope)(const Rope&);

  void (*sum_tokens)(const SumTokens&);
  // out (B, T) = the sum of the weights (B, n) of what each token marks, (B, T, n)
  void (*weigh_marks)(const uint8_t* marks, const float* weights, float* out, int64_t batch,
                      int64_t length, int64_t n, int64_t threads);
  // Marks the entries of each row (rows, n) that are above 0 and not below its counts[row]-th
  // largest; by_size: of magnitudes.
  void (*mark_largest)(const void* values, const int64_t* counts, uint8_t* marks, int64_t rows,
                       int64_t n, bool by_size, int64_t threads, Dtype dtype);
  // out (B,) = the ranks[b]-th smallest magnitude of the tokens that count, over all n numbers or
  // over those at indices (B, count); false where a number is not finite.
  bool (*kth_size)(const void* values, const uint8_t* tokens, const int64_t* indices,
                   const int64_t* ranks, float* out, int64_t batch, int64_t length, int64_t n,
                   int64_t count, Dtype dtype);
  // The indices of the `count` highest of n scores, ascending; of equal ones the first. False
  // where a score is NaN.
  bool (*top_k)(const float* scores, int64_t n, int64_t count, int64_t* indices);
  // The union of sets of neurons, each ascending; set i holds for `group` batch rows from i * group
  // on. marks has `width` zeros and is left so. Returns the neurons in the union; -1 where a set
  // does not ascend within the width.
  int64_t (*unite)(const int64_t* indices, int64_t sets, int64_t count, int64_t group,
                   int64_t width, int32_t* neurons, uint32_t* members, uint32_t* marks);
};

// Defined where the compiler knows the instruction set (COREMATCHING_HAS_<ISA>).
extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512bf16,
    kernels_amx;

}  // namespace corematching
