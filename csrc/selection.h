// What is chosen from a prompt: sums over its tokens, and the largest of many numbers.
#pragma once

#include "norm_rope.h"

namespace corematching::COREMATCHING_ISA {

constexpr float kTiny = 1e-24f;  // a token without activations counts nothing

CM_INLINE float number(float x) { return x; }
CM_INLINE float number(bf16 x) { return widen(x); }
CM_INLINE float number(uint8_t x) { return x; }

template <class T>
static float squares_of(const T* row, int64_t n) {
  if constexpr (sizeof(T) == 1) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += row[i] != 0;
    return static_cast<float>(count);
  } else {
    return sum_squares(row, n);
  }
}

template <class T>
CM_INLINE void add_row(const T* row, int64_t first, int64_t last, Sum what, float factor,
                       float* out) {
  if (what == Sum::values)
    for (int64_t i = first; i < last; i++) out[i] += number(row[i]);
  else if (what == Sum::sizes)
    for (int64_t i = first; i < last; i++) out[i] += std::fabs(number(row[i]));
  else
    for (int64_t i = first; i < last; i++) out[i] += number(row[i]) * number(row[i]) * factor;
}

// Threads split the columns: their number changes no result.
template <class T>
static void run_sum_tokens(const SumTokens& s) {
  const auto* values = static_cast<const T*>(s.values);
  const int threads = static_cast<int>(s.threads);
  int64_t parts = s.batch < threads ? threads : 1, n = s.width;
  if (s.what == Sum::unit_squares) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < s.batch * s.length; t++) {
      float size = s.tokens[t] ? squares_of(values + t * n, n) : 0;
      s.factors[t] = 1.0f / (size > kTiny ? size : kTiny);
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < s.batch * parts; task++) {
    int64_t sample = task / parts;
    Range columns = split(n, static_cast<int>(task % parts), static_cast<int>(parts));
    float* out = s.out + sample * n;
    for (int64_t i = columns.first; i < columns.last; i++) out[i] = 0;
    for (int64_t t = sample * s.length; t < (sample + 1) * s.length; t++)
      if (s.tokens[t])
        add_row(values + t * n, columns.first, columns.last, s.what,
                s.what == Sum::unit_squares ? s.factors[t] : 0, out);
  }
}

static void weigh_marks(const uint8_t* marks, const float* weights, float* out, int64_t batch,
                        int64_t length, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t t = 0; t < batch * length; t++) {
    const uint8_t* own = marks + t * n;
    const float* w = weights + t / length * n;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += own[i] ? w[i] : 0;
    out[t] = total;
  }
}

CM_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

CM_INLINE uint32_t bits_of(bf16 x) { return uint32_t{x.bits} << 16; }

// A float's bits, such that whole numbers compare as the floats do; -0 counts as 0.
CM_INLINE uint32_t sortable(float x) {
  uint32_t bits = bits_of(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What is known of the n-th largest of some numbers: its highest bits, and how many of those that
// begin alike are still to be counted. Radix selection, a byte at a time.
struct Cut {
  uint32_t bits, known;
  int64_t missing;

  void set_byte(int64_t byte, int shift) {
    bits |= static_cast<uint32_t>(byte) << shift;
    known |= 255u << shift;
  }

  // From how often each value of the next byte follows the bits that are known.
  void narrow_down(const int64_t found[256], int shift) {
    int64_t byte = 255;
    for (; byte > 0 && found[byte] < missing; byte--) missing -= found[byte];
    set_byte(byte, shift);
  }
};

static bool top_k(const float* scores, int64_t n, int64_t count, int64_t* indices) {
  Cut cut = {0, 0, count};
  for (int64_t i = 0; i < n; i++)
    if (scores[i] != scores[i]) return false;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t found[256] = {};
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = sortable(scores[i]);
      found[bits >> shift & 255] += (bits & cut.known) == cut.bits;
    }
    cut.narrow_down(found, shift);
  }
  for (int64_t i = 0; i < n && count; i++) {
    uint32_t bits = sortable(scores[i]);
    if (bits > cut.bits || (bits == cut.bits && cut.missing-- > 0)) *indices++ = i, count--;
  }
  return true;
}

// Bits in the order of the floats above 0: of magnitudes, or of numbers, of which others count as
// 0.
CM_INLINE uint32_t rank_bits(uint32_t bits, bool by_size) {
  const uint32_t sign = 1u << 31;
  return by_size ? bits & ~sign : bits & sign ? 0 : bits;
}

constexpr int64_t kMaxHalves = 32768;

