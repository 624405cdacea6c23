/* Vectors of 16 bytes and no intrinsics but NEON's widening product: AArch64 and everything else. */
#include <stdlib.h>

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LEVEL portable
#define PORTABLE 1
#ifndef WIDTH /* tests set it, to run what is written for wider vectors on any machine */
#define WIDTH 16
#endif
#define VECTOR_BYTES WIDTH
#include "level.h"
