// What Python hands to the kernels. Matrices are row-major, one row per output, in the model's
// dtype; every other number is float32. Letters in comments: B samples, T tokens, d hidden size,
// F intermediate size, H attention heads, G key-value heads, D head dimension.
#pragma once

#include <cstdint>

namespace corematching {

constexpr int kMaxBatch = 16;  // rows of a decode step
constexpr int kMaxGemms = 4;   // products of the same x in one call

enum class Dtype : int { float32, bfloat16, boolean };
enum class Activation : int { none = -1, silu, gelu, gelu_tanh, relu, quick_gelu };
enum class Mask : int { none, boolean, additive };  // false hides a key; added to the scores
enum class Sum : int { values, sizes, unit_squares };

// The FFN of a decode step, over all neurons or over a list of them.
struct Ffn {
  const void *up, *gate, *up_bias, *gate_bias;  // (F, d); gate may be null
  const void* down;         // by_neuron: (F, d), else (d, F)
  const void* bias;         // (biases, d), added to the output, or null
  const int32_t* neurons;   // (count,) listed neurons; null: all
  const uint32_t* members;  // (count,) one bit per batch row that keeps the neuron; null: all
  const float *input_threshold, *gate_threshold, *output_threshold;  // (B,) or null
  int64_t* rows_read;       // (3,) rows of gate, up and down read so far
  int64_t width, count, biases;
  bool by_neuron;
  Activation activation;
};

struct DecoderLayer {
  const void *attention_norm, *ffn_norm;  // (d,)
  const void *q, *k, *v, *o, *q_bias, *k_bias, *v_bias, *o_bias;
  const void *q_norm, *k_norm;  // (D,) or null
  void *keys, *values;          // (B, G, capacity, D)
  Ffn ffn;
};

// One token per row through all layers. Row b has lengths[b] cache columns, its new one the last.
struct DecodeStep {
  const DecoderLayer* layers;
  const void* final_norm;    // (d,)
  const void* x;             // (B, d)
  void* out;                 // (B, d)
  const float *cos, *sin;    // (B, D)
  const int64_t* lengths;    // (B,)
  const uint8_t* valid;      // (B, valid_stride) columns that are seen; null: all
  const float* log_counts;   // (B, counted) added to the first columns' scores, or null
  float* scratch;
  int64_t num_layers, hidden, heads, kv_heads, head_dim;
  int64_t batch, capacity, valid_stride, counted, threads;
  double epsilon, scaling;
  Dtype dtype;
};

// An FFN alone: (B, d) to (B, d).
struct FfnCall {
  const Ffn* ffn;
  const void* x;
  void* out;
  float* scratch;
  int64_t batch, hidden, threads;
  Dtype dtype;
};

// A linear layer of a decode step: (B, inputs) to (B, outputs). Scratch: batch * (inputs +
// outputs).
struct LinearCall {
  const void *weight, *bias, *x;
  void* out;
  float* scratch;
  int64_t batch, inputs, outputs, threads;
  Dtype dtype;
};

// out = act(norm(x) . weight^T + bias) + residual or, with a gate,
// out = act(norm(x) . gate^T + gate_bias) * (norm(x) . weight^T + bias).
// Sums are float32. Gate, activation and product are rounded as PyTorch's operators round them.
struct Gemm {
  const void* x;                          // (rows, inputs)
  const void *weight, *gate;              // (outputs, inputs); gate may be null
  const void *bias, *gate_bias;           // (outputs,) or null
  const void* residual;                   // (rows, outputs) or null
  const void *norm, *norm_bias;           // (inputs,); null, norm_bias only: RMSNorm
  void* out;                              // (rows, out_stride), of which outputs are set
  const int32_t* gate_slots;              // (rows,) where a row's act(gate) is kept, -1: nowhere
  void* kept_gates;                       // (slots, outputs)
  void* scratch;                          // on a cache line
  int64_t rows, inputs, outputs, out_stride, threads;
  double epsilon;
  bool by_input;  // weight is (inputs, outputs); then there is no gate
  Activation activation;
  Dtype dtype;
};

// Attention of a prompt. Strides count numbers between samples, heads and tokens; the D numbers of
// a head stand side by side. Query t sees key s unless the mask hides it or, if causal, s > t.
struct Attention {
  const void *query, *key, *value, *mask;
  void* out;      // (B, T, H, D)
  void* scratch;  // on a cache line
  int64_t query_strides[3], key_strides[3], value_strides[3];
  int64_t mask_strides[2];  // between samples, and between queries
  int64_t batch, heads, kv_heads, length, keys, head_dim, threads;
  double scaling;
  bool causal;
  Mask mask_kind;
  Dtype dtype;
};

// What of a layer stays the same from prompt to prompt: Llama's form, or CLIP's tower.
struct PrefillLayer {
  const void *q, *k, *v, *o, *gate, *up, *down;  // without a gate, up is activated
  const void *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
  const void *attention_norm, *attention_norm_bias, *ffn_norm, *ffn_norm_bias;  // (d,)
  int64_t hidden, heads, kv_heads, head_dim, width;
  double attention_epsilon, ffn_epsilon, scaling;
  bool down_by_input;
  Activation activation;
  Dtype dtype;
};

// One prompt in a layer. Token i of all takes row i % rope_rows of the cosines and sines.
struct Prefill {
  const void *x, *cos, *sin, *mask;  // x (B, T, d)
  void* qkv;               // (B, T, H + 2G, D), or null: in scratch
  void *keys, *values;     // (B, G, T, D), rotated; null: no rotary embedding
  void *middle, *out;      // (B, T, d), behind the attention, behind the FFN
  void* active;            // (B, T, F)
  const int32_t* gate_slots;
  void *kept_gates, *scratch;
  int64_t mask_strides[2];
  int64_t batch, length, rope_rows, threads;
  bool causal;
  Mask mask_kind;
};

// Norm of every row: RMSNorm or, with norm_bias, LayerNorm.
struct Normalize {
  const void *x, *norm, *norm_bias;
  void* out;
  int64_t rows, width, threads;
  double epsilon;
  Dtype dtype;
};

// x (B, T, H + 2G, D): queries are rotated in place; keys go rotated, values as they are, to
// keys and values (B, G, T, D).
struct Rope {
  void *x, *keys, *values;
  const void *cos, *sin;
  int64_t batch, length, heads, kv_heads, head_dim, rope_rows, threads;
  Dtype dtype;
};

// out (B, n): a sum over those of the tokens (B, T) that count. factors has room for (B, T).
struct SumTokens {
  const void* values;
  const uint8_t* tokens;
  float *factors, *out;
  int64_t batch, length, width, threads;
  Sum what;
  Dtype dtype;
};

}  // namespace corematching
