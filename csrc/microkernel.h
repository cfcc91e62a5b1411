// The innermost loop of gemm and attention, and the packing of its right operand.
//
//        x (M rows, row-major)          panel (depth, 2 * kLanes), packed
//        +--------------+               +-----+-----+   one cell of 4 bytes per entry:
//     M  | cell k ->    |  broadcast  x | low |high |   a float, or two bfloat16 of
//        +--------------+               +-----+-----+   neighbouring inputs (vdpbf16ps)
//                  sums (M, 2 * kLanes) stay in registers over all of the depth
//
// M is 12 with 32 vector registers, else 6.
#pragma once

#include <type_traits>

#include "vec.h"

namespace corematching::COREMATCHING_ISA {

// Processors with tiles run vdpbf16ps at half the rate: there, floats are as fast.
#if defined(__AVX512BF16__) && !defined(COREMATCHING_TILES)
constexpr bool kDotsBf16 = true;
#else
constexpr bool kDotsBf16 = false;
#endif
// Whether a cell holds two inputs.
template <class T>
constexpr bool kPairs = kDotsBf16 && sizeof(T) == sizeof(bf16);
template <class T>
constexpr int64_t kInputsPerCell = kPairs<T> ? 2 : 1;
// A cell as its owner knows it.
template <class T>
using Cell = std::conditional_t<kPairs<T>, bf16, float>;

constexpr int64_t kCell = 4;             // bytes
constexpr int64_t kPanel = 2 * kLanes;   // columns of a panel
constexpr int kMaxRows = kRegisters == 32 ? 12 : 6;
constexpr int kSomeRows = 6;

// Rows of cells, `row_bytes` apart.
struct Rows {
  const char* data;
  int64_t row_bytes;
};

template <bool Pairs>
CM_INLINE Vec multiply_add(Vec sum, Words panel, const char* cell) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs) {
    int word;
    std::memcpy(&word, cell, sizeof word);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)panel);
  }
#endif
  float x;
  std::memcpy(&x, cell, sizeof x);
  return sum + (Vec)panel * x;
}

