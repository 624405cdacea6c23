/* x86-64-v3 without FMA, which rounds once where the reference rounds twice. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx2,bmi,bmi2,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")
#endif
#define LEVEL avx2
#define VECTOR_BYTES 32
#include "level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
