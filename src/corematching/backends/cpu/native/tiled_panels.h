/* Products on matrix tiles for which the weights are packed. Part of tiles.h.

   Rows of x are left operands as they lie in memory. Of the weights, blocks of 32 outputs become
   right operands: two tiles for every 32 inputs, two inputs side by side. A thread takes its blocks
   in panels that stay in the second-level cache; the next one is packed while this one is
   multiplied, and sums wait in memory for the panel of the next inputs. */

#define MANY_ROWS 192
#define MANY_INPUTS 4608
#define PANEL_INPUTS 256
#define PANEL_BLOCKS 10
#define PANEL_WORDS (PANEL_INPUTS / 2 * PANEL_BLOCKS * SPAN)
#define AHEAD_LINES 96 /* between the weights that are packed and those fetched */
#define PAIRS_PER_TILE (TILE / 2) /* a tile is as much work as so many pairs of inputs */
#define SAME_SETS 4096 /* bytes; rows so far apart, or a multiple, meet in the first-level cache */

/* Whether packing the weights takes less time than turning what comes out, and reading x anew for
   every block of outputs */
INLINE int packs_weights(const product_bf16 *p) {
    if (p->by_input) return 1;
    if (p->gate || p->norm || p->rows < MANY_ROWS || p->inputs < MANY_INPUTS) return 0;
    return p->inputs * (int64_t)sizeof(bf16) % SAME_SETS != 0;
}

/* Blocks [first, first + blocks) and inputs [input, input + inputs) */
typedef struct {
    int64_t first, blocks, input, inputs;
} panel_t;

/* A thread's blocks as panels */
typedef struct {
    int64_t first, last, groups, parts;
} panels_t;

static panels_t list_panels(const product_bf16 *p, int thread, int threads) {
    panels_t panels = {.parts = ceil_div(p->inputs, PANEL_INPUTS)};
    split_bf16(p->outputs / SPAN, thread, threads, &panels.first, &panels.last);
    panels.groups = ceil_div(panels.last - panels.first, PANEL_BLOCKS);
    return panels;
}

/* Panel number n: all inputs of some blocks, then those of the next; empty behind the last */
static panel_t find_panel(const product_bf16 *p, const panels_t *panels, int64_t n) {
    int64_t steps = p->inputs / DEPTH, part = n % panels->parts, group = n / panels->parts;
    if (group >= panels->groups) return (panel_t){.blocks = 1};
    int64_t count = panels->last - panels->first, first = count * group / panels->groups;
    int64_t from = steps * part / panels->parts, to = steps * (part + 1) / panels->parts;
    return (panel_t){.first = panels->first + first,
                     .blocks = count * (group + 1) / panels->groups - first,
                     .input = from * DEPTH, .inputs = (to - from) * DEPTH};
}

/* A panel on its way into right operands: those of all blocks for 32 inputs stand together */
typedef struct {
    const product_bf16 *p;
    panel_t panel;
    uint32_t *out;
    int64_t input, block, second, ahead, credit; /* second: whether a block's first tile is done */
} packing_t;

static packing_t begin_packing(const product_bf16 *p, panel_t panel, uint32_t *out) {
    return (packing_t){.p = p, .panel = panel, .out = out,
                       .ahead = ceil_div(AHEAD_LINES, 2 * panel.blocks) * 2 * p->outputs};
}

/* Two inputs of a block, stored by input: outputs come in fours, by turns into both tiles */
INLINE void pack_pair(packing_t *packing, uint32_t *to) {
    const product_bf16 *p = packing->p;
    const bf16 *row = p->up + (packing->panel.input + packing->input) * p->outputs +
                      (packing->panel.first + packing->block) * SPAN;
    __builtin_prefetch(row + packing->ahead, 0, 2);
    __builtin_prefetch(row + packing->ahead + p->outputs, 0, 2);
    __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + p->outputs);
    to += packing->input % DEPTH / 2 * TILE;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(to + TILE_WORDS, _mm512_unpackhi_epi16(even, odd));
}

/* A tile of 32 inputs of a block's first or second 16 outputs, stored by output */
INLINE void pack_tile(packing_t *packing, uint32_t *to) {
    const product_bf16 *p = packing->p;
    int64_t output = (packing->panel.first + packing->block) * SPAN + packing->second * TILE;
    const bf16 *weight = p->up + output * p->inputs + packing->panel.input + packing->input;
    pack_rows(weight, TILE, p->inputs, DEPTH, 0, to + packing->second * TILE_WORDS);
}

/* So many pairs of inputs of a block more, or tiles that are worth as much */
INLINE void pack_pairs(packing_t *packing, int64_t pairs) {
    int64_t by_input = packing->p->by_input;
    packing->credit += pairs;
    while (packing->credit > 0 && packing->input < packing->panel.inputs) {
        int64_t place = packing->input / DEPTH * packing->panel.blocks + packing->block;
        uint32_t *to = packing->out + place * 2 * TILE_WORDS;
        if (by_input)
            pack_pair(packing, to);
        else
            pack_tile(packing, to);
        packing->credit -= by_input ? 1 : PAIRS_PER_TILE;
        packing->second ^= !by_input;
        if (packing->second) continue;
        if (++packing->block < packing->panel.blocks) continue;
        packing->block = 0, packing->input += by_input ? 2 : DEPTH;
    }
}

