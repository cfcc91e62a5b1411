/* Products of whole prompts on matrix tiles (AMX), bf16, with sums in fp32. Included last.

   Weights stay as they are. A tile of 16 outputs x 32 inputs of a matrix (outputs, inputs) is a
   left operand as it lies in memory, so the product comes out transposed and is turned when it is
   stored; the prompt's rows, far fewer bytes, are the operand that is packed. */
#if defined(CM_EMULATE_TILES) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define CM_HAS_TILES
#include "emulated_tiles.h"
#elif defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && \
    defined(__linux__)
#define CM_HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(CM_HAS_TILES)

#include "lanes.h"

#define TILE 16  /* rows of a tile, and floats in one */
#define DEPTH 32 /* inputs that a tile holds */
#define SPAN 32  /* outputs, and rows, that are computed at a time */
#define TILE_WORDS (TILE * TILE)
#define MOST_PACKED (1 << 20) /* bytes of x */
#define FEWEST_PACKED 96      /* rows of x, whatever their bytes */

/* Tile registers 0 to 3 hold sums, 4 and 5 left operands, 6 and 7 right ones */
#define CLEAR_SUMS     \
    do {               \
        _tile_zero(0); \
        _tile_zero(1); \
        _tile_zero(2); \
        _tile_zero(3); \
    } while (0)
/* All four between their registers and memory, by _tile_loadd or _tile_stored */
#define MOVE_SUMS(move, sums)                 \
    do {                                      \
        move(0, sums, LINE);                  \
        move(1, sums + TILE_WORDS, LINE);     \
        move(2, sums + 2 * TILE_WORDS, LINE); \
        move(3, sums + 3 * TILE_WORDS, LINE); \
    } while (0)

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config_t;

static void load_tile_config(void) {
    tile_config_t config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = LINE, config.rows[i] = TILE;
    _tile_loadconfig(&config);
}

/* Rows [16 * tile, ...) of x, `rows` of them `stride` numbers apart, those beyond its end 0, as
   right operands: one tile of (input pairs, rows) for every 32 inputs */
static void pack_rows(const bf16 *x, int64_t rows, int64_t stride, int64_t inputs, int64_t tile,
                      uint32_t *out) {
    for (int64_t k = 0; k < inputs; k += DEPTH, out += TILE_WORDS) {
        __m512i r[TILE];
        for (int64_t i = 0; i < TILE; i++) {
            int64_t row = tile * TILE + i;
            r[i] = row < rows ? _mm512_loadu_si512(x + row * stride + k) : _mm512_setzero_si512();
        }
        turn_words(r);
        for (int i = 0; i < TILE; i++) _mm512_store_si512(out + i * TILE, r[i]);
    }
}

/* Weights that the next block reads: `lines` of them are fetched for every 32 inputs */
typedef struct {
    const char *at;
    int64_t lines;
} ahead_t;

INLINE void fetch_ahead(ahead_t *ahead) {
    for (int64_t i = 0; i < ahead->lines; i++, ahead->at += LINE)
        __builtin_prefetch(ahead->at, 0, 2);
}

/* A block whose sums are there, and whose outputs are made of them, pair by pair, while the tiles
   compute the next block: outputs [first, first + 16) of gate and up, or [first, first + 32), of
   rows [row, row + 32). The sums (16, 16) of weights i and rows j are number 2 * i + j. */
typedef struct {
    const product_bf16 *p;
    int64_t first, row, done, pairs;
    float *sums;
    int keeps;             /* whether some row's gate is kept; it stands in outputs + TILE */
    __m512i outputs[SPAN]; /* two outputs of 16 rows in each */
} pending_t;

INLINE uint32_t *packed_of(const product_bf16 *p) { return p->scratch; }

