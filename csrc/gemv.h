// Products of rows of weights with few vectors: a decode step reads every row once, in place.
//
//   row (n,)                    dots: one row . up to 8 vectors -> 8 sums in registers
//   xs[0..7] (n,) in float32    mix:  4 rows scaled, added to up to 4 outputs
//
// Rows that are read soon are prefetched: the time of a step is the time of reading its weights.
#pragma once

#include "types.h"
#include "vec.h"

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kAheadBytes = 9216;  // between what is used and what is fetched
constexpr int64_t kStep = 2 * kLanes;
constexpr int kSamples = 8;  // of dots
constexpr int kRows = 4;     // of mix

// How many rows of n weights to fetch ahead.
template <class T>
CM_INLINE int64_t rows_ahead(int64_t n) {
  return ceil_div(kAheadBytes, n * static_cast<int64_t>(sizeof(T)));
}

template <class T>
CM_INLINE void prefetch(const T* row, int64_t start) {
  for (size_t byte = 0; byte < kStep * sizeof(T); byte += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const char*>(row + start) + byte, 0, 2);
}

template <int S, class T>
CM_INLINE void dots_of(const T* row, const float* const* xs, int64_t n, const T* ahead,
                       float* out) {
  Vec low[S] = {}, high[S] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    prefetch(ahead, i);
    Vec first = load(row + i), second = load(row + i + kLanes);
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      low[s] += first * load(xs[s] + i);
      high[s] += second * load(xs[s] + i + kLanes);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < S; s++) {
    float total = sum_lanes(low[s] + high[s]);
    for (int64_t j = i; j < n; j++) total += widen(row[j]) * xs[s][j];
    out[s] = total;
  }
}

// out[s] = row . xs[s], for any number of samples.
template <class T>
static void dots(const T* row, const float* const* xs, int samples, int64_t n, const T* ahead,
                 float* out) {
  for (; samples > kSamples; samples -= kSamples, xs += kSamples, out += kSamples)
    dots_of<kSamples>(row, xs, n, ahead, out);
  switch (samples) {
    case 1: return dots_of<1>(row, xs, n, ahead, out);
    case 2: return dots_of<2>(row, xs, n, ahead, out);
    case 3: return dots_of<3>(row, xs, n, ahead, out);
    case 4: return dots_of<4>(row, xs, n, ahead, out);
    case 5: return dots_of<5>(row, xs, n, ahead, out);
    case 6: return dots_of<6>(row, xs, n, ahead, out);
    case 7: return dots_of<7>(row, xs, n, ahead, out);
    case 8: return dots_of<8>(row, xs, n, ahead, out);
  }
}

template <int S, class T>
CM_INLINE void mix_of(const T* const* rows, const float* factors, float* const* ys, int64_t n,
                      const T* const* ahead) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    Vec low[kRows], high[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
      prefetch(ahead[r], i);
      low[r] = load(rows[r] + i);
      high[r] = load(rows[r] + i + kLanes);
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; s++) {
      Vec a = load(ys[s] + i), b = load(ys[s] + i + kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        a += low[r] * factors[s * kRows + r];
        b += high[r] * factors[s * kRows + r];
      }
      store(ys[s] + i, a);
      store(ys[s] + i + kLanes, b);
    }
  }
  for (; i < n; i++)
    for (int s = 0; s < S; s++)
      for (int r = 0; r < kRows; r++) ys[s][i] += factors[s * kRows + r] * widen(rows[r][i]);
}

// ys[s] += sum over kRows rows of factors[s][r] * rows[r], for any number of samples.
template <class T>
static void mix(const T* const* rows, const float* factors, float* const* ys, int samples,
                int64_t n, const T* const* ahead) {
  for (; samples > 4; samples -= 4, factors += 4 * kRows, ys += 4)
    mix_of<4>(rows, factors, ys, n, ahead);
  switch (samples) {
    case 1: return mix_of<1>(rows, factors, ys, n, ahead);
    case 2: return mix_of<2>(rows, factors, ys, n, ahead);
    case 3: return mix_of<3>(rows, factors, ys, n, ahead);
    case 4: return mix_of<4>(rows, factors, ys, n, ahead);
  }
}

// Rows [first, last) of a linear layer: out[s][r] = weight[r] . xs[s] + bias[r] (+ out[s][r]).
template <class T>
static void gemv(const T* weight, const T* bias, const float* const* xs, int samples, int64_t n,
                 int64_t first, int64_t last, float* const* out, bool accumulate) {
  float results[kMaxBatch];
  int64_t ahead = rows_ahead<T>(n);
  for (int64_t r = first; r < last; r++) {
    const T* row = weight + r * n;
    dots(row, xs, samples, n, row + (r + ahead < last ? ahead * n : 0), results);
    float extra = bias ? widen(bias[r]) : 0.0f;
    for (int s = 0; s < samples; s++)
      out[s][r] = results[s] + extra + (accumulate ? out[s][r] : 0.0f);
  }
}

// Where the rows of a (count, stride) matrix begin.
CM_INLINE void rows_at(float* start, int count, int64_t stride, float** rows) {
  for (int s = 0; s < count; s++) rows[s] = start + s * stride;
}

template <class T>
CM_INLINE void widen_all(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; i++) out[i] = widen(x[i]);
}

template <class T>
CM_INLINE void narrow_all(const float* x, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
  for (; i < n; i++) out[i] = narrow<T>(x[i]);
}

}  // namespace corematching::COREMATCHING_ISA
