// The kernels of one instruction set, COREMATCHING_ISA, chosen by the compiler's flags.
#include "kernels.h"

#include "decode.h"
#include "prefill_layer.h"
#include "selection.h"

#define CM_NAME_OF(isa) #isa
#define CM_NAME(isa) CM_NAME_OF(isa)
#define CM_TABLE_OF(isa) kernels_##isa
#define CM_TABLE(isa) CM_TABLE_OF(isa)

namespace corematching {
namespace COREMATCHING_ISA {

// Calls f with a null pointer of the type that a dtype names.
template <class F>
static auto dispatch(Dtype dtype, F f) {
  return dtype == Dtype::bfloat16 ? f(static_cast<bf16*>(nullptr))
                                  : f(static_cast<float*>(nullptr));
}

template <class P>
using Pointee = std::remove_pointer_t<P>;

static void decode_step(const DecodeStep& step) {
  dispatch(step.dtype, [&](auto* t) { run_decode_step<Pointee<decltype(t)>>(step); });
}

static void ffn(const FfnCall& call) {
  dispatch(call.dtype, [&](auto* t) { run_ffn<Pointee<decltype(t)>>(call); });
}

static void linear(const LinearCall& call) {
  dispatch(call.dtype, [&](auto* t) { run_linear<Pointee<decltype(t)>>(call); });
}

static int64_t gemm_scratch(const Gemm& g) {
  return dispatch(g.dtype, [&](auto* t) { return gemm_scratch_of<Pointee<decltype(t)>>(g); });
}

static void gemm(const Gemm* gemms, int count) {
  if (count < 1 || count > kMaxGemms || gemms->rows <= 0) return;
  dispatch(gemms->dtype, [&](auto* t) { run_gemm<Pointee<decltype(t)>>(gemms, count); });
}

static int64_t attention_scratch(const Attention& a) {
  return dispatch(a.dtype, [&](auto* t) { return attention_scratch_of<Pointee<decltype(t)>>(a); });
}

static void attention(const Attention& a) {
  dispatch(a.dtype, [&](auto* t) { run_attention<Pointee<decltype(t)>>(a); });
}

static int64_t prefill_layer_scratch(const PrefillLayer& l, const Prefill& p) {
  return dispatch(l.dtype, [&](auto* t) {
    return prefill_layer_scratch_of<Pointee<decltype(t)>>(l, p);
  });
}

static void prefill_layer(const PrefillLayer& l, const Prefill& p) {
  dispatch(l.dtype, [&](auto* t) { run_prefill_layer<Pointee<decltype(t)>>(l, p); });
}

static void normalize(const Normalize& call) {
  dispatch(call.dtype, [&](auto* t) { run_normalize<Pointee<decltype(t)>>(call); });
}

static void rope(const Rope& call) {
  dispatch(call.dtype, [&](auto* t) { run_rope<Pointee<decltype(t)>>(call); });
}

static void sum_tokens(const SumTokens& call) {
  if (call.dtype == Dtype::boolean) return run_sum_tokens<uint8_t>(call);
  dispatch(call.dtype, [&](auto* t) { run_sum_tokens<Pointee<decltype(t)>>(call); });
}

static void mark_largest(const void* values, const int64_t* counts, uint8_t* marks, int64_t rows,
                         int64_t n, bool by_size, int64_t threads, Dtype dtype) {
  dispatch(dtype, [&](auto* t) {
    run_mark_largest(static_cast<const Pointee<decltype(t)>*>(values), counts, marks, rows, n,
                     by_size, threads);
  });
}

static bool kth_size(const void* values, const uint8_t* tokens, const int64_t* indices,
                     const int64_t* ranks, float* out, int64_t batch, int64_t length, int64_t n,
                     int64_t count, Dtype dtype) {
  return dispatch(dtype, [&](auto* t) {
    return run_kth_size(static_cast<const Pointee<decltype(t)>*>(values), tokens, indices, ranks,
                        out, batch, length, n, count);
  });
}

}  // namespace COREMATCHING_ISA

using namespace COREMATCHING_ISA;

const Kernels CM_TABLE(COREMATCHING_ISA) = {
    CM_NAME(COREMATCHING_ISA),
    decode_scratch,
    decode_step,
    ffn_scratch,
    ffn,
    linear,
    gemm_scratch,
    gemm,
    attention_scratch,
    attention,
    prefill_layer_scratch,
    prefill_layer,
    normalize,
    rope,
    sum_tokens,
    weigh_marks,
    mark_largest,
    kth_size,
    top_k,
    unite,
};

}  // namespace corematching
