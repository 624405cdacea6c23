/* Every op on memory of exactly the size it is promised, to be built with
 * -fsanitize=address,undefined: whatever is read or written beyond it ends the process. First over
 * odd sizes with ordinary values; then, as often as the argument says, over random sizes and
 * settings with bits that no honest sender makes: NaN, Inf and negative scales, values and weights,
 * codes that no encoder writes, positions beyond their chunk, out of order and many times over. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "levels.h"

const char *gradcodec_level(int at);
int gradcodec_levels(void);
void gradcodec_encode(int, const void *, int, size_t, size_t, int, size_t, int, int, int, uint64_t,
                      void *, int, int, uint8_t *, uint16_t *);
void gradcodec_decode(int, const uint8_t *, size_t, const uint16_t *, size_t, size_t,
                      const float *, size_t, size_t, int, size_t, int, int, int, void *);
int gradcodec_topk(int, const void *, int, size_t, size_t, size_t, void *, int, void *,
                   uint16_t *);
void gradcodec_rows(int, const void *, int, size_t, size_t, void *, int, void *, uint8_t *);
int gradcodec_sparse_mean(int, const void *, int, const uint16_t *, size_t, size_t, size_t, size_t,
                          size_t, float *);
int gradcodec_lloyd(int, const void *, int, size_t, size_t, void *, int, uint8_t *, uint16_t *);
void gradcodec_lloyd_mean(int, const uint8_t *, size_t, const uint16_t *, size_t, size_t,
                          const float *, size_t, size_t, float *);
void gradcodec_rotsign(int, const void *, int, const uint64_t *, size_t, size_t, size_t, void *,
                       int, uint8_t *, uint16_t *);
void gradcodec_rotsign_mean(int, const uint8_t *, size_t, const uint16_t *, size_t,
                            const uint64_t *, size_t, size_t, const float *, size_t, size_t, size_t,
                            float *);
void gradcodec_random_bytes(int, uint64_t, size_t, uint64_t, uint8_t *);

static uint32_t state = 1;

/* Memory of exactly so many bytes, of random bits or, as floats, of random finite numbers. */
static void *filled(size_t bytes, int dtype) {
    uint8_t *memory = malloc(bytes ? bytes : 1);
    for (size_t i = 0; i < bytes; i++) {
        state = state * 1664525u + 1013904223u;
        memory[i] = (uint8_t)(state >> 24);
    }
    /* The exponent's upper bits cleared: magnitudes are below 2. */
    size_t width = dtype == FP32 ? 4 : 2;
    if (dtype >= 0)
        for (size_t i = width - 1; i < bytes; i += width) memory[i] &= 0xBF;
    return memory;
}

static size_t ceiling(size_t a, size_t b) { return (a + b - 1) / b; }

