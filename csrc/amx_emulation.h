// The tile instructions that amx_*.h use, in plain C++: sanitizers then see what they read and
// write, and processors without tiles can test them. Defined with COREMATCHING_EMULATE_TILES.
#pragma once

#include <cstdlib>

#include "vec.h"

namespace corematching::COREMATCHING_ISA {

struct EmulatedTile {
  static constexpr int kRows = 16, kBytes = 64;
  uint8_t bytes[kRows][kBytes];
};

struct EmulatedTiles {
  EmulatedTile tiles[8];
  bool configured;  // between a configuration and a release
};

static thread_local EmulatedTiles emulated;

// As the processor does: a tile that is not configured ends the program.
static EmulatedTile& emulated_tile(int tile) {
  if (!emulated.configured || tile < 0 || tile > 7) std::abort();
  return emulated.tiles[tile];
}

// All tiles are 16 rows of 64 bytes here; another configuration is not known.
static void emulate_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1 || bytes[1]) std::abort();
  for (int i = 0; i < 8; i++) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, sizeof width);
    if (width != EmulatedTile::kBytes || bytes[48 + i] != EmulatedTile::kRows) std::abort();
  }
  std::memset(emulated.tiles, 0, sizeof emulated.tiles);
  emulated.configured = true;
}

static void emulate_release() {
  if (!emulated.configured) std::abort();
  emulated.configured = false;
}

static void emulate_zero(int tile) { std::memset(&emulated_tile(tile), 0, sizeof(EmulatedTile)); }

static void emulate_load(int tile, const void* from, int64_t stride) {
  EmulatedTile& t = emulated_tile(tile);
  for (int64_t row = 0; row < EmulatedTile::kRows; row++)
    std::memcpy(t.bytes[row], static_cast<const char*>(from) + row * stride, EmulatedTile::kBytes);
}

static void emulate_store(int tile, void* to, int64_t stride) {
  const EmulatedTile& t = emulated_tile(tile);
  for (int64_t row = 0; row < EmulatedTile::kRows; row++)
    std::memcpy(static_cast<char*>(to) + row * stride, t.bytes[row], EmulatedTile::kBytes);
}

// sums (16, 16) += left (16, 32) . right, whose word (k, n) has inputs 2k and 2k + 1 of output n.
static void emulate_dot(int sums, int left, int right) {
  constexpr int rows = EmulatedTile::kRows, columns = EmulatedTile::kBytes / 4;
  EmulatedTile &out = emulated_tile(sums), &a = emulated_tile(left), &b = emulated_tile(right);
  for (int m = 0; m < rows; m++) {
    float total[columns];
    std::memcpy(total, out.bytes[m], sizeof total);
    for (int k = 0; k < rows; k++) {
      bf16 x[2], y[2 * columns];
      std::memcpy(x, a.bytes[m] + 4 * k, sizeof x);
      std::memcpy(y, b.bytes[k], sizeof y);
      for (int n = 0; n < columns; n++)
        total[n] += widen(x[0]) * widen(y[2 * n]) + widen(x[1]) * widen(y[2 * n + 1]);
    }
    std::memcpy(out.bytes[m], total, sizeof total);
  }
}

}  // namespace corematching::COREMATCHING_ISA

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulate_config
#define _tile_release emulate_release
#define _tile_zero emulate_zero
#define _tile_loadd emulate_load
#define _tile_stream_loadd emulate_load
#define _tile_stored emulate_store
#define _tile_dpbf16ps emulate_dot
