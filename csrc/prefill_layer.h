// A layer of Llama's form, or of CLIP's tower, for a whole prompt: norm and projections, rotary
// embedding, attention, output projection with its residual, FFN with its residual.
#pragma once

#include "attention.h"
#include "gemm.h"
#if defined(COREMATCHING_TILES)
#include "amx_attention.h"
#include "amx_gemm.h"
#endif

namespace corematching::COREMATCHING_ISA {

// Tiles take bfloat16 and whole blocks; everything else goes to vectors.
template <class T>
CM_INLINE bool takes_tiles(const Gemm* gemms, int count) {
#if defined(COREMATCHING_TILES)
  if constexpr (sizeof(T) == sizeof(bf16)) {
    bool fits = true;
    for (int i = 0; i < count; i++) fits &= fits_tiles(gemms[i]);
    return fits;
  }
#endif
  (void)gemms, (void)count;
  return false;
}

template <class T>
static int64_t gemm_scratch_of(const Gemm& g) {
#if defined(COREMATCHING_TILES)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (fits_tiles(g)) return tiled_gemm_scratch(g);
#endif
  return vector_gemm_scratch<T>(g);
}

template <class T>
static void run_gemm(const Gemm* gemms, int count) {
#if defined(COREMATCHING_TILES)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (takes_tiles<T>(gemms, count)) return tiled_gemm(gemms, count);
#endif
  vector_gemm<T>(gemms, count);
}

template <class T>
static int64_t attention_scratch_of(const Attention& a) {
#if defined(COREMATCHING_TILES)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (fits_tiles(a)) return tiled_attention_scratch(a);
#endif
  return vector_attention_scratch<T>(a);
}

template <class T>
static void run_attention(const Attention& a) {
#if defined(COREMATCHING_TILES)
  if constexpr (sizeof(T) == sizeof(bf16))
    if (fits_tiles(a)) return tiled_attention(a);
#endif
  vector_attention<T>(a);
}

// Queries, keys and values, the attention's output, and the parts' own scratch memory.
template <class T>
struct PrefillScratch {
  T *qkv, *mixed;
  char* rest;
  int64_t bytes;
};

template <class T>
static Attention describe_attention(const PrefillLayer& l, const Prefill& p,
                                    const PrefillScratch<T>& s) {
  int64_t all = l.heads + 2 * l.kv_heads, size = l.head_dim, length = p.length;
  Attention a = {};
  a.query = s.qkv, a.out = s.mixed, a.scratch = s.rest, a.mask = p.mask;
  a.key = p.keys ? p.keys : s.qkv + l.heads * size;
  a.value = p.keys ? p.values : s.qkv + (l.heads + l.kv_heads) * size;
  int64_t joint[3] = {length * all * size, size, all * size};
  int64_t apart[3] = {l.kv_heads * length * size, length * size, size};
  for (int i = 0; i < 3; i++) {
    a.query_strides[i] = joint[i];
    a.key_strides[i] = a.value_strides[i] = p.keys ? apart[i] : joint[i];
  }
  a.mask_strides[0] = p.mask_strides[0], a.mask_strides[1] = p.mask_strides[1];
  a.batch = p.batch, a.heads = l.heads, a.kv_heads = l.kv_heads;
  a.length = a.keys = length, a.head_dim = size, a.threads = p.threads, a.scaling = l.scaling;
  a.causal = p.causal, a.mask_kind = p.mask_kind, a.dtype = l.dtype;
  return a;
}

template <class T>
static Gemm describe_gemm(const PrefillLayer& l, const Prefill& p, const PrefillScratch<T>& s,
                          const void* x, const void* weight, const void* bias, void* out,
                          int64_t inputs, int64_t outputs) {
  Gemm g = {};
  g.x = x, g.weight = weight, g.bias = bias, g.out = out, g.scratch = s.rest;
  g.rows = p.batch * p.length, g.inputs = inputs, g.outputs = g.out_stride = outputs;
  g.threads = p.threads, g.activation = Activation::none, g.dtype = l.dtype;
  return g;
}

// The five products of a layer. Queries, keys and values are one call.
template <class T>
struct LayerGemms {
  Gemm qkv[3], o, up, down;

