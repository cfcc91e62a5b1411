/* Products of a prompt's rows with matrices, on vectors. Included once per dtype of the weights.
   Sums are fp32, and those of a row do not depend on the other rows. */

#define IN_WORD ((int64_t)(sizeof(uint32_t) / sizeof(W)))

/* What one call computes: act(gate) * up where there is a gate, else act(up), both of x */
typedef struct {
    const W *up, *gate, *up_bias, *gate_bias; /* (outputs, inputs), (outputs) or NULL */
    const W *x;                               /* (rows, inputs) */
    const W *residual;                        /* (rows, outputs), added to out, or NULL */
    W *out;                                   /* (rows, stride), of which outputs are set */
    int64_t rows, inputs, outputs, stride, activation; /* stride: between rows of out */
    int64_t by_input;                         /* up is (inputs, outputs), and there is no gate */
    void *scratch;
    const int32_t *places; /* (rows), where a row's gate is kept, or -1; NULL: none is */
    W *gates;              /* (places, outputs), act(gate) of the rows that are kept */
    const W *norm;         /* (inputs), a norm's weight: x is normalised first; NULL: it is not */
    const W *shift;        /* (inputs), a LayerNorm's bias; NULL: it is an RMSNorm */
    double epsilon;        /* the norm's; only tiles normalise */
} F(product);

/* What the rows of x are in fp32: where they lie, and the floats between them */
typedef struct {
    const float *x;
    int64_t stride;
} F(wide);

/* Inputs [from, from + count) of half a panel, whose outputs begin at `first`, stored by output;
   an output beyond the last one is the last one once more */
INLINE void F(pack_half)(const F(product) *p, const W *weight, int64_t first, int64_t from,
                         int64_t count, float *out) {
    const W *rows[LANES];
    int64_t k = 0;
    for (int64_t i = 0; i < LANES; i++) {
        int64_t output = first + i < p->outputs ? first + i : p->outputs - 1;
        rows[i] = weight + output * p->inputs + from;
    }
    for (; k + LANES * IN_WORD <= count; k += LANES * IN_WORD) {
        words r[LANES];
        for (int i = 0; i < LANES; i++) memcpy(r + i, rows[i] + k, sizeof r[i]);
        turn_words((void *)r);
        for (int i = 0; i < LANES; i++) {
            float *to = out + (k + i * IN_WORD) * PANEL;
            if (IN_WORD == 1) {
                memcpy(to, r + i, sizeof r[i]);
            } else { /* two bf16, the first one in the lower half */
                words low = r[i] << 16, high = r[i] & 0xffff0000u;
                memcpy(to, &low, sizeof low);
                memcpy(to + PANEL, &high, sizeof high);
            }
        }
    }
    for (; k < count; k++)
        for (int i = 0; i < LANES; i++) out[k * PANEL + i] = WIDEN(rows[i][k]);
}

static void F(pack_panel)(const F(product) *p, const W *weight, int64_t first, int64_t from,
                          int64_t count, float *out) {
    if (!p->by_input) {
        F(pack_half)(p, weight, first, from, count, out);
        F(pack_half)(p, weight, first + LANES, from, count, out + LANES);
        return;
    }
    int64_t left = p->outputs - first, used = left < PANEL ? left : PANEL;
    const W *row = weight + from * p->outputs + first;
    for (int64_t k = 0; k < count; k++, row += p->outputs, out += PANEL)
        if (used == PANEL) {
            store_float(out, LOAD(row));
            store_float(out + LANES, LOAD(row + LANES));
        } else {
            for (int64_t i = 0; i < PANEL; i++) out[i] = i < used ? WIDEN(row[i]) : 0;
        }
}

INLINE void F(add_bias)(const W *bias, int64_t n, float *sums) {
    if (bias)
        for (int64_t i = 0; i < n; i++) sums[i] += WIDEN(bias[i]);
}

/* n outputs of a row from `first` on, rounded as PyTorch's operators round */
static void F(finish_row)(const F(product) *p, int64_t row, int64_t first, int64_t n,
                          float *sums) {
    W *out = p->out + row * p->stride + first;
    F(add_bias)(p->up_bias ? p->up_bias + first : NULL, n, sums);
    if (p->activation != NO_ACTIVATION) {
        for (int64_t i = 0; i < n; i++) sums[i] = WIDEN(NARROW(sums[i]));
        activate(sums, n, p->activation);
    }
    if (p->residual) {
        const W *more = p->residual + row * p->outputs + first;
        for (int64_t i = 0; i < n; i++)
            out[i] = NARROW(WIDEN(NARROW(sums[i])) + WIDEN(more[i]));
    } else {
        for (int64_t i = 0; i < n; i++) out[i] = NARROW(sums[i]);
    }
}