static void coding(int level, size_t numel, int bits, size_t block, int rotate, int dtype,
                   int stochastic) {
    enum { WORLD = 3 };
    size_t total = rotate ? ceiling(numel, 4096) * 4096 : numel;
    size_t blocks = ceiling(total, block), bytes = ceiling(total * (size_t)bits, 8);
    size_t width = dtype == FP32 ? 4 : 2;
    void *values = filled(numel * width, dtype), *residual = filled(total * width, dtype);
    uint8_t *packed = filled(WORLD * bytes, -1);
    uint16_t *deltas = filled(WORLD * blocks * 2, BF16);
    float *weights = filled(WORLD * 4, FP32);
    void *decoded = filled(numel * width, dtype);
    for (int with = 0; with < 2; with++) {
        void *e = with ? residual : NULL;
        for (int gaussian = 0; gaussian <= (bits == 4 && !stochastic); gaussian++) {
            gradcodec_encode(level, values, dtype, numel, total, bits, block, with ? 0 : 2, rotate,
                             stochastic, 7, e, dtype, gaussian, packed, deltas);
            gradcodec_decode(level, packed, bytes, deltas, blocks, WORLD, with ? weights : NULL,
                             numel, total, bits, block, rotate, gaussian, dtype, decoded);
        }
    }
    void *all[] = {values, residual, packed, deltas, weights, decoded};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void sparse(int level, size_t numel, size_t chunk, size_t k, int dtype) {
    size_t width = dtype == FP32 ? 4 : 2, chunks = ceiling(numel, chunk), rows = ceiling(numel, 64);
    void *values = filled(numel * width, dtype), *residual = filled(numel * width, dtype);
    void *kept = filled(chunks * k * width, -1), *of_rows = filled(rows * 2 * width, -1);
    uint16_t *index = filled(chunks * k * 2, -1);
    uint8_t *places = filled(rows * 2, -1);
    float *out = filled(numel * 4, FP32);
    gradcodec_topk(level, values, dtype, numel, k, chunk, residual, dtype, kept, index);
    gradcodec_topk(level, values, dtype, numel, k, chunk, NULL, 0, kept, index);
    gradcodec_sparse_mean(level, kept, dtype, index, 1, chunks, k, chunk, numel, out);
    for (size_t i = 0; i < chunks * k; i++) index[i] = (uint16_t)(index[i] * 40503u); /* anything */
    gradcodec_sparse_mean(level, kept, dtype, index, 1, chunks, k, chunk, numel, out);
    gradcodec_rows(level, values, dtype, numel, 1, residual, dtype, of_rows, places);
    gradcodec_rows(level, values, dtype, numel, 2, NULL, 0, of_rows, places);
    void *all[] = {values, residual, kept, of_rows, index, places, out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* A number below `end`. */
static size_t below(size_t end) {
    state = state * 1664525u + 1013904223u;
    return (size_t)(state >> 8) % end;
}

/* Memory of exactly so many bytes: any bits, and half of the time 32-bit patterns that are special
 * in fp32, bf16 or fp16. */
static void *any(size_t bytes) {
    static const uint32_t special[] = {0x7F800000, 0xFF800000, 0x7FC00001, 0x80000000, 0x7F7FFFFF,
                                       0x7F807F80, 0xFF80FF80, 0x7F7F7F7F, 0xFFFFFFFF, 1};
    uint8_t *memory = filled(bytes, -1);
    if (below(2))
        for (size_t i = 0; i + 4 <= bytes; i += 4 * (1 + below(3)))
            memcpy(memory + i, special + below(sizeof special / sizeof *special), 4);
    return memory;
}

static void hostile_coding(int level) {
    const size_t blocks_of[] = {8, 9, 10, 64, 100, 256, 4096, 8192, 1 << 20};
    int bits = 1 << below(4), dtype = (int)below(3), rotate = below(3) == 0, other = (int)below(3);
    int scale = bits <= 2 ? (int)below(3) : (int)below(2) * 2, stochastic = (int)below(2);
    int gaussian = bits == 4 && !stochastic && below(2);
    size_t block = rotate ? (size_t)8 << below(10) : blocks_of[below(sizeof blocks_of / sizeof *blocks_of)];
    size_t world = 1 + below(below(8) ? 4 : 600);
    size_t numel = below(world > 4 || below(2) ? 70 : 9000);
    size_t total = rotate ? ceiling(numel, 4096) * 4096 : numel, width = dtype == FP32 ? 4 : 2;
    size_t blocks = ceiling(total, block), bytes = ceiling(total * (size_t)bits, 8);
    void *values = any(numel * width), *residual = any(total * (other == FP32 ? 4 : 2));
    uint8_t *packed = any(world * bytes);
    uint16_t *deltas = any(world * blocks * 2);
    float *weights = any(world * 4);
    void *decoded = any(numel * width), *e = below(2) ? residual : NULL;
    const float *shares = below(2) ? weights : NULL;
    uint64_t seed = (uint64_t)state << 32 | state;
    gradcodec_decode(level, packed, bytes, deltas, blocks, world, shares, numel, total, bits, block,
                     rotate, gaussian, dtype, decoded);
    gradcodec_encode(level, values, dtype, numel, total, bits, block, scale, rotate, stochastic,
                     seed, e, other, gaussian, packed, deltas);
    void *all[] = {values, residual, packed, deltas, weights, decoded};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Two fitted levels: bodies that no encoder made, then values of any bits. */
static void hostile_levels(int level) {
    const size_t blocks_of[] = {8, 9, 10, 64, 100, 256, 1024, 4096, 8192, 1 << 20};
    size_t block = blocks_of[below(sizeof blocks_of / sizeof *blocks_of)], world = 1 + below(4);
    size_t numel = below(below(2) ? 70 : 9000), blocks = ceiling(numel, block);
    size_t bytes = ceiling(2 * numel, 8);
    int dtype = (int)below(3), other = (int)below(3);
    void *values = any(numel * (dtype == FP32 ? 4 : 2)), *e = any(numel * (other == FP32 ? 4 : 2));
    uint8_t *packed = any(world * bytes), *out = any(bytes);
    uint16_t *levels = any(world * blocks * 4), *fitted = any(blocks * 4);
    float *weights = any(world * 4), *mean = any(numel * 4);
    gradcodec_lloyd_mean(level, packed, bytes, levels, blocks, world, below(2) ? weights : NULL,
                         numel, block, mean);
    if (gradcodec_lloyd(level, values, dtype, numel, block, below(2) ? e : NULL, other, out, fitted))
        abort();
    void *all[] = {values, e, packed, out, levels, fitted, weights, mean};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Signs of rotated blocks, likewise. */
static void hostile_signs(int level) {
    size_t block = (size_t)8 << below(10), kept = 1 + below(block), world = 1 + below(4);
    size_t numel = below(below(2) ? 70 : 9000), blocks = ceiling(numel, block);
    size_t bytes = ceiling(blocks * kept, 8), words = ceiling(blocks * block, 64);
    int dtype = (int)below(3), other = (int)below(3);
    void *values = any(numel * (dtype == FP32 ? 4 : 2)), *e = any(numel * (other == FP32 ? 4 : 2));
    uint8_t *packed = any(world * bytes), *out = any(bytes);
    uint16_t *scales = any(world * blocks * 2), *made = any(blocks * 2);
    uint64_t *signs = any(world * words * 8);
    float *weights = any(world * 4), *mean = any(numel * 4);
    gradcodec_rotsign_mean(level, packed, bytes, scales, blocks, signs, words, world,
                           below(2) ? weights : NULL, numel, block, kept, mean);
    gradcodec_rotsign(level, values, dtype, signs, numel, block, kept, below(2) ? e : NULL, other,
                      out, made);
    void *all[] = {values, e, packed, out, scales, made, signs, weights, mean};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void hostile_lists(int level) {
    const size_t chunks_of[] = {2, 63, 64, 65, 100, 4096, 65535, 65536};
    size_t chunk = chunks_of[below(sizeof chunks_of / sizeof *chunks_of)];
    size_t numel = below(below(8) ? 9000 : 140000), chunks = ceiling(numel, chunk);
    size_t k = numel > 9000 ? 1 : 1 + below(chunk < 300 ? chunk : 300);
    size_t rows = ceiling(numel, 64), world = 1 + below(3);
    int dtype = (int)below(3);
    size_t width = dtype == FP32 ? 4 : 2;
    void *values = any(numel * width), *residual = any(numel * width);
    void *kept = any(world * chunks * k * width), *of_rows = any(rows * 2 * width);
    uint16_t *index = any(world * chunks * k * 2);
    uint8_t *places = any(rows * 2);
    float *out = any(numel * 4);
    gradcodec_sparse_mean(level, kept, dtype, index, world, chunks, k, chunk, numel, out);
    for (size_t i = 0; i < world * chunks * k; i++)
        index[i] = (uint16_t)below(below(50) ? chunk : 65536);
    gradcodec_sparse_mean(level, kept, dtype, index, world, chunks, k, chunk, numel, out);
    gradcodec_topk(level, values, dtype, numel, k, chunk, below(2) ? residual : NULL, dtype, kept,
                   index);
    for (size_t i = 0; i < chunks * k; i++)
        if (index[i] >= chunk) abort();
    gradcodec_rows(level, values, dtype, numel, 1 + below(2), below(2) ? residual : NULL, dtype,
                   of_rows, places);
    void *all[] = {values, residual, kept, of_rows, index, places, out};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void dither(int level) {
    size_t count = below(9000);
    uint8_t *out = malloc(count + 256); /* whole groups of counters are written */
    gradcodec_random_bytes(level, below(1 << 20) * 16, count, state, out);
    free(out);
}

int main(int count, char **arguments) {
    size_t rounds = count > 1 ? strtoul(arguments[1], NULL, 10) : 0;
    const size_t sizes[] = {0, 1, 65, 4095, 2 * 4096 + 17};
    const size_t blocks[] = {64, 4096, 10, 8192};
    for (int level = 0; level < gradcodec_levels(); level++) {
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int dtype = 0; dtype < 3; dtype++) {
                for (int bits = 1; bits <= 8; bits *= 2)
                    for (int stochastic = 0; stochastic < 2; stochastic++) {
                        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
                            coding(level, sizes[s], bits, blocks[b], 0, dtype, stochastic);
                        coding(level, sizes[s], bits, 4096, 1, dtype, stochastic);
                    }
                sparse(level, sizes[s], 4096, 64, dtype);
                sparse(level, sizes[s], 100, 99, dtype);
                sparse(level, sizes[s], 40000, 40000, dtype);
            }
        for (size_t i = 0; i < rounds; i++) {
            hostile_coding(level);
            hostile_lists(level);
            hostile_levels(level);
            hostile_signs(level);
            dither(level);
        }
        printf("%s\n", gradcodec_level(level));
    }
    return 0;
}
