// Matrix tiles (AMX) and their operands.
//
//   left operand (16 rows, 32 inputs)      right operand (16 input pairs, 16 columns)
//   rows as they lie in memory             one word per entry: inputs 2k and 2k + 1
//
//   registers:      tile 6   tile 7        a block of 32 x 32 sums: every operand that is loaded
//           tile 4    0        1           is used twice
//           tile 5    2        3
#pragma once

#include "gemm.h"
#if defined(COREMATCHING_EMULATE_TILES)
#include "amx_emulation.h"
#endif

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kTile = 16;   // rows of a tile, and words in one
constexpr int64_t kInputs = 32;  // bfloat16 inputs that a tile holds
constexpr int64_t kSpan = 32;   // rows, and columns, that are computed at a time
constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kSumWords = 4 * kTileWords;

struct TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

static void configure_tiles() {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = kCacheLine, config.rows[i] = kTile;
  _tile_loadconfig(&config);
}

CM_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

CM_INLINE void load_sums(const float* sums) {
  _tile_loadd(0, sums, kCacheLine);
  _tile_loadd(1, sums + kTileWords, kCacheLine);
  _tile_loadd(2, sums + 2 * kTileWords, kCacheLine);
  _tile_loadd(3, sums + 3 * kTileWords, kCacheLine);
}

CM_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, kCacheLine);
  _tile_stored(1, sums + kTileWords, kCacheLine);
  _tile_stored(2, sums + 2 * kTileWords, kCacheLine);
  _tile_stored(3, sums + 3 * kTileWords, kCacheLine);
}

CM_INLINE Words load_line(const void* p) {
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

CM_INLINE void store_line(void* p, Words w) { std::memcpy(p, &w, sizeof w); }

// Rows [16 * tile, ...) of x, `rows` of them `stride` numbers apart, those behind the last 0, as
// right operands: one tile of (input pairs, rows) for every 32 inputs.
static void pack_rows(const bf16* x, int64_t rows, int64_t stride, int64_t inputs, int64_t tile,
                      uint32_t* out) {
  for (int64_t k = 0; k < inputs; k += kInputs, out += kTileWords) {
    Words r[kTile];
    for (int64_t i = 0; i < kTile; i++) {
      int64_t row = tile * kTile + i;
      r[i] = row < rows ? load_line(x + row * stride + k) : Words{};
    }
    transpose(r);
    for (int64_t i = 0; i < kTile; i++) store_line(out + i * kTile, r[i]);
  }
}

// 32 numbers, rounded, the first 16 of them `low`.
CM_INLINE Words narrow_pair(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  return (Words)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  Halves halves[2] = {narrow(low), narrow(high)};
  return load_line(halves);
#endif
}

// Two numbers of 16 rows, rounded, side by side in every word.
CM_INLINE Words interleave_pair(Vec even, Vec odd) {
  return to_words(narrow(even)) | to_words(narrow(odd)) << 16;
}

// 32 rounded numbers and 32 more that lie at `more`.
CM_INLINE Words add_line(Words line, const bf16* more) {
  bf16 own[kSpan];
  store_line(own, line);
  return narrow_pair(load(own) + load(more), load(own + kTile) + load(more + kTile));
}

// What comes out where there is no gate, not rounded yet.
CM_INLINE Vec activate_sum(const Gemm& g, Vec sum) {
  if (g.activation == Activation::none) return sum;
  return activate<bf16>(round_to<bf16>(sum), g.activation);
}

}  // namespace corematching::COREMATCHING_ISA
