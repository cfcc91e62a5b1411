/* Attention of whole prompts on matrix tiles, bf16, with scores, softmax and sums in fp32. Included
   after tiles.h.

   A block of 32 queries sees all its keys at once: scores, their softmax, and the mean of the
   values. Keys and values of a group of heads are packed once, as right operands. */

enum { NO_MASK, FLAGS, SUMMANDS }; /* FLAGS: 0 hides a key; SUMMANDS, bf16, are added to scores */

/* `step_*` are the numbers between a tensor's samples, heads and tokens; a head's numbers stand
   side by side. Query t sees key s unless the mask hides it or, where it is causal, s > t. */
typedef struct {
    const void *query, *key, *value, *mask;
    void *out; /* (batch, length, heads, size) */
    void *scratch;
    int64_t step_query[3], step_key[3], step_value[3], step_mask[2]; /* of a mask: samples, rows */
    int64_t batch, heads, groups, length, stored, size, mask_kind, causal, threads;
    double scaling;
} attention_t;

#if defined(CM_HAS_TILES)
#define LOWEST (-3.0e38f)
#define HIDDEN (-1.0e38f) /* what a mask adds to a hidden key's score, or less */
#define LOG2_E 1.44269504f

INLINE int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

/* Bytes of a thread's scratch memory: scores, weights and the sums of 32 queries, and a copy of
   queries where fewer are left */
INLINE int64_t attention_bytes(const attention_t *a) {
    int64_t keys = round_up(a->stored, SPAN);
    return SPAN * (keys * 6 + a->size * 6);
}

/* Bytes of scratch memory, on a cache line, that cm_attend needs */
int64_t cm_attend_scratch(const attention_t *a) {
    int64_t packed = a->batch * a->groups * round_up(a->stored, SPAN) * a->size;
    return 2 * packed * (int64_t)sizeof(bf16) + a->threads * attention_bytes(a);
}

/* Values [32 * chunk, ...) of a head as right operands: a tile of (key pairs, 16 numbers) for every
   16 numbers of a value */
