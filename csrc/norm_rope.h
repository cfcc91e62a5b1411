// Norms and rotary embeddings: of a decode step in float32, and of a prompt's rows, rounded where
// PyTorch's operators round.
#pragma once

#include "parallel.h"
#include "types.h"

namespace corematching::COREMATCHING_ISA {

template <class T>
CM_INLINE float sum(const T* x, int64_t n) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(x + i);
  if (i < n) total += load_first(x + i, n - i);
  return sum_lanes(total);
}

// The sum of (x - mean)^2.
template <class T>
CM_INLINE float sum_squares(const T* x, int64_t n, float mean = 0) {
  Vec total = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec v = load(x + i) - mean;
    total += v * v;
  }
  float rest = 0;
  for (; i < n; i++) rest += (widen(x[i]) - mean) * (widen(x[i]) - mean);
  return sum_lanes(total) + rest;
}

CM_INLINE float inverse_root(float squares, int64_t n, double epsilon) {
  return static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(n) + epsilon));
}

// y = x / sqrt(mean(x^2) + epsilon) * weight in float32; y may be x.
template <class T>
CM_INLINE void rms_norm(const float* x, const T* weight, double epsilon, int64_t n, float* y) {
  float scale = inverse_root(sum_squares(x, n), n, epsilon);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < n; i++) y[i] = x[i] * scale * widen(weight[i]);
}

// Rotary embedding of one head in float32, in place; size is even.
CM_INLINE void rotate(float* head, const float* cos, const float* sin, int64_t size) {
  int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// Llama's RMSNorm of a row: normalized, rounded, times the weight.
template <class T>
CM_INLINE void rms_norm_row(const T* x, const T* weight, T* out, int64_t n, double epsilon) {
  float scale = inverse_root(sum_squares(x, n), n, epsilon);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, round_to<T>(load(x + i) * scale) * load(weight + i));
  for (; i < n; i++) out[i] = narrow<T>(widen(narrow<T>(widen(x[i]) * scale)) * widen(weight[i]));
}

// PyTorch's LayerNorm of a row, rounded once.
template <class T>
CM_INLINE void layer_norm_row(const T* x, const T* weight, const T* bias, T* out, int64_t n,
                              double epsilon) {
  float mean = sum(x, n) / static_cast<float>(n);
  float scale = inverse_root(sum_squares(x, n, mean), n, epsilon);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
  for (; i < n; i++)
    out[i] = narrow<T>((widen(x[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]));
}

// LayerNorm with a bias, else RMSNorm.
template <class T>
CM_INLINE void normalize_row(const T* x, const T* weight, const T* bias, T* out, int64_t n,
                             double epsilon) {
  if (bias)
    layer_norm_row(x, weight, bias, out, n, epsilon);
  else
    rms_norm_row(x, weight, out, n, epsilon);
}

template <class T>
static void run_normalize(const Normalize& call) {
  const auto *x = static_cast<const T*>(call.x), *weight = static_cast<const T*>(call.norm);
  const auto* bias = static_cast<const T*>(call.norm_bias);
  auto* out = static_cast<T*>(call.out);
#pragma omp parallel for num_threads(static_cast<int>(call.threads)) schedule(static)
  for (int64_t row = 0; row < call.rows; row++)
    normalize_row(x + row * call.width, weight, bias, out + row * call.width, call.width,
                  call.epsilon);
}

// Rotary embedding of a head; out may be the head.
template <class T>
CM_INLINE void rotate_head(const T* head, const T* cos, const T* sin, int64_t half, T* out) {
  const T* upper = head + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    Vec a = load(head + i), b = load(upper + i);
    Vec low = round_to<T>(a * load(cos + i)) - round_to<T>(b * load(sin + i));
    Vec high = round_to<T>(b * load(cos + i + half)) + round_to<T>(a * load(sin + i + half));
    store(out + i, low);
    store(out + i + half, high);
  }
  for (; i < half; i++) {
    float a = widen(head[i]), b = widen(upper[i]);
    float low = widen(narrow<T>(a * widen(cos[i]))) - widen(narrow<T>(b * widen(sin[i])));
    float high = widen(narrow<T>(b * widen(cos[i + half])));
    high += widen(narrow<T>(a * widen(sin[i + half])));
    out[i] = narrow<T>(low), out[i + half] = narrow<T>(high);
  }
}

template <class T>
static void run_rope(const Rope& r) {
  auto *x = static_cast<T*>(r.x), *keys = static_cast<T*>(r.keys);
  auto* values = static_cast<T*>(r.values);
  const auto *cos = static_cast<const T*>(r.cos), *sin = static_cast<const T*>(r.sin);
  int64_t size = r.head_dim, all = r.heads + 2 * r.kv_heads;
#pragma omp parallel for num_threads(static_cast<int>(r.threads)) schedule(static)
  for (int64_t token = 0; token < r.batch * r.length; token++) {
    const T *c = cos + token % r.rope_rows * size, *s = sin + token % r.rope_rows * size;
    T* head = x + token * all * size;
    for (int64_t h = 0; h < r.heads; h++, head += size) rotate_head(head, c, s, size / 2, head);
    int64_t to = (token / r.length * r.kv_heads * r.length + token % r.length) * size;
    for (int64_t g = 0; g < r.kv_heads; g++, to += r.length * size, head += size) {
      rotate_head(head, c, s, size / 2, keys + to);
      std::memcpy(values + to, head + r.kv_heads * size, static_cast<size_t>(size) * sizeof(T));
    }
  }
}

}  // namespace corematching::COREMATCHING_ISA
