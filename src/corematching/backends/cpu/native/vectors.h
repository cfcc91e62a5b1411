/* Vectors of floats as wide as the machine has them, and the functions of one variable. */
#ifndef CM_VECTORS_H
#define CM_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define LINE 64 /* bytes of a cache line */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

INLINE vec load_float(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_float(float *p, vec v) { memcpy(p, &v, sizeof v); }

INLINE vec load_bf16(const bf16 *p) {
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vec)_mm512_slli_epi32(wide, 16);
#else
    halves v;
    memcpy(&v, p, sizeof v);
    return (vec)(__builtin_convertvector(v, words) << 16);
#endif
}

/* Rounded to the nearest, ties to even */
INLINE halves narrow_lanes(vec v) {
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
    words bits = (words)v, nan = (words)(v != v);
    words up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((up & ~nan) | (nan & 0x7fc0), halves);
#endif
}

#if defined(__AVX512F__)
/* 32 numbers, rounded, the first 16 of them `low` */
INLINE __m512i narrow_pair(__m512 low, __m512 high) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
    __m512i half = _mm512_castsi256_si512((__m256i)narrow_lanes((vec)low));
    return _mm512_inserti64x4(half, (__m256i)narrow_lanes((vec)high), 1);
#endif
}
#endif

INLINE void store_bf16(bf16 *p, vec v) {
    halves narrow = narrow_lanes(v);
    memcpy(p, &narrow, sizeof narrow);
}

INLINE vec round_bf16(vec v) {
    halves narrow = narrow_lanes(v);
    return load_bf16((const bf16 *)&narrow);
}

INLINE vec round_float(vec v) { return v; }

INLINE float widen_float(float x) { return x; }

INLINE float widen_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE float narrow_float(float x) { return x; }

INLINE bf16 narrow_bf16(float x) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7fc0;
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float sum_lanes(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

/* exp, to 2 units in the last place; NaN stays NaN. Written so that compilers vectorise loops over it:
   the whole number n stands in the lowest bits of `shifted`, and no NaN becomes an integer. */
INLINE float exp_fast(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23 rounds to an integer */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    float scale;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

INLINE void activate(float *x, int64_t n, int64_t activation) {
    if (activation == SILU) {
        for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exp_fast(-x[i]));
    } else if (activation == GELU) {
        for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
    } else if (activation == GELU_TANH) { /* 0.5 * (1 + tanh(u)) is sigmoid(2 * u) */
        for (int64_t i = 0; i < n; i++) {
            float u = 1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
            x[i] = x[i] / (1.0f + exp_fast(-u));
        }
    } else if (activation == QUICK_GELU) {
        for (int64_t i = 0; i < n; i++) x[i] = x[i] / (1.0f + exp_fast(-1.702f * x[i]));
    } else if (activation == RELU) {
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : x[i]; /* NaN stays */
    }
}

#endif
