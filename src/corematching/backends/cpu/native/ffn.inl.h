/* The FFN over a list of neurons. Included once per dtype, after rows.inl.h.
   Each thread computes the neurons of its own share of the list, so nothing waits before the sum. */

/* What one thread works on: entries [first, last) of the list, and where their values go. */
typedef struct {
    const ffn_t *ffn;
    const float *const *xs; /* (batch) inputs of hidden numbers */
    float *values;          /* (batch, count) */
    uint32_t *alive;        /* (count), the samples that still want the neuron */
    int32_t *entries;       /* (count), the thread's from `first` on: entries some sample wants */
    int64_t first, last, kept, hidden;
    int batch;
} F(share);

INLINE int64_t F(row_of)(const ffn_t *ffn, int64_t entry) {
    return ffn->rows ? ffn->rows[entry] : entry;
}

/* The products of the wanted rows of `weight` with the samples that want them */
static void F(project)(const F(share) * share, const W *weight, const W *bias, int times) {
    const ffn_t *ffn = share->ffn;
    const int32_t *entries = share->entries + share->first;
    const float *xs[MAX_BATCH];
    float results[MAX_BATCH];
    int samples[MAX_BATCH];
    int64_t ahead = F(rows_ahead)(share->hidden);
    for (int64_t i = 0; i < share->kept; i++) {
        int64_t entry = entries[i], row = F(row_of)(ffn, entry);
        int64_t next = i + ahead < share->kept ? F(row_of)(ffn, entries[i + ahead]) : row;
        int count = 0;
        for (uint32_t left = share->alive[entry]; left; left &= left - 1, count++) {
            samples[count] = __builtin_ctz(left);
            xs[count] = share->xs[samples[count]];
        }
        F(dots)(weight + row * share->hidden, xs, count, share->hidden,
                weight + next * share->hidden, results);
        float extra = bias ? WIDEN(bias[row]) : 0.0f;
        for (int s = 0; s < count; s++) {
            float *value = share->values + samples[s] * ffn->count + entry;
            *value = times ? *value * (results[s] + extra) : results[s] + extra;
        }
    }
}

/* Forget what stays under a sample's threshold, and list the entries that are still wanted */
static void F(filter)(F(share) * share, const float *threshold) {
    int64_t count = share->ffn->count, kept = 0;
    if (!threshold) return;
    for (int64_t i = 0; i < share->kept; i++) {
        int32_t entry = share->entries[share->first + i];
        uint32_t alive = share->alive[entry];
        for (uint32_t left = alive; left; left &= left - 1) {
            int s = __builtin_ctz(left);
            float *value = share->values + s * count + entry;
            if (!(fabsf(*value) >= threshold[s])) {
                *value = 0;
                alive &= ~(1u << s);
            }
        }
        share->alive[entry] = alive;
        share->entries[share->first + kept] = entry;
        kept += alive != 0;
    }
    share->kept = kept;
}

static void F(begin_share)(F(share) * share) {
    const ffn_t *ffn = share->ffn;
    uint32_t every = (1u << share->batch) - 1;
    for (int64_t entry = share->first; entry < share->last; entry++) {
        share->entries[entry] = (int32_t)entry;
        share->alive[entry] = ffn->members ? ffn->members[entry] & every : every;
    }
    share->kept = share->last - share->first;
    if (ffn->members)
        for (int s = 0; s < share->batch; s++)
            memset(share->values + s * ffn->count + share->first, 0,
                   sizeof(float) * (size_t)(share->last - share->first));
}

/* The activations of the thread's neurons: act(gate) * up, or act(up) */
static void F(activations)(F(share) * share) {
    const ffn_t *ffn = share->ffn;
    int64_t read[2] = {0, 0};
    F(begin_share)(share);
    const W *first = ffn->gate ? ffn->gate : ffn->up;
    F(project)(share, first, ffn->gate ? ffn->gate_bias : ffn->up_bias, 0);
    read[ffn->gate ? 0 : 1] = share->kept;
    for (int s = 0; s < share->batch; s++)
        activate(share->values + s * ffn->count + share->first, share->last - share->first,
                 ffn->activation);
    if (ffn->gate) {
        F(filter)(share, ffn->gate_threshold);
        F(project)(share, ffn->up, ffn->up_bias, 1);
        read[1] = share->kept;
    }
    F(filter)(share, ffn->output_threshold);
    for (int i = 0; i < 2; i++) {
#pragma omp atomic
        ffn->rows_read[i] += read[i];
    }
}

/* ys[s] += the thread's neurons' share of the down projection, stored one neuron per row */
static void F(add_down)(const F(share) * share, float *const *ys) {
    const ffn_t *ffn = share->ffn;
    const W *down = ffn->down;
    const int32_t *entries = share->entries + share->first;
    float factors[MAX_BATCH * ROWS];
    float *targets[MAX_BATCH];
    int64_t distance = (F(rows_ahead)(share->hidden) + ROWS - 1) / ROWS * ROWS;
    for (int64_t i = 0; i < share->kept; i += ROWS) {
        const W *rows[ROWS], *ahead[ROWS];
        uint32_t alive = 0;
        for (int r = 0; r < ROWS; r++) {
            int64_t here = i + r < share->kept ? i + r : i;
            int64_t next = here + distance < share->kept ? here + distance : here;
            rows[r] = down + F(row_of)(ffn, entries[here]) * share->hidden;
            ahead[r] = down + F(row_of)(ffn, entries[next]) * share->hidden;
            alive |= share->alive[entries[here]];
        }
        int count = 0;
        for (; alive; alive &= alive - 1, count++) {
            int s = __builtin_ctz(alive);
            targets[count] = ys[s];
            for (int r = 0; r < ROWS; r++)
                factors[count * ROWS + r] =
                    i + r < share->kept ? share->values[s * ffn->count + entries[i + r]] : 0.0f;
        }
        F(mix)(rows, factors, targets, count, share->hidden, ahead);
    }
#pragma omp atomic
    ffn->rows_read[2] += share->kept;
}
