/* Walsh-Hadamard transforms, gradcodec.reference.hadamard: butterflies of span 1, 2, 4 .. half the
 * block. Several stages are done on values while they are in registers; every sum has the same
 * operands as if the stages were done one after the other. `rotate` is rotate_chunks.
 */
#define CHUNK 4096
#define ROW_SIGNS 0x9E3779B97F4A7C15u
#define COLUMN_SIGNS 0xC2B2AE3D27D4EB4Fu

/* The sign bit of a row or a column; a value is flipped by the xor of both. */
INLINE uint32_t sign_bit(uint64_t word, size_t at) { return (uint32_t)(word >> at & 1) << 31; }

static void column_signs(uint32_t signs[64]) {
    for (size_t i = 0; i < 64; i++) signs[i] = sign_bit(COLUMN_SIGNS, i);
}

static void flip_signs(float *x) {
    uint32_t columns[64] ALIGNED;
    column_signs(columns);
    for (size_t row = 0; row < 64; row++) {
        uint32_t mine = sign_bit(ROW_SIGNS, row);
        i32_any *bits = (i32_any *)(x + 64 * row);
        for (size_t i = 0; i < 64; i++) bits[i] ^= (int32_t)(columns[i] ^ mine);
    }
}

/* a + b in the lower lane of a pair and a - b in the upper one: the pair swapped, plus itself
 * with the upper lane negated. */
#define IN_VECTOR(x, swap, span)                                                                   \
    (swap(x) + (vf)((vu)(x) ^ ((vu)((LANE_INDEX & (span)) != 0) & 0x80000000u)))

INLINE vf butterflies_in_vector(vf x, size_t size) {
    x = IN_VECTOR(x, SWAP_1, 1);
    x = IN_VECTOR(x, SWAP_2, 2);
#if LANES >= 8
    x = IN_VECTOR(x, SWAP_4, 4);
#endif
#if LANES >= 16
    if (size >= 16) x = IN_VECTOR(x, SWAP_8, 8);
#endif
    (void)size;
    return x;
}

/* Stages of span, 2 span, .. between `radix` vectors. */
INLINE void butterflies_across(vf *x, size_t radix) {
    for (size_t half = 1; half < radix; half *= 2)
        for (size_t i = 0; i < radix; i++)
            if (!(i & half)) {
                vf a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
}

/* Stages of span .. span * radix / 2; if span is LANES, first those within a vector. */
INLINE void pass_of(float *x, size_t length, size_t size, size_t span, size_t radix, float factor) {
    for (size_t base = 0; base < length; base += span * radix)
        for (size_t j = base; j < base + span; j += LANES) {
            vf part[8];
            for (size_t r = 0; r < radix; r++) {
                part[r] = load(x + j + r * span);
                if (span == LANES) part[r] = butterflies_in_vector(part[r], size);
            }
            butterflies_across(part, radix);
            for (size_t r = 0; r < radix; r++)
                store(x + j + r * span, factor == 1 ? part[r] : part[r] * factor);
        }
}

INLINE void pass(float *x, size_t length, size_t size, size_t span, size_t radix, float factor) {
    if (radix == 8)
        pass_of(x, length, size, span, 8, factor);
    else if (radix == 4)
        pass_of(x, length, size, span, 4, factor);
    else if (radix == 2)
        pass_of(x, length, size, span, 2, factor);
    else
        pass_of(x, length, size, span, 1, factor);
}

/* The radix of a pass: at most 8, and 1 if a block is shorter than a vector. */
static size_t least_radix(size_t left) { return left > 8 ? 8 : left ? left : 1; }

/* factor * H x of every `size` values, a power of two from 8 on; `length` is a multiple of 64. */
static void butterflies(float *x, size_t length, size_t size, float factor) {
    size_t radix = least_radix(size / LANES), span = LANES * radix;
    pass(x, length, size, LANES, radix, span < size ? 1 : factor);
    for (; span < size; span *= radix) {
        radix = least_radix(size / span);
        pass(x, length, size, span, radix, span * radix < size ? 1 : factor);
    }
}

/* The same for one chunk, with all numbers known to the compiler, which is a tenth faster. */
static void hadamard(float *x) {
    const float factor = 1.0f / 64;
    pass_of(x, CHUNK, CHUNK, LANES, 8, 1);
#if LANES == 4
    pass_of(x, CHUNK, CHUNK, 32, 8, 1);
    pass_of(x, CHUNK, CHUNK, 256, 8, 1);
    pass_of(x, CHUNK, CHUNK, 2048, 2, factor);
#elif LANES == 8
    pass_of(x, CHUNK, CHUNK, 64, 8, 1);
    pass_of(x, CHUNK, CHUNK, 512, 8, factor);
#else
    pass_of(x, CHUNK, CHUNK, 128, 8, 1);
    pass_of(x, CHUNK, CHUNK, 1024, 4, factor);
#endif
}

static void rotate(float *x) {
    flip_signs(x);
    hadamard(x);
}

static void rotate_back(float *x) {
    hadamard(x);
    flip_signs(x);
}