/* Two outputs of 16 rows, rounded, side by side in every word */
INLINE __m512i pair_outputs(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)narrow_lanes((vec)even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)narrow_lanes((vec)odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

INLINE __m512 sum_of(const float *sums, const bf16 *bias, int64_t output) {
    __m512 sum = _mm512_loadu_ps(sums);
    return bias ? _mm512_add_ps(sum, _mm512_set1_ps(widen_bf16(bias[output]))) : sum;
}

INLINE __m512 gate_of(const product_bf16 *p, const float *sums, int64_t output) {
    return activate_lanes(round_bf16(sum_of(sums, p->gate_bias, output)), p->activation);
}

INLINE __m512 up_of(const product_bf16 *p, const float *sums, int64_t output) {
    return round_bf16(sum_of(sums + 2 * TILE_WORDS, p->up_bias, output));
}

/* What comes out where there is no gate, not rounded yet */
INLINE __m512 activate_sum(const product_bf16 *p, __m512 sum) {
    return p->activation == NO_ACTIVATION ? sum : activate_lanes(round_bf16(sum), p->activation);
}

/* The next pair of outputs of 16 rows; a row, or two, that they will be written to is fetched */
INLINE void make_pair(pending_t *block) {
    const product_bf16 *p = block->p;
    int64_t per_tile = p->gate ? TILE / 2 : TILE, half = block->done >= per_tile;
    int64_t i = (block->done - half * per_tile) * 2, output = block->first + i;
    int64_t rows = TILE / per_tile, row = block->row + block->done * rows;
    for (int64_t more = 0; more < rows; more++)
        __builtin_prefetch(p->out + (row + more) * p->stride + block->first, 1);
    const float *sums = block->sums + half * TILE_WORDS + i * TILE;
    if (p->gate) {
        __m512 even = gate_of(p, sums, output), odd = gate_of(p, sums + TILE, output + 1);
        if (block->keeps) block->outputs[TILE + block->done] = pair_outputs(even, odd);
        even = _mm512_mul_ps(even, up_of(p, sums, output));
        odd = _mm512_mul_ps(odd, up_of(p, sums + TILE, output + 1));
        block->outputs[block->done] = pair_outputs(even, odd);
    } else {
        if (i >= TILE) sums += TILE_WORDS; /* behind those of the other rows */
        __m512 even = activate_sum(p, sum_of(sums, p->up_bias, output));
        __m512 odd = activate_sum(p, sum_of(sums + TILE, p->up_bias, output + 1));
        block->outputs[block->done] = pair_outputs(even, odd);
    }
    block->done++;
}

/* 32 rounded numbers and 32 more that lie at `more` */
INLINE __m512i add_rows(__m512i row, const bf16 *more) {
    const bf16 *own = (const bf16 *)&row;
    __m512 low = (__m512)load_bf16(own), high = (__m512)load_bf16(own + TILE);
    low = _mm512_add_ps(low, (__m512)load_bf16(more));
    high = _mm512_add_ps(high, (__m512)load_bf16(more + TILE));
    return narrow_pair(low, high);
}

/* Where the gate of a row is kept, NULL if it is not */
INLINE bf16 *place_of(const product_bf16 *p, int64_t row) {
    return p->places[row] < 0 ? NULL : p->gates + p->places[row] * p->outputs;
}

/* The outputs, or gates that are kept, of a block; row i of the first 16 stands beside row i of the
   second 16 */
static void store_gated(const pending_t *block, __m512i r[TILE], int kept) {
    const product_bf16 *p = block->p;
    turn_words(r);
    for (int64_t i = 0; i < SPAN && block->row + i < p->rows; i++) {
        int64_t row = block->row + i;
        bf16 *out = kept ? place_of(p, row) : p->out + row * p->stride;
        if (out)
            _mm256_storeu_si256((__m256i *)(out + block->first),
                                i < TILE ? _mm512_castsi512_si256(r[i])
                                         : _mm512_extracti64x4_epi64(r[i - TILE], 1));
    }
}

static void store_plain(const pending_t *block, __m512i r[TILE], int64_t from) {
    const product_bf16 *p = block->p;
    turn_words(r);
    for (int64_t i = 0; i < TILE && from + i < p->rows; i++) {
        const bf16 *more = p->residual + (from + i) * p->outputs + block->first;
        __m512i row = p->residual ? add_rows(r[i], more) : r[i];
        _mm512_storeu_si512(p->out + (from + i) * p->stride + block->first, row);
    }
}

/* What is left of a block, and its outputs to their places */
static void finish_block(pending_t *block) {
    while (block->done < block->pairs) make_pair(block);
    if (!block->pairs) return;
    if (block->p->gate) {
        store_gated(block, block->outputs, 0);
        if (block->keeps) store_gated(block, block->outputs + TILE, 1);
    } else {
        store_plain(block, block->outputs, block->row);
        if (block->pairs > TILE) store_plain(block, block->outputs + TILE, block->row + TILE);
    }
    block->pairs = block->done = 0;
}

/* The sums of 32 outputs, 16 at `first` and 16 at `second`, and 32 packed rows (of 16 rows or fewer
   only those with j = 0), while the block before is finished; they take the place of its sums */
static void multiply_block(const bf16 *first, const bf16 *second, const uint32_t *left,
                           int64_t rows, int64_t inputs, ahead_t ahead[2],
                           pending_t *before) {
    int64_t stride = inputs * (int64_t)sizeof(bf16), steps = inputs / DEPTH;
    int64_t each = ceil_div(before->pairs, steps);
    const uint32_t *right = left + TILE * inputs / 2;
    CLEAR_SUMS;
    for (int64_t k = 0; k < inputs; k += DEPTH, left += TILE_WORDS, right += TILE_WORDS) {
        _tile_loadd(4, first + k, stride);
        _tile_stream_loadd(6, left, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, second + k, stride);
        fetch_ahead(ahead);
        _tile_dpbf16ps(2, 5, 6);
        if (rows > TILE) {
            _tile_stream_loadd(7, right, LINE);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        fetch_ahead(ahead + 1);
        for (int64_t i = 0; i < each && before->done < before->pairs; i++) make_pair(before);
    }
    finish_block(before);
    MOVE_SUMS(_tile_stored, before->sums);
}

/* One block, of rows [row, row + 32); the one before is finished meanwhile, this one is not */
static void compute_block(const product_bf16 *p, int64_t first, int64_t row, ahead_t ahead[2],
                          pending_t *pending) {
    const bf16 *one = (p->gate ? p->gate : p->up) + first * p->inputs;
    const bf16 *two = p->gate ? p->up + first * p->inputs : one + TILE * p->inputs;
    multiply_block(one, two, packed_of(p) + row * p->inputs / 2, p->rows - row, p->inputs, ahead,
                   pending);
    int64_t pairs = p->gate ? TILE / 2 : TILE;
    pending->p = p, pending->first = first, pending->row = row;
    pending->pairs = p->rows - row > TILE ? 2 * pairs : pairs;
    pending->keeps = 0;
    for (int64_t i = row; p->places && i < p->rows && i < row + SPAN; i++)
        pending->keeps |= p->places[i] >= 0;
}

/* All rows of one block of outputs, while the weights of the next one come */
static void compute_outputs(const product_bf16 *p, int64_t block, int is_last,
                            pending_t *pending) {
    int64_t spans = (p->rows + SPAN - 1) / SPAN, per_tile = p->inputs * TILE;
    int64_t lines = (TILE + spans - 1) / spans; /* per 32 inputs, of the 16 in a tile's row */
    int64_t next = is_last ? 0 : block + 1;
    ahead_t ahead[2];
    for (int64_t i = 0; i < 2; i++) {
        const bf16 *from = p->gate ? (i ? p->up : p->gate) + next * per_tile
                                   : p->up + (2 * next + i) * per_tile;
        ahead[i] = (ahead_t){(const char *)from, is_last ? 0 : lines};
    }
    for (int64_t row = 0; row < p->rows; row += SPAN)
        compute_block(p, block * (p->gate ? TILE : SPAN), row, ahead, pending);
}

/* Every so many tiles' rows of x as right operands, normalised first where there is a norm */
static void pack_prompt(const product_bf16 *p, int64_t thread, int64_t threads) {
    int64_t tiles = ceil_div(p->rows, SPAN) * 2, panel = p->inputs * TILE;
    bf16 *normed = (bf16 *)(packed_of(p) + tiles / 2 * panel + thread * panel);
    for (int64_t tile = thread; tile < tiles; tile += threads) {
        int64_t first = tile * TILE, rows = p->rows - first < TILE ? p->rows - first : TILE;
        const bf16 *x = p->x + first * p->inputs;
        for (int64_t i = 0; p->norm && i < rows; i++)
            normalise_row_bf16(x + i * p->inputs, p->norm, p->shift, normed + i * p->inputs,
                               p->inputs, p->epsilon);
        pack_rows(p->norm ? normed : x, rows, p->inputs, p->inputs, 0,
                  packed_of(p) + tile * panel / 2);
    }
}

/* Several products of the same x, of which the first has the scratch memory */
static void multiply_rows(const product_bf16 *products, int count, int num_threads) {
    const product_bf16 *p = products;
#pragma omp parallel num_threads(num_threads)
    {
        int64_t first, last, thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float sums[4 * TILE_WORDS] __attribute__((aligned(LINE)));
        pending_t pending = {.sums = sums};
        pack_prompt(p, thread, threads);
        load_tile_config();
#pragma omp barrier
        for (int i = 0; i < count; i++) {
            int64_t blocks = products[i].outputs / (p->gate ? TILE : SPAN);
            split_bf16(blocks, (int)thread, (int)threads, &first, &last);
            for (int64_t block = first; block < last; block++)
                compute_outputs(products + i, block, block + 1 == last, &pending);
        }
        finish_block(&pending);
        _tile_release();
    }
}

/* The same, so many rows at a time that what is packed of them stays in the second-level cache */
static void multiply_tiles(const product_bf16 *products, int count, int num_threads) {
    int64_t inputs = products->inputs, rows = products->rows, bytes = inputs * (int64_t)sizeof(bf16);
    int64_t most = MOST_PACKED / bytes > FEWEST_PACKED ? MOST_PACKED / bytes : FEWEST_PACKED;
    int64_t each = ceil_div(ceil_div(rows, ceil_div(rows, most)), SPAN) * SPAN;
    for (int64_t from = 0; from < rows; from += each) {
        product_bf16 some[MOST_PRODUCTS];
        for (int i = 0; i < count; i++) {
            some[i] = products[i];
            some[i].rows = rows - from < each ? rows - from : each;
            some[i].x += from * inputs;
            some[i].out += from * some[i].stride;
            if (some[i].residual) some[i].residual += from * some[i].outputs;
            if (some[i].places) some[i].places += from;
        }
        multiply_rows(some, count, num_threads);
    }
}

#include "tiled_panels.h"

/* Floats of scratch memory for products of either kind */
INLINE int64_t count_tiled_floats(int64_t rows, int64_t inputs, int64_t threads) {
    int64_t packed = (ceil_div(rows, SPAN) + 2 * threads) * TILE * inputs;
    return packed + threads * count_panel_floats(rows);
}
#endif

/* Whether this machine lets this process use matrix tiles */
int cm_has_tiles(void) {
#if defined(CM_EMULATE_TILES) && defined(CM_HAS_TILES)
    return 1;
#elif defined(CM_HAS_TILES)
    const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM */
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return 0;
#endif
}
