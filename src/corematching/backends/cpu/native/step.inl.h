/* A whole decode step, and an FFN of its own. Included once per dtype, after ffn.inl.h.
   All threads run the same code on their own rows and meet at the barriers. */

INLINE void F(split)(int64_t n, int thread, int threads, int64_t *first, int64_t *last) {
    *first = n * thread / threads;
    *last = n * (thread + 1) / threads;
}

INLINE void F(rows_at)(float *start, int batch, int64_t stride, float **rows) {
    for (int s = 0; s < batch; s++) rows[s] = start + s * stride;
}

/* Entries of x below a sample's threshold count 0 */
INLINE void F(silence)(const float *threshold, float *const *xs, int batch, int64_t n) {
    if (!threshold) return;
    for (int s = 0; s < batch; s++)
        for (int64_t i = 0; i < n; i++) xs[s][i] = fabsf(xs[s][i]) >= threshold[s] ? xs[s][i] : 0;
}

/* out[s] += FFN(xs[s]); every thread calls it, and passes a barrier before it reads out */
static void F(ffn)(const ffn_t *ffn, float *const *xs, float *const *out, int batch, int64_t hidden,
                   const scratch_t *scratch, int thread, int threads) {
    int64_t first, last;
    float *ys[MAX_BATCH];
    F(share) share = {.ffn = ffn, .xs = (const float *const *)xs, .values = scratch->values,
                      .alive = scratch->alive, .entries = scratch->entries, .hidden = hidden,
                      .batch = batch};
    F(silence)(ffn->input_threshold, xs, batch, hidden);
    F(split)(ffn->count, thread, threads, &share.first, &share.last);
    F(activations)(&share);
    F(split)(hidden, thread, threads, &first, &last);
    if (!ffn->by_neuron) {
        F(rows_at)(scratch->values, batch, ffn->count, ys);
#pragma omp barrier
        F(linear)(ffn->down, ffn->bias, (const float *const *)ys, batch, ffn->count, first, last,
                  out, 1);
#pragma omp atomic
        ffn->rows_read[2] += thread == 0 ? ffn->count : 0;
        return;
    }
    float *own = scratch->ys + thread * batch * hidden;
    memset(own, 0, sizeof(float) * (size_t)(batch * hidden));
    F(rows_at)(own, batch, hidden, ys);
    F(add_down)(&share, ys);
#pragma omp barrier
    const W *bias = ffn->bias;
    for (int s = 0; s < batch; s++) {
        for (int t = 0; t < threads; t++) {
            const float *part = scratch->ys + (t * batch + s) * hidden;
            for (int64_t i = first; i < last; i++) out[s][i] += part[i];
        }
        const W *row = bias ? bias + s * ffn->biases / batch * hidden : NULL;
        for (int64_t i = first; row && i < last; i++) out[s][i] += WIDEN(row[i]);
    }
}

/* Turn one head by its position; `size` is even */
INLINE void F(rotate)(float *head, const float *cosine, const float *sine, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
}

/* Store this token's key and value, then attend: one sample, one head of keys and values */
static void F(attend)(const step_t *step, const layer_t *layer, const scratch_t *scratch,
                      float *scores, int sample, int64_t group) {
    int64_t size = step->head_dim, queries = step->heads / step->kv_heads, n = step->length;
    int64_t width = (step->heads + 2 * step->kv_heads) * size;
    const float *cosine = step->cos + sample * size, *sine = step->sin + sample * size;
    const uint8_t *valid = step->valid ? step->valid + sample * n : NULL;
    const float *log_counts = step->log_counts ? step->log_counts + sample * step->weighed : NULL;
    float *q = scratch->qkv + sample * width + group * queries * size;
    float *k = scratch->qkv + sample * width + (step->heads + group) * size;
    float *v = k + step->kv_heads * size;
    int64_t cache = (sample * step->kv_heads + group) * step->capacity * size;
    W *keys = (W *)layer->keys + cache, *values = (W *)layer->values + cache;
    for (int64_t h = 0; h < queries; h++) {
        if (layer->q_norm)
            F(rms_norm)(q + h * size, layer->q_norm, step->epsilon, size, q + h * size);
        F(rotate)(q + h * size, cosine, sine, size);
    }
    if (layer->k_norm) F(rms_norm)(k, layer->k_norm, step->epsilon, size, k);
    F(rotate)(k, cosine, sine, size);
    for (int64_t i = 0; i < size; i++) {
        keys[(n - 1) * size + i] = NARROW(k[i]);
        values[(n - 1) * size + i] = NARROW(v[i]);
    }
    for (int64_t first = 0; first < queries; first += MAX_BATCH) {
        int heads = (int)(queries - first < MAX_BATCH ? queries - first : MAX_BATCH);
        float *own = q + first * size;
        float *mixed = scratch->mixed + (sample * step->heads + group * queries + first) * size;
        F(attend_heads)(step, keys, values, valid, log_counts, own, heads, scores, mixed);
    }
}

