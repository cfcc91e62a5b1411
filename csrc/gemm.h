// Products of a prompt's rows with matrices, on vectors, with epilogues.
//
// A task is a group of up to 4 panels (columns of the output) times a chunk of rows. Its weights
// are packed, up to kMaxDepth cells of the inputs at a time, into memory that stays in the second-
// level cache; then blocks of kMaxRows rows run over the panels. Sums are float32, and those of a
// row do not depend on the other rows.
#pragma once

#include "activations.h"
#include "microkernel.h"
#include "norm_rope.h"

namespace corematching::COREMATCHING_ISA {

constexpr int64_t kMaxPanels = 4;            // that are packed at a time
constexpr int64_t kMaxDepth = 768;           // cells of a panel's inputs that are
constexpr int64_t kMaxRowsOfChunk = 768;     // rows whose sums wait for further inputs
constexpr int64_t kMaxWidth = 64;            // columns of their sums
constexpr int64_t kPackedCells = kMaxDepth * kMaxWidth;
constexpr int64_t kThreadCells = kPackedCells + kMaxRowsOfChunk * kMaxWidth;

template <class T>
CM_INLINE const T* typed(const void* p) {
  return static_cast<const T*>(p);
}

// Bytes between rows of cells: no multiple of a page, whose lines meet in one set of the cache.
template <class T>
CM_INLINE int64_t padded_row_bytes(int64_t inputs) {
  return round_up(ceil_div(inputs, kInputsPerCell<T>), 16) * kCell + kCacheLine;
}

// Whether x can be read as it lies in memory.
template <class T>
CM_INLINE bool reads_in_place(const Gemm& g) {
  bool cells = kPairs<T> ? g.inputs % 2 == 0 : sizeof(T) == sizeof(float);
  return cells && !g.norm;
}

// A row of x as cells, normalized first where there is a norm.
template <class T>
static void prepare_row(const Gemm& g, const T* x, char* out, T* normed) {
  if (g.norm) {
    normalize_row(x, typed<T>(g.norm), typed<T>(g.norm_bias), normed, g.inputs, g.epsilon);
    x = normed;
  }
  if constexpr (kPairs<T> || sizeof(T) == sizeof(float)) {
    std::memcpy(out, x, sizeof(T) * static_cast<size_t>(g.inputs));
    if (kPairs<T> && g.inputs % 2) std::memset(out + g.inputs * sizeof(T), 0, sizeof(T));
  } else {
    widen_all(x, g.inputs, reinterpret_cast<float*>(out));
  }
}

// How the output is dealt to threads: groups of panels, times chunks of rows. Their inputs come
// `depth` at a time.
struct Tasks {
  int64_t panels, groups, chunks, chunk_rows, depth;
};

template <class T>
static Tasks deal(const Gemm& g, int64_t threads) {
  Tasks tasks = {};
  int64_t parts = ceil_div(g.inputs, kMaxDepth * kInputsPerCell<T>);
  tasks.depth = round_up(ceil_div(g.inputs, parts), kPanel);
  int64_t width = parts > 1 ? kMaxWidth : kMaxPanels * kPanel;
  int64_t most = min(kPackedCells * kInputsPerCell<T> / tasks.depth, width) / kPanel;
  most = min(most, kMaxPanels) / (g.gate ? 2 : 1);
  tasks.panels = ceil_div(g.outputs, kPanel);
  tasks.groups = min(ceil_div(ceil_div(tasks.panels, most), threads) * threads, tasks.panels);
  int64_t chunks = max(ceil_div(g.rows, kMaxRowsOfChunk), threads / tasks.groups);
  tasks.chunk_rows = ceil_div(g.rows, chunks * kMaxRows) * kMaxRows;
  tasks.chunks = ceil_div(g.rows, tasks.chunk_rows);
  return tasks;
}

// kLanes numbers, or the first n.
template <class T>
CM_INLINE Vec load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, n);
}

template <class T>
CM_INLINE void store_some(T* p, Vec v, int64_t n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_first(p, v, n);
}

// n outputs of a row, from column `first` on.
template <class T>
CM_INLINE void finish_row(const Gemm& g, int64_t row, int64_t first, int64_t n,
                          const float* sums) {
  T* out = static_cast<T*>(g.out) + row * g.out_stride + first;
  const T* residual = g.residual ? typed<T>(g.residual) + row * g.outputs + first : nullptr;
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec v = load(sums + i);
    if (g.bias) v += load_some(typed<T>(g.bias) + first + i, n - i);
    if (g.activation != Activation::none) v = activate<T>(round_to<T>(v), g.activation);
    if (residual) v = round_to<T>(v) + load_some(residual + i, n - i);
    store_some(out + i, v, n - i);
  }
}

