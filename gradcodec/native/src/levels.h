/* What a caller asks for, and the table of functions that each instruction-set level fills in. */
#ifndef GRADCODEC_LEVELS_H
#define GRADCODEC_LEVELS_H

#include <stddef.h>
#include <stdint.h>

/* Raise it when a signature or a bit of any result changes; gradcodec/native/library.py has it too. */
#define GRADCODEC_ABI 3

enum { FP32, BF16, FP16 };
enum { SCALE_ABSMAX, SCALE_L1, SCALE_RMS };

/* W payloads to take the mean of. */
struct payloads {
    const uint8_t *packed; /* [W, stride] */
    const uint16_t *deltas; /* bf16 [W, blocks] */
    const float *weights; /* [W], or NULL for the mean */
    size_t world, stride, blocks;
};

struct encode_job {
    const void *values;
    void *residual; /* may be NULL */
    uint8_t *packed;
    uint16_t *deltas; /* bf16 [blocks] */
    uint64_t seed;
    size_t numel, total, block; /* total: whole chunks where rotated */
    int values_dtype, residual_dtype, bits, scale, rotate, stochastic;
    int gaussian; /* levels of gradcodec.reference.gaussian, 4 bits */
};

struct decode_job {
    struct payloads of;
    void *out;
    size_t numel, total, block;
    int bits, rotate, gaussian, dtype;
};

struct topk_job {
    const void *values;
    void *residual, *kept;
    void *index; /* uint16 of topk, uint8 of rows */
    size_t numel, k, chunk;
    int values_dtype, residual_dtype;
};

struct sparse_job {
    const void *kept; /* [W, chunks, k] */
    const uint16_t *index;
    float *out;
    size_t world, chunks, k, chunk, numel;
    int dtype;
};

struct lloyd_job {
    const void *values;
    void *residual; /* may be NULL */
    uint8_t *packed;
    uint16_t *levels; /* bf16 [blocks, 2] */
    size_t numel, block;
    int values_dtype, residual_dtype;
};

struct lloyd_mean_job {
    struct payloads of; /* deltas: bf16 [W, blocks, 2] */
    float *out;
    size_t numel, block;
};

struct rotsign_job {
    const void *values;
    const uint64_t *signs; /* a bit per value, padding included, in whole words */
    void *residual; /* [numel]; may be NULL */
    uint8_t *packed;
    uint16_t *scales; /* bf16 [blocks] */
    size_t numel, block, kept;
    int values_dtype, residual_dtype;
};

struct rotsign_mean_job {
    struct payloads of;
    const uint64_t *signs; /* [W, words] */
    float *out;
    size_t words, numel, block, kept;
};

struct level {
    const char *name;
    void (*random_bytes)(uint64_t start, size_t count, uint64_t seed, uint8_t *out,
                         const char *ahead);
    void (*encode)(const struct encode_job *);
    void (*decode)(const struct decode_job *);
    int (*topk)(const struct topk_job *); /* not 0: no memory */
    void (*rows)(const struct topk_job *);
    int (*sparse_mean)(const struct sparse_job *); /* not 0: a position beyond its chunk */
    int (*lloyd)(const struct lloyd_job *); /* not 0: no memory */
    void (*lloyd_mean)(const struct lloyd_mean_job *);
    void (*rotsign)(const struct rotsign_job *);
    void (*rotsign_mean)(const struct rotsign_mean_job *);
};

extern const struct level gradcodec_portable;
#if defined(__x86_64__)
extern const struct level gradcodec_sse2, gradcodec_avx2, gradcodec_avx512;
#endif

#endif