static void F(finish_gated_row)(const F(product) *p, int64_t row, int64_t first, int64_t n,
                                float *gate, float *up) {
    W *out = p->out + row * p->stride + first;
    F(add_bias)(p->gate_bias ? p->gate_bias + first : NULL, n, gate);
    F(add_bias)(p->up_bias ? p->up_bias + first : NULL, n, up);
    for (int64_t i = 0; i < n; i++) gate[i] = WIDEN(NARROW(gate[i]));
    activate(gate, n, p->activation);
    if (p->places && p->places[row] >= 0) {
        W *kept = p->gates + p->places[row] * p->outputs + first;
        for (int64_t i = 0; i < n; i++) kept[i] = NARROW(gate[i]);
    }
    for (int64_t i = 0; i < n; i++)
        out[i] = NARROW(WIDEN(NARROW(gate[i])) * WIDEN(NARROW(up[i])));
}

/* One group of panels for one chunk of rows. `memory` is this thread's. */
static void F(compute_group)(const F(product) *p, const F(wide) *wide, const deal_t *deal,
                             int64_t task, float *memory) {
    int64_t group = task % deal->groups, start = task / deal->groups * deal->chunk_rows;
    int64_t left = p->rows - start, rows = left < deal->chunk_rows ? left : deal->chunk_rows;
    int64_t panel = group * deal->panels / deal->groups, first = panel * PANEL;
    int64_t panels = (group + 1) * deal->panels / deal->groups - panel;
    int64_t halves = p->gate ? 2 : 1, width = halves * panels * PANEL;
    int64_t depth = ceil_div(p->inputs, ceil_div(p->inputs, MOST_INPUTS));
    float *sums = memory + MOST_INPUTS * GROUP_FLOATS;
    depth = ceil_div(depth, PANEL) * PANEL;
    for (int64_t k = 0; k < p->inputs; k += depth) {
        int64_t inputs = p->inputs - k < depth ? p->inputs - k : depth;
        for (int64_t i = 0; i < halves * panels; i++)
            F(pack_panel)(p, i < panels && p->gate ? p->gate : p->up,
                          first + i % panels * PANEL, k, inputs, memory + i * inputs * PANEL);
        for (int64_t row = 0; row < rows; row += MOST_ROWS) {
            int64_t some = rows - row < MOST_ROWS ? rows - row : MOST_ROWS;
            const float *x = wide->x + (start + row) * wide->stride + k;
            for (int64_t i = 0; i < halves * panels; i++)
                add_products(x, wide->stride, memory + i * inputs * PANEL, inputs, some, k > 0,
                             sums + row * width + i * PANEL, width);
        }
    }
    int64_t n = p->outputs - first < panels * PANEL ? p->outputs - first : panels * PANEL;
    for (int64_t row = 0; row < rows; row++, sums += width)
        if (p->gate)
            F(finish_gated_row)(p, start + row, first, n, sums, sums + panels * PANEL);
        else
            F(finish_row)(p, start + row, first, n, sums);
}

/* Several products of the same x, of which the first has the scratch memory */
static void F(multiply)(const F(product) *products, int count, int num_threads) {
    const F(product) *p = products;
    float *memory = p->scratch;
    F(wide) wide = {(const float *)(const void *)p->x, p->inputs};
    if (IN_WORD > 1) wide = (F(wide)){memory, wide_stride(p->inputs)};
    float *wider = memory;
    if (IN_WORD > 1) memory += p->rows * wide.stride;
#pragma omp parallel num_threads(num_threads)
    {
        float *own = memory + omp_get_thread_num() * THREAD_FLOATS;
        if (IN_WORD > 1) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < p->rows; row++)
                F(widen_rows)(p->x + row * p->inputs, p->inputs, wider + row * wide.stride);
        }
        for (int i = 0; i < count; i++) {
            const F(product) *one = products + i;
            deal_t deal = deal_out(one->rows, one->outputs, one->gate ? GROUP / 2 : GROUP,
                                   omp_get_num_threads());
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < deal.groups * deal.chunks; task++)
                F(compute_group)(one, &wide, &deal, task, own);
        }
    }
}

#undef IN_WORD
