// exp and the activations of FFNs, rounded where PyTorch's operators round.
#pragma once

#include "types.h"
#include "vec.h"

namespace corematching::COREMATCHING_ISA {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: sums with it are rounded to whole numbers

// p * 2^n, with n as it stands in the lowest bits of `shifted` = n + kMagic.
CM_INLINE Vec scale_by_power(Vec p, Vec n, Vec shifted) {
#if defined(__AVX512F__)
  (void)shifted;
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  (void)n;
  return p * (Vec)(((Words)shifted + 127) << 23);
#endif
}

// exp, to 2 units in the last place; for what is rounded to bfloat16, to 20 bits. NaN stays NaN.
template <class T>
CM_INLINE Vec exp(Vec x) {
  constexpr bool is_exact = sizeof(T) == sizeof(float);
  x = min(splat(88.0f), max(splat(-87.0f), x));
  Vec shifted = x * 1.44269504f + kMagic, n = shifted - kMagic;
  Vec r = is_exact ? x - n * 0.693359375f + n * 2.12194440e-4f : x - n * 0.69314718f;
  Vec p = is_exact ? r * 1.9875691500e-4f + 1.3981999507e-3f : splat(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return scale_by_power(p, n, shifted);
}

// 2 to the power of x, of 0 or less, to 13 bits: for what is rounded to bfloat16. NaN stays NaN.
CM_INLINE Vec exp2_coarse(Vec x) {
  x = max(splat(-126.0f), x);
  Vec shifted = x + kMagic, n = shifted - kMagic, r = x - n;
  Vec p = r * 5.50088928e-02f + 2.42211028e-01f;
  p = p * r + 6.93282938e-01f;
  return scale_by_power(p * r + 1.0f, n, shifted);
}

// x / y, to 23 bits.
CM_INLINE Vec divide(Vec x, Vec y) {
#if defined(__AVX512F__)
  __m512 guess = _mm512_rcp14_ps((__m512)y);
  guess = _mm512_mul_ps(guess, _mm512_fnmadd_ps((__m512)y, guess, _mm512_set1_ps(2.0f)));
  return x * (Vec)guess;
#else
  return x / y;
#endif
}

// x * sigmoid(slope).
template <class T>
CM_INLINE Vec swish(Vec x, Vec slope) {
  return divide(x, exp<T>(-slope) + 1.0f);
}

// 1 - erf(x) of 0 or more, to 1.5e-7 (Abramowitz and Stegun, 7.1.26). Behind 10 it is 0.
template <class T>
CM_INLINE Vec erfc(Vec x) {
  x = min(splat(10.0f), x);
  Vec t = divide(splat(1.0f), x * 0.3275911f + 1.0f);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return p * t * exp<T>(-(x * x));
}

template <class T>
CM_INLINE Vec gelu(Vec x) {
  Vec size = max(x, -x), beyond = erfc<T>(size * 0.70710678f);
  Vec folded = 2.0f - beyond;
  beyond = x > Vec{} ? folded : beyond;
  return x * 0.5f * beyond;
}

template <class T>
CM_INLINE Vec activate(Vec x, Activation activation) {
  if (activation == Activation::silu) return round_to<T>(swish<T>(x, x));
  if (activation == Activation::relu) return max(Vec{}, x);
  if (activation == Activation::gelu_tanh)  // 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
    return round_to<T>(swish<T>(x, (x * x * 0.044715f * x + x) * 1.59576912f));
  if (activation == Activation::gelu) return round_to<T>(gelu<T>(x));
  if (activation == Activation::none) return x;
  Vec slope = round_to<T>(x * 1.702f);  // quick_gelu, in three operators
  return round_to<T>(x * round_to<T>(swish<T>(splat(1.0f), slope)));
}

CM_INLINE void activate(float* x, int64_t n, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, activate<float>(load(x + i), activation));
  if (i < n) store_first(x + i, activate<float>(load_first(x + i, n - i), activation), n - i);
}

}  // namespace corematching::COREMATCHING_ISA