static void pack_values(const bf16 *values, int64_t stored, int64_t stride, int64_t size,
                        int64_t chunk, uint32_t *out) {
    for (int64_t pair = 0; pair < TILE; pair++) {
        int64_t key = chunk * DEPTH + 2 * pair;
        const bf16 *even = values + key * stride, *odd = even + stride;
        for (int64_t d = 0; d < size; d += TILE) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (key < stored)
                low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + d)));
            if (key + 1 < stored)
                high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(odd + d)));
            _mm512_store_si512(out + d / TILE * TILE_WORDS + pair * TILE,
                               _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

/* out (32, 32), `width` floats between its rows = 32 rows of x, `stride` numbers apart, times two
   columns of right operands, whose tiles are `step` words apart */
INLINE void multiply_square(const bf16 *x, int64_t stride, int64_t inputs, const uint32_t *left,
                            const uint32_t *right, int64_t step, float *out, int64_t width) {
    int64_t row_bytes = stride * (int64_t)sizeof(bf16), out_bytes = width * (int64_t)sizeof(float);
    CLEAR_SUMS;
    for (int64_t k = 0; k < inputs; k += DEPTH, left += step, right += step) {
        _tile_loadd(4, x + k, row_bytes);
        _tile_loadd(6, left, LINE);
        _tile_loadd(7, right, LINE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, x + TILE * stride + k, row_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + TILE, out_bytes);
    _tile_stored(2, out + TILE * width, out_bytes);
    _tile_stored(3, out + TILE * width + TILE, out_bytes);
}

/* scores (32, keys) of 32 queries `stride` numbers apart with packed keys */
static void score_keys(const bf16 *queries, int64_t stride, const uint32_t *keys, int64_t size,
                       int64_t count, float *scores, int64_t width) {
    int64_t tile_words = TILE * size / 2;
    for (int64_t s = 0; s < count; s += SPAN, keys += 2 * tile_words)
        multiply_square(queries, stride, size, keys, keys + tile_words, TILE_WORDS, scores + s,
                        width);
}

INLINE __mmask16 first_lanes(int64_t count) {
    return (__mmask16)(count < TILE ? (1 << count) - 1 : 0xffff);
}

INLINE const char *mask_row(const attention_t *a, int64_t sample, int64_t row) {
    int64_t bytes = a->mask_kind == FLAGS ? 1 : sizeof(bf16);
    return (const char *)a->mask + (sample * a->step_mask[0] + row * a->step_mask[1]) * bytes;
}

INLINE __mmask16 load_flags(const char *mask, int64_t s, __mmask16 on) {
    __m128i flags = _mm_maskz_loadu_epi8(on, mask + s);
    return _mm_mask_test_epi8_mask(on, flags, flags);
}

INLINE __m512 load_summands(const char *mask, int64_t s, __mmask16 on) {
    __m256i more = _mm256_maskz_loadu_epi16(on, (const bf16 *)mask + s);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(more), 16);
}

/* How many keys a query has to look at: behind them all are hidden. Where every key is, all of them
   count alike. */
static int64_t count_seen(const attention_t *a, int64_t sample, int64_t row) {
    int64_t seen = a->causal && row + 1 < a->stored ? row + 1 : a->stored, end = seen;
    if (a->mask_kind == NO_MASK) return seen;
    const char *mask = mask_row(a, sample, row);
    for (; end > 0; end = (end - 1) / TILE * TILE) {
        int64_t from = (end - 1) / TILE * TILE;
        __mmask16 on = first_lanes(end - from), shown;
        if (a->mask_kind == FLAGS)
            shown = load_flags(mask, from, on);
        else
            shown = _mm512_mask_cmp_ps_mask(on, load_summands(mask, from, on),
                                            _mm512_set1_ps(HIDDEN), _CMP_NLE_UQ);
        if (shown) return end;
    }
    return seen;
}

/* 16 scores under a mask, as powers of 2; hidden ones are lowest */
INLINE __m512 mask_lanes(const attention_t *a, __m512 x, const char *mask, int64_t s,
                         __mmask16 on) {
    __m512 unit = _mm512_set1_ps(LOG2_E), lowest = _mm512_set1_ps(LOWEST);
    x = _mm512_mul_ps(x, _mm512_set1_ps((float)a->scaling * LOG2_E));
    if (a->mask_kind == FLAGS)
        on = load_flags(mask, s, on);
    else
        x = _mm512_fmadd_ps(load_summands(mask, s, on), unit, x);
    return _mm512_mask_mov_ps(lowest, on, _mm512_max_ps(lowest, x));
}

/* The first `count` of a query's scores become weights, e to the difference from the largest one,
   the others up to `width` 0. Returns 1 over their sum. */
static float weigh_keys(const attention_t *a, float *scores, const char *mask, int64_t count,
                        int64_t width, bf16 *weights) {
    __m512 largest = _mm512_set1_ps(LOWEST), total = _mm512_setzero_ps();
    for (int64_t s = 0; s < count; s += TILE) {
        __m512 x = _mm512_load_ps(scores + s);
        __mmask16 on = first_lanes(count - s);
        if (a->mask_kind != NO_MASK)
            _mm512_store_ps(scores + s, x = mask_lanes(a, x, mask, s, on));
        largest = _mm512_mask_max_ps(largest, on, largest, x);
    }
    float factor = a->mask_kind == NO_MASK ? (float)a->scaling * LOG2_E : 1.0f;
    __m512 unit = _mm512_set1_ps(factor);
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest) * factor);
    for (int64_t s = 0; s < count; s += TILE) {
        __m512 x = exp2_lanes(_mm512_fmsub_ps(_mm512_load_ps(scores + s), unit, top));
        x = _mm512_maskz_mov_ps(first_lanes(count - s), x);
        total = _mm512_add_ps(total, x);
        store_bf16(weights + s, x);
    }
    int64_t done = round_up(count, TILE);
    memset(weights + done, 0, sizeof(bf16) * (size_t)(width - done));
    return 1 / _mm512_reduce_add_ps(total);
}

/* sums (32, size) of packed values under weights (32, keys), `width` numbers apart */
static void sum_values(const bf16 *weights, const uint32_t *values, int64_t size, int64_t count,
                       int64_t width, float *sums) {
    for (int64_t d = 0; d < size; d += SPAN, values += 2 * TILE_WORDS)
        multiply_square(weights, width, count, values, values + TILE_WORDS, size * TILE, sums + d,
                        size);
}

