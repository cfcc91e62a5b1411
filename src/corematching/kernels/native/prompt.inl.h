/* A prompt's norms and rotations. Included once per dtype. */

/* Llama's RMSNorm of a row, rounded where PyTorch's operators round */
static void F(scale_row)(const W *x, const W *weight, W *out, int64_t n, double epsilon) {
    float scale = (float)(1.0 / sqrt((double)F(square_row)(x, n) / (double)n + epsilon));
    for (int64_t i = 0; i < n; i++)
        out[i] = NARROW(WIDEN(NARROW(WIDEN(x[i]) * scale)) * WIDEN(weight[i]));
}

/* PyTorch's LayerNorm of a row, rounded once */
static void F(centre_row)(const W *x, const W *weight, const W *shift, W *out, int64_t n,
                          double epsilon) {
    float mean = 0, square = 0;
    _Pragma("omp simd reduction(+ : mean)") for (int64_t i = 0; i < n; i++) mean += WIDEN(x[i]);
    mean /= (float)n;
    _Pragma("omp simd reduction(+ : square)") for (int64_t i = 0; i < n; i++) {
        float away = WIDEN(x[i]) - mean;
        square += away * away;
    }
    float scale = (float)(1.0 / sqrt((double)square / (double)n + epsilon));
    for (int64_t i = 0; i < n; i++)
        out[i] = NARROW((WIDEN(x[i]) - mean) * scale * WIDEN(weight[i]) + WIDEN(shift[i]));
}

/* The one where there is a shift, else the other */
INLINE void F(normalise_row)(const W *x, const W *weight, const W *shift, W *out, int64_t n,
                             double epsilon) {
    if (shift)
        F(centre_row)(x, weight, shift, out, n, epsilon);
    else
        F(scale_row)(x, weight, out, n, epsilon);
}

static void F(normalise)(const W *x, const W *weight, const W *shift, W *out, int64_t rows,
                         int64_t n, double epsilon, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        F(normalise_row)(x + row * n, weight, shift, out + row * n, n, epsilon);
}

/* Rotary embedding in place of the first heads of x, (rows, stride), rounded where PyTorch's
   operators round; row i takes the angles of row i % angles */
static void F(rotate_rows)(W *x, const W *cosine, const W *sine, int64_t rows, int64_t stride,
                           int64_t heads, int64_t size, int64_t angles, int threads) {
    int64_t half = size / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const W *c = cosine + row % angles * size, *s = sine + row % angles * size;
        for (W *head = x + row * stride; head < x + row * stride + heads * size; head += size)
            for (int64_t i = 0; i < half; i++) {
                float a = WIDEN(head[i]), b = WIDEN(head[i + half]);
                float low = WIDEN(NARROW(a * WIDEN(c[i]))) - WIDEN(NARROW(b * WIDEN(s[i])));
                float high = WIDEN(NARROW(b * WIDEN(c[i + half])));
                high += WIDEN(NARROW(a * WIDEN(s[i + half])));
                head[i] = NARROW(low), head[i + half] = NARROW(high);
            }
    }
}
