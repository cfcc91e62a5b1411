/* The tile instructions that tiles.h uses, in plain C: so that what they read and write can be checked
   by sanitizers, and tiles be tested on processors that have none. Defined with CM_EMULATE_TILES. */
#ifndef CM_EMULATED_TILES_H
#define CM_EMULATED_TILES_H

#include <stdlib.h>

#define EMULATED_ROWS 16
#define EMULATED_BYTES 64

typedef struct {
    uint8_t bytes[EMULATED_ROWS][EMULATED_BYTES];
} emulated_tile_t;

static _Thread_local emulated_tile_t emulated[8];
static _Thread_local int emulated_on; /* between a configuration and a release */

/* As the processor does: a tile that is not configured ends the program */
static emulated_tile_t *emulated_at(int tile) {
    if (!emulated_on || tile < 0 || tile > 7) abort();
    return &emulated[tile];
}

/* All tiles are 16 rows of 64 bytes here; another configuration is not known */
static void emulate_config(const void *config) {
    const uint8_t *bytes = config;
    if (bytes[0] != 1 || bytes[1]) abort();
    for (int i = 0; i < 8; i++) {
        uint16_t width;
        memcpy(&width, bytes + 16 + 2 * i, sizeof width);
        if (width != EMULATED_BYTES || bytes[48 + i] != EMULATED_ROWS) abort();
    }
    memset(emulated, 0, sizeof emulated);
    emulated_on = 1;
}

static void emulate_release(void) {
    if (!emulated_on) abort();
    emulated_on = 0;
}

static void emulate_zero(int tile) { memset(emulated_at(tile), 0, sizeof *emulated); }

static void emulate_load(int tile, const void *from, int64_t stride) {
    emulated_tile_t *t = emulated_at(tile);
    for (int64_t row = 0; row < EMULATED_ROWS; row++)
        memcpy(t->bytes[row], (const char *)from + row * stride, EMULATED_BYTES);
}

static void emulate_store(int tile, void *to, int64_t stride) {
    const emulated_tile_t *t = emulated_at(tile);
    for (int64_t row = 0; row < EMULATED_ROWS; row++)
        memcpy((char *)to + row * stride, t->bytes[row], EMULATED_BYTES);
}

/* sums (16, 16) += left (16, 32) . right, whose word (k, n) has inputs 2k and 2k + 1 of output n */
static void emulate_products(int sums, int left, int right) {
    emulated_tile_t *out = emulated_at(sums), *a = emulated_at(left), *b = emulated_at(right);
    for (int m = 0; m < EMULATED_ROWS; m++) {
        float total[EMULATED_BYTES / 4];
        memcpy(total, out->bytes[m], sizeof total);
        for (int k = 0; k < EMULATED_ROWS; k++) {
            bf16 x[2], y[EMULATED_BYTES / 2];
            memcpy(x, a->bytes[m] + 4 * k, sizeof x);
            memcpy(y, b->bytes[k], sizeof y);
            for (int n = 0; n < EMULATED_BYTES / 4; n++)
                total[n] += widen_bf16(x[0]) * widen_bf16(y[2 * n]) +
                            widen_bf16(x[1]) * widen_bf16(y[2 * n + 1]);
        }
        memcpy(out->bytes[m], total, sizeof total);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulate_config
#define _tile_release emulate_release
#define _tile_zero emulate_zero
#define _tile_loadd emulate_load
#define _tile_stream_loadd emulate_load
#define _tile_stored emulate_store
#define _tile_dpbf16ps emulate_products

#endif
