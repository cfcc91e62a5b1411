// Products on matrix tiles for which the weights are packed.
//
// Rows of x are left operands as they lie in memory. Blocks of 32 outputs become right operands:
// two tiles for every 32 inputs. A thread takes its blocks in panels that stay in the second-level
// cache; the next panel is packed while this one is multiplied, and sums wait in memory for the
// panel of the next inputs.
#pragma once

#include "amx_tiles.h"

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kManyRows = 192, kManyInputs = 4608;
constexpr int64_t kPanelInputs = 256, kPanelBlocks = 10;
constexpr int64_t kPanelWords = kPanelInputs / 2 * kPanelBlocks * kSpan;
constexpr int64_t kAheadLines = 96;            // between the weights that are packed and fetched
constexpr int64_t kPairsPerTile = kTile / 2;  // a tile is as much work as so many input pairs
constexpr int64_t kSameSets = 4096;  // bytes; rows so far apart meet in the first-level cache

// Whether packing the weights takes less time than transposing what comes out, and reading x anew
// for every block of outputs.
CM_INLINE bool packs_weights(const Gemm& g) {
  if (g.by_input) return true;
  if (g.gate || g.norm || g.rows < kManyRows || g.inputs < kManyInputs) return false;
  return g.inputs * static_cast<int64_t>(sizeof(bf16)) % kSameSets != 0;
}

// Blocks [first, first + blocks) and inputs [input, input + inputs).
struct TilePanel {
  int64_t first, blocks, input, inputs;
};

// A thread's blocks as panels: all inputs of some blocks, then those of the next.
struct TilePanels {
  const Gemm& g;
  Range blocks;
  int64_t groups, parts;

  TilePanels(const Gemm& gemm, int thread, int threads)
      : g(gemm), blocks(split(gemm.outputs / kSpan, thread, threads)) {
    parts = ceil_div(g.inputs, kPanelInputs);
    groups = ceil_div(blocks.last - blocks.first, kPanelBlocks);
  }

  // Panel number n; an empty one behind the last.
  TilePanel at(int64_t n) const {
    int64_t steps = g.inputs / kInputs, part = n % parts, group = n / parts;
    if (group >= groups) return {0, 1, 0, 0};
    int64_t count = blocks.last - blocks.first, first = count * group / groups;
    int64_t from = steps * part / parts, to = steps * (part + 1) / parts;
    return {blocks.first + first, count * (group + 1) / groups - first, from * kInputs,
            (to - from) * kInputs};
  }
};

// A panel on its way into right operands; those of all blocks for 32 inputs stand together.
struct Packing {
  const Gemm* g;
  TilePanel panel;
  uint32_t* out;
  int64_t ahead, input, block, credit;
  bool second;  // whether a block's first tile is done

  Packing(const Gemm& gemm, TilePanel panel_, uint32_t* out_)
      : g(&gemm), panel(panel_), out(out_), input(0), block(0), credit(0), second(false) {
    ahead = ceil_div(kAheadLines, 2 * panel.blocks) * 2 * gemm.outputs;
  }
};

// Two inputs of a block, stored by input: outputs come in fours, by turns into both tiles.
CM_INLINE void pack_input_pair(const Packing& p, uint32_t* to) {
  const bf16* row = typed<bf16>(p.g->weight) + (p.panel.input + p.input) * p.g->outputs +
                    (p.panel.first + p.block) * kSpan;
  __builtin_prefetch(row + p.ahead, 0, 2);
  __builtin_prefetch(row + p.ahead + p.g->outputs, 0, 2);
  __m512i even = (__m512i)load_line(row), odd = (__m512i)load_line(row + p.g->outputs);
  to += p.input % kInputs / 2 * kTile;
  store_line(to, (Words)_mm512_unpacklo_epi16(even, odd));
  store_line(to + kTileWords, (Words)_mm512_unpackhi_epi16(even, odd));
}

// A tile of 32 inputs of a block's first or second 16 outputs, stored by output.
CM_INLINE void pack_tile(const Packing& p, uint32_t* to) {
  int64_t output = (p.panel.first + p.block) * kSpan + p.second * kTile;
  const bf16* weight =
      typed<bf16>(p.g->weight) + output * p.g->inputs + p.panel.input + p.input;
  pack_rows(weight, kTile, p.g->inputs, kInputs, 0, to + p.second * kTileWords);
}

// So many pairs of inputs of a block more, or tiles that are worth as much.
CM_INLINE void pack_more(Packing* p, int64_t pairs) {
  bool by_input = p->g->by_input;
  p->credit += pairs;
  while (p->credit > 0 && p->input < p->panel.inputs) {
    int64_t place = p->input / kInputs * p->panel.blocks + p->block;
    uint32_t* to = p->out + place * 2 * kTileWords;
    if (by_input)
      pack_input_pair(*p, to);
    else
      pack_tile(*p, to);
    p->credit -= by_input ? 1 : kPairsPerTile;
    if (!by_input && (p->second = !p->second)) continue;
    if (++p->block < p->panel.blocks) continue;
    p->block = 0, p->input += by_input ? 2 : kInputs;
  }
}

