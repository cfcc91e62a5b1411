/* Sums over the tokens of a prompt. Included once per dtype of the values. */

static float F(square_row)(const W *row, int64_t n) {
    float total = 0;
    _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) {
        float value = WIDEN(row[i]);
        total += value * value;
    }
    return total;
}

INLINE void F(add_row)(const W *row, int64_t first, int64_t last, int64_t kind, float factor,
                       float *out) {
    if (kind == SUM) {
        for (int64_t i = first; i < last; i++) out[i] += WIDEN(row[i]);
    } else if (kind == SUM_SIZES) {
        for (int64_t i = first; i < last; i++) out[i] += fabsf(WIDEN(row[i]));
    } else {
        for (int64_t i = first; i < last; i++) {
            float value = WIDEN(row[i]);
            out[i] += value * value * factor;
        }
    }
}

/* out (batch, n) = a sum over those of the tokens (batch, length) that count. `factors` has room
   for (batch, length). Threads split the columns: their number changes no result. */
static void F(sum_rows)(const W *values, const uint8_t *tokens, int64_t kind, float *factors,
                        float *out, int64_t batch, int64_t length, int64_t n, int threads) {
    int64_t parts = batch < threads ? threads : 1;
    if (kind == SUM_UNIT_SQUARES) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t t = 0; t < batch * length; t++) {
            float size = tokens[t] ? F(square_row)(values + t * n, n) : 0;
            factors[t] = 1.0f / (size > TINY ? size : TINY);
        }
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < batch * parts; task++) {
        int64_t sample = task / parts, part = task % parts;
        int64_t first = n * part / parts, last = n * (part + 1) / parts;
        float *to = out + sample * n;
        for (int64_t i = first; i < last; i++) to[i] = 0;
        for (int64_t t = sample * length; t < (sample + 1) * length; t++)
            if (tokens[t])
                F(add_row)(values + t * n, first, last, kind,
                           kind == SUM_UNIT_SQUARES ? factors[t] : 0, to);
    }
}