/* Queries [first, first + 32) of a head */
static void attend_block(const attention_t *a, int64_t sample, int64_t head, int64_t first,
                         const uint32_t *keys, const uint32_t *values, char *scratch) {
    int64_t width = round_up(a->stored, SPAN), rows = a->length - first, stride = a->step_query[2];
    rows = rows < SPAN ? rows : SPAN;
    float *scores = (float *)scratch, *sums = scores + SPAN * width;
    bf16 *weights = (bf16 *)(sums + SPAN * a->size), *copy = weights + SPAN * width;
    const bf16 *queries = (const bf16 *)a->query + sample * a->step_query[0] +
                          head * a->step_query[1] + first * stride;
    if (rows < SPAN) {
        memset(copy, 0, sizeof(bf16) * (size_t)(SPAN * a->size));
        for (int64_t i = 0; i < rows; i++)
            memcpy(copy + i * a->size, queries + i * stride, sizeof(bf16) * (size_t)a->size);
        queries = copy, stride = a->size;
    }
    int64_t seen[SPAN], most = 1;
    for (int64_t i = 0; i < rows; i++) {
        seen[i] = count_seen(a, sample, first + i);
        most = seen[i] > most ? seen[i] : most;
    }
    int64_t count = round_up(most, SPAN);
    score_keys(queries, stride, keys, a->size, count, scores, width);
    float factors[SPAN];
    for (int64_t i = 0; i < rows; i++)
        factors[i] = weigh_keys(a, scores + i * width, mask_row(a, sample, first + i), seen[i],
                                count, weights + i * width);
    for (int64_t i = rows; i < SPAN; i++)
        memset(weights + i * width, 0, sizeof(bf16) * (size_t)count);
    sum_values(weights, values, a->size, count, width, sums);
    bf16 *out = (bf16 *)a->out + ((sample * a->length + first) * a->heads + head) * a->size;
    for (int64_t i = 0; i < rows; i++, out += a->heads * a->size)
        for (int64_t d = 0; d < a->size; d += TILE) {
            __m512 x = _mm512_load_ps(sums + i * a->size + d);
            x = _mm512_mul_ps(x, _mm512_set1_ps(factors[i]));
            store_bf16(out + d, x);
        }
}

/* Tiles are configured; the sizes are multiples of 32 */
void cm_attend(const attention_t *a) {
    int64_t width = round_up(a->stored, SPAN), sets = a->batch * a->groups, chunks = width / DEPTH;
    int64_t blocks = ceil_div(a->length, SPAN), words = width * a->size / 2;
    uint32_t *keys = a->scratch, *values = keys + sets * words;
    char *rest = (char *)(values + sets * words);
#pragma omp parallel num_threads((int)a->threads)
    {
        char *own = rest + omp_get_thread_num() * attention_bytes(a);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sets * chunks; i++) {
            int64_t set = i / chunks, chunk = i % chunks, sample = set / a->groups;
            int64_t group = set % a->groups, tile_words = TILE * a->size / 2;
            const bf16 *from =
                (const bf16 *)a->key + sample * a->step_key[0] + group * a->step_key[1];
            uint32_t *to = keys + set * words + 2 * chunk * tile_words;
            pack_rows(from, a->stored, a->step_key[2], a->size, 2 * chunk, to);
            pack_rows(from, a->stored, a->step_key[2], a->size, 2 * chunk + 1, to + tile_words);
            from = (const bf16 *)a->value + sample * a->step_value[0] + group * a->step_value[1];
            pack_values(from, a->stored, a->step_value[2], a->size, chunk,
                        values + set * words + chunk * TILE * a->size);
        }
        load_tile_config();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a->batch * a->heads * blocks; i++) {
            int64_t which = i % (a->batch * a->heads), block = blocks - 1 - i / (a->batch * a->heads);
            int64_t sample = which / a->heads, head = which % a->heads;
            int64_t set = sample * a->groups + head / (a->heads / a->groups);
            attend_block(a, sample, head, block * SPAN, keys + set * words, values + set * words,
                         own);
        }
        _tile_release();
    }
}
#else
int64_t cm_attend_scratch(const attention_t *a) { return (void)a, 0; }
void cm_attend(const attention_t *a) { (void)a; }
#endif
