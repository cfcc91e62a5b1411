// Attention of a prompt in blocks of queries and keys, with a running maximum, so that scores stay
// in the first-level cache.
//
//              keys, packed: kKeys at a time           values, packed
//   queries  +---------+---------+---------+           (keys, D)
//   kQueries | scores  |   ->    |         |  weights . values  added to out (kQueries, D),
//            +---------+---------+---------+           which is rescaled where the maximum grows
//
// Scores, softmax and sums are float32; weights and the result are rounded to the model's dtype.
#pragma once

#include "activations.h"
#include "microkernel.h"
#include "norm_rope.h"

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kQueries = 2 * kMaxRows;
constexpr int64_t kKeys = 128;
constexpr float kLowest = -3.0e38f;
// Scores are powers of e, or of 2 for what is rounded to bfloat16.
template <class T>
constexpr float kLogUnit = sizeof(T) == sizeof(float) ? 1.0f : 1.44269504f;

template <class T>
CM_INLINE Vec weight_of(Vec score) {
  if constexpr (sizeof(T) == sizeof(float))
    return exp<float>(score);
  else
    return exp2_coarse(score);
}

// Sizes in cells or numbers; T's cells hold one or two of D, or of the keys.
template <class T>
struct AttentionSizes {
  int64_t keys, head_cells, key_cells, dims;  // keys and D as multiples of whole panels
  int64_t packed;                             // cells of the keys and values of one head

  explicit AttentionSizes(const Attention& a) {
    keys = round_up(a.keys, kPanel);
    head_cells = ceil_div(a.head_dim, kInputsPerCell<T>);
    key_cells = keys / kInputsPerCell<T>;
    dims = round_up(a.head_dim, kPanel);
    packed = keys * head_cells + dims * key_cells;
  }

  // Bytes of a thread: queries, scores, weights, out, and each query's maximum, sum and scale.
  int64_t thread_bytes() const {
    return round_up(kQueries * (head_cells + 2 * kKeys + dims + 3) * kCell, kCacheLine);
  }
};

template <class T>
static int64_t vector_attention_scratch(const Attention& a) {
  AttentionSizes<T> sizes(a);
  int64_t packed = round_up(a.batch * a.kv_heads * sizes.packed * kCell, kCacheLine);
  return packed + a.threads * sizes.thread_bytes();
}

template <class T>
CM_INLINE const T* head_of(const void* data, const int64_t strides[3], int64_t sample,
                           int64_t head) {
  return static_cast<const T*>(data) + sample * strides[0] + head * strides[1];
}

// A panel of keys, and the values of as many keys, of one head. Values of a block of kKeys keys
// stand together, panel by panel of D, so that a block is read in a row.
template <class T>
static void pack_keys(const Attention& a, const AttentionSizes<T>& sizes, int64_t set,
                      int64_t panel, uint32_t* packed) {
  int64_t sample = set / a.kv_heads, group = set % a.kv_heads, first = panel * kPanel;
  const T* keys = head_of<T>(a.key, a.key_strides, sample, group) + first * a.key_strides[2];
  pack_panel<T>({keys, a.key_strides[2], a.keys - first}, a.head_dim,
                packed + first * sizes.head_cells);
  int64_t block = first / kKeys * kKeys, count = min(sizes.keys - block, kKeys);
  uint32_t* out = packed + sizes.keys * sizes.head_cells +
                  block / kInputsPerCell<T> * sizes.dims +
                  (first - block) / kInputsPerCell<T> * kPanel;
  const T* values =
      head_of<T>(a.value, a.value_strides, sample, group) + first * a.value_strides[2];
  int64_t inputs = min(a.keys - first, kPanel), cells = ceil_div(inputs, kInputsPerCell<T>);
  for (int64_t d = 0; d < sizes.dims; d += kPanel, out += count / kInputsPerCell<T> * kPanel) {
    pack_panel_by_input(values + d, a.value_strides[2], a.head_dim - d, inputs, out);
    std::memset(out + cells * kPanel, 0,
                static_cast<size_t>((kPanel / kInputsPerCell<T> - cells) * kPanel * kCell));
  }
}

