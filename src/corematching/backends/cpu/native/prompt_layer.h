/* A layer of Llama's form, or of CLIP's tower, for a whole prompt, bf16 on matrix tiles. Included
   after products.h. */

/* What stays the same from prompt to prompt */
typedef struct {
    const void *q, *k, *v, *o, *gate, *up, *down; /* one row per output; down maybe by input, and
                                                     without a gate, NULL, up is activated */
    const void *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias; /* or NULL */
    const void *attention_norm, *ffn_norm;   /* (hidden) */
    const void *attention_shift, *ffn_shift; /* (hidden), of LayerNorms; NULL: RMSNorms */
    int64_t hidden, heads, groups, size, width, activation, down_by_input;
    double attention_epsilon, ffn_epsilon, scaling;
} prompt_layer_t;

/* One prompt. Of the mask, `mask_kind` and `step_mask` are as in attention_t; token i of all takes
   the angles of row i % angles. places (batch * length): where a token's gate is kept, or -1. */
typedef struct {
    const void *x, *cosine, *sine, *mask; /* x (batch, length, hidden) */
    const int32_t *places;
    void *qkv; /* (batch, length, heads + 2 * groups, size), queries, keys and values; NULL: in
                    scratch memory */
    void *keys, *values; /* (batch, groups, length, size), rotated; NULL: none are, and there are no
                            angles */
    void *middle, *out;  /* (batch, length, hidden), behind the attention and behind the FFN */
    void *active;        /* (batch, length, width) */
    void *gates, *scratch;
    int64_t step_mask[2];
    int64_t batch, length, angles, mask_kind, causal, threads;
} prompt_t;

#if defined(CM_HAS_TILES)
/* Where queries, keys and values, what attention gives, and the rest of the scratch memory lie */
typedef struct {
    bf16 *qkv, *mixed;
    void *rest;
    int64_t bytes;
} prompt_scratch_t;

static attention_t describe_attention(const prompt_layer_t *l, const prompt_t *p,
                                      const prompt_scratch_t *s) {
    int64_t total = l->heads + 2 * l->groups, length = p->length, size = l->size;
    const bf16 *key = p->keys ? p->keys : s->qkv + l->heads * size;
    const bf16 *value = p->keys ? p->values : key + l->groups * size;
    int64_t qkv[3] = {length * total * size, size, total * size};
    int64_t apart[3] = {l->groups * length * size, length * size, size};
    attention_t a = {.query = s->qkv, .key = key, .value = value, .mask = p->mask,
                     .out = s->mixed, .scratch = s->rest,
                     .step_mask = {p->step_mask[0], p->step_mask[1]},
                     .batch = p->batch, .heads = l->heads, .groups = l->groups, .length = length,
                     .stored = length, .size = size, .mask_kind = p->mask_kind,
                     .causal = p->causal, .threads = p->threads, .scaling = l->scaling};
    memcpy(a.step_query, qkv, sizeof qkv);
    memcpy(a.step_key, p->keys ? apart : qkv, sizeof qkv);
    memcpy(a.step_value, p->keys ? apart : qkv, sizeof qkv);
    return a;
}

static prompt_scratch_t lay_out_prompt(const prompt_layer_t *l, const prompt_t *p) {
    int64_t rows = p->batch * p->length, most = l->width > l->hidden ? l->width : l->hidden;
    int64_t inner = l->heads * l->size, qkv = inner + 2 * l->groups * l->size;
    int64_t mixed = round_up(rows * inner, LINE);
    qkv = p->qkv ? 0 : round_up(rows * qkv, LINE);
    most = inner > most ? inner : most;
    prompt_scratch_t s = {.qkv = p->qkv ? p->qkv : p->scratch};
    s.mixed = (bf16 *)p->scratch + qkv, s.rest = s.mixed + mixed;
    attention_t a = describe_attention(l, p, &s);
    int64_t attending = cm_attend_scratch(&a);
    int64_t multiplying = cm_multiply_scratch(rows, most, p->threads, TILES, 1);
    s.bytes = (qkv + mixed) * (int64_t)sizeof(bf16);
    s.bytes += attending > multiplying ? attending : multiplying;
    return s;
}

/* Bytes of scratch memory, on a cache line, that cm_prompt_layer needs */
int64_t cm_prompt_layer_scratch(const prompt_layer_t *l, const prompt_t *p) {
    return lay_out_prompt(l, p).bytes;
}

static product_bf16 begin_product(const prompt_t *p, const void *weight, const void *bias,
                                  const void *x, void *out, int64_t inputs, int64_t outputs,
                                  void *scratch) {
    product_bf16 product = {.up = weight, .up_bias = bias, .x = x, .out = out,
                            .rows = p->batch * p->length, .inputs = inputs, .outputs = outputs,
                            .stride = outputs, .activation = NO_ACTIVATION, .scratch = scratch};
    return product;
}

static void project_jointly(const prompt_layer_t *l, const prompt_t *p, const prompt_scratch_t *s) {
    const void *weights[3] = {l->q, l->k, l->v}, *biases[3] = {l->q_bias, l->k_bias, l->v_bias};
    int64_t widths[3] = {l->heads * l->size, l->groups * l->size, l->groups * l->size};
    int64_t stride = widths[0] + 2 * widths[1];
    product_bf16 products[3];
    bf16 *out = s->qkv;
    for (int i = 0; i < 3; out += widths[i++]) {
        products[i] = begin_product(p, weights[i], biases[i], p->x, out, l->hidden, widths[i],
                                    s->rest);
        products[i].stride = stride;
        products[i].norm = l->attention_norm, products[i].shift = l->attention_shift;
        products[i].epsilon = l->attention_epsilon;
    }
    multiply_bf16s(products, 3, (int)p->threads, TILES);
}

/* Keys and values go to their places; the residuals are added where the products are rounded */
void cm_prompt_layer(const prompt_layer_t *l, const prompt_t *p) {
    if (p->batch * p->length <= 0) return;
    prompt_scratch_t s = lay_out_prompt(l, p);
    int threads = (int)p->threads;
    project_jointly(l, p, &s);
    if (p->keys)
        rotate_apart_bf16(s.qkv, p->cosine, p->sine, p->keys, p->values, p->batch, p->length,
                          l->heads, l->groups, l->size, p->angles, threads);
    attention_t a = describe_attention(l, p, &s);
    cm_attend(&a);
    product_bf16 o = begin_product(p, l->o, l->o_bias, s.mixed, p->middle, l->heads * l->size,
                                   l->hidden, s.rest);
    o.residual = p->x;
    multiply_bf16s(&o, 1, threads, TILES);
    product_bf16 up = begin_product(p, l->up, l->up_bias, p->middle, p->active, l->hidden, l->width,
                                    s.rest);
    up.gate = l->gate, up.gate_bias = l->gate_bias, up.activation = l->activation;
    up.places = p->places, up.gates = p->gates;
    up.norm = l->ffn_norm, up.shift = l->ffn_shift, up.epsilon = l->ffn_epsilon;
    multiply_bf16s(&up, 1, threads, TILES);
    product_bf16 down = begin_product(p, l->down, l->down_bias, p->active, p->out, l->width,
                                      l->hidden, s.rest);
    down.residual = p->middle, down.by_input = (int)l->down_by_input;
    multiply_bf16s(&down, 1, threads, TILES);
}
#else
int64_t cm_prompt_layer_scratch(const prompt_layer_t *l, const prompt_t *p) {
    return (void)l, (void)p, 0;
}
void cm_prompt_layer(const prompt_layer_t *l, const prompt_t *p) { (void)l, (void)p; }
#endif
