// exp and the activations of FFNs, rounded where PyTorch's operators round.
#pragma once

#include "types.h"
#include "vec.h"

namespace corematching::COREMATCHING_ISA {

// exp, to 2 units in the last place; NaN stays NaN. 1.5 * 2^23 rounds to a whole number, which then
// stands in the lowest bits.
CM_INLINE Vec exp(Vec x) {
  const float magic = 12582912.0f;
  x = min(splat(88.0f), max(splat(-87.0f), x));
  Vec shifted = x * 1.44269504f + magic, n = shifted - magic;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vec)(((Words)shifted + 127) << 23);
#endif
}

// 2 to the power of x, of 0 or less, to 13 bits: for what is rounded to bfloat16. NaN stays NaN.
CM_INLINE Vec exp2_coarse(Vec x) {
  const float magic = 12582912.0f;
  x = max(splat(-126.0f), x);
  Vec shifted = x + magic, n = shifted - magic, r = x - n;
  Vec p = r * 5.50088928e-02f + 2.42211028e-01f;
  p = p * r + 6.93282938e-01f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (Vec)(((Words)shifted + 127) << 23);
#endif
}

// e to the power of x, of 0 or less, as exact as a T shows.
template <class T>
CM_INLINE Vec exp_weight(Vec x) {
  if constexpr (sizeof(T) == sizeof(float))
    return exp(x);
  else
    return exp2_coarse(x * 1.44269504f);
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
CM_INLINE Vec swish(Vec x, Vec slope) { return divide(x, exp(-slope) + 1.0f); }

// 1 - erf(x) of 0 or more, to 1.5e-7 (Abramowitz and Stegun, 7.1.26). Behind 10 it is 0.
CM_INLINE Vec erfc(Vec x) {
  x = min(splat(10.0f), x);
  Vec t = divide(splat(1.0f), x * 0.3275911f + 1.0f);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return p * t * exp(-(x * x));
}

CM_INLINE Vec gelu(Vec x) {
  Vec size = max(x, -x), beyond = erfc(size * 0.70710678f);
  Vec folded = 2.0f - beyond;
  beyond = x > Vec{} ? folded : beyond;
  return x * 0.5f * beyond;
}

template <class T>
CM_INLINE Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::silu:
      return round_to<T>(swish(x, x));
    case Activation::relu:
      return max(Vec{}, x);
    case Activation::gelu_tanh:  // 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
      return round_to<T>(swish(x, (x * x * 0.044715f * x + x) * 1.59576912f));
    case Activation::gelu:
      return round_to<T>(gelu(x));
    case Activation::quick_gelu: {  // three operators
      Vec slope = round_to<T>(x * 1.702f);
      return round_to<T>(x * round_to<T>(swish(splat(1.0f), slope)));
    }
    default:
      return x;
  }
}

CM_INLINE void activate(float* x, int64_t n, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, activate<float>(load(x + i), activation));
  if (i < n) store_first(x + i, activate<float>(load_first(x + i, n - i), activation), n - i);
}

}  // namespace corematching::COREMATCHING_ISA