// Some queries of a head, and what is known of them so far.
template <class T>
struct QueryBlock {
  const Attention& a;
  AttentionSizes<T> sizes;
  int64_t sample, first, rows;
  Rows queries;
  float *scores, *out, *most, *total, *scale;
  Cell<T>* weights;

  QueryBlock(const Attention& attention, const AttentionSizes<T>& s, int64_t sample_, int64_t head,
             int64_t first_, char* memory)
      : a(attention), sizes(s), sample(sample_), first(first_) {
    rows = min(a.length - first, kQueries);
    auto* floats = reinterpret_cast<float*>(memory);
    scores = floats + kQueries * sizes.head_cells;
    weights = reinterpret_cast<Cell<T>*>(scores + kQueries * kKeys);
    out = scores + 2 * kQueries * kKeys;
    most = out + kQueries * sizes.dims, total = most + kQueries, scale = total + kQueries;
    for (int64_t r = 0; r < rows; r++) most[r] = kLowest, total[r] = 0;
    const T* q = head_of<T>(a.query, a.query_strides, sample, head) + first * a.query_strides[2];
    queries = {reinterpret_cast<const char*>(q),
               a.query_strides[2] * static_cast<int64_t>(sizeof(T))};
    if (kPairs<T> ? a.head_dim % 2 == 0 : sizeof(T) == sizeof(float)) return;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = 0; k < sizes.head_cells; k++) {
        uint32_t cell = make_cell(q + r * a.query_strides[2], 1, k * kInputsPerCell<T>, a.head_dim);
        std::memcpy(memory + (r * sizes.head_cells + k) * kCell, &cell, sizeof cell);
      }
    queries = {memory, sizes.head_cells * kCell};
  }

  // The keys that a query sees begin at 0; how many of those from `key` on.
  int64_t visible(int64_t row, int64_t key, int64_t count) const {
    int64_t seen = a.causal ? min(first + row + 1, a.keys) : a.keys;
    return max(min(seen - key, count), 0);
  }
};

// Scales a query's scores and applies the mask; hidden keys get kLowest.
template <class T>
static void mask_scores(const QueryBlock<T>& b, int64_t row, int64_t key, int64_t count) {
  const Attention& a = b.a;
  float *scores = b.scores + row * kKeys, unit = static_cast<float>(a.scaling) * kLogUnit<T>;
  int64_t at = b.sample * a.mask_strides[0] + (b.first + row) * a.mask_strides[1] + key;
  if (a.mask_kind == Mask::boolean) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + at;
    for (int64_t s = 0; s < count; s++) scores[s] = mask[s] ? scores[s] * unit : kLowest;
  } else {
    const T* mask = static_cast<const T*>(a.mask) + at;
    for (int64_t s = 0; s < count; s += kLanes) {
      int64_t n = min(count - s, kLanes);
      Vec added = n == kLanes ? load(mask + s) : load_first(mask + s, n);
      store(scores + s, max(splat(kLowest), load(scores + s) * unit + added * kLogUnit<T>));
    }
  }
}

// Scores of a query and a block of keys become weights; `width` of them, those hidden 0.
template <class T>
static void weigh_keys(const QueryBlock<T>& b, int64_t row, int64_t key, int64_t count,
                       int64_t width) {
  float* scores = b.scores + row * kKeys;
  Cell<T>* weights = b.weights + row * kKeys * kInputsPerCell<T>;
  int64_t seen = b.visible(row, key, count), done = round_up(seen, kLanes);
  for (int64_t s = seen; s < done; s++) scores[s] = kLowest;
  float unit = static_cast<float>(b.a.scaling) * kLogUnit<T>;
  if (b.a.mask_kind != Mask::none) {
    mask_scores(b, row, key, seen);
    for (int64_t s = seen; s < done; s++) scores[s] = kLowest;
    unit = 1;
  }
  Vec largest = splat(kLowest), sum = {};
  for (int64_t s = 0; s < done; s += kLanes) largest = max(load(scores + s), largest);
  float most = max_lanes(largest) * unit, before = b.most[row];
  most = most > before ? most : before;
  for (int64_t s = 0; s < done; s += kLanes) {
    Vec weight = weight_of<T>(load(scores + s) * unit - most);
    if (s + kLanes > seen)
      for (int64_t i = seen - s; i < kLanes; i++) weight[i] = 0;
    sum += weight;
    store(weights + s, weight);
  }
  for (int64_t s = done; s < width; s++) weights[s] = {};
  b.scale[row] = weight_of<T>(splat(before - most))[0];
  b.most[row] = most;
  b.total[row] = b.total[row] * b.scale[row] + sum_lanes(sum);
}

