/* The parallel regions, for one dtype. Included last. */

static void F(step)(const step_t *step, const scratch_t *scratch) {
#pragma omp parallel num_threads((int)step->threads)
    F(step_thread)(step, scratch, omp_get_thread_num(), omp_get_num_threads());
}

static void F(widen_rows)(const W *x, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) out[i] = WIDEN(x[i]);
}

/* out (batch, outputs) = x (batch, inputs) . weight^T + bias; `scratch` holds both in fp32 */
static void F(linear_alone)(const W *weight, const W *bias, const W *x, W *out, int batch,
                            int64_t inputs, int64_t outputs, int num_threads, float *scratch) {
    float *xs[MAX_BATCH], *ys[MAX_BATCH];
    F(rows_at)(scratch, batch, inputs, xs);
    F(rows_at)(scratch + batch * inputs, batch, outputs, ys);
    F(widen_rows)(x, batch * inputs, scratch);
#pragma omp parallel num_threads(num_threads)
    {
        int64_t first, last;
        F(split)(outputs, omp_get_thread_num(), omp_get_num_threads(), &first, &last);
        F(linear)(weight, bias, (const float *const *)xs, batch, inputs, first, last, ys, 0);
        for (int s = 0; s < batch; s++)
            for (int64_t r = first; r < last; r++) out[s * outputs + r] = NARROW(ys[s][r]);
    }
}

static void F(ffn_alone)(const ffn_t *ffn, const W *x, W *out, int batch, int64_t hidden,
                         int num_threads, const scratch_t *scratch) {
    memset(scratch->hidden, 0, sizeof(float) * (size_t)(batch * hidden));
#pragma omp parallel num_threads(num_threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *xs[MAX_BATCH], *ys[MAX_BATCH];
        int64_t first, last;
        F(rows_at)(scratch->x + thread * batch * hidden, batch, hidden, xs);
        F(rows_at)(scratch->hidden, batch, hidden, ys);
        F(widen_rows)(x, batch * hidden, xs[0]);
        F(ffn)(ffn, xs, ys, batch, hidden, scratch, thread, threads);
        F(split)(hidden, thread, threads, &first, &last); /* the rows that this thread summed up */
        for (int s = 0; s < batch; s++)
            for (int64_t i = first; i < last; i++) out[s * hidden + i] = NARROW(ys[s][i]);
    }
}