CM_INLINE Words load_words(const uint32_t* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

template <int M, bool Pairs>
CM_INLINE void microkernel(Rows x, const uint32_t* panel, int64_t depth, bool accumulate,
                           float* sums, int64_t width) {
  Vec low[M], high[M];
#pragma GCC unroll 12
  for (int r = 0; r < M; r++) {
    low[r] = accumulate ? load(sums + r * width) : Vec{};
    high[r] = accumulate ? load(sums + r * width + kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; k++, panel += kPanel) {
    Words first = load_words(panel), second = load_words(panel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < M; r++) {
      const char* cell = x.data + r * x.row_bytes + k * kCell;
      low[r] = multiply_add<Pairs>(low[r], first, cell);
      high[r] = multiply_add<Pairs>(high[r], second, cell);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < M; r++) {
    store(sums + r * width, low[r]);
    store(sums + r * width + kLanes, high[r]);
  }
}

// sums (rows, width), kPanel columns of them, = x times a panel, for up to kMaxRows rows.
template <bool Pairs>
static void multiply_rows(Rows x, const uint32_t* panel, int64_t depth, int64_t rows,
                          bool accumulate, float* sums, int64_t width) {
  if (rows == kMaxRows)
    return microkernel<kMaxRows, Pairs>(x, panel, depth, accumulate, sums, width);
  if (rows >= kSomeRows) {
    microkernel<kSomeRows, Pairs>(x, panel, depth, accumulate, sums, width);
    x.data += kSomeRows * x.row_bytes, sums += kSomeRows * width, rows -= kSomeRows;
  }
  switch (rows) {
    case 1: return microkernel<1, Pairs>(x, panel, depth, accumulate, sums, width);
    case 2: return microkernel<2, Pairs>(x, panel, depth, accumulate, sums, width);
    case 3: return microkernel<3, Pairs>(x, panel, depth, accumulate, sums, width);
    case 4: return microkernel<4, Pairs>(x, panel, depth, accumulate, sums, width);
    case 5: return microkernel<5, Pairs>(x, panel, depth, accumulate, sums, width);
  }
}

// Transposes a square of words in place.
CM_INLINE void transpose(Words r[kLanes]) {
#if defined(__AVX512F__)
  __m512i *w = (__m512i*)r, t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    w[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    w[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    w[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    w[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    w[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    w[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    w[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    w[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
#elif defined(__AVX__)
  __m256 *w = (__m256*)r, t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm256_unpacklo_ps(w[i], w[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(w[i], w[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    w[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    w[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    w[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    w[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(w[i], w[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(w[i], w[i + 4], 0x31);
  }
  for (int i = 0; i < kLanes; i++) w[i] = t[i];
#else
  uint32_t from[kLanes][kLanes], to[kLanes][kLanes];
  std::memcpy(from, r, sizeof from);
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < kLanes; j++) to[i][j] = from[j][i];
  std::memcpy(r, to, sizeof to);
#endif
}

// A column's inputs k and, of a pair, k + 1; 0 behind the last.
template <class T>
CM_INLINE uint32_t make_cell(const T* column, int64_t step, int64_t k, int64_t inputs) {
  Cell<T> cell[kInputsPerCell<T>] = {};
  for (int64_t i = 0; i < kInputsPerCell<T> && k + i < inputs; i++)
    if constexpr (kPairs<T>)
      cell[i] = column[(k + i) * step];
    else
      cell[i] = widen(column[(k + i) * step]);
  uint32_t word;
  std::memcpy(&word, cell, sizeof word);
  return word;
}

// Where the inputs of a panel's columns come from: (columns, inputs), `stride` numbers apart.
template <class T>
struct Columns {
  const T* data;
  int64_t stride, count;  // columns behind the last one count as 0
};

// Half a panel from columns that are stored input by input: squares of words are transposed.
template <class T>
CM_INLINE void pack_half(const Columns<T>& from, int64_t inputs, uint32_t* out) {
  constexpr int64_t per_word = kCell / sizeof(T), square = kLanes * per_word;
  constexpr int64_t cells_per_word = per_word / kInputsPerCell<T>;
  int64_t k = 0, used = min(from.count, kLanes);
  for (; k + square <= inputs; k += square) {
    Words r[kLanes];
    for (int64_t i = 0; i < kLanes; i++) {
      r[i] = Words{};
      if (i < used) std::memcpy(r + i, from.data + i * from.stride + k, sizeof r[i]);
    }
    transpose(r);
    for (int64_t i = 0; i < kLanes; i++) {
      uint32_t* to = out + (k / per_word + i) * cells_per_word * kPanel;
      if constexpr (cells_per_word == 1) {
        std::memcpy(to, r + i, sizeof r[i]);
      } else {  // two bfloat16 as floats
        Words low = r[i] << 16, high = r[i] & 0xffff0000u;
        std::memcpy(to, &low, sizeof low);
        std::memcpy(to + kPanel, &high, sizeof high);
      }
    }
  }
  for (; k < inputs; k += kInputsPerCell<T>)
    for (int64_t i = 0; i < kLanes; i++)
      out[k / kInputsPerCell<T> * kPanel + i] =
          i < used ? make_cell(from.data + i * from.stride, 1, k, inputs) : 0;
}

template <class T>
CM_INLINE void pack_panel(const Columns<T>& from, int64_t inputs, uint32_t* out) {
  pack_half(from, inputs, out);
  pack_half<T>({from.data + kLanes * from.stride, from.stride, max(from.count - kLanes, 0)}, inputs,
               out + kLanes);
}

// A row of cells of kLanes columns that stand side by side; `next` has a pair's second inputs.
template <class T>
CM_INLINE Words interleave(const T* row, const T* next) {
  if constexpr (kPairs<T>) {
    Halves low, high = {};
    std::memcpy(&low, row, sizeof low);
    if (next) std::memcpy(&high, next, sizeof high);
    return to_words(low) | to_words(high) << 16;
  } else {
    return (Words)load(row);
  }
}

// A panel from columns that stand side by side, inputs `stride` numbers apart.
template <class T>
CM_INLINE void pack_panel_by_input(const T* data, int64_t stride, int64_t columns, int64_t inputs,
                                   uint32_t* out) {
  for (int64_t k = 0; k < inputs; k += kInputsPerCell<T>, out += kPanel) {
    const T *row = data + k * stride, *next = k + 1 < inputs ? row + stride : nullptr;
    if (columns >= kPanel) {
      Words low = interleave(row, next);
      Words high = interleave(row + kLanes, next ? next + kLanes : nullptr);
      std::memcpy(out, &low, sizeof low);
      std::memcpy(out + kLanes, &high, sizeof high);
      continue;
    }
    for (int64_t i = 0; i < kPanel; i++)
      out[i] = i < columns ? make_cell(data + i, stride, k, inputs) : 0;
  }
}

}  // namespace corematching::COREMATCHING_ISA