template <class T>
static void attend_block(QueryBlock<T>& b, const uint32_t* packed, int64_t key, int64_t last) {
  constexpr bool pairs = kPairs<T>;
  int64_t count = min(last - key, kKeys), panels = ceil_div(count, kPanel);
  int64_t stored = min(b.sizes.keys - key, kKeys), cells = stored / kInputsPerCell<T>;
  const uint32_t* keys = packed + key * b.sizes.head_cells;
  const uint32_t* values = packed + b.sizes.keys * b.sizes.head_cells +
                           key / kInputsPerCell<T> * b.sizes.dims;
  for (int64_t row = 0; row < b.rows; row += kMaxRows) {
    int64_t some = min(b.rows - row, kMaxRows);
    Rows queries = {b.queries.data + row * b.queries.row_bytes, b.queries.row_bytes};
    for (int64_t i = 0; i < panels; i++)
      multiply_rows<pairs>(queries, keys + i * kPanel * b.sizes.head_cells, b.sizes.head_cells,
                           some, false, b.scores + row * kKeys + i * kPanel, kKeys);
    for (int64_t r = row; r < row + some; r++) {
      weigh_keys(b, r, key, count, panels * kPanel);
      float* out = b.out + r * b.sizes.dims;
      for (int64_t d = 0; key && b.scale[r] != 1 && d < b.sizes.dims; d += kLanes)
        store(out + d, load(out + d) * b.scale[r]);
    }
    Rows weights = {reinterpret_cast<const char*>(b.weights) + row * kKeys * kCell,
                    kKeys * kCell};
    for (int64_t d = 0; d < b.sizes.dims; d += kPanel)
      multiply_rows<pairs>(weights, values + d * cells, panels * kPanel / kInputsPerCell<T>, some,
                           key > 0, b.out + row * b.sizes.dims + d, b.sizes.dims);
  }
}

template <class T>
static void attend_queries(const Attention& a, const AttentionSizes<T>& sizes, int64_t sample,
                           int64_t head, int64_t first, const uint32_t* packed, char* memory) {
  QueryBlock<T> b(a, sizes, sample, head, first, memory);
  int64_t last = a.causal ? min(first + b.rows, a.keys) : a.keys;
  for (int64_t key = 0; key < last; key += kKeys) attend_block(b, packed, key, last);
  T* out = static_cast<T*>(a.out) + ((sample * a.length + first) * a.heads + head) * a.head_dim;
  for (int64_t r = 0; r < b.rows; r++, out += a.heads * a.head_dim) {
    const float *row = b.out + r * sizes.dims, scale = 1 / b.total[r];
    for (int64_t d = 0; d < a.head_dim; d += kLanes) {
      Vec v = load(row + d) * scale;
      if (a.head_dim - d >= kLanes)
        store(out + d, v);
      else
        store_first(out + d, v, a.head_dim - d);
    }
  }
}

template <class T>
static void vector_attention(const Attention& a) {
  AttentionSizes<T> sizes(a);
  int64_t sets = a.batch * a.kv_heads, panels = sizes.keys / kPanel;
  int64_t blocks = ceil_div(a.length, kQueries), heads = a.batch * a.heads;
  auto* packed = static_cast<uint32_t*>(a.scratch);
  char* rest = static_cast<char*>(a.scratch) + round_up(sets * sizes.packed * kCell, kCacheLine);
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    char* own = rest + thread_number() * sizes.thread_bytes();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < sets * panels; i++)
      pack_keys(a, sizes, i / panels, i % panels, packed + i / panels * sizes.packed);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * blocks; i++) {  // the longest first
      int64_t sample = i % heads / a.heads, head = i % heads % a.heads;
      int64_t set = sample * a.kv_heads + head / (a.heads / a.kv_heads);
      attend_queries(a, sizes, sample, head, (blocks - 1 - i / heads) * kQueries,
                     packed + set * sizes.packed, own);
    }
  }
}

}  // namespace corematching::COREMATCHING_ISA
