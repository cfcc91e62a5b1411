/* The entries of sums.inl.h and prompt.inl.h, and what is chosen among numbers. Included last. */

void cm_sum_rows(const void *values, const uint8_t *tokens, int64_t kind, float *factors,
                 float *out, int64_t batch, int64_t length, int64_t n, int64_t threads,
                 int dtype) {
    if (dtype == BF16S)
        sum_rows_bf16(values, tokens, kind, factors, out, batch, length, n, (int)threads);
    else if (dtype == BYTES)
        sum_rows_byte(values, tokens, kind, factors, out, batch, length, n, (int)threads);
    else
        sum_rows_float(values, tokens, kind, factors, out, batch, length, n, (int)threads);
}

/* Llama's RMSNorm, or PyTorch's LayerNorm where there is a shift */
void cm_normalise(const void *x, const void *weight, const void *shift, void *out, int64_t rows,
                  int64_t n, double epsilon, int64_t threads, int is_bf16) {
    if (is_bf16)
        normalise_bf16(x, weight, shift, out, rows, n, epsilon, (int)threads);
    else
        normalise_float(x, weight, shift, out, rows, n, epsilon, (int)threads);
}

void cm_rotate_apart(void *x, const void *cosine, const void *sine, void *keys, void *values,
                     int64_t batch, int64_t length, int64_t heads, int64_t groups, int64_t size,
                     int64_t angles, int64_t threads, int is_bf16) {
    if (is_bf16)
        rotate_apart_bf16(x, cosine, sine, keys, values, batch, length, heads, groups, size, angles,
                          (int)threads);
    else
        rotate_apart_float(x, cosine, sine, keys, values, batch, length, heads, groups, size,
                           angles, (int)threads);
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

/* What is known of the n-th largest of some numbers: the highest bits of its own, and how many of
   those that begin alike are still to be counted */
typedef struct {
    uint32_t bits, known;
    int64_t missing;
} cut_t;

/* One byte more of the cut, from how often each value of it follows the bits that are known */
INLINE void narrow_cut(cut_t *cut, const int64_t found[256], int shift) {
    int64_t byte = 255;
    for (; byte > 0 && found[byte] < cut->missing; byte--) cut->missing -= found[byte];
    cut->bits |= (uint32_t)byte << shift;
    cut->known |= 255u << shift;
}

/* The places of the `count` highest of n scores, ascending; of equal ones the first. Bytes from the
   highest down, it narrows the cut. Returns 0 where a score is NaN. */
int cm_pick_top(const float *scores, int64_t n, int64_t count, int64_t *places) {
    cut_t cut = {0, 0, count};
    for (int64_t i = 0; i < n; i++)
        if (scores[i] != scores[i]) return 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t found[256] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = sortable(scores[i]);
            found[bits >> shift & 255] += (bits & cut.known) == cut.bits;
        }
        narrow_cut(&cut, found, shift);
    }
    for (int64_t i = 0; i < n && count; i++) {
        uint32_t bits = sortable(scores[i]);
        if (bits > cut.bits || (bits == cut.bits && cut.missing-- > 0)) *places++ = i, count--;
    }
    return 1;
}

/* The bits of entry i, in the order of the floats above 0: others count 0, or by their size */
INLINE uint32_t size_bits(const void *row, int64_t i, int by_size, int is_bf16) {
    const uint32_t sign = 1u << 31;
    uint32_t bits =
        is_bf16 ? (uint32_t)((const uint16_t *)row)[i] << 16 : ((const uint32_t *)row)[i];
    return by_size ? bits & ~sign : bits & sign ? 0 : bits;
}

#define MOST_HALVES 32768

/* Mark the entries of a row of 16-bit floats, at most MOST_HALVES, that are above 0 and not below the
   `count`-th largest. Bits from the highest down: counting what reaches a trial is work for whole
   vectors, and the row stays in the first-level cache */
