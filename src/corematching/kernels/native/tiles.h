/* Products of whole prompts on matrix tiles (AMX), bf16, with sums in fp32. Included last.

   Weights stay as they are. A tile of 16 outputs x 32 inputs of a matrix (outputs, inputs) is a
   left operand as it lies in memory, so the product comes out transposed and is turned when it is
   stored; the prompt's rows, far fewer bytes, are the operand that is packed. */
#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define CM_HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include "lanes.h"

#define TILE 16  /* rows of a tile, and floats in one */
#define DEPTH 32 /* inputs that a tile holds */
#define SPAN 32  /* outputs, and rows, that are computed at a time */
#define TILE_WORDS (TILE * TILE)

/* Tile registers 0 to 3 hold sums, 4 and 5 left operands, 6 and 7 right ones */
#define CLEAR_SUMS     \
    do {               \
        _tile_zero(0); \
        _tile_zero(1); \
        _tile_zero(2); \
        _tile_zero(3); \
    } while (0)
#define STORE_SUMS(sums)                              \
    do {                                              \
        _tile_stored(0, sums, LINE);                  \
        _tile_stored(1, sums + TILE_WORDS, LINE);     \
        _tile_stored(2, sums + 2 * TILE_WORDS, LINE); \
        _tile_stored(3, sums + 3 * TILE_WORDS, LINE); \
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

/* Rows [16 * tile, ...) of x (rows, inputs), those beyond its end 0, as right operands: one tile of
   (input pairs, rows) for every 32 inputs */
static void pack_rows(const bf16 *x, int64_t rows, int64_t inputs, int64_t tile, uint32_t *out) {
    for (int64_t k = 0; k < inputs; k += DEPTH, out += TILE_WORDS) {
        __m512i r[TILE];
        for (int64_t i = 0; i < TILE; i++) {
            int64_t row = tile * TILE + i;
            r[i] = row < rows ? _mm512_loadu_si512(x + row * inputs + k) : _mm512_setzero_si512();
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

/* sums[2 * i + j] (16, 16) = a tile row of weight i times the transpose of packed tile row j */
INLINE void multiply_block(const bf16 *first, const bf16 *second, const uint32_t *left,
                           int64_t inputs, ahead_t ahead[2], float *sums) {
    int64_t stride = inputs * (int64_t)sizeof(bf16);
    const uint32_t *right = left + TILE * inputs / 2;
    CLEAR_SUMS;
    for (int64_t k = 0; k < inputs; k += DEPTH, left += TILE_WORDS, right += TILE_WORDS) {
        _tile_loadd(4, first + k, stride);
        _tile_loadd(6, left, LINE);
        _tile_loadd(7, right, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, second + k, stride);
        fetch_ahead(ahead);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        fetch_ahead(ahead + 1);
        _tile_dpbf16ps(3, 5, 7);
    }
    STORE_SUMS(sums);
}

/* Two outputs of 16 rows, rounded, side by side in every word */
INLINE __m512i pair_outputs(__m512 even, __m512 odd) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

INLINE uint32_t *packed_of(const product_bf16 *p) { return p->scratch; }

INLINE __m512 sum_of(const float *sums, const bf16 *bias, int64_t output) {
    __m512 sum = _mm512_loadu_ps(sums);
    return bias ? _mm512_add_ps(sum, _mm512_set1_ps(widen_bf16(bias[output]))) : sum;
}

INLINE __m512 gated_lanes(const product_bf16 *p, const float *sums, int64_t output) {
    __m512 gate = round_bf16(sum_of(sums, p->gate_bias, output));
    __m512 up = round_bf16(sum_of(sums + 2 * TILE_WORDS, p->up_bias, output));
    return _mm512_mul_ps(activate_lanes(gate, p->activation), up);
}

/* Outputs [first, first + 16) of gate and up, rows [row, row + 32) */
static void gated_block(const product_bf16 *p, int64_t first, int64_t row, ahead_t ahead[2],
                        float *sums) {
    __m512i r[TILE];
    multiply_block(p->gate + first * p->inputs, p->up + first * p->inputs,
                   packed_of(p) + row * p->inputs / 2, p->inputs, ahead, sums);
    for (int64_t j = 0; j < 2; j++)
        for (int64_t i = 0; i < TILE; i += 2) {
            const float *pair = sums + j * TILE_WORDS + i * TILE;
            r[j * TILE / 2 + i / 2] = pair_outputs(gated_lanes(p, pair, first + i),
                                                   gated_lanes(p, pair + TILE, first + i + 1));
        }
    turn_words(r); /* row i of the first 16 beside row i of the second 16 */
    for (int64_t i = 0; i < TILE && row + i < p->rows; i++) {
        bf16 *out = p->out + (row + i) * p->stride + first;
        _mm256_storeu_si256((__m256i *)out, _mm512_castsi512_si256(r[i]));
        if (row + TILE + i < p->rows)
            _mm256_storeu_si256((__m256i *)(out + TILE * p->stride),
                                _mm512_extracti64x4_epi64(r[i], 1));
    }
}

/* 32 rounded numbers and 32 more that lie at `more` */
INLINE __m512i add_rows(__m512i row, const bf16 *more) {
    const bf16 *own = (const bf16 *)&row;
    __m512 low = (__m512)load_bf16(own), high = (__m512)load_bf16(own + TILE);
    low = _mm512_add_ps(low, (__m512)load_bf16(more));
    high = _mm512_add_ps(high, (__m512)load_bf16(more + TILE));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Outputs [first, first + 32), rows [row, row + 32) */
static void plain_block(const product_bf16 *p, int64_t first, int64_t row, ahead_t ahead[2],
                        float *sums) {
    const bf16 *weight = p->up + first * p->inputs;
    multiply_block(weight, weight + TILE * p->inputs, packed_of(p) + row * p->inputs / 2,
                   p->inputs, ahead, sums);
    for (int64_t j = 0; j < 2; j++) {
        __m512i r[TILE];
        for (int64_t i = 0; i < SPAN; i += 2) {
            const float *pair = sums + (i / TILE * 2 + j) * TILE_WORDS + i % TILE * TILE;
            r[i / 2] = pair_outputs(sum_of(pair, p->up_bias, first + i),
                                    sum_of(pair + TILE, p->up_bias, first + i + 1));
        }
        turn_words(r);
        int64_t from = row + j * TILE;
        for (int64_t i = 0; i < TILE && from + i < p->rows; i++) {
            __m512i row32 = r[i];
            if (p->residual) row32 = add_rows(row32, p->residual + (from + i) * p->outputs + first);
            _mm512_storeu_si512(p->out + (from + i) * p->stride + first, row32);
        }
    }
}

/* All rows of one block of outputs, while the weights of the next one come */
static void compute_outputs(const product_bf16 *p, int64_t block, int is_last, float *sums) {
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
        if (p->gate)
            gated_block(p, block * TILE, row, ahead, sums);
        else
            plain_block(p, block * SPAN, row, ahead, sums);
}

/* Several products of the same x, of which the first has the scratch memory */
static void multiply_rows(const product_bf16 *products, int count, int num_threads) {
    const product_bf16 *p = products;
    int64_t tiles = (p->rows + SPAN - 1) / SPAN * 2;
#pragma omp parallel num_threads(num_threads)
    {
        int64_t first, last, thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float sums[4 * TILE_WORDS] __attribute__((aligned(LINE)));
        for (int64_t tile = thread; tile < tiles; tile += threads)
            pack_rows(p->x, p->rows, p->inputs, tile, packed_of(p) + tile * TILE * p->inputs / 2);
        load_tile_config();
#pragma omp barrier
        for (int i = 0; i < count; i++) {
            int64_t blocks = products[i].outputs / (p->gate ? TILE : SPAN);
            split_bf16(blocks, (int)thread, (int)threads, &first, &last);
            for (int64_t block = first; block < last; block++)
                compute_outputs(products + i, block, block + 1 == last, sums);
        }
        _tile_release();
    }
}

/* A matrix stored by input, (inputs, outputs): 32 of its outputs as right operands, two tiles for
   every 32 inputs */
static void pack_outputs(const bf16 *weight, int64_t inputs, int64_t outputs, int64_t first,
                         uint32_t *out) {
    uint16_t low[DEPTH], high[DEPTH];
    for (int i = 0; i < DEPTH; i++) {
        low[i] = (uint16_t)(i / 2 + i % 2 * DEPTH);
        high[i] = (uint16_t)(low[i] + TILE);
    }
    __m512i pick_low = _mm512_loadu_si512(low), pick_high = _mm512_loadu_si512(high);
    for (int64_t k = 0; k < inputs; k += 2) {
        const bf16 *row = weight + k * outputs + first;
        uint32_t *to = out + k / DEPTH * 2 * TILE_WORDS + k % DEPTH / 2 * TILE;
        __m512i even = _mm512_loadu_si512(row), odd = _mm512_loadu_si512(row + outputs);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(even, pick_low, odd));
        _mm512_store_si512(to + TILE_WORDS, _mm512_permutex2var_epi16(even, pick_high, odd));
    }
}

/* Rows [row, row + 32) of 32 outputs; rows of x beyond its end are read from `tail`. What the next
   block reads comes meanwhile, `fetch` rows of the weight for every 32 inputs. */
static void by_input_block(const product_bf16 *p, const uint32_t *packed, const bf16 *tail,
                           int64_t first, int64_t row, int64_t fetch, float *sums) {
    const bf16 *ahead = p->up + row / SPAN * fetch * p->inputs / DEPTH * p->outputs + first + SPAN;
    int64_t stride = p->inputs * (int64_t)sizeof(bf16), full = p->rows / TILE * TILE;
    const bf16 *upper = row < full ? p->x + row * p->inputs : tail;
    int64_t next = row + TILE;
    const bf16 *lower = next < full ? p->x + next * p->inputs : tail;
    CLEAR_SUMS;
    for (int64_t k = 0; k < p->inputs; k += DEPTH, packed += 2 * TILE_WORDS) {
        _tile_loadd(4, upper + k, stride);
        _tile_loadd(6, packed, LINE);
        _tile_loadd(7, packed + TILE_WORDS, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower + k, stride);
        for (int64_t i = 0; i < fetch; i++, ahead += p->outputs) __builtin_prefetch(ahead, 0, 2);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    STORE_SUMS(sums);
    for (int64_t tile = 0; tile < 4; tile++)
        for (int64_t i = 0; i < TILE && row + tile / 2 * TILE + i < p->rows; i++) {
            int64_t output = first + tile % 2 * TILE;
            __m512 sum = _mm512_loadu_ps(sums + tile * TILE_WORDS + i * TILE);
            if (p->up_bias) sum = _mm512_add_ps(sum, (__m512)load_bf16(p->up_bias + output));
            int64_t at = row + tile / 2 * TILE + i;
            if (p->residual)
                sum = _mm512_add_ps(round_bf16(sum),
                                    (__m512)load_bf16(p->residual + at * p->outputs + output));
            bf16 *out = p->out + at * p->stride + output;
            _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(sum));
        }
}

/* up is (inputs, outputs) */
static void multiply_rows_by_input(const product_bf16 *p, int threads) {
    int64_t full = p->rows / TILE * TILE, panel = p->inputs * TILE;
    int64_t spans = (p->rows + SPAN - 1) / SPAN, lines = (DEPTH + spans - 1) / spans;
    bf16 *tail = (bf16 *)packed_of(p);
    memset(tail, 0, sizeof(bf16) * (size_t)(TILE * p->inputs));
    memcpy(tail, p->x + full * p->inputs, sizeof(bf16) * (size_t)((p->rows - full) * p->inputs));
#pragma omp parallel num_threads(threads)
    {
        int64_t first, last, thread = omp_get_thread_num(), count = omp_get_num_threads();
        float sums[4 * TILE_WORDS] __attribute__((aligned(LINE)));
        uint32_t *packed = packed_of(p) + TILE * p->inputs / 2 + thread * panel;
        load_tile_config();
        split_bf16(p->outputs / SPAN, (int)thread, (int)count, &first, &last);
        for (int64_t block = first; block < last; block++) {
            pack_outputs(p->up, p->inputs, p->outputs, block * SPAN, packed);
            for (int64_t row = 0; row < p->rows; row += SPAN)
                by_input_block(p, packed, tail, block * SPAN, row,
                               block + 1 < last ? lines : 0, sums);
        }
        _tile_release();
    }
}
#endif

/* Whether this machine lets this process use matrix tiles */
int cm_has_tiles(void) {
#if defined(CM_HAS_TILES)
    const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM */
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return 0;
#endif
}
