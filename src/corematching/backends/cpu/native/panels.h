/* Products of many rows of floats with panels of a matrix, on vectors.

   A panel is PANEL outputs of the matrix, laid out by input: what one step of the sums needs lies
   side by side. Sums of up to MOST_ROWS rows stay in registers over all inputs of a panel. */
#ifndef CM_PANELS_H
#define CM_PANELS_H

#include "turn.h"

#define PANEL (2 * LANES)
#define FEW_ROWS 6
#if LANES == 16 || defined(__aarch64__) /* 32 registers */
#define MOST_ROWS 12
#else
#define MOST_ROWS FEW_ROWS
#endif
#define GROUP 4          /* most panels that are packed at a time, */
#define MOST_INPUTS 384  /* and most of their inputs */
#define CHUNK_ROWS 384   /* most rows whose sums are kept; a multiple of MOST_ROWS */
#define GROUP_FLOATS (GROUP * PANEL)
#define THREAD_FLOATS ((MOST_INPUTS + CHUNK_ROWS) * GROUP_FLOATS)

INLINE int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* Floats between rows that are widened: not a multiple of a page, whose lines get in each other's
   way in the cache */
INLINE int64_t wide_stride(int64_t inputs) { return ceil_div(inputs, 16) * 16 + 16; }

/* sums (rows, width), PANEL of them, = x (rows, stride) times a panel; added to them if `more` */
INLINE void add_products_of(const float *x, int64_t stride, const float *panel, int64_t inputs,
                            const int rows, int more, float *sums, int64_t width) {
    vec low[MOST_ROWS], high[MOST_ROWS];
    _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {
        low[r] = more ? load_float(sums + r * width) : (vec){0};
        high[r] = more ? load_float(sums + r * width + LANES) : (vec){0};
    }
    for (int64_t k = 0; k < inputs; k++, panel += PANEL) {
        vec first = load_float(panel), second = load_float(panel + LANES);
        _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {
            low[r] += first * x[r * stride + k];
            high[r] += second * x[r * stride + k];
        }
    }
    _Pragma("GCC unroll 12") for (int r = 0; r < rows; r++) {
        store_float(sums + r * width, low[r]);
        store_float(sums + r * width + LANES, high[r]);
    }
}

/* The same for up to MOST_ROWS rows */
static void add_products(const float *x, int64_t stride, const float *panel, int64_t inputs,
                         int64_t rows, int more, float *sums, int64_t width) {
    if (rows == MOST_ROWS) {
        add_products_of(x, stride, panel, inputs, MOST_ROWS, more, sums, width);
        return;
    }
    if (rows >= FEW_ROWS) {
        add_products_of(x, stride, panel, inputs, FEW_ROWS, more, sums, width);
        x += FEW_ROWS * stride, sums += FEW_ROWS * width, rows -= FEW_ROWS;
    }
    switch (rows) {
        case 1: add_products_of(x, stride, panel, inputs, 1, more, sums, width); break;
        case 2: add_products_of(x, stride, panel, inputs, 2, more, sums, width); break;
        case 3: add_products_of(x, stride, panel, inputs, 3, more, sums, width); break;
        case 4: add_products_of(x, stride, panel, inputs, 4, more, sums, width); break;
        case 5: add_products_of(x, stride, panel, inputs, 5, more, sums, width); break;
    }
}

#define MOST_PRODUCTS 4 /* of the same x at once */

/* How the outputs of a product are dealt to threads: groups of panels, and chunks of rows */
typedef struct {
    int64_t panels, groups, chunks, chunk_rows;
} deal_t;

INLINE deal_t deal_out(int64_t rows, int64_t outputs, int64_t most_panels, int64_t threads) {
    deal_t deal = {.panels = ceil_div(outputs, PANEL)};
    deal.groups = ceil_div(ceil_div(deal.panels, most_panels), threads) * threads;
    if (deal.groups > deal.panels) deal.groups = deal.panels;
    int64_t least = ceil_div(rows, CHUNK_ROWS), wanted = threads / deal.groups;
    int64_t blocks = ceil_div(rows, (wanted > least ? wanted : least) * MOST_ROWS);
    deal.chunk_rows = blocks * MOST_ROWS;
    deal.chunks = ceil_div(rows, deal.chunk_rows);
    return deal;
}

#endif
