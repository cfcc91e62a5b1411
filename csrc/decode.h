// A whole decode step of a decoder of Llama's form, and its parts alone. All threads run the same
// code on their own rows of the weights, and meet at barriers.
#pragma once

#include "decode_ffn.h"
#include "norm_rope.h"

namespace corematching::COREMATCHING_ISA {

// In place; hidden columns get 0.
CM_INLINE void softmax(float* scores, const uint8_t* valid, int64_t n) {
  float most = -INFINITY;
  for (int64_t i = 0; valid && i < n; i++) scores[i] = valid[i] ? scores[i] : -INFINITY;
  for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(scores + i, exp<float>(load(scores + i) - most));
  if (i < n) store_first(scores + i, exp<float>(load_first(scores + i, n - i) - most), n - i);
  for (i = 0; valid && i < n; i++) scores[i] = valid[i] ? scores[i] : 0.0f;
  float scale = 1.0f / sum(scores, n);
  for (i = 0; i < n; i++) scores[i] *= scale;
}

// One row's query heads that share keys: mixed (heads, D) from queries (heads, D) and n columns.
template <class T>
static void attend_heads(const DecodeStep& step, const T* keys, const T* values,
                         const uint8_t* valid, const float* log_counts, float* queries, int heads,
                         int64_t n, float* scores, float* mixed) {
  int64_t size = step.head_dim, distance = round_up(rows_ahead<T>(size), kRows);
  float results[kMaxBatch], factors[kMaxBatch * kRows];
  float *xs[kMaxBatch], *ys[kMaxBatch];
  rows_at(queries, heads, size, xs);
  rows_at(mixed, heads, size, ys);
  for (int64_t i = 0; i < n; i++) {
    const T* row = keys + i * size;
    dots(row, xs, heads, size, row + (i + distance < n ? distance * size : 0), results);
    for (int h = 0; h < heads; h++)
      scores[h * step.capacity + i] = results[h] * static_cast<float>(step.scaling);
  }
  int64_t counted = log_counts ? min(step.counted, n) : 0;
  for (int h = 0; h < heads; h++) {
    for (int64_t i = 0; i < counted; i++) scores[h * step.capacity + i] += log_counts[i];
    softmax(scores + h * step.capacity, valid, n);
  }
  std::memset(mixed, 0, sizeof(float) * static_cast<size_t>(heads * size));
  for (int64_t i = 0; i < n; i += kRows) {
    const T *rows[kRows], *ahead[kRows];
    for (int r = 0; r < kRows; r++) {
      int64_t here = i + r < n ? i + r : i;
      rows[r] = values + here * size;
      ahead[r] = values + (here + distance < n ? here + distance : here) * size;
      for (int h = 0; h < heads; h++)
        factors[h * kRows + r] = i + r < n ? scores[h * step.capacity + i + r] : 0.0f;
    }
    mix(rows, factors, ys, heads, size, ahead);
  }
}

// Stores this token's key and value, then attends: one row of the batch, one head of keys.
template <class T>
static void decode_attention(const DecodeStep& step, const DecoderLayer& layer,
                             const DecodeScratch& scratch, float* scores, int64_t row,
                             int64_t group) {
  int64_t size = step.head_dim, queries = step.heads / step.kv_heads, n = step.lengths[row];
  int64_t width = (step.heads + 2 * step.kv_heads) * size;
  const float *cos = step.cos + row * size, *sin = step.sin + row * size;
  const uint8_t* valid = step.valid ? step.valid + row * step.valid_stride : nullptr;
  const float* log_counts = step.log_counts ? step.log_counts + row * step.counted : nullptr;
  float* q = scratch.qkv + row * width + group * queries * size;
  float* k = scratch.qkv + row * width + (step.heads + group) * size;
  float* v = k + step.kv_heads * size;
  int64_t start = (row * step.kv_heads + group) * step.capacity * size;
  T *keys = static_cast<T*>(layer.keys) + start, *values = static_cast<T*>(layer.values) + start;
  const auto *q_norm = static_cast<const T*>(layer.q_norm);
  const auto *k_norm = static_cast<const T*>(layer.k_norm);
  for (int64_t h = 0; h < queries; h++) {
    if (q_norm) rms_norm(q + h * size, q_norm, step.epsilon, size, q + h * size);
    rotate(q + h * size, cos, sin, size);
  }
  if (k_norm) rms_norm(k, k_norm, step.epsilon, size, k);
  rotate(k, cos, sin, size);
  for (int64_t i = 0; i < size; i++) {
    keys[(n - 1) * size + i] = narrow<T>(k[i]);
    values[(n - 1) * size + i] = narrow<T>(v[i]);
  }
  for (int64_t first = 0; first < queries; first += kMaxBatch) {
    int heads = static_cast<int>(min(queries - first, kMaxBatch));
    float* mixed = scratch.mixed + (row * step.heads + group * queries + first) * size;
    attend_heads(step, keys, values, valid, log_counts, q + first * size, heads, n, scores, mixed);
  }
}

template <class T>
static void norm_rows(const DecodeStep& step, const void* weight, const float* hidden,
                      float* const* out) {
  for (int64_t s = 0; s < step.batch; s++)
    rms_norm(hidden + s * step.hidden, static_cast<const T*>(weight), step.epsilon, step.hidden,
             out[s]);
}

// A thread's rows of the three matrices, as if they were one.
template <class T>
static void project_qkv(const DecodeStep& step, const DecoderLayer& layer, float* const* xs,
                        float* qkv, int thread, int threads) {
  int64_t q = step.heads * step.head_dim, kv = step.kv_heads * step.head_dim;
  const void* weights[3] = {layer.q, layer.k, layer.v};
  const void* biases[3] = {layer.q_bias, layer.k_bias, layer.v_bias};
  int64_t starts[4] = {0, q, q + kv, q + 2 * kv};
  Range mine = split(q + 2 * kv, thread, threads);
  for (int i = 0; i < 3; i++) {
    int64_t from = max(mine.first, starts[i]), to = min(mine.last, starts[i + 1]);
    float* out[kMaxBatch];
    rows_at(qkv + starts[i], static_cast<int>(step.batch), q + 2 * kv, out);
    if (from < to)
      gemv(static_cast<const T*>(weights[i]), static_cast<const T*>(biases[i]), xs,
           static_cast<int>(step.batch), step.hidden, from - starts[i], to - starts[i], out, false);
  }
}

template <class T>
static void decode_layer(const DecodeStep& step, const DecoderLayer& layer,
                         const DecodeScratch& scratch, float** xs, float** hidden, float** mixed,
                         int thread, int threads) {
  int batch = static_cast<int>(step.batch);
  Range columns = split(step.hidden, thread, threads);
  float* scores = scratch.scores + thread * kMaxBatch * step.capacity;
  norm_rows<T>(step, layer.attention_norm, scratch.hidden, xs);
  project_qkv<T>(step, layer, xs, scratch.qkv, thread, threads);
#pragma omp barrier
  for (int64_t task = thread; task < batch * step.kv_heads; task += threads)
    decode_attention<T>(step, layer, scratch, scores, task / step.kv_heads, task % step.kv_heads);
#pragma omp barrier
  gemv(static_cast<const T*>(layer.o), static_cast<const T*>(layer.o_bias), mixed, batch,
       step.heads * step.head_dim, columns.first, columns.last, hidden, true);
#pragma omp barrier
  norm_rows<T>(step, layer.ffn_norm, scratch.hidden, xs);
  decode_ffn<T>(layer.ffn, xs, hidden, batch, step.hidden, scratch, thread, threads);
#pragma omp barrier
}

template <class T>
static void decode_thread(const DecodeStep& step, const DecodeScratch& scratch, int thread,
                          int threads) {
  int batch = static_cast<int>(step.batch);
  int64_t d = step.hidden;
  float *xs[kMaxBatch], *hidden[kMaxBatch], *mixed[kMaxBatch];
  rows_at(scratch.x + thread * batch * d, batch, d, xs);
  rows_at(scratch.hidden, batch, d, hidden);
  rows_at(scratch.mixed, batch, step.heads * step.head_dim, mixed);
  const auto* x = static_cast<const T*>(step.x);
  Range columns = split(d, thread, threads);
  for (int s = 0; s < batch; s++)
    widen_all(x + s * d + columns.first, columns.last - columns.first, hidden[s] + columns.first);
#pragma omp barrier
  for (int64_t l = 0; l < step.num_layers; l++)
    decode_layer<T>(step, step.layers[l], scratch, xs, hidden, mixed, thread, threads);
  for (int s = thread; s < batch; s += threads) {
    rms_norm(hidden[s], static_cast<const T*>(step.final_norm), step.epsilon, d, xs[s]);
    narrow_all(xs[s], d, static_cast<T*>(step.out) + s * d);
  }
}

struct DecodeSizes {
  int64_t batch, hidden, heads, kv_heads, head_dim, capacity, width, threads;
};

CM_INLINE float* take(float* start, int64_t* used, int64_t count) {
  float* here = start ? start + *used : nullptr;
  *used += round_up(count, 16);
  return here;
}

// Lays the scratch memory out from `start` on; from null it only counts. Returns floats used.
static int64_t lay_out(float* start, const DecodeSizes& z, DecodeScratch* out) {
  int64_t used = 0, rows = z.batch * z.threads;
  out->hidden = take(start, &used, z.batch * z.hidden);
  out->qkv = take(start, &used, z.batch * (z.heads + 2 * z.kv_heads) * z.head_dim);
  out->mixed = take(start, &used, z.batch * z.heads * z.head_dim);
  out->values = take(start, &used, z.batch * z.width);
  out->x = take(start, &used, rows * z.hidden);
  out->ys = take(start, &used, rows * z.hidden);
  out->scores = take(start, &used, z.threads * kMaxBatch * z.capacity);
  out->wanted = reinterpret_cast<uint32_t*>(take(start, &used, z.width));
  out->entries = reinterpret_cast<int32_t*>(take(start, &used, z.width));
  return used;
}

static DecodeSizes sizes_of(const DecodeStep& step) {
  DecodeSizes sizes = {step.batch,    step.hidden,   step.heads, step.kv_heads,
                       step.head_dim, step.capacity, 0,          step.threads};
  for (int64_t l = 0; l < step.num_layers; l++)
    sizes.width = max(sizes.width, step.layers[l].ffn.width);
  return sizes;
}

static int64_t decode_scratch(const DecodeStep& step) {
  DecodeScratch scratch;
  return lay_out(nullptr, sizes_of(step), &scratch);
}

template <class T>
static void run_decode_step(const DecodeStep& step) {
  DecodeScratch scratch;
  lay_out(step.scratch, sizes_of(step), &scratch);
#pragma omp parallel num_threads(static_cast<int>(step.threads))
  decode_thread<T>(step, scratch, thread_number(), thread_count());
}

static int64_t ffn_scratch(int64_t batch, int64_t hidden, int64_t width, int64_t threads) {
  DecodeScratch scratch;
  return lay_out(nullptr, {batch, hidden, 0, 0, 0, 0, width, threads}, &scratch);
}

template <class T>
static void run_ffn(const FfnCall& call) {
  int batch = static_cast<int>(call.batch);
  int64_t d = call.hidden;
  const auto* x = static_cast<const T*>(call.x);
  auto* out = static_cast<T*>(call.out);
  DecodeScratch scratch;
  lay_out(call.scratch, {call.batch, d, 0, 0, 0, 0, call.ffn->width, call.threads}, &scratch);
  std::memset(scratch.hidden, 0, sizeof(float) * static_cast<size_t>(batch * d));
#pragma omp parallel num_threads(static_cast<int>(call.threads))
  {
    int thread = thread_number(), threads = thread_count();
    float *xs[kMaxBatch], *ys[kMaxBatch];
    rows_at(scratch.x + thread * batch * d, batch, d, xs);
    rows_at(scratch.hidden, batch, d, ys);
    widen_all(x, batch * d, xs[0]);
    decode_ffn<T>(*call.ffn, xs, ys, batch, d, scratch, thread, threads);
    Range mine = split(d, thread, threads);  // the columns that this thread has summed up
    for (int s = 0; s < batch; s++)
      narrow_all(ys[s] + mine.first, mine.last - mine.first, out + s * d + mine.first);
  }
}

template <class T>
static void run_linear(const LinearCall& call) {
  int batch = static_cast<int>(call.batch);
  float *xs[kMaxBatch], *ys[kMaxBatch];
  rows_at(call.scratch, batch, call.inputs, xs);
  rows_at(call.scratch + batch * call.inputs, batch, call.outputs, ys);
  widen_all(static_cast<const T*>(call.x), batch * call.inputs, call.scratch);
  auto* out = static_cast<T*>(call.out);
#pragma omp parallel num_threads(static_cast<int>(call.threads))
  {
    Range mine = split(call.outputs, thread_number(), thread_count());
    gemv(static_cast<const T*>(call.weight), static_cast<const T*>(call.bias), xs, batch,
         call.inputs, mine.first, mine.last, ys, false);
    for (int s = 0; s < batch; s++)
      narrow_all(ys[s] + mine.first, mine.last - mine.first, out + s * call.outputs + mine.first);
  }
}

}  // namespace corematching::COREMATCHING_ISA
