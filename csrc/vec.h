// Vectors of floats as wide as the instruction set has them, and bfloat16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Matrix tiles: the processor's, or emulated ones for tests.
#if defined(__AMX_BF16__) || defined(COREMATCHING_EMULATE_TILES)
#define COREMATCHING_TILES
#endif

#define CM_INLINE static inline __attribute__((always_inline))

namespace corematching::COREMATCHING_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int64_t kCacheLine = 64;

struct bf16 {
  uint16_t bits;
};

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

CM_INLINE Vec splat(float x) { return Vec{} + x; }

// The larger of each pair; where one is NaN, the second.
CM_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

CM_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

CM_INLINE float widen(float x) { return x; }

CM_INLINE float widen(bf16 x) {
  uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Rounded to the nearest, ties to even.
template <class T>
CM_INLINE T narrow(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
}

CM_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Zero-extended, and cut to the lower half; compilers split what __builtin_convertvector widens.
CM_INLINE Words to_words(Halves h) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Words);
#endif
}

CM_INLINE Halves to_halves(Words w) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)w);
#else
  return __builtin_convertvector(w, Halves);
#endif
}

CM_INLINE Vec load(const bf16* p) {
  Halves v;
  std::memcpy(&v, p, sizeof v);
  return (Vec)(to_words(v) << 16);
}

CM_INLINE Halves narrow(Vec v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Words bits = (Words)v, nan = (Words)(v != v);
  Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return to_halves((rounded & ~nan) | (nan & 0x7fc0));
#endif
}

CM_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

CM_INLINE void store(bf16* p, Vec v) {
  Halves narrowed = narrow(v);
  std::memcpy(p, &narrowed, sizeof narrowed);
}

// The first n of a vector, n at most kLanes; the others are 0.
template <class T>
CM_INLINE Vec load_first(const T* p, int64_t n) {
  T some[kLanes] = {};
  std::memcpy(some, p, sizeof(T) * static_cast<size_t>(n));
  return load(some);
}

template <class T>
CM_INLINE void store_first(T* p, Vec v, int64_t n) {
  T some[kLanes];
  store(some, v);
  std::memcpy(p, some, sizeof(T) * static_cast<size_t>(n));
}

// What a T of each number reads as.
template <class T>
CM_INLINE Vec round_to(Vec v) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return v;
  } else {
    Halves narrowed = narrow(v);
    return (Vec)(to_words(narrowed) << 16);
  }
}

CM_INLINE float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += v[i];
  return total;
#endif
}

CM_INLINE float max_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < kLanes; i++) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

}  // namespace corematching::COREMATCHING_ISA
