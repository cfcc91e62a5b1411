// Attention of a prompt on matrix tiles, bfloat16: a block of 32 queries sees all its keys at once.
// Keys and values of a head are packed once, as right operands.
#pragma once

#include "amx_tiles.h"
#include "attention.h"

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kMaxTiledKeys = 8192;  // more of them would leave the caches
constexpr float kHidden = -1.0e38f;      // what a mask adds to a hidden key's score, or less

static bool fits_tiles(const Attention& a) {
  return a.head_dim % kSpan == 0 && a.keys <= kMaxTiledKeys;
}

// Bytes of a thread: scores, weights and sums of 32 queries, and a copy of queries where fewer are
// left.
CM_INLINE int64_t tiled_thread_bytes(const Attention& a) {
  return kSpan * (round_up(a.keys, kSpan) * 6 + a.head_dim * 6);
}

static int64_t tiled_attention_scratch(const Attention& a) {
  int64_t packed = a.batch * a.kv_heads * round_up(a.keys, kSpan) * a.head_dim;
  return 2 * packed * static_cast<int64_t>(sizeof(bf16)) + a.threads * tiled_thread_bytes(a);
}

// Values [32 * chunk, ...) of a head: a tile of (key pairs, 16 numbers) for every 16 of D.
static void pack_values(const bf16* values, int64_t keys, int64_t stride, int64_t size,
                        int64_t chunk, uint32_t* out) {
  for (int64_t pair = 0; pair < kTile; pair++) {
    int64_t key = chunk * kInputs + 2 * pair;
    const bf16 *even = values + key * stride, *odd = even + stride;
    for (int64_t d = 0; d < size; d += kTile) {
      Words low = key < keys ? (Words)load(even + d) >> 16 : Words{};
      Words high = key + 1 < keys ? (Words)load(odd + d) : Words{};
      store_line(out + d / kTile * kTileWords + pair * kTile, low | high);
    }
  }
}

// out (32, 32), `width` floats between its rows = 32 rows of x, `stride` numbers apart, times two
// columns of right operands, whose tiles are `step` words apart.
CM_INLINE void multiply_square(const bf16* x, int64_t stride, int64_t inputs, const uint32_t* left,
                               const uint32_t* right, int64_t step, float* out, int64_t width) {
  int64_t row_bytes = stride * static_cast<int64_t>(sizeof(bf16));
  int64_t out_bytes = width * static_cast<int64_t>(sizeof(float));
  zero_sums();
  for (int64_t k = 0; k < inputs; k += kInputs, left += step, right += step) {
    _tile_loadd(4, x + k, row_bytes);
    _tile_loadd(6, left, kCacheLine);
    _tile_loadd(7, right, kCacheLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x + kTile * stride + k, row_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, out_bytes);
  _tile_stored(1, out + kTile, out_bytes);
  _tile_stored(2, out + kTile * width, out_bytes);
  _tile_stored(3, out + kTile * width + kTile, out_bytes);
}

CM_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count < kTile ? (1 << count) - 1 : 0xffff);
}

CM_INLINE __mmask16 load_flags(const char* mask, int64_t s, __mmask16 on) {
  __m128i flags = _mm_maskz_loadu_epi8(on, mask + s);
  return _mm_mask_test_epi8_mask(on, flags, flags);
}

CM_INLINE __m512 load_summands(const char* mask, int64_t s, __mmask16 on) {
  const auto* summands = reinterpret_cast<const bf16*>(mask);
  __m256i more = _mm256_maskz_loadu_epi16(on, summands + s);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(more), 16);
}

// One query's row of the mask.
CM_INLINE const char* mask_row(const Attention& a, int64_t sample, int64_t row) {
  int64_t bytes = a.mask_kind == Mask::boolean ? 1 : sizeof(bf16);
  int64_t at = sample * a.mask_strides[0] + row * a.mask_strides[1];
  return static_cast<const char*>(a.mask) + at * bytes;
}

// How many keys a query has to look at: behind them all are hidden. Where every key is, all of them
// count alike.
static int64_t count_seen(const Attention& a, int64_t sample, int64_t row) {
  int64_t seen = a.causal ? min(row + 1, a.keys) : a.keys, end = seen;
  if (a.mask_kind == Mask::none) return seen;
  const char* mask = mask_row(a, sample, row);
  for (; end > 0; end = (end - 1) / kTile * kTile) {
    int64_t from = (end - 1) / kTile * kTile;
    __mmask16 on = first_lanes(end - from), shown;
    if (a.mask_kind == Mask::boolean)
      shown = load_flags(mask, from, on);
    else
      shown = _mm512_mask_cmp_ps_mask(on, load_summands(mask, from, on), _mm512_set1_ps(kHidden),
                                      _CMP_NLE_UQ);
    if (shown) return end;
  }
  return seen;
}

// 16 scores under a mask, as powers of 2; hidden ones are kLowest.
CM_INLINE Vec mask_lanes(const Attention& a, Vec x, const char* mask, int64_t s, __mmask16 on) {
  x *= static_cast<float>(a.scaling) * kLogUnit<bf16>;
  if (a.mask_kind == Mask::boolean)
    on = load_flags(mask, s, on);
  else
    x += (Vec)load_summands(mask, s, on) * kLogUnit<bf16>;
  return (Vec)_mm512_mask_mov_ps((__m512)splat(kLowest), on, (__m512)max(splat(kLowest), x));
}

