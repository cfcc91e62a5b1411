// Products of a prompt's rows on matrix tiles, bfloat16.
//
// Weights stay as they are: a tile of 16 outputs x 32 inputs of a matrix (outputs, inputs) is a
// left operand as it lies in memory, so the product comes out transposed, and is transposed when it
// is stored. The prompt's rows, far fewer bytes, are the operand that is packed.
#pragma once

#include "amx_packed_gemm.h"
#include "amx_tiles.h"

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kMaxPackedBytes = 1 << 20;  // of x
constexpr int64_t kMinPackedRows = 96;        // of x, whatever their bytes

// Weights that the next block reads: `lines` of them are fetched for every 32 inputs.
struct Ahead {
  const char* at;
  int64_t lines;

  void fetch() {
    for (int64_t i = 0; i < lines; i++, at += kCacheLine) __builtin_prefetch(at, 0, 2);
  }
};

// A block whose sums are there. Its outputs are made pair by pair, while the tiles compute the next
// block: [first, first + 16) of gate and up, or [first, first + 32), of rows [row, row + 32). The
// sums (16, 16) of outputs i and rows j are number 2 * i + j.
struct PendingBlock {
  const Gemm* g;
  int64_t first, row, done, pairs;
  float* sums;
  bool keeps_gates;      // those of some row, in outputs + kTile
  Words outputs[kSpan];  // two outputs of 16 rows in each
};

CM_INLINE Vec sum_of(const float* sums, const void* bias, int64_t output) {
  Vec sum = load(sums);
  return bias ? sum + widen(typed<bf16>(bias)[output]) : sum;
}

CM_INLINE Vec gate_of(const Gemm& g, const float* sums, int64_t output) {
  return activate<bf16>(round_to<bf16>(sum_of(sums, g.gate_bias, output)), g.activation);
}

CM_INLINE Vec up_of(const Gemm& g, const float* sums, int64_t output) {
  return round_to<bf16>(sum_of(sums + 2 * kTileWords, g.bias, output));
}

CM_INLINE bf16* row_of(const Gemm& g, int64_t row) {
  return static_cast<bf16*>(g.out) + row * g.out_stride;
}

// The next pair of outputs of 16 rows; a row, or two, that they will be written to is fetched.
CM_INLINE void make_pair(PendingBlock* block) {
  const Gemm& g = *block->g;
  int64_t per_tile = g.gate ? kTile / 2 : kTile, half = block->done >= per_tile;
  int64_t i = (block->done - half * per_tile) * 2, output = block->first + i;
  int64_t rows = kTile / per_tile, row = block->row + block->done * rows;
  for (int64_t more = 0; more < rows; more++)
    __builtin_prefetch(row_of(g, row + more) + block->first, 1);
  const float* sums = block->sums + half * kTileWords + i * kTile;
  if (g.gate) {
    Vec even = gate_of(g, sums, output), odd = gate_of(g, sums + kTile, output + 1);
    if (block->keeps_gates) block->outputs[kTile + block->done] = interleave_pair(even, odd);
    even *= up_of(g, sums, output);
    odd *= up_of(g, sums + kTile, output + 1);
    block->outputs[block->done] = interleave_pair(even, odd);
  } else {
    if (i >= kTile) sums += kTileWords;  // behind those of the other rows
    Vec even = activate_sum(g, sum_of(sums, g.bias, output));
    Vec odd = activate_sum(g, sum_of(sums + kTile, g.bias, output + 1));
    block->outputs[block->done] = interleave_pair(even, odd);
  }
  block->done++;
}

// Where the gate of a row is kept, null if it is not.
CM_INLINE bf16* kept_gate(const Gemm& g, int64_t row) {
  if (g.gate_slots[row] < 0) return nullptr;
  return static_cast<bf16*>(g.kept_gates) + g.gate_slots[row] * g.outputs;
}