static void mark_halves(const uint16_t *row, int64_t n, int64_t count, int by_size,
                        uint8_t *marks) {
    uint16_t sizes[MOST_HALVES], cut = 0;
    for (int64_t i = 0; i < n; i++)
        sizes[i] = by_size ? row[i] & 0x7fff : row[i] & 0x8000 ? 0 : row[i];
    for (int bit = 14; bit >= 0; bit--) {
        uint16_t trial = (uint16_t)(cut | 1 << bit), reach = 0;
        for (int64_t i = 0; i < n; i++) reach = (uint16_t)(reach + (sizes[i] >= trial));
        if (reach >= count) cut = trial;
    }
    if (!cut) cut = 1;
    for (int64_t i = 0; i < n; i++) marks[i] = sizes[i] >= cut;
}

/* Mark the entries of each row, (rows, n), that are above 0 and not below its counts[row]-th
   largest */
void cm_mark_largest(const void *values, const int64_t *counts, uint8_t *marks, int64_t rows,
                     int64_t n, int by_size, int64_t threads, int is_bf16) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        if (is_bf16 && n <= MOST_HALVES) {
            mark_halves((const uint16_t *)values + row * n, n, counts[row], by_size,
                        marks + row * n);
            continue;
        }
        const char *own = (const char *)values + row * n * (is_bf16 ? 2 : 4);
        cut_t cut = {0, 0, counts[row]};
        for (int shift = 24; shift >= (is_bf16 ? 16 : 0); shift -= 8) {
            int64_t found[256] = {0};
            for (int64_t i = 0; i < n; i++) {
                uint32_t bits = size_bits(own, i, by_size, is_bf16);
                found[bits >> shift & 255] += (bits & cut.known) == cut.bits;
            }
            narrow_cut(&cut, found, shift);
        }
        if (!cut.bits) cut.bits = 1;
        for (int64_t i = 0; i < n; i++)
            marks[row * n + i] = size_bits(own, i, by_size, is_bf16) >= cut.bits;
    }
}

/* Count the bytes at `shift` of the sizes of n numbers, or of those at `places`, whose higher bits
   are those of the cut. Returns 0 where one is not finite. */
static int count_bytes(const void *row, const int64_t *places, int64_t n, const cut_t *cut,
                       int shift, int is_bf16, int64_t found[4][256]) {
    const uint32_t infinite = 0x7f800000u;
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = size_bits(row, places ? places[i] : i, 1, is_bf16);
        found[i & 3][bits >> shift & 255] += (bits & cut->known) == cut->bits;
        largest = bits > largest ? bits : largest;
    }
    return largest < infinite;
}

/* out (batch) = the ranks[b]-th smallest size of the tokens (batch, length) that count, of all n
   numbers or of those at places (batch, count); 0 where the rank is. Bytes from the highest down.
   Returns 0 where a number is not finite. */
int cm_find_size(const void *values, const uint8_t *tokens, const int64_t *places,
                 const int64_t *ranks, float *out, int64_t batch, int64_t length, int64_t n,
                 int64_t count, int is_bf16) {
    for (int64_t b = 0; b < batch; b++) {
        cut_t cut = {0, 0, ranks[b]};
        const int64_t *own = places ? places + b * count : NULL;
        out[b] = 0;
        for (int shift = 24; ranks[b] && shift >= (is_bf16 ? 16 : 0); shift -= 8) {
            int64_t found[4][256] = {{0}}, byte = 0;
            for (int64_t t = b * length; t < (b + 1) * length; t++) {
                const char *row = (const char *)values + t * n * (is_bf16 ? 2 : 4);
                if (tokens[t] &&
                    !count_bytes(row, own, own ? count : n, &cut, shift, is_bf16, found))
                    return 0;
            }
            for (;; byte++) {
                int64_t here = found[0][byte] + found[1][byte] + found[2][byte] + found[3][byte];
                if (here >= cut.missing || byte == 255) break;
                cut.missing -= here;
            }
            cut.bits |= (uint32_t)byte << shift;
            cut.known |= 255u << shift;
        }
        memcpy(out + b, &cut.bits, sizeof cut.bits);
    }
    return 1;
}