// The first `count` of a query's scores become weights, the others up to `width` 0. Returns 1 over
// the weights' sum.
static float weigh_all_keys(const Attention& a, float* scores, const char* mask, int64_t count,
                            int64_t width, bf16* weights) {
  Vec largest = splat(kLowest), total = {};
  for (int64_t s = 0; s < count; s += kTile) {
    Vec x = load(scores + s);
    __mmask16 on = first_lanes(count - s);
    if (a.mask_kind != Mask::none) store(scores + s, x = mask_lanes(a, x, mask, s, on));
    largest = (Vec)_mm512_mask_max_ps((__m512)largest, on, (__m512)largest, (__m512)x);
  }
  bool scaled = a.mask_kind != Mask::none;
  float unit = scaled ? 1.0f : static_cast<float>(a.scaling) * kLogUnit<bf16>;
  float most = max_lanes(largest) * unit;
  for (int64_t s = 0; s < count; s += kTile) {
    Vec x = exp2_coarse(load(scores + s) * unit - most);
    x = (Vec)_mm512_maskz_mov_ps(first_lanes(count - s), (__m512)x);
    total += x;
    store(weights + s, x);
  }
  int64_t done = round_up(count, kTile);
  std::memset(weights + done, 0, sizeof(bf16) * static_cast<size_t>(width - done));
  return 1 / sum_lanes(total);
}

// A thread's memory for 32 queries.
struct TiledQueries {
  float *scores, *sums;
  bf16 *weights, *copy;

  TiledQueries(const Attention& a, int64_t width, char* memory) {
    scores = reinterpret_cast<float*>(memory), sums = scores + kSpan * width;
    weights = reinterpret_cast<bf16*>(sums + kSpan * a.head_dim), copy = weights + kSpan * width;
  }
};

// Queries [first, first + 32) of a head.
static void attend_span(const Attention& a, int64_t sample, int64_t head, int64_t first,
                        const uint32_t* keys, const uint32_t* values, char* memory) {
  int64_t width = round_up(a.keys, kSpan), rows = min(a.length - first, kSpan);
  int64_t size = a.head_dim, stride = a.query_strides[2], seen[kSpan], most = 1;
  TiledQueries m(a, width, memory);
  const bf16* queries = head_of<bf16>(a.query, a.query_strides, sample, head) + first * stride;
  if (rows < kSpan) {
    std::memset(m.copy, 0, sizeof(bf16) * static_cast<size_t>(kSpan * size));
    for (int64_t i = 0; i < rows; i++)
      std::memcpy(m.copy + i * size, queries + i * stride,
                  sizeof(bf16) * static_cast<size_t>(size));
    queries = m.copy, stride = size;
  }
  for (int64_t i = 0; i < rows; i++) most = max(seen[i] = count_seen(a, sample, first + i), most);
  int64_t count = round_up(most, kSpan), tile_words = kTile * size / 2;
  for (int64_t s = 0; s < count; s += kSpan, keys += 2 * tile_words)
    multiply_square(queries, stride, size, keys, keys + tile_words, kTileWords, m.scores + s,
                    width);
  float scales[kSpan];
  for (int64_t i = 0; i < rows; i++)
    scales[i] = weigh_all_keys(a, m.scores + i * width, mask_row(a, sample, first + i), seen[i],
                               count, m.weights + i * width);
  for (int64_t i = rows; i < kSpan; i++)
    std::memset(m.weights + i * width, 0, sizeof(bf16) * static_cast<size_t>(count));
  for (int64_t d = 0; d < size; d += kSpan, values += 2 * kTileWords)
    multiply_square(m.weights, width, count, values, values + kTileWords, size * kTile, m.sums + d,
                    size);
  bf16* out = static_cast<bf16*>(a.out) + ((sample * a.length + first) * a.heads + head) * size;
  for (int64_t i = 0; i < rows; i++, out += a.heads * size)
    for (int64_t d = 0; d < size; d += kTile)
      store(out + d, load(m.sums + i * size + d) * scales[i]);
}

// A chunk of 32 keys and values of one head, as right operands.
static void pack_chunk(const Attention& a, int64_t set, int64_t chunk, uint32_t* keys,
                       uint32_t* values) {
  int64_t sample = set / a.kv_heads, group = set % a.kv_heads, size = a.head_dim;
  int64_t tile_words = kTile * size / 2, words = round_up(a.keys, kSpan) * size / 2;
  const bf16* from = head_of<bf16>(a.key, a.key_strides, sample, group);
  keys += set * words + 2 * chunk * tile_words;
  pack_rows(from, a.keys, a.key_strides[2], size, 2 * chunk, keys);
  pack_rows(from, a.keys, a.key_strides[2], size, 2 * chunk + 1, keys + tile_words);
  from = head_of<bf16>(a.value, a.value_strides, sample, group);
  pack_values(from, a.keys, a.value_strides[2], size, chunk,
              values + set * words + chunk * kTile * size);
}

static void tiled_attention(const Attention& a) {
  int64_t width = round_up(a.keys, kSpan), sets = a.batch * a.kv_heads, chunks = width / kInputs;
  int64_t blocks = ceil_div(a.length, kSpan), words = width * a.head_dim / 2;
  int64_t heads = a.batch * a.heads;
  auto *keys = static_cast<uint32_t*>(a.scratch), *values = keys + sets * words;
  auto* rest = reinterpret_cast<char*>(values + sets * words);
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    char* own = rest + thread_number() * tiled_thread_bytes(a);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < sets * chunks; i++) pack_chunk(a, i / chunks, i % chunks, keys, values);
    configure_tiles();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * blocks; i++) {  // the longest first
      int64_t sample = i % heads / a.heads, head = i % heads % a.heads;
      int64_t set = sample * a.kv_heads + head / (a.heads / a.kv_heads);
      attend_span(a, sample, head, (blocks - 1 - i / heads) * kSpan, keys + set * words,
                  values + set * words, own);
    }
    _tile_release();
  }
}

}  // namespace corematching::COREMATCHING_ISA
