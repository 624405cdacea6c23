/* x86-64-v4 without FMA, as in avx2. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,lzcnt,popcnt")
#endif
#define LEVEL avx512
#define VECTOR_BYTES 64
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