// The outputs, or the gates that are kept; row i of the first 16 stands beside row i of the second.
static void store_gated(const PendingBlock& block, Words r[kTile], bool gates) {
  const Gemm& g = *block.g;
  transpose(r);
  for (int64_t i = 0; i < kSpan && block.row + i < g.rows; i++) {
    int64_t row = block.row + i;
    bf16 *out = gates ? kept_gate(g, row) : row_of(g, row), line[kSpan];
    store_line(line, r[i % kTile]);
    if (out) std::memcpy(out + block.first, line + i / kTile * kTile, kTile * sizeof(bf16));
  }
}

static void store_plain(const PendingBlock& block, Words r[kTile], int64_t from) {
  const Gemm& g = *block.g;
  transpose(r);
  for (int64_t i = 0; i < kTile && from + i < g.rows; i++) {
    const bf16* more = typed<bf16>(g.residual) + (from + i) * g.outputs + block.first;
    store_line(row_of(g, from + i) + block.first, g.residual ? add_line(r[i], more) : r[i]);
  }
}

// What is left of a block, and its outputs to their places.
static void finish_block(PendingBlock* block) {
  while (block->done < block->pairs) make_pair(block);
  if (!block->pairs) return;
  if (block->g->gate) {
    store_gated(*block, block->outputs, false);
    if (block->keeps_gates) store_gated(*block, block->outputs + kTile, true);
  } else {
    store_plain(*block, block->outputs, block->row);
    if (block->pairs > kTile) store_plain(*block, block->outputs + kTile, block->row + kTile);
  }
  block->pairs = block->done = 0;
}