template <class T>
CM_INLINE void finish_gated_row(const Gemm& g, int64_t row, int64_t first, int64_t n,
                                const float* gates, const float* ups) {
  T *out = static_cast<T*>(g.out) + row * g.out_stride + first, *kept = nullptr;
  if (g.gate_slots && g.gate_slots[row] >= 0)
    kept = static_cast<T*>(g.kept_gates) + g.gate_slots[row] * g.outputs + first;
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec gate = load(gates + i), up = load(ups + i);
    if (g.gate_bias) gate += load_some(typed<T>(g.gate_bias) + first + i, n - i);
    if (g.bias) up += load_some(typed<T>(g.bias) + first + i, n - i);
    gate = activate<T>(round_to<T>(gate), g.activation);
    if (kept) store_some(kept + i, gate, n - i);
    store_some(out + i, gate * round_to<T>(up), n - i);
  }
}

// The panels of one task.
struct Group {
  int64_t panel, panels, first, columns;  // first: of the output's columns

  Group(const Gemm& g, const Tasks& tasks, int64_t number) {
    panel = number * tasks.panels / tasks.groups;
    panels = (number + 1) * tasks.panels / tasks.groups - panel;
    first = panel * kPanel;
    columns = min(g.outputs - first, panels * kPanel);
  }
};

// Packs `inputs` inputs of a group, the gate's panels in front of up's.
template <class T>
static void pack_group(const Gemm& g, const Group& group, int64_t from, int64_t inputs,
                       uint32_t* out) {
  int64_t cells = ceil_div(inputs, kInputsPerCell<T>) * kPanel;
  const void* matrices[] = {g.gate, g.weight};
  for (const void* matrix : matrices) {
    for (int64_t i = 0; matrix && i < group.panels; i++, out += cells) {
      int64_t first = group.first + i * kPanel, columns = g.outputs - first;
      if (g.by_input)
        pack_panel_by_input(typed<T>(matrix) + from * g.outputs + first, g.outputs, columns, inputs,
                            out);
      else
        pack_panel<T>({typed<T>(matrix) + first * g.inputs + from, g.inputs, columns}, inputs, out);
    }
  }
}

template <class T>
static void run_task(const Gemm& g, Rows x, const Tasks& tasks, int64_t task, uint32_t* memory) {
  Group group(g, tasks, task % tasks.groups);
  int64_t start = task / tasks.groups * tasks.chunk_rows;
  int64_t rows = min(g.rows - start, tasks.chunk_rows), panels = (g.gate ? 2 : 1) * group.panels;
  int64_t width = panels * kPanel;
  auto* sums = reinterpret_cast<float*>(memory + kPackedCells);
  for (int64_t k = 0; k < g.inputs; k += tasks.depth) {
    int64_t inputs = min(g.inputs - k, tasks.depth), cells = ceil_div(inputs, kInputsPerCell<T>);
    bool last = k + inputs == g.inputs;
    pack_group<T>(g, group, k, inputs, memory);
    for (int64_t row = 0; row < rows; row += kMaxRows) {
      int64_t some = min(rows - row, kMaxRows);
      float* own = sums + (tasks.depth < g.inputs ? row * width : 0);
      Rows left = {x.data + (start + row) * x.row_bytes + k / kInputsPerCell<T> * kCell,
                   x.row_bytes};
      for (int64_t i = 0; i < panels; i++)
        multiply_rows<kPairs<T>>(left, memory + i * cells * kPanel, cells, some, k > 0,
                                 own + i * kPanel, width);
      for (int64_t r = 0; last && r < some; r++, own += width) {
        if (g.gate)
          finish_gated_row<T>(g, start + row + r, group.first, group.columns, own,
                              own + group.panels * kPanel);
        else
          finish_row<T>(g, start + row + r, group.first, group.columns, own);
      }
    }
  }
}

// Bytes of scratch memory: x as cells, a normalized row of every thread, and the threads' panels.
template <class T>
static int64_t vector_gemm_scratch(const Gemm& g) {
  int64_t normed = round_up(g.inputs * static_cast<int64_t>(sizeof(T)), kCacheLine);
  return g.rows * padded_row_bytes<T>(g.inputs) + g.threads * (normed + kThreadCells * kCell);
}

template <class T>
static void vector_gemm(const Gemm* gemms, int count) {
  const Gemm& g = *gemms;
  bool in_place = reads_in_place<T>(g);
  auto* copy = static_cast<char*>(g.scratch);
  Rows x = {static_cast<const char*>(g.x), g.inputs * static_cast<int64_t>(sizeof(T))};
  if (!in_place) x = {copy, padded_row_bytes<T>(g.inputs)};
  char* rest = copy + g.rows * padded_row_bytes<T>(g.inputs);
  int64_t normed = round_up(g.inputs * static_cast<int64_t>(sizeof(T)), kCacheLine);
#pragma omp parallel num_threads(static_cast<int>(g.threads))
  {
    char* own = rest + thread_number() * (normed + kThreadCells * kCell);
    auto* memory = reinterpret_cast<uint32_t*>(own + normed);
    if (!in_place) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < g.rows; row++)
        prepare_row(g, typed<T>(g.x) + row * g.inputs, copy + row * x.row_bytes,
                    reinterpret_cast<T*>(own));
    }
    for (int i = 0; i < count; i++) {
      Tasks tasks = deal<T>(gemms[i], thread_count());
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < tasks.groups * tasks.chunks; task++)
        run_task<T>(gemms[i], x, tasks, task, memory);
    }
  }
}

}  // namespace corematching::COREMATCHING_ISA
