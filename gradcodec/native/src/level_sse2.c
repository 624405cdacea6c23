/* What every x86-64 has. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdlib.h>

#define LEVEL sse2
#define VECTOR_BYTES 16
#include "level.h"
#endif