static void F(norm_all)(const step_t *step, const W *weight, float *hidden, float *const *out) {
    for (int s = 0; s < step->batch; s++)
        F(rms_norm)(hidden + s * step->hidden, weight, step->epsilon, step->hidden, out[s]);
}

/* Rows of queries, keys and values, as if their three matrices were one */
static void F(project_qkv)(const step_t *step, const layer_t *layer, float *const *xs, float *qkv,
                           int thread, int threads) {
    int64_t size = step->head_dim, q = step->heads * size, kv = step->kv_heads * size;
    const W *weights[3] = {layer->q, layer->k, layer->v};
    const W *biases[3] = {layer->q_bias, layer->k_bias, layer->v_bias};
    int64_t starts[4] = {0, q, q + kv, q + 2 * kv}, first, last;
    F(split)(q + 2 * kv, thread, threads, &first, &last);
    for (int part = 0; part < 3; part++) {
        int64_t from = first > starts[part] ? first : starts[part];
        int64_t to = last < starts[part + 1] ? last : starts[part + 1];
        float *out[MAX_BATCH];
        F(rows_at)(qkv + starts[part], (int)step->batch, q + 2 * kv, out);
        if (from < to)
            F(linear)(weights[part], biases[part], (const float *const *)xs, (int)step->batch,
                      step->hidden, from - starts[part], to - starts[part], out, 0);
    }
}

/* One thread's part of the step */
static void F(step_thread)(const step_t *step, const scratch_t *scratch, int thread,
                           int threads) {
    int batch = (int)step->batch;
    int64_t d = step->hidden, size = step->head_dim, first, last;
    float *xs[MAX_BATCH], *hidden[MAX_BATCH], *mixed[MAX_BATCH];
    float *scores = scratch->scores + thread * MAX_BATCH * step->capacity;
    F(rows_at)(scratch->x + thread * batch * d, batch, d, xs);
    F(rows_at)(scratch->hidden, batch, d, hidden);
    F(rows_at)(scratch->mixed, batch, step->heads * size, mixed);
    F(split)(d, thread, threads, &first, &last);
    for (int s = 0; s < batch; s++)
        for (int64_t i = first; i < last; i++) hidden[s][i] = WIDEN(((const W *)step->x)[s * d + i]);
#pragma omp barrier
    for (int64_t l = 0; l < step->num_layers; l++) {
        const layer_t *layer = step->layers + l;
        F(norm_all)(step, layer->attention_norm, scratch->hidden, xs);
        F(project_qkv)(step, layer, xs, scratch->qkv, thread, threads);
#pragma omp barrier
        for (int64_t task = thread; task < batch * step->kv_heads; task += threads)
            F(attend)(step, layer, scratch, scores, (int)(task / step->kv_heads),
                      task % step->kv_heads);
#pragma omp barrier
        F(linear)(layer->o, layer->o_bias, (const float *const *)mixed, batch, step->heads * size,
                  first, last, hidden, 1);
#pragma omp barrier
        F(norm_all)(step, layer->ffn_norm, scratch->hidden, xs);
        F(ffn)(&layer->ffn, xs, hidden, batch, d, scratch, thread, threads);
#pragma omp barrier
    }
    for (int s = thread; s < batch; s += threads) {
        F(rms_norm)(hidden[s], step->final_norm, step->epsilon, d, xs[s]);
        for (int64_t i = 0; i < d; i++) ((W *)step->out)[s * d + i] = NARROW(xs[s][i]);
    }
}