// Of a row of bfloat16, bit by bit from the highest: counting what reaches a trial is work for
// whole vectors, and the row stays in the first-level cache.
static void mark_halves(const bf16* row, int64_t n, int64_t count, bool by_size, uint8_t* marks) {
  uint16_t sizes[kMaxHalves], cut = 0;
  for (int64_t i = 0; i < n; i++) {
    uint16_t bits = row[i].bits;
    sizes[i] = by_size ? bits & 0x7fff : bits & 0x8000 ? 0 : bits;
  }
  for (int bit = 14; bit >= 0; bit--) {
    auto trial = static_cast<uint16_t>(cut | 1 << bit);
    uint16_t reached = 0;
    for (int64_t i = 0; i < n; i++) reached = static_cast<uint16_t>(reached + (sizes[i] >= trial));
    if (reached >= count) cut = trial;
  }
  if (!cut) cut = 1;
  for (int64_t i = 0; i < n; i++) marks[i] = sizes[i] >= cut;
}

template <class T>
static void mark_row(const T* row, int64_t n, int64_t count, bool by_size, uint8_t* marks) {
  Cut cut = {0, 0, count};
  for (int shift = 24; shift >= (sizeof(T) == 2 ? 16 : 0); shift -= 8) {
    int64_t found[256] = {};
    for (int64_t i = 0; i < n; i++) {
      uint32_t bits = rank_bits(bits_of(row[i]), by_size);
      found[bits >> shift & 255] += (bits & cut.known) == cut.bits;
    }
    cut.narrow_down(found, shift);
  }
  if (!cut.bits) cut.bits = 1;
  for (int64_t i = 0; i < n; i++) marks[i] = rank_bits(bits_of(row[i]), by_size) >= cut.bits;
}

template <class T>
static void run_mark_largest(const T* values, const int64_t* counts, uint8_t* marks, int64_t rows,
                             int64_t n, bool by_size, int64_t threads) {
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    if constexpr (sizeof(T) == sizeof(bf16)) {
      if (n <= kMaxHalves) {
        mark_halves(values + row * n, n, counts[row], by_size, marks + row * n);
        continue;
      }
    }
    mark_row(values + row * n, n, counts[row], by_size, marks + row * n);
  }
}

// Counts the byte at `shift` of the magnitudes whose higher bits are those of the cut; false where
// one is not finite. Four histograms, so that equal bytes in a row do not wait for each other.
template <class T>
static bool count_bytes(const T* row, const int64_t* indices, int64_t n, const Cut& cut, int shift,
                        int64_t found[4][256]) {
  const uint32_t infinite = 0x7f800000u;
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = rank_bits(bits_of(row[indices ? indices[i] : i]), true);
    found[i & 3][bits >> shift & 255] += (bits & cut.known) == cut.bits;
    largest = bits > largest ? bits : largest;
  }
  return largest < infinite;
}

template <class T>
static bool run_kth_size(const T* values, const uint8_t* tokens, const int64_t* indices,
                         const int64_t* ranks, float* out, int64_t batch, int64_t length,
                         int64_t n, int64_t count) {
  for (int64_t b = 0; b < batch; b++) {
    Cut cut = {0, 0, ranks[b]};
    const int64_t* own = indices ? indices + b * count : nullptr;
    out[b] = 0;
    for (int shift = 24; ranks[b] && shift >= (sizeof(T) == 2 ? 16 : 0); shift -= 8) {
      int64_t found[4][256] = {}, byte = 0;
      for (int64_t t = b * length; t < (b + 1) * length; t++)
        if (tokens[t] && !count_bytes(values + t * n, own, own ? count : n, cut, shift, found))
          return false;
      for (;; byte++) {
        int64_t here = found[0][byte] + found[1][byte] + found[2][byte] + found[3][byte];
        if (here >= cut.missing || byte == 255) break;
        cut.missing -= here;
      }
      cut.set_byte(byte, shift);
    }
    std::memcpy(out + b, &cut.bits, sizeof cut.bits);
  }
  return true;
}

static int64_t unite(const int64_t* indices, int64_t sets, int64_t count, int64_t group,
                     int64_t width, int32_t* neurons, uint32_t* members, uint32_t* marks) {
  int64_t found = 0;
  for (int64_t s = 0; s < sets; s++) {
    uint32_t bits = ((1u << group) - 1) << (s * group);
    for (int64_t i = 0, last = -1; i < count; i++) {
      int64_t index = indices[s * count + i];
      if (index <= last || index >= width) return -1;
      marks[last = index] |= bits;
    }
  }
  for (int64_t n = 0; n < width; n++) {
    if (!marks[n]) continue;
    neurons[found] = static_cast<int32_t>(n);
    members[found++] = marks[n];
    marks[n] = 0;
  }
  return found;
}

}  // namespace corematching::COREMATCHING_ISA
