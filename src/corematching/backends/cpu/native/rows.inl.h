/* Products with rows of weights. Included once per dtype W; F(name) appends it to a name.
   A row is read once for up to BLOCK samples; `ahead` is a row that will be read soon. */

#define STEP (2 * LANES)
#define BLOCK 8
#define ROWS 4

/* How many rows of n weights to fetch ahead */
INLINE int64_t F(rows_ahead)(int64_t n) {
    int64_t size = n * (int64_t)sizeof(W);
    return (AHEAD_BYTES + size - 1) / size;
}

INLINE void F(prefetch)(const W *row, int64_t start) {
    for (uint64_t byte = 0; byte < STEP * sizeof(W); byte += LINE)
        __builtin_prefetch((const char *)(row + start) + byte, 0, 2);
}

INLINE void F(dots_of)(const W *row, const float *const *xs, const int samples, int64_t n,
                       const W *ahead, float *out) {
    vec low[BLOCK], high[BLOCK];
    _Pragma("GCC unroll 8") for (int s = 0; s < samples; s++) low[s] = high[s] = (vec){0};
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        F(prefetch)(ahead, i);
        vec first = LOAD(row + i), second = LOAD(row + i + LANES);
        _Pragma("GCC unroll 8") for (int s = 0; s < samples; s++) {
            low[s] += first * load_float(xs[s] + i);
            high[s] += second * load_float(xs[s] + i + LANES);
        }
    }
    _Pragma("GCC unroll 8") for (int s = 0; s < samples; s++) {
        float total = sum_lanes(low[s] + high[s]);
        for (int64_t j = i; j < n; j++) total += WIDEN(row[j]) * xs[s][j];
        out[s] = total;
    }
}

/* out[s] = row . xs[s], for any number of samples */
static void F(dots)(const W *row, const float *const *xs, int samples, int64_t n, const W *ahead,
                    float *out) {
    for (; samples > BLOCK; samples -= BLOCK, xs += BLOCK, out += BLOCK)
        F(dots_of)(row, xs, BLOCK, n, ahead, out);
    switch (samples) {
        case 1: F(dots_of)(row, xs, 1, n, ahead, out); break;
        case 2: F(dots_of)(row, xs, 2, n, ahead, out); break;
        case 3: F(dots_of)(row, xs, 3, n, ahead, out); break;
        case 4: F(dots_of)(row, xs, 4, n, ahead, out); break;
        case 5: F(dots_of)(row, xs, 5, n, ahead, out); break;
        case 6: F(dots_of)(row, xs, 6, n, ahead, out); break;
        case 7: F(dots_of)(row, xs, 7, n, ahead, out); break;
        case 8: F(dots_of)(row, xs, 8, n, ahead, out); break;
    }
}

INLINE void F(mix_of)(const W *const *rows, const float *factors, float *const *ys,
                      const int samples, int64_t n, const W *const *ahead) {
    int64_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        vec low[ROWS], high[ROWS];
        _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) {
            F(prefetch)(ahead[r], i);
            low[r] = LOAD(rows[r] + i);
            high[r] = LOAD(rows[r] + i + LANES);
        }
        _Pragma("GCC unroll 4") for (int s = 0; s < samples; s++) {
            vec a = load_float(ys[s] + i), b = load_float(ys[s] + i + LANES);
            _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++) {
                a += low[r] * factors[s * ROWS + r];
                b += high[r] * factors[s * ROWS + r];
            }
            store_float(ys[s] + i, a);
            store_float(ys[s] + i + LANES, b);
        }
    }
    for (; i < n; i++)
        for (int s = 0; s < samples; s++)
            for (int r = 0; r < ROWS; r++) ys[s][i] += factors[s * ROWS + r] * WIDEN(rows[r][i]);
}

/* ys[s] += sum over ROWS rows of factors[s][r] * rows[r], for any number of samples */
static void F(mix)(const W *const *rows, const float *factors, float *const *ys, int samples,
                   int64_t n, const W *const *ahead) {
    for (; samples > 4; samples -= 4, factors += 4 * ROWS, ys += 4)
        F(mix_of)(rows, factors, ys, 4, n, ahead);
    switch (samples) {
        case 1: F(mix_of)(rows, factors, ys, 1, n, ahead); break;
        case 2: F(mix_of)(rows, factors, ys, 2, n, ahead); break;
        case 3: F(mix_of)(rows, factors, ys, 3, n, ahead); break;
        case 4: F(mix_of)(rows, factors, ys, 4, n, ahead); break;
    }
}

/* Rows [first, last) of a linear layer: out[s][r] = weight[r] . xs[s] + bias[r], added if `add` */
static void F(linear)(const W *weight, const W *bias, const float *const *xs, int samples,
                      int64_t n, int64_t first, int64_t last, float *const *out, int add) {
    float results[MAX_BATCH];
    int64_t ahead = F(rows_ahead)(n);
    for (int64_t r = first; r < last; r++) {
        const W *row = weight + r * n;
        F(dots)(row, xs, samples, n, row + (r + ahead < last ? ahead * n : 0), results);
        float extra = bias ? WIDEN(bias[r]) : 0.0f;
        for (int s = 0; s < samples; s++)
            out[s][r] = results[s] + extra + (add ? out[s][r] : 0.0f);
    }
}

/* y = x / sqrt(mean(x^2) + epsilon) * weight; y may be x */
static void F(rms_norm)(const float *x, const W *weight, double epsilon, int64_t n, float *y) {
    float total = 0;
    _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) total += x[i] * x[i];
    float scale = (float)(1.0 / sqrt((double)total / (double)n + epsilon));
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * WIDEN(weight[i]);
}
