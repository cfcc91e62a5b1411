/* A prompt's norms and rotations. Included once per dtype. */

/* Llama's RMSNorm of a row, rounded where PyTorch's operators round */
static void F(scale_row)(const W *x, const W *weight, W *out, int64_t n, double epsilon) {
    float scale = (float)(1.0 / sqrt((double)F(square_row)(x, n) / (double)n + epsilon));
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        STORE(out + i, F(round)(LOAD(x + i) * scale) * LOAD(weight + i));
    for (; i < n; i++) out[i] = NARROW(WIDEN(NARROW(WIDEN(x[i]) * scale)) * WIDEN(weight[i]));
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

/* Rotary embedding of a head, rounded where PyTorch's operators round; out may be the head */
INLINE void F(rotate_head)(const W *head, const W *cosine, const W *sine, int64_t half, W *out) {
    const W *more = head + half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        vec a = LOAD(head + i), b = LOAD(more + i);
        vec low = F(round)(a * LOAD(cosine + i)) - F(round)(b * LOAD(sine + i));
        vec high = F(round)(b * LOAD(cosine + i + half)) + F(round)(a * LOAD(sine + i + half));
        STORE(out + i, low);
        STORE(out + i + half, high);
    }
    for (; i < half; i++) {
        float a = WIDEN(head[i]), b = WIDEN(more[i]);
        float low = WIDEN(NARROW(a * WIDEN(cosine[i]))) - WIDEN(NARROW(b * WIDEN(sine[i])));
        float high = WIDEN(NARROW(b * WIDEN(cosine[i + half])));
        high += WIDEN(NARROW(a * WIDEN(sine[i + half])));
        out[i] = NARROW(low), out[i + half] = NARROW(high);
    }
}

/* x (batch, length, heads + 2 * groups, size): rotates the first heads, queries, in place; the keys
   behind them go rotated to keys (batch, groups, length, size), the values behind these as they are
   to values. Token i of all takes the angles of row i % angles */
static void F(rotate_apart)(W *x, const W *cosine, const W *sine, W *keys, W *values, int64_t batch,
                            int64_t length, int64_t heads, int64_t groups, int64_t size,
                            int64_t angles, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < batch * length; token++) {
        const W *c = cosine + token % angles * size, *s = sine + token % angles * size;
        W *own = x + token * (heads + 2 * groups) * size;
        for (int64_t h = 0; h < heads; h++, own += size) F(rotate_head)(own, c, s, size / 2, own);
        int64_t place = (token / length * groups * length + token % length) * size;
        for (int64_t g = 0; g < groups; g++, place += length * size, own += size) {
            F(rotate_head)(own, c, s, size / 2, keys + place);
            memcpy(values + place, own + groups * size, (size_t)size * sizeof(W));
        }
    }
}
