/* Vectors of VECTOR_BYTES bytes, set by the level that includes this.
 *
 * Arithmetic is written with the vector extensions of GCC and clang; what those lack or compile
 * badly has an intrinsic here, and beside it a portable form, for the level `portable` and for
 * machines other than x86-64. All forms give the same bits.
 */
#ifndef GRADCODEC_VECTORS_H
#define GRADCODEC_VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES (VECTOR_BYTES / 4)
#define INLINE static inline __attribute__((always_inline, unused))
#define ALIGNED __attribute__((aligned(64)))

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between inlined functions only */
#endif

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t vq __attribute__((vector_size(VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(VECTOR_BYTES)));

/* The same memory seen as another type. */
typedef float vf_any __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint8_t vb_any __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef int32_t i32_any __attribute__((may_alias));
typedef uint16_t u16_any __attribute__((may_alias, aligned(1)));
typedef uint32_t u32_any __attribute__((may_alias, aligned(1)));
typedef uint64_t u64_any __attribute__((may_alias, aligned(1)));

INLINE vf load(const float *from) { return *(const vf_any *)from; }
INLINE void store(float *to, vf x) { *(vf_any *)to = x; }
INLINE vf every(float x) { return (vf){0} + x; }

#if defined(__x86_64__) && !defined(PORTABLE)
#define X86 1
#if VECTOR_BYTES == 16
#define MM(name) _mm_##name
#define INTEGERS(x) ((__m128i)(x))
#elif VECTOR_BYTES == 32
#define MM(name) _mm256_##name
#define INTEGERS(x) ((__m256i)(x))
#else
#define MM(name) _mm512_##name
#define INTEGERS(x) ((__m512i)(x))
#endif
#else
#define X86 0
#endif

/* Lanes swapped at distance 1, 2, 4, 8. */
#if defined(__clang__)
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (vi){__VA_ARGS__})
#endif
#if VECTOR_BYTES == 16
#define SWAP_1(x) SHUFFLE(x, 1, 0, 3, 2)
#define SWAP_2(x) SHUFFLE(x, 2, 3, 0, 1)
#define LANE_INDEX ((vi){0, 1, 2, 3})
#elif VECTOR_BYTES == 32
#define SWAP_1(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6)
#define SWAP_2(x) SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAP_4(x) SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3)
#define LANE_INDEX ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define SWAP_1(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#define SWAP_2(x) SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAP_4(x) SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define SWAP_8(x) SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define LANE_INDEX ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#endif

/* clamp(x, low, high); low where x is NaN. */
INLINE vf clamp(vf x, float low, float high) {
#if X86
    return MM(min_ps)(MM(max_ps)(x, every(low)), every(high));
#else
    vi above = x > every(low), below;
    x = (vf)(((vi)x & above) | ((vi)every(low) & ~above));
    below = x < every(high);
    return (vf)(((vi)x & below) | ((vi)every(high) & ~below));
#endif
}

/* The low halves of 64-bit lanes, multiplied to 64 bits; high halves do not matter. */
INLINE vq multiply_low(vq a, uint32_t b) {
#if X86
    return (vq)MM(mul_epu32)(INTEGERS(a), INTEGERS((vq){0} + b));
#elif defined(__ARM_NEON) && VECTOR_BYTES == 16
    return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

/* sums += x in fp64: lower lanes to the first, upper ones to the second. */
INLINE void add_doubles(vd sums[2], vf x) {
#if X86 && VECTOR_BYTES == 64
    sums[0] += (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
    sums[1] += (vd)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
#elif X86 && VECTOR_BYTES == 32
    sums[0] += (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
    sums[1] += (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
#elif X86
    sums[0] += (vd)_mm_cvtps_pd((__m128)x);
    sums[1] += (vd)_mm_cvtps_pd(_mm_movehl_ps((__m128)x, (__m128)x));
#else
    for (int lane = 0; lane < LANES; lane++) sums[lane / (LANES / 2)][lane % (LANES / 2)] += x[lane];
#endif
}

/* The sum of all lanes, of integers and of fp64. */
INLINE int32_t sum_lanes(vi x) {
#if VECTOR_BYTES >= 64
    x += (vi)SWAP_8((vf)x);
#endif
#if VECTOR_BYTES >= 32
    x += (vi)SWAP_4((vf)x);
#endif
    x += (vi)SWAP_2((vf)x);
    return x[0] + x[1];
}

INLINE double sum_doubles(vd x) {
#if VECTOR_BYTES >= 64
    x += (vd)SWAP_8((vf)x);
#endif
#if VECTOR_BYTES >= 32
    x += (vd)SWAP_4((vf)x);
#endif
    return x[0] + x[1];
}

/* 4 x LANES integers of 0..255 as bytes. */
INLINE void store_bytes(uint8_t *to, const vi x[4]) {
#if X86 && VECTOR_BYTES == 64
    for (int k = 0; k < 4; k++)
        _mm_storeu_si128((__m128i *)(to + 16 * k), _mm512_cvtepi32_epi8(INTEGERS(x[k])));
#elif X86 && VECTOR_BYTES == 32
    __m256i low = _mm256_packs_epi32(INTEGERS(x[0]), INTEGERS(x[1]));
    __m256i high = _mm256_packs_epi32(INTEGERS(x[2]), INTEGERS(x[3]));
    __m256i mixed = _mm256_packus_epi16(low, high); /* its halves are interleaved by fours */
    __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutevar8x32_epi32(mixed, order));
#elif X86
    __m128i low = _mm_packs_epi32(INTEGERS(x[0]), INTEGERS(x[1]));
    __m128i high = _mm_packs_epi32(INTEGERS(x[2]), INTEGERS(x[3]));
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi16(low, high));
#else
    for (int k = 0; k < 4; k++) *(vb_any *)(to + k * LANES) = __builtin_convertvector(x[k], vb);
#endif
}

/* 4 x LANES bytes as integers. */
INLINE void load_bytes(const uint8_t *from, vi x[4]) {
#if X86 && VECTOR_BYTES == 64
    for (int k = 0; k < 4; k++)
        x[k] = (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + 16 * k)));
#elif X86 && VECTOR_BYTES == 32
    for (int k = 0; k < 4; k++)
        x[k] = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8 * k)));
#elif X86
    __m128i zero = _mm_setzero_si128(), all = _mm_loadu_si128((const __m128i *)from);
    __m128i low = _mm_unpacklo_epi8(all, zero), high = _mm_unpackhi_epi8(all, zero);
    x[0] = (vi)_mm_unpacklo_epi16(low, zero);
    x[1] = (vi)_mm_unpackhi_epi16(low, zero);
    x[2] = (vi)_mm_unpacklo_epi16(high, zero);
    x[3] = (vi)_mm_unpackhi_epi16(high, zero);
#else
    for (int k = 0; k < 4; k++)
        x[k] = __builtin_convertvector((vb) * (const vb_any *)(from + k * LANES), vi);
#endif
}

#endif
