/* What Python calls: levels by number, flat arguments. Nothing is checked here; callers pass
 * contiguous memory of the right sizes. No global state, so any thread may call at any time. */
#include "levels.h"

#define EXPORT __attribute__((visibility("default")))

/* Hash of the sources, set by setup.py: a library built from other sources is refused. */
#ifndef GRADCODEC_SOURCES
#define GRADCODEC_SOURCES unknown
#endif
#define TEXT(x) TEXT_OF(x)
#define TEXT_OF(x) #x

static const struct level *const LEVELS[] = {
    &gradcodec_portable,
#if defined(__x86_64__)
    &gradcodec_sse2, &gradcodec_avx2, &gradcodec_avx512,
#endif
};
#define COUNT (int)(sizeof LEVELS / sizeof *LEVELS)

EXPORT int gradcodec_abi(void) { return GRADCODEC_ABI; }

EXPORT const char *gradcodec_sources(void) { return TEXT(GRADCODEC_SOURCES); }

/* Name of a level, slowest first; NULL where there is none. */
EXPORT const char *gradcodec_level(int at) {
    return at >= 0 && at < COUNT ? LEVELS[at]->name : 0;
}

/* How many of the levels this machine runs. Each needs all that the one before it needs. */
EXPORT int gradcodec_levels(void) {
    int count = COUNT;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        count = 3;
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
          __builtin_cpu_supports("bmi2")))
        count = 2;
#endif
    return count;
}

EXPORT void gradcodec_random_bytes(int level, uint64_t start, size_t count, uint64_t seed,
                                   uint8_t *out) {
    LEVELS[level]->random_bytes(start, count, seed, out, 0);
}

EXPORT void gradcodec_encode(int level, const void *values, int values_dtype, size_t numel,
                             size_t total, int bits, size_t block, int scale, int rotate,
                             int stochastic, uint64_t seed, void *residual, int residual_dtype,
                             int gaussian, uint8_t *packed, uint16_t *deltas) {
    struct encode_job job = {
        .values = values, .values_dtype = values_dtype, .numel = numel, .total = total,
        .bits = bits, .block = block, .scale = scale, .rotate = rotate, .stochastic = stochastic,
        .seed = seed, .residual = residual, .residual_dtype = residual_dtype, .packed = packed,
        .deltas = deltas, .gaussian = gaussian,
    };
    LEVELS[level]->encode(&job);
}

EXPORT void gradcodec_decode(int level, const uint8_t *packed, size_t stride,
                             const uint16_t *deltas, size_t blocks, size_t world,
                             const float *weights, size_t numel, size_t total, int bits,
                             size_t block, int rotate, int gaussian, int dtype, void *out) {
    struct decode_job job = {
        .of = {.packed = packed, .deltas = deltas, .weights = weights, .world = world,
               .stride = stride, .blocks = blocks},
        .numel = numel, .total = total, .bits = bits, .block = block, .rotate = rotate,
        .gaussian = gaussian, .dtype = dtype, .out = out,
    };
    LEVELS[level]->decode(&job);
}

EXPORT int gradcodec_topk(int level, const void *values, int values_dtype, size_t numel, size_t k,
                          size_t chunk, void *residual, int residual_dtype, void *kept,
                          uint16_t *index) {
    struct topk_job job = {
        .values = values, .values_dtype = values_dtype, .numel = numel, .k = k, .chunk = chunk,
        .residual = residual, .residual_dtype = residual_dtype, .kept = kept, .index = index,
    };
    return LEVELS[level]->topk(&job);
}

EXPORT void gradcodec_rows(int level, const void *values, int values_dtype, size_t numel, size_t k,
                           void *residual, int residual_dtype, void *kept, uint8_t *index) {
    struct topk_job job = {
        .values = values, .values_dtype = values_dtype, .numel = numel, .k = k,
        .residual = residual, .residual_dtype = residual_dtype, .kept = kept, .index = index,
    };
    LEVELS[level]->rows(&job);
}

EXPORT int gradcodec_sparse_mean(int level, const void *kept, int dtype, const uint16_t *index,
                                 size_t world, size_t chunks, size_t k, size_t chunk, size_t numel,
                                 float *out) {
    struct sparse_job job = {
        .kept = kept, .dtype = dtype, .index = index, .world = world, .chunks = chunks, .k = k,
        .chunk = chunk, .numel = numel, .out = out,
    };
    return LEVELS[level]->sparse_mean(&job);
}

EXPORT int gradcodec_lloyd(int level, const void *values, int values_dtype, size_t numel,
                           size_t block, void *residual, int residual_dtype, uint8_t *packed,
                           uint16_t *levels) {
    struct lloyd_job job = {
        .values = values, .values_dtype = values_dtype, .numel = numel, .block = block,
        .residual = residual, .residual_dtype = residual_dtype, .packed = packed,
        .levels = levels,
    };
    return LEVELS[level]->lloyd(&job);
}

EXPORT void gradcodec_lloyd_mean(int level, const uint8_t *packed, size_t stride,
                                 const uint16_t *levels, size_t blocks, size_t world,
                                 const float *weights, size_t numel, size_t block, float *out) {
    struct lloyd_mean_job job = {
        .of = {.packed = packed, .deltas = levels, .weights = weights, .world = world,
               .stride = stride, .blocks = blocks},
        .numel = numel, .block = block, .out = out,
    };
    LEVELS[level]->lloyd_mean(&job);
}

EXPORT void gradcodec_rotsign(int level, const void *values, int values_dtype,
                              const uint64_t *signs, size_t numel, size_t block, size_t kept,
                              void *residual, int residual_dtype, uint8_t *packed,
                              uint16_t *scales) {
    struct rotsign_job job = {
        .values = values, .values_dtype = values_dtype, .signs = signs, .numel = numel,
        .block = block, .kept = kept, .residual = residual, .residual_dtype = residual_dtype,
        .packed = packed, .scales = scales,
    };
    LEVELS[level]->rotsign(&job);
}

EXPORT void gradcodec_rotsign_mean(int level, const uint8_t *packed, size_t stride,
                                   const uint16_t *scales, size_t blocks, const uint64_t *signs,
                                   size_t words, size_t world, const float *weights, size_t numel,
                                   size_t block, size_t kept, float *out) {
    struct rotsign_mean_job job = {
        .of = {.packed = packed, .deltas = scales, .weights = weights, .world = world,
               .stride = stride, .blocks = blocks},
        .signs = signs, .words = words, .numel = numel, .block = block, .kept = kept, .out = out,
    };
    LEVELS[level]->rotsign_mean(&job);
}
