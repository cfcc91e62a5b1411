/* A prompt's norms and rotations. Included once per dtype. */

/* Llama's RMSNorm of a row, rounded where PyTorch's operators round */
static void F(normalise_row)(const W *x, const W *weight, W *out, int64_t n, double epsilon) {
    float scale = (float)(1.0 / sqrt((double)F(square_row)(x, n) / (double)n + epsilon));
    for (int64_t i = 0; i < n; i++)
        out[i] = NARROW(WIDEN(NARROW(WIDEN(x[i]) * scale)) * WIDEN(weight[i]));
}

static void F(normalise)(const W *x, const W *weight, W *out, int64_t rows, int64_t n,
                         double epsilon, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        F(normalise_row)(x + row * n, weight, out + row * n, n, epsilon);
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