/* 32 outputs of a row, whose sums stand in two tiles */
INLINE void finish_row(const product_bf16 *p, int64_t row, int64_t output, const float *sums) {
    __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + TILE_WORDS);
    if (p->by_input) {
        __m512i four = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), more = _mm512_set1_epi64(4);
        __m512i even = (__m512i)low, odd = (__m512i)high;
        low = (__m512)_mm512_permutex2var_epi64(even, four, odd);
        high = (__m512)_mm512_permutex2var_epi64(even, _mm512_add_epi64(four, more), odd);
    }
    if (p->up_bias) {
        low = _mm512_add_ps(low, (__m512)load_bf16(p->up_bias + output));
        high = _mm512_add_ps(high, (__m512)load_bf16(p->up_bias + output + TILE));
    }
    low = activate_sum(p, low), high = activate_sum(p, high);
    __m512i rounded = narrow_pair(low, high);
    if (p->residual) rounded = add_rows(rounded, p->residual + row * p->outputs + output);
    _mm512_storeu_si512(p->out + row * p->stride + output, rounded);
}

/* Rows [row, row + 32) of x times a panel's block, added to the sums there; rows beyond the end of
   x are read from `tail`. Meanwhile the next panel is packed. */
INLINE void panel_block(const product_bf16 *p, const panel_t *panel, int64_t block,
                        const uint32_t *packed, const bf16 *tail, int64_t row, packing_t *next,
                        float *sums) {
    int64_t stride = p->inputs * (int64_t)sizeof(bf16), full = p->rows / TILE * TILE;
    int64_t each = ceil_div(TILE, ceil_div(p->rows, SPAN));
    const bf16 *upper = (row < full ? p->x + row * p->inputs : tail) + panel->input;
    const bf16 *lower = (row + TILE < full ? p->x + (row + TILE) * p->inputs : tail) + panel->input;
    int half = p->rows - row <= TILE;
    packed += block * 2 * TILE_WORDS;
    if (panel->input)
        MOVE_SUMS(_tile_loadd, sums);
    else
        CLEAR_SUMS;
    for (int64_t k = 0; k < panel->inputs; k += DEPTH, packed += panel->blocks * 2 * TILE_WORDS) {
        _tile_loadd(4, upper + k, stride);
        _tile_stream_loadd(6, packed, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, packed + TILE_WORDS, LINE);
        _tile_dpbf16ps(1, 4, 7);
        pack_pairs(next, each);
        if (half) continue;
        _tile_loadd(5, lower + k, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    MOVE_SUMS(_tile_stored, sums);
    if (panel->input + panel->inputs < p->inputs) return;
    for (int64_t i = 0; i < SPAN && row + i < p->rows; i++)
        finish_row(p, row + i, (panel->first + block) * SPAN,
                   sums + i / TILE * 2 * TILE_WORDS + i % TILE * TILE);
}

/* Floats of a thread: two panels, and the sums of one */
INLINE int64_t count_panel_floats(int64_t rows) {
    return 2 * PANEL_WORDS + ceil_div(rows, SPAN) * SPAN * PANEL_BLOCKS * SPAN;
}

static void multiply_panels(const product_bf16 *p, int num_threads) {
    int64_t full = p->rows / TILE * TILE;
    bf16 *tail = (bf16 *)packed_of(p);
    memset(tail, 0, sizeof(bf16) * (size_t)(TILE * p->inputs));
    memcpy(tail, p->x + full * p->inputs, sizeof(bf16) * (size_t)((p->rows - full) * p->inputs));
#pragma omp parallel num_threads(num_threads)
    {
        int thread = omp_get_thread_num();
        panels_t panels = list_panels(p, thread, omp_get_num_threads());
        uint32_t *here = packed_of(p) + TILE * p->inputs / 2;
        here += thread * count_panel_floats(p->rows);
        uint32_t *there = here + PANEL_WORDS;
        float *sums = (float *)(there + PANEL_WORDS);
        load_tile_config();
        packing_t packing = begin_packing(p, find_panel(p, &panels, 0), here);
        for (int64_t n = 0; n < panels.groups * panels.parts; n++) {
            panel_t panel = find_panel(p, &panels, n);
            pack_pairs(&packing, panel.inputs / 2 * panel.blocks);
            packing = begin_packing(p, find_panel(p, &panels, n + 1), there);
            for (int64_t row = 0; row < p->rows; row += SPAN)
                for (int64_t block = 0; block < panel.blocks; block++)
                    panel_block(p, &panel, block, here, tail, row, &packing,
                                sums + (row * panel.blocks + block * SPAN) * SPAN);
            uint32_t *done = here;
            here = there, there = done;
        }
        _tile_release();
    }
}