// Sums of 32 outputs, 16 at `first` and 16 at `second`, and 32 packed rows (of 16 rows or fewer
// only those with j = 0). Meanwhile the block before is finished; then its sums are replaced.
static void multiply_block(const bf16* first, const bf16* second, const uint32_t* left,
                           int64_t rows, int64_t inputs, Ahead ahead[2], PendingBlock* before) {
  int64_t stride = inputs * static_cast<int64_t>(sizeof(bf16)), steps = inputs / kInputs;
  int64_t each = ceil_div(before->pairs, steps);
  const uint32_t* right = left + kTile * inputs / 2;
  zero_sums();
  for (int64_t k = 0; k < inputs; k += kInputs, left += kTileWords, right += kTileWords) {
    _tile_loadd(4, first + k, stride);
    _tile_stream_loadd(6, left, kCacheLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, second + k, stride);
    ahead[0].fetch();
    _tile_dpbf16ps(2, 5, 6);
    if (rows > kTile) {
      _tile_stream_loadd(7, right, kCacheLine);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    ahead[1].fetch();
    for (int64_t i = 0; i < each && before->done < before->pairs; i++) make_pair(before);
  }
  finish_block(before);
  store_sums(before->sums);
}

// One block, of rows [row, row + 32); the one before is finished meanwhile, this one is not.
static void compute_block(const Gemm& g, int64_t first, int64_t row, Ahead ahead[2],
                          PendingBlock* pending) {
  const bf16* one = typed<bf16>(g.gate ? g.gate : g.weight) + first * g.inputs;
  const bf16* two =
      g.gate ? typed<bf16>(g.weight) + first * g.inputs : one + kTile * g.inputs;
  const uint32_t* x = static_cast<const uint32_t*>(g.scratch) + row * g.inputs / 2;
  multiply_block(one, two, x, g.rows - row, g.inputs, ahead, pending);
  int64_t pairs = g.gate ? kTile / 2 : kTile;
  pending->g = &g, pending->first = first, pending->row = row;
  pending->pairs = g.rows - row > kTile ? 2 * pairs : pairs;
  pending->keeps_gates = false;
  for (int64_t i = row; g.gate_slots && i < g.rows && i < row + kSpan; i++)
    pending->keeps_gates |= g.gate_slots[i] >= 0;
}

// All rows of one block of outputs, while the weights of the next one come.
static void compute_outputs(const Gemm& g, int64_t block, bool is_last, PendingBlock* pending) {
  int64_t spans = ceil_div(g.rows, kSpan), per_tile = g.inputs * kTile;
  int64_t lines = ceil_div(kTile, spans);  // per 32 inputs, of the 16 rows of a tile
  int64_t next = is_last ? 0 : block + 1;
  const auto *gate = typed<bf16>(g.gate), *weight = typed<bf16>(g.weight);
  Ahead ahead[2];
  for (int64_t i = 0; i < 2; i++) {
    const bf16* from = g.gate ? (i ? weight : gate) + next * per_tile
                              : weight + (2 * next + i) * per_tile;
    ahead[i] = {reinterpret_cast<const char*>(from), is_last ? 0 : lines};
  }
  for (int64_t row = 0; row < g.rows; row += kSpan)
    compute_block(g, block * (g.gate ? kTile : kSpan), row, ahead, pending);
}

// A thread's part of x as right operands, normalized first where there is a norm.
static void pack_prompt(const Gemm& g, int64_t thread, int64_t threads) {
  auto* packed = static_cast<uint32_t*>(g.scratch);
  int64_t tiles = ceil_div(g.rows, kSpan) * 2, panel = g.inputs * kTile;
  auto* normed = reinterpret_cast<bf16*>(packed + tiles / 2 * panel + thread * panel);
  for (int64_t tile = thread; tile < tiles; tile += threads) {
    int64_t first = tile * kTile, rows = min(g.rows - first, kTile);
    const bf16* x = typed<bf16>(g.x) + first * g.inputs;
    for (int64_t i = 0; g.norm && i < rows; i++)
      normalize_row(x + i * g.inputs, typed<bf16>(g.norm), typed<bf16>(g.norm_bias),
                    normed + i * g.inputs, g.inputs, g.epsilon);
    pack_rows(g.norm ? normed : x, rows, g.inputs, g.inputs, 0, packed + tile * panel / 2);
  }
}

static void multiply_packed_rows(const Gemm* gemms, int count) {
#pragma omp parallel num_threads(static_cast<int>(gemms->threads))
  {
    int thread = thread_number(), threads = thread_count();
    alignas(kCacheLine) float sums[kSumWords];
    PendingBlock pending = {};
    pending.sums = sums;
    pack_prompt(*gemms, thread, threads);
    configure_tiles();
#pragma omp barrier
    for (int i = 0; i < count; i++) {
      const Gemm& g = gemms[i];
      Range mine = split(g.outputs / (g.gate ? kTile : kSpan), thread, threads);
      for (int64_t block = mine.first; block < mine.last; block++)
        compute_outputs(g, block, block + 1 == mine.last, &pending);
    }
    finish_block(&pending);
    _tile_release();
  }
}

// So many rows at a time that what is packed of them stays in the second-level cache.
static void tiled_gemm(const Gemm* gemms, int count) {
  if (packs_weights(*gemms)) {
    for (int i = 0; i < count; i++) packed_tiled_gemm(gemms[i]);
    return;
  }
  int64_t bytes = gemms->inputs * static_cast<int64_t>(sizeof(bf16)), rows = gemms->rows;
  int64_t most = max(kMaxPackedBytes / bytes, kMinPackedRows);
  int64_t each = round_up(ceil_div(rows, ceil_div(rows, most)), kSpan);
  for (int64_t from = 0; from < rows; from += each) {
    Gemm some[kMaxGemms];
    for (int i = 0; i < count; i++) {
      Gemm& g = some[i] = gemms[i];
      g.scratch = gemms->scratch;
      g.rows = min(rows - from, each);
      g.x = typed<bf16>(g.x) + from * g.inputs;
      g.out = row_of(gemms[i], from);
      if (g.residual) g.residual = typed<bf16>(g.residual) + from * g.outputs;
      if (g.gate_slots) g.gate_slots += from;
    }
    multiply_packed_rows(some, count);
  }
}

static bool fits_tiles(const Gemm& g) {
  bool whole = g.inputs % kInputs == 0 && g.outputs % kSpan == 0;
  return whole && !(g.by_input && (g.gate || g.norm));
}

// Bytes of scratch memory for products of either kind.
static int64_t tiled_gemm_scratch(const Gemm& g) {
  int64_t packed = (ceil_div(g.rows, kSpan) + 2 * g.threads) * kTile * g.inputs;
  return (packed + g.threads * packed_panel_words(g.rows)) * kCell;
}

}  // namespace corematching::COREMATCHING_ISA
