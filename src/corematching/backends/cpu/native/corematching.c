/* Decode steps on CPUs: FFNs over lists of neurons, and whole steps of Llama-like decoders.
   The time goes into reading weights, so every row is read once, in place, and prefetched. */
#include <stddef.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "types.h"
#include "vectors.h"

#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif
#include "panels.h"

#define AHEAD_BYTES 9216 /* between what is used and what is fetched */
#define TINY 1e-24f /* a token without activations counts nothing */

enum { SUM, SUM_SIZES, SUM_UNIT_SQUARES };
enum { FLOATS, BF16S, BYTES };

#define W float
#define F(name) name##_float
#define LOAD load_float
#define STORE store_float
#define WIDEN widen_float
#define NARROW narrow_float
#include "dtype.inl.h"

#define W bf16
#define F(name) name##_bf16
#define LOAD load_bf16
#define STORE store_bf16
#define WIDEN widen_bf16
#define NARROW narrow_bf16
#include "dtype.inl.h"

#define W uint8_t
#define F(name) name##_byte
#define WIDEN (float)
#include "sums.inl.h"
#undef W
#undef F
#undef WIDEN

static float *take_floats(float *start, int64_t *used, int64_t count) {
    float *here = start ? start + *used : NULL;
    *used += (count + 15) / 16 * 16;
    return here;
}

/* Lay the scratch memory out from `start` on; from NULL it only counts. Returns floats used. */
static int64_t lay_out(float *start, const sizes_t *z, scratch_t *out) {
    int64_t used = 0, rows = z->batch * z->threads;
    out->hidden = take_floats(start, &used, z->batch * z->hidden);
    out->qkv = take_floats(start, &used, z->batch * (z->heads + 2 * z->kv_heads) * z->head_dim);
    out->mixed = take_floats(start, &used, z->batch * z->heads * z->head_dim);
    out->values = take_floats(start, &used, z->batch * z->width);
    out->x = take_floats(start, &used, rows * z->hidden);
    out->ys = take_floats(start, &used, rows * z->hidden);
    out->scores = take_floats(start, &used, z->threads * MAX_BATCH * z->capacity);
    out->alive = (uint32_t *)take_floats(start, &used, z->width);
    out->entries = (int32_t *)take_floats(start, &used, z->width);
    return used;
}

static sizes_t step_sizes(const step_t *step) {
    sizes_t sizes = {step->batch, step->hidden, step->heads, step->kv_heads, step->head_dim,
                     step->capacity, 0, step->threads};
    for (int64_t l = 0; l < step->num_layers; l++)
        if (step->layers[l].ffn.width > sizes.width) sizes.width = step->layers[l].ffn.width;
    return sizes;
}

/* Floats of scratch memory that cm_step needs */
int64_t cm_step_scratch(const step_t *step) {
    scratch_t scratch;
    sizes_t sizes = step_sizes(step);
    return lay_out(NULL, &sizes, &scratch);
}

void cm_step(const step_t *step, int is_bf16) {
    scratch_t scratch;
    sizes_t sizes = step_sizes(step);
    lay_out(step->scratch, &sizes, &scratch);
    if (is_bf16)
        step_bf16(step, &scratch);
    else
        step_float(step, &scratch);
}

/* Floats of scratch memory that cm_ffn needs */
int64_t cm_ffn_scratch(int64_t batch, int64_t hidden, int64_t width, int64_t threads) {
    scratch_t scratch;
    sizes_t sizes = {.batch = batch, .hidden = hidden, .width = width, .threads = threads};
    return lay_out(NULL, &sizes, &scratch);
}

void cm_ffn(const ffn_t *ffn, const void *x, void *out, int64_t batch, int64_t hidden,
            int64_t threads, float *memory, int is_bf16) {
    scratch_t scratch;
    sizes_t sizes = {.batch = batch, .hidden = hidden, .width = ffn->width, .threads = threads};
    lay_out(memory, &sizes, &scratch);
    if (is_bf16)
        ffn_alone_bf16(ffn, x, out, (int)batch, hidden, (int)threads, &scratch);
    else
        ffn_alone_float(ffn, x, out, (int)batch, hidden, (int)threads, &scratch);
}

/* Needs batch * (inputs + outputs) floats of scratch memory */
void cm_linear(const void *weight, const void *bias, const void *x, void *out, int64_t batch,
               int64_t inputs, int64_t outputs, int64_t threads, float *memory, int is_bf16) {
    if (is_bf16)
        linear_alone_bf16(weight, bias, x, out, (int)batch, inputs, outputs, (int)threads, memory);
    else
        linear_alone_float(weight, bias, x, out, (int)batch, inputs, outputs, (int)threads, memory);
}

/* The union of sets of neurons, each ascending. Set i holds for `group` rows of the batch from
   i * group on. `marks` has `width` zeros and is left so. Returns the neurons in the union; -1, and
   `marks` half made, where a set does not ascend within the width. */
int64_t cm_unite(const int64_t *indices, int64_t sets, int64_t count, int64_t group, int64_t width,
                 int32_t *rows, uint32_t *members, uint32_t *marks) {
    int64_t found = 0;
    for (int64_t s = 0; s < sets; s++) {
        uint32_t bits = ((1u << group) - 1) << (s * group);
        for (int64_t i = 0, last = -1; i < count; i++) {
            int64_t index = indices[s * count + i];
            if (index <= last || index >= width) return -1;
            marks[last = index] |= bits;
        }
    }
    for (int64_t n = 0; n < width; n++) {
        if (!marks[n]) continue;
        rows[found] = (int32_t)n;
        members[found++] = marks[n];
        marks[n] = 0;
    }
    return found;
}

/* Put an address range on large pages: fewer translations, a third more bandwidth.
   Parts that are not memory of the program's own stay as they are. Returns the bytes put there. */
int64_t cm_use_large_pages(uint64_t start, uint64_t end) {
    int64_t done = 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uint64_t page = 1u << 21;
    const int collapse_now = 25; /* MADV_COLLAPSE, Linux 6.1 */
    start = (start + page - 1) / page * page;
    for (uint64_t at = start; at + page <= end; at += page) {
        madvise((void *)at, page, MADV_HUGEPAGE);
        if (!madvise((void *)at, page, collapse_now)) done += (int64_t)page;
    }
#else
    (void)start, (void)end;
#endif
    return done;
}

const char *cm_target(void) {
#if defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "generic";
#endif
}

#include "prompt.h"
#include "tiles.h"
#include "tiled_attention.h"
#include "products.h"
#include "prompt_layer.h"
