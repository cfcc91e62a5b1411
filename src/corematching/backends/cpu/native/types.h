/* What Python hands over; `corematching/backends/cpu/native/structs.py` mirrors every field.
   Matrices are row-major, one row per output, in the model's dtype; all other numbers are fp32. */
#ifndef CM_TYPES_H
#define CM_TYPES_H

#include <stdint.h>

#define MAX_BATCH 16

enum { NO_ACTIVATION = -1, SILU, GELU, GELU_TANH, RELU, QUICK_GELU };

typedef struct {
    const void *up, *gate, *up_bias, *gate_bias; /* (width, hidden); gate may be NULL */
    const void *down;        /* by_neuron: (width, hidden), else (hidden, width) */
    const void *bias;        /* (biases, hidden), what is added to the output, or NULL */
    const int32_t *rows;     /* (count), the listed neurons; NULL: all */
    const uint32_t *members; /* (count), one bit for each batch row that keeps it; NULL: all */
    const float *input_threshold, *gate_threshold, *output_threshold; /* (batch) or NULL */
    int64_t *rows_read;      /* (3), rows of gate, up and down read so far */
    int64_t width, count, biases, activation, by_neuron;
} ffn_t;

typedef struct {
    const void *attention_norm, *ffn_norm; /* (hidden) */
    const void *q, *k, *v, *o, *q_bias, *k_bias, *v_bias, *o_bias;
    const void *q_norm, *k_norm; /* (head_dim) or NULL */
    void *keys, *values;         /* (batch, kv_heads, capacity, head_dim) */
    ffn_t ffn;
} layer_t;

typedef struct {
    const layer_t *layers;
    const void *final_norm; /* (hidden) */
    const void *x;          /* (batch, hidden), the token's embedding */
    void *out;              /* (batch, hidden) */
    const float *cos, *sin; /* (batch, head_dim) */
    const uint8_t *valid;   /* (batch, length), which cache columns count; NULL: all */
    const float *log_counts; /* (batch, weighed), added to the first columns' scores; NULL: none */
    float *scratch;
    int64_t num_layers, hidden, heads, kv_heads, head_dim;
    int64_t batch, length, capacity, threads; /* length counts this token */
    int64_t weighed;
    double epsilon, scaling;
} step_t;

/* Scratch memory that the threads share; `x` and `ys` hold (batch, hidden) for every thread. */
typedef struct {
    float *hidden, *qkv, *mixed, *values, *x, *ys, *scores;
    uint32_t *alive;
    int32_t *entries;
} scratch_t;

typedef struct {
    int64_t batch, hidden, heads, kv_heads, head_dim, capacity, width, threads;
} sizes_t;

#endif
