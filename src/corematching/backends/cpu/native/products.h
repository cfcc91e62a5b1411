/* The entries of panels.inl.h and tiles.h. Included last. */

enum { VECTORS, TILES };

/* Bytes of scratch memory, on a cache line, that cm_multiply needs */
int64_t cm_multiply_scratch(int64_t rows, int64_t inputs, int64_t threads, int unit, int is_bf16) {
    int64_t floats = (is_bf16 ? rows * wide_stride(inputs) : 0) + threads * THREAD_FLOATS;
#if defined(CM_HAS_TILES)
    if (unit == TILES) floats = count_tiled_floats(rows, inputs, threads);
#endif
    (void)unit;
    return floats * (int64_t)sizeof(float);
}

static void multiply_bf16s(const product_bf16 *products, int count, int threads, int unit) {
#if defined(CM_HAS_TILES)
    if (unit == TILES && packs_weights(products))
        for (int i = 0; i < count; i++) multiply_panels(products + i, threads);
    else if (unit == TILES)
        multiply_tiles(products, count, threads);
    else
#endif
        multiply_bf16(products, count, threads);
    (void)unit;
}

/* out (rows, outputs) = act(x . up^T + bias) (+ residual), or act(x . gate^T) * (x . up^T). On tiles,
   all is bf16, and inputs and outputs are multiples of 32. by_input: up is stored (inputs,
   outputs), and there is no gate, nor, on tiles, a norm. places (rows): where act(x . gate^T) of a
   row is kept, or -1. norm (inputs), on tiles: x is normalised first, with that weight, and shift
   (inputs), if it is a LayerNorm; or NULL. */
void cm_multiply(const void *up, const void *gate, const void *up_bias, const void *gate_bias,
                 const void *x, const void *residual, void *out, int64_t rows, int64_t inputs,
                 int64_t outputs, int64_t activation, int by_input, const int32_t *places,
                 void *gates, const void *norm, const void *shift, double epsilon, int64_t threads,
                 void *scratch, int unit, int is_bf16) {
    if (rows <= 0 || inputs <= 0 || outputs <= 0) return;
    if (is_bf16) {
        product_bf16 p = {up,     gate,    up_bias, gate_bias,  x,        residual, out, rows,
                          inputs, outputs, outputs, activation, by_input, scratch, places, gates,
                          norm, shift, epsilon};
        multiply_bf16s(&p, 1, (int)threads, unit);
    } else {
        product_float p = {up,     gate,    up_bias, gate_bias,  x,        residual, out, rows,
                           inputs, outputs, outputs, activation, by_input, scratch, places, gates,
                           norm, shift, epsilon};
        multiply_float(&p, 1, (int)threads);
    }
}

/* out (rows, the sum of the outputs) = x, normalised first on tiles where there is a norm, times up
   to 4 matrices, one beside the other. Nothing is done with no rows or more matrices. */
void cm_multiply_several(const void *const *weights, const void *const *biases,
                         const int64_t *outputs, int64_t count, const void *x, void *out,
                         int64_t rows, int64_t inputs, const void *norm, const void *shift,
                         double epsilon, int64_t threads, void *scratch, int unit, int is_bf16) {
    product_bf16 halves[MOST_PRODUCTS];
    product_float floats[MOST_PRODUCTS];
    int64_t stride = 0, place = 0;
    if (rows <= 0 || inputs <= 0 || count <= 0 || count > MOST_PRODUCTS) return;
    for (int64_t i = 0; i < count; i++) stride += outputs[i];
    for (int64_t i = 0; i < count; place += outputs[i++]) {
        halves[i] = (product_bf16){.up = weights[i], .up_bias = biases[i], .x = x,
                                   .out = (bf16 *)out + place, .rows = rows, .inputs = inputs,
                                   .outputs = outputs[i], .stride = stride, .scratch = scratch,
                                   .activation = NO_ACTIVATION, .norm = norm, .shift = shift,
                                   .epsilon = epsilon};
        floats[i] = (product_float){.up = weights[i], .up_bias = biases[i], .x = x,
                                    .out = (float *)out + place, .rows = rows, .inputs = inputs,
                                    .outputs = outputs[i], .stride = stride, .scratch = scratch,
                                    .activation = NO_ACTIVATION};
    }
    if (is_bf16)
        multiply_bf16s(halves, (int)count, (int)threads, unit);
    else
        multiply_float(floats, (int)count, (int)threads);
}
