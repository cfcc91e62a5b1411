// The FFN of a decode step over a list of neurons: each thread computes the neurons of its part of
// the list, gate first, then up for what the gate leaves, and adds them up by rows of down.
#pragma once

#include "activations.h"
#include "gemv.h"
#include "parallel.h"

namespace corematching::COREMATCHING_ISA {

// What the threads share of a decode step, in float32. A pointer's comment gives its shape.
struct DecodeScratch {
  float* hidden;      // (B, d)
  float* qkv;         // (B, H + 2G, D)
  float* mixed;       // (B, H, D)
  float* values;      // (B, F) activations
  float* x;           // (threads, B, d)
  float* ys;          // (threads, B, d)
  float* scores;      // (threads, kMaxBatch, capacity)
  uint32_t* wanted;   // (F,) one bit per row that still wants the neuron
  int32_t* entries;   // (F,) entries of the list that some row wants
};

// Entries [first, last) of the list, one thread's.
struct FfnPart {
  const Ffn* ffn;
  const float* const* xs;  // (B,) inputs of d numbers
  float* values;
  uint32_t* wanted;
  int32_t* entries;  // from `first` on
  int64_t first, last, kept, hidden;
  int batch;

  int64_t neuron(int64_t entry) const { return ffn->neurons ? ffn->neurons[entry] : entry; }
  float* value(int row, int64_t entry) const { return values + row * ffn->count + entry; }
};

// Products of the wanted rows of a matrix with the samples that want them; multiplied in, or set.
template <class T>
static void project(const FfnPart& part, const T* weight, const T* bias, bool multiply) {
  const int32_t* entries = part.entries + part.first;
  const float* xs[kMaxBatch];
  float results[kMaxBatch];
  int rows[kMaxBatch];
  int64_t ahead = rows_ahead<T>(part.hidden);
  for (int64_t i = 0; i < part.kept; i++) {
    int64_t entry = entries[i], neuron = part.neuron(entry);
    int64_t next = i + ahead < part.kept ? part.neuron(entries[i + ahead]) : neuron;
    int count = 0;
    for (uint32_t left = part.wanted[entry]; left; left &= left - 1, count++) {
      rows[count] = __builtin_ctz(left);
      xs[count] = part.xs[rows[count]];
    }
    dots(weight + neuron * part.hidden, xs, count, part.hidden, weight + next * part.hidden,
         results);
    float extra = bias ? widen(bias[neuron]) : 0.0f;
    for (int s = 0; s < count; s++) {
      float* value = part.value(rows[s], entry);
      *value = multiply ? *value * (results[s] + extra) : results[s] + extra;
    }
  }
}

// Drops what is below a row's threshold, and lists the entries that are still wanted.
static void apply_threshold(FfnPart& part, const float* threshold) {
  int64_t kept = 0;
  if (!threshold) return;
  for (int64_t i = 0; i < part.kept; i++) {
    int32_t entry = part.entries[part.first + i];
    uint32_t wanted = part.wanted[entry];
    for (uint32_t left = wanted; left; left &= left - 1) {
      int s = __builtin_ctz(left);
      float* value = part.value(s, entry);
      if (!(std::fabs(*value) >= threshold[s])) {
        *value = 0;
        wanted &= ~(1u << s);
      }
    }
    part.wanted[entry] = wanted;
    part.entries[part.first + kept] = entry;
    kept += wanted != 0;
  }
  part.kept = kept;
}

static void begin_part(FfnPart& part) {
  const Ffn& ffn = *part.ffn;
  uint32_t every = (1u << part.batch) - 1;
  for (int64_t entry = part.first; entry < part.last; entry++) {
    part.entries[entry] = static_cast<int32_t>(entry);
    part.wanted[entry] = ffn.members ? ffn.members[entry] & every : every;
  }
  part.kept = part.last - part.first;
  for (int s = 0; ffn.members && s < part.batch; s++)
    std::memset(part.value(s, part.first), 0,
                sizeof(float) * static_cast<size_t>(part.last - part.first));
}

// act(gate) * up, or act(up), of the thread's neurons.
template <class T>
static void compute_activations(FfnPart& part) {
  const Ffn& ffn = *part.ffn;
  const auto *up = static_cast<const T*>(ffn.up), *gate = static_cast<const T*>(ffn.gate);
  const auto *up_bias = static_cast<const T*>(ffn.up_bias);
  int64_t read[2] = {0, 0};
  begin_part(part);
  project(part, gate ? gate : up, gate ? static_cast<const T*>(ffn.gate_bias) : up_bias, false);
  read[gate ? 0 : 1] = part.kept;
  for (int s = 0; s < part.batch; s++)
    activate(part.value(s, part.first), part.last - part.first, ffn.activation);
  if (gate) {
    apply_threshold(part, ffn.gate_threshold);
    project(part, up, up_bias, true);
    read[1] = part.kept;
  }
  apply_threshold(part, ffn.output_threshold);
  for (int i = 0; i < 2; i++) {
#pragma omp atomic
    ffn.rows_read[i] += read[i];
  }
}

// ys[s] += the part's neurons times their rows of down, stored one neuron per row.
template <class T>
static void add_down(const FfnPart& part, float* const* ys) {
  const auto* down = static_cast<const T*>(part.ffn->down);
  const int32_t* entries = part.entries + part.first;
  float factors[kMaxBatch * kRows];
  float* targets[kMaxBatch];
  int64_t distance = round_up(rows_ahead<T>(part.hidden), kRows);
  for (int64_t i = 0; i < part.kept; i += kRows) {
    const T *rows[kRows], *ahead[kRows];
    uint32_t wanted = 0;
    for (int r = 0; r < kRows; r++) {
      int64_t here = i + r < part.kept ? i + r : i;
      int64_t next = here + distance < part.kept ? here + distance : here;
      rows[r] = down + part.neuron(entries[here]) * part.hidden;
      ahead[r] = down + part.neuron(entries[next]) * part.hidden;
      wanted |= part.wanted[entries[here]];
    }
    int count = 0;
    for (; wanted; wanted &= wanted - 1, count++) {
      int s = __builtin_ctz(wanted);
      targets[count] = ys[s];
      for (int r = 0; r < kRows; r++)
        factors[count * kRows + r] = i + r < part.kept ? *part.value(s, entries[i + r]) : 0.0f;
    }
    mix(rows, factors, targets, count, part.hidden, ahead);
  }
#pragma omp atomic
  part.ffn->rows_read[2] += part.kept;
}

// Numbers below a row's threshold count as 0.
static void mask_inputs(const float* threshold, float* const* xs, int batch, int64_t n) {
  for (int s = 0; threshold && s < batch; s++)
    for (int64_t i = 0; i < n; i++) xs[s][i] = std::fabs(xs[s][i]) >= threshold[s] ? xs[s][i] : 0;
}

// out[s] += FFN(xs[s]). Every thread calls it, and passes a barrier before it reads out.
template <class T>
static void decode_ffn(const Ffn& ffn, float* const* xs, float* const* out, int batch,
                       int64_t hidden, const DecodeScratch& scratch, int thread, int threads) {
  float* ys[kMaxBatch];
  Range mine = split(ffn.count, thread, threads), columns = split(hidden, thread, threads);
  FfnPart part = {&ffn,           xs,         scratch.values, scratch.wanted, scratch.entries,
                  mine.first, mine.last, 0,              hidden,         batch};
  mask_inputs(ffn.input_threshold, xs, batch, hidden);
  compute_activations<T>(part);
  const auto* bias = static_cast<const T*>(ffn.bias);
  if (!ffn.by_neuron) {
    rows_at(scratch.values, batch, ffn.count, ys);
#pragma omp barrier
    gemv(static_cast<const T*>(ffn.down), bias, ys, batch, ffn.count, columns.first, columns.last,
         out, true);
#pragma omp atomic
    ffn.rows_read[2] += thread == 0 ? ffn.count : 0;
    return;
  }
  float* own = scratch.ys + thread * batch * hidden;
  std::memset(own, 0, sizeof(float) * static_cast<size_t>(batch * hidden));
  rows_at(own, batch, hidden, ys);
  add_down<T>(part, ys);
#pragma omp barrier
  for (int s = 0; s < batch; s++) {
    for (int t = 0; t < threads; t++) {
      const float* other = scratch.ys + (t * batch + s) * hidden;
      for (int64_t i = columns.first; i < columns.last; i++) out[s][i] += other[i];
    }
    const T* row = bias ? bias + s * ffn.biases / batch * hidden : nullptr;
    for (int64_t i = columns.first; row && i < columns.last; i++) out[s][i] += widen(row[i]);
  }
}

}  // namespace corematching::COREMATCHING_ISA
