/* The entries of prompt.inl.h. Included last. */

void cm_sum_rows(const void *values, const uint8_t *tokens, int64_t kind, float *factors,
                 float *out, int64_t batch, int64_t length, int64_t n, int64_t threads,
                 int is_bf16) {
    if (is_bf16)
        sum_rows_bf16(values, tokens, kind, factors, out, batch, length, n, (int)threads);
    else
        sum_rows_float(values, tokens, kind, factors, out, batch, length, n, (int)threads);
}

void cm_normalise(const void *x, const void *weight, void *out, int64_t rows, int64_t n,
                  double epsilon, int64_t threads, int is_bf16) {
    if (is_bf16)
        normalise_bf16(x, weight, out, rows, n, epsilon, (int)threads);
    else
        normalise_float(x, weight, out, rows, n, epsilon, (int)threads);
}

void cm_rotate(void *x, const void *cosine, const void *sine, int64_t rows, int64_t stride,
               int64_t heads, int64_t size, int64_t angles, int64_t threads, int is_bf16) {
    if (is_bf16)
        rotate_rows_bf16(x, cosine, sine, rows, stride, heads, size, angles,
                       (int)threads);
    else
        rotate_rows_float(x, cosine, sine, rows, stride, heads, size, angles,
                       (int)threads);
}

/* out (batch, n) = how many of the tokens (batch, length) that count are marked, (batch, length, n) */
void cm_sum_marks(const uint8_t *marks, const uint8_t *tokens, float *out, int64_t batch,
                  int64_t length, int64_t n, int64_t threads) {
    int64_t parts = batch < threads ? threads : 1;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t task = 0; task < batch * parts; task++) {
        int64_t sample = task / parts, part = task % parts;
        int64_t first = n * part / parts, last = n * (part + 1) / parts;
        float *to = out + sample * n;
        for (int64_t i = first; i < last; i++) to[i] = 0;
        for (int64_t t = sample * length; t < (sample + 1) * length; t++)
            if (tokens[t])
                for (int64_t i = first; i < last; i++) to[i] += (float)marks[t * n + i];
    }
}

/* out (batch, length) = the sum of the weights (batch, n) of what a token marks */
void cm_weigh_marks(const uint8_t *marks, const float *weights, float *out, int64_t batch,
                    int64_t length, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t t = 0; t < batch * length; t++) {
        const uint8_t *own = marks + t * n;
        const float *w = weights + t / length * n;
        float total = 0;
        _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) total +=
            own[i] ? w[i] : 0;
        out[t] = total;
    }
}

/* A float's bits so that whole numbers compare as the floats do */
INLINE uint32_t sortable(float x) {
    uint32_t bits;
    x += 0.0f; /* -0 counts as 0 */
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The places of the `count` highest of n scores, ascending; of equal ones the first. Bytes from the
   highest down, it narrows the cut. Returns 0 where a score is NaN. */
int cm_pick_top(const float *scores, int64_t n, int64_t count, int64_t *places) {
    uint32_t cut = 0, known = 0;
    int64_t missing = count;
    for (int64_t i = 0; i < n; i++)
        if (scores[i] != scores[i]) return 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t found[256] = {0}, byte = 255;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = sortable(scores[i]);
            found[bits >> shift & 255] += (bits & known) == cut;
        }
        for (; byte > 0 && found[byte] < missing; byte--) missing -= found[byte];
        cut |= (uint32_t)byte << shift;
        known |= 255u << shift;
    }
    for (int64_t i = 0; i < n && count; i++) {
        uint32_t bits = sortable(scores[i]);
        if (bits > cut || (bits == cut && missing-- > 0)) *places++ = i, count--;
    }
    return 1;
}

/* Mark the entries of each row, (rows, n), that are above 0 and not below its counts[row]-th largest.
   The bits of positive floats are ordered as the floats; negative ones count as 0, or by their
   magnitude. Rows of 16-bit floats have only two bytes to look at. */
void cm_mark_largest(const void *values, const int64_t *counts, uint8_t *marks, int64_t rows,
                     int64_t n, int by_size, int64_t threads, int is_bf16) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const uint32_t *wide = (const uint32_t *)values + row * n;
        const uint16_t *narrow = (const uint16_t *)values + row * n;
        uint32_t cut = 0, known = 0, sign = 1u << 31;
        int64_t missing = counts[row];
        for (int shift = 24; shift >= (is_bf16 ? 16 : 0); shift -= 8) {
            int64_t found[256] = {0}, byte = 255;
            for (int64_t i = 0; i < n; i++) {
                uint32_t bits = is_bf16 ? (uint32_t)narrow[i] << 16 : wide[i];
                bits = by_size ? bits & ~sign : bits & sign ? 0 : bits;
                found[bits >> shift & 255] += (bits & known) == cut;
            }
            for (; byte > 0 && found[byte] < missing; byte--) missing -= found[byte];
            cut |= (uint32_t)byte << shift;
            known |= 255u << shift;
        }
        if (!cut) cut = 1;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = is_bf16 ? (uint32_t)narrow[i] << 16 : wide[i];
            bits = by_size ? bits & ~sign : bits & sign ? 0 : bits;
            marks[row * n + i] = bits >= cut;
        }
    }
}
