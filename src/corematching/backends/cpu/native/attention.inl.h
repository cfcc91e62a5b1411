/* Query heads that share one head of keys and values. Included once per dtype, after rows.inl.h. */

/* The probabilities of one query head, from its scores, in place; hidden columns get 0 */
INLINE void F(softmax)(float *scores, const uint8_t *valid, int64_t n) {
    float most = -INFINITY, total = 0;
    if (valid)
        for (int64_t i = 0; i < n; i++) scores[i] = valid[i] ? scores[i] : -INFINITY;
    for (int64_t i = 0; i < n; i++) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = 0; i < n; i++) scores[i] = exp_fast(scores[i] - most);
    if (valid)
        for (int64_t i = 0; i < n; i++) scores[i] = valid[i] ? scores[i] : 0.0f;
    _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) total += scores[i];
    for (int64_t i = 0; i < n; i++) scores[i] /= total;
}

/* mixed (heads, size) from queries (heads, size) and the cache's keys and values (length, size) */
static void F(attend_heads)(const step_t *step, const W *keys, const W *values,
                            const uint8_t *valid, const float *log_counts, float *queries,
                            int heads, float *scores, float *mixed) {
    int64_t size = step->head_dim, n = step->length;
    int64_t distance = (F(rows_ahead)(size) + ROWS - 1) / ROWS * ROWS;
    const float *xs[MAX_BATCH];
    float *ys[MAX_BATCH], results[MAX_BATCH], factors[MAX_BATCH * ROWS];
    for (int h = 0; h < heads; h++) xs[h] = queries + h * size, ys[h] = mixed + h * size;
    for (int64_t i = 0; i < n; i++) {
        const W *row = keys + i * size;
        F(dots)(row, xs, heads, size, row + (i + distance < n ? distance * size : 0), results);
        for (int h = 0; h < heads; h++)
            scores[h * step->capacity + i] = results[h] * (float)step->scaling;
    }
    int64_t weighed = !log_counts ? 0 : step->weighed < n ? step->weighed : n;
    for (int h = 0; h < heads; h++)
        for (int64_t i = 0; i < weighed; i++) scores[h * step->capacity + i] += log_counts[i];
    for (int h = 0; h < heads; h++) F(softmax)(scores + h * step->capacity, valid, n);
    memset(mixed, 0, sizeof(float) * (size_t)(heads * size));
    for (int64_t i = 0; i < n; i += ROWS) {
        const W *rows[ROWS], *ahead[ROWS];
        for (int r = 0; r < ROWS; r++) {
            int64_t here = i + r < n ? i + r : i;
            rows[r] = values + here * size;
            ahead[r] = values + (here + distance < n ? here + distance : here) * size;
            for (int h = 0; h < heads; h++)
                factors[h * ROWS + r] = i + r < n ? scores[h * step->capacity + i + r] : 0.0f;
        }
        F(mix)(rows, factors, ys, heads, size, ahead);
    }
}