  LayerGemms(const PrefillLayer& l, const Prefill& p, const PrefillScratch<T>& s) {
    int64_t inner = l.heads * l.head_dim, kv = l.kv_heads * l.head_dim;
    qkv[0] = describe_gemm(l, p, s, p.x, l.q, l.q_bias, s.qkv, l.hidden, inner);
    qkv[1] = describe_gemm(l, p, s, p.x, l.k, l.k_bias, s.qkv + inner, l.hidden, kv);
    qkv[2] = describe_gemm(l, p, s, p.x, l.v, l.v_bias, s.qkv + inner + kv, l.hidden, kv);
    for (Gemm& g : qkv) {
      g.out_stride = inner + 2 * kv;
      g.norm = l.attention_norm, g.norm_bias = l.attention_norm_bias;
      g.epsilon = l.attention_epsilon;
    }
    o = describe_gemm(l, p, s, s.mixed, l.o, l.o_bias, p.middle, inner, l.hidden);
    o.residual = p.x;
    up = describe_gemm(l, p, s, p.middle, l.up, l.up_bias, p.active, l.hidden, l.width);
    up.gate = l.gate, up.gate_bias = l.gate_bias, up.activation = l.activation;
    up.norm = l.ffn_norm, up.norm_bias = l.ffn_norm_bias, up.epsilon = l.ffn_epsilon;
    up.gate_slots = p.gate_slots, up.kept_gates = p.kept_gates;
    down = describe_gemm(l, p, s, p.active, l.down, l.down_bias, p.out, l.width, l.hidden);
    down.residual = p.middle, down.by_input = l.down_by_input;
  }
};

template <class T>
static PrefillScratch<T> lay_out_prefill(const PrefillLayer& l, const Prefill& p) {
  int64_t rows = p.batch * p.length, inner = l.heads * l.head_dim;
  int64_t qkv = p.qkv ? 0 : round_up(rows * (inner + 2 * l.kv_heads * l.head_dim), kCacheLine);
  int64_t mixed = round_up(rows * inner, kCacheLine);
  auto* memory = static_cast<T*>(p.scratch);
  PrefillScratch<T> s = {p.qkv ? static_cast<T*>(p.qkv) : memory, memory + qkv,
                         reinterpret_cast<char*>(memory + qkv + mixed), 0};
  LayerGemms<T> gemms(l, p, s);
  s.bytes = attention_scratch_of<T>(describe_attention(l, p, s));
  const Gemm* all[] = {gemms.qkv, gemms.qkv + 1, gemms.qkv + 2, &gemms.o, &gemms.up, &gemms.down};
  for (const Gemm* g : all)
    s.bytes = max(s.bytes, gemm_scratch_of<T>(*g));
  s.bytes += (qkv + mixed) * static_cast<int64_t>(sizeof(T));
  return s;
}

template <class T>
static int64_t prefill_layer_scratch_of(const PrefillLayer& l, const Prefill& p) {
  Prefill sized = p;
  sized.scratch = &sized;  // any place: nothing is read or written
  return lay_out_prefill<T>(l, sized).bytes;
}

// Keys and values go to their places; residuals are added where products are rounded.
template <class T>
static void run_prefill_layer(const PrefillLayer& l, const Prefill& p) {
  if (p.batch * p.length <= 0) return;
  PrefillScratch<T> s = lay_out_prefill<T>(l, p);
  LayerGemms<T> gemms(l, p, s);
  run_gemm<T>(gemms.qkv, 3);
  if (p.keys)
    run_rope<T>({s.qkv, p.keys, p.values, p.cos, p.sin, p.batch, p.length, l.heads, l.kv_heads,
                 l.head_dim, p.rope_rows, p.threads, l.dtype});
  run_attention<T>(describe_attention(l, p, s));
  run_gemm<T>(&gemms.o, 1);
  run_gemm<T>(&gemms.up, 1);
  run_gemm<T>(&gemms.down, 1);
}

}  // namespace corematching::COREMATCHING_ISA