// 32 outputs of a row, whose sums stand in two tiles.
CM_INLINE void finish_tile_row(const Gemm& g, int64_t row, int64_t output, const float* sums) {
  Vec low = load(sums), high = load(sums + kTileWords);
  if (g.by_input) {
    __m512i four = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), more = _mm512_set1_epi64(4);
    __m512i even = (__m512i)low, odd = (__m512i)high;
    low = (Vec)_mm512_permutex2var_epi64(even, four, odd);
    high = (Vec)_mm512_permutex2var_epi64(even, _mm512_add_epi64(four, more), odd);
  }
  if (g.bias) {
    low += load(typed<bf16>(g.bias) + output);
    high += load(typed<bf16>(g.bias) + output + kTile);
  }
  Words rounded = narrow_pair(activate_sum(g, low), activate_sum(g, high));
  if (g.residual) rounded = add_line(rounded, typed<bf16>(g.residual) + row * g.outputs + output);
  store_line(static_cast<bf16*>(g.out) + row * g.out_stride + output, rounded);
}

// Rows [row, row + 32) of x times a panel's block, added to the sums there; rows behind the last
// whole tile are read from `tail`. Meanwhile the next panel is packed.
CM_INLINE void multiply_panel_block(const Gemm& g, const TilePanel& panel, int64_t block,
                                    const uint32_t* packed, const bf16* tail, int64_t row,
                                    Packing* next, float* sums) {
  int64_t stride = g.inputs * static_cast<int64_t>(sizeof(bf16)), full = g.rows / kTile * kTile;
  int64_t each = ceil_div(kTile, ceil_div(g.rows, kSpan));
  const auto* x = typed<bf16>(g.x);
  const bf16* upper = (row < full ? x + row * g.inputs : tail) + panel.input;
  const bf16* lower = (row + kTile < full ? x + (row + kTile) * g.inputs : tail) + panel.input;
  bool half = g.rows - row <= kTile;
  packed += block * 2 * kTileWords;
  if (panel.input)
    load_sums(sums);
  else
    zero_sums();
  for (int64_t k = 0; k < panel.inputs; k += kInputs, packed += panel.blocks * 2 * kTileWords) {
    _tile_loadd(4, upper + k, stride);
    _tile_stream_loadd(6, packed, kCacheLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, packed + kTileWords, kCacheLine);
    _tile_dpbf16ps(1, 4, 7);
    pack_more(next, each);
    if (half) continue;
    _tile_loadd(5, lower + k, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_sums(sums);
  if (panel.input + panel.inputs < g.inputs) return;
  for (int64_t i = 0; i < kSpan && row + i < g.rows; i++)
    finish_tile_row(g, row + i, (panel.first + block) * kSpan,
                    sums + i / kTile * 2 * kTileWords + i % kTile * kTile);
}

// Words of a thread: two panels, and the sums of one.
CM_INLINE int64_t packed_panel_words(int64_t rows) {
  return 2 * kPanelWords + ceil_div(rows, kSpan) * kSpan * kPanelBlocks * kSpan;
}

static void packed_tiled_gemm(const Gemm& g) {
  int64_t full = g.rows / kTile * kTile, left = g.rows - full;
  auto* tail = static_cast<bf16*>(g.scratch);
  std::memset(tail, 0, sizeof(bf16) * static_cast<size_t>(kTile * g.inputs));
  std::memcpy(tail, typed<bf16>(g.x) + full * g.inputs,
              sizeof(bf16) * static_cast<size_t>(left * g.inputs));
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
    int thread = thread_number();
    TilePanels panels(g, thread, thread_count());
    uint32_t* here = static_cast<uint32_t*>(g.scratch) + kTile * g.inputs / 2;
    here += thread * packed_panel_words(g.rows);
    uint32_t* there = here + kPanelWords;
    auto* sums = reinterpret_cast<float*>(there + kPanelWords);
    configure_tiles();
    Packing packing(g, panels.at(0), here);
    for (int64_t n = 0; n < panels.groups * panels.parts; n++) {
      TilePanel panel = panels.at(n);
      pack_more(&packing, panel.inputs / 2 * panel.blocks);
      packing = Packing(g, panels.at(n + 1), there);
      for (int64_t row = 0; row < g.rows; row += kSpan)
        for (int64_t block = 0; block < panel.blocks; block++)
          multiply_panel_block(g, panel, block, here, tail, row, &packing,
                               sums + (row * panel.blocks + block * kSpan) * kSpan);
      uint32_t* done = here;
      here = there, there = done;
    }
    _tile_release();
  }
}

}  // namespace corematching::COREMATCHING_ISA
