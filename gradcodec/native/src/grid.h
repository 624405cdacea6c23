/* The levels of a block, gradcodec.reference.grid: value = (code - zero) * delta. */
#define GAUSSIAN 16 /* in place of bits: the 16 levels of gradcodec.reference.gaussian */

static const uint8_t SIZES[8] = {5, 15, 25, 36, 48, 62, 79, 104};

INLINE float zero_of(int bits) { return bits == 8 ? 128 : bits == 4 ? 8 : bits == 2 ? 1.5f : 0.5f; }
INLINE float low_of(int bits) { return bits >= 4 ? 1 : 0; }
INLINE float high_of(int bits) { return (float)((1 << bits) - 1); }
INLINE float top_of(int bits) {
    if (bits == GAUSSIAN) return 104;
    return bits == 8 ? 127 : bits == 4 ? 7 : bits == 2 ? 1.5f : 1;
}

#define LARGEST 3e38f /* below the end of fp32, where rounding to bf16 could make an infinity */
#define HEADROOM (1.0f + 0x1p-7f)

/* Magnitudes have the order of their bits; NaN is above all. Inlined into `encode` it is slower. */
static __attribute__((noinline)) float absmax(const float *y, size_t count) {
    const i32_any *bits = (const i32_any *)y;
    int32_t most = 0;
    for (size_t i = 0; i < count; i++) {
        int32_t size = bits[i] & 0x7FFFFFFF;
        most = size > most ? size : most;
    }
    return float_of_bits((uint32_t)most);
}

/* Sum of |y| or of y^2, in fp64. */
static double sum_of_sizes(const float *y, size_t count, int squares) {
    double sums[8] = {0}, total = 0;
    size_t whole = count / 8 * 8;
    for (size_t i = 0; i < whole; i += 8)
        for (size_t lane = 0; lane < 8; lane++) {
            double size = __builtin_fabs((double)y[i + lane]);
            sums[lane] += squares ? size * size : size;
        }
    for (size_t i = whole; i < count; i++) {
        double size = __builtin_fabs((double)y[i]);
        total += squares ? size * size : size;
    }
    for (size_t lane = 0; lane < 8; lane++) total += sums[lane];
    return total;
}

static float factor_of(int scale, int bits) {
    if (scale == SCALE_L1) return bits == 2 ? 1.2479f : 1;
    if (bits == GAUSSIAN) return 0.026217f;
    return bits == 8 ? 0.0308f : bits == 4 ? 0.3535f : bits == 2 ? 0.9957f : 0.7979f;
}

/* What a block's delta follows from, gathered over its parts: the largest magnitude, or a sum. */
struct size {
    float peak;
    double sum;
};

static void add_size(struct size *size, const float *y, size_t count, int scale) {
    if (scale == SCALE_ABSMAX) {
        float peak = absmax(y, count);
        size->peak = peak <= size->peak ? size->peak : peak; /* a NaN stays */
    } else {
        size->sum += sum_of_sizes(y, count, scale == SCALE_RMS);
    }
}

/* bf16 delta of a block of `count` values. */
static uint16_t delta_of(struct size size, size_t count, int bits, int scale, int stochastic) {
    float delta;
    if (scale == SCALE_ABSMAX) {
        delta = (size.peak > LARGEST ? LARGEST : size.peak) / top_of(bits);
        if (stochastic) delta *= HEADROOM;
    } else {
        double mean = size.sum / (double)count;
        delta = (float)(scale == SCALE_RMS ? __builtin_sqrt(mean) : mean) * factor_of(scale, bits);
        delta = delta > LARGEST / top_of(bits) ? LARGEST / top_of(bits) : delta;
    }
    return bf16_of_float(delta);
}

/* zero + dither, exact: the byte becomes the mantissa of 128 + (byte + 1/2) / 256. */
INLINE void shifts_of(const uint8_t *dither, int bits, vf shift[4]) {
    vi bytes[4];
#if X86 && VECTOR_BYTES == 64
    const __m512i place = _mm512_set_epi8(
        -1, -1, 15, -1, -1, -1, 14, -1, -1, -1, 13, -1, -1, -1, 12, -1, -1, -1, 11, -1, -1, -1,
        10, -1, -1, -1, 9, -1, -1, -1, 8, -1, -1, -1, 7, -1, -1, -1, 6, -1, -1, -1, 5, -1, -1, -1,
        4, -1, -1, -1, 3, -1, -1, -1, 2, -1, -1, -1, 1, -1, -1, -1, 0, -1);
    for (int k = 0; k < 4; k++) {
        __m128i part = _mm_loadu_si128((const __m128i *)(dither + 16 * k));
        bytes[k] = (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(part), place);
    }
#elif X86 && VECTOR_BYTES == 32
    const __m256i place[2] = {
        _mm256_setr_epi8(-1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 4, -1, -1,
                         -1, 5, -1, -1, -1, 6, -1, -1, -1, 7, -1, -1),
        _mm256_setr_epi8(-1, 8, -1, -1, -1, 9, -1, -1, -1, 10, -1, -1, -1, 11, -1, -1, -1, 12, -1,
                         -1, -1, 13, -1, -1, -1, 14, -1, -1, -1, 15, -1, -1)};
    for (int k = 0; k < 4; k++) {
        __m128i part = _mm_loadu_si128((const __m128i *)(dither + 16 * (k / 2)));
        bytes[k] = (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(part), place[k % 2]);
    }
#else
    load_bytes(dither, bytes);
    for (int k = 0; k < 4; k++) bytes[k] <<= 8;
#endif
    for (int k = 0; k < 4; k++) {
        shift[k] = (vf)(bytes[k] | 0x43000080);
        if (bits != 8) shift[k] -= 128 - zero_of(bits);
    }
}

/* Gaussian levels of t = code - 7.5: an odd polynomial is within 0.4 of each of these whole numbers, and is
 * rounded to them by a sum that has no bits below one. Looking them up takes twice as long. */
#define GAUSSIAN_LEVEL(t) \
    ((t) * (((t) * (t) * 0.00114183f + 0.0017385f) * ((t) * (t)) + 10.1032f) + 0x1.8p23f - 0x1.8p23f)

/* As quantise_as with these levels: a code counts the middles below a magnitude. */
INLINE void quantise_gaussian(float *rest, const float *y, size_t count, float step,
                              uint8_t *codes) {
    float inverse = step > 0 ? 1.0f / step : 0.0f;
    for (size_t i = 0; i < count; i += 4 * LANES) {
        vi code[4];
        for (int k = 0; k < 4; k++) {
            vf x = load(y + i + (size_t)k * LANES);
            vf size = (vf)((vi)(x * inverse) & 0x7FFFFFFF);
            vi minus = x < 0, above = {0};
            for (int m = 0; m < 7; m++)
                above -= size > every((float)(SIZES[m] + SIZES[m + 1]) / 2);
            code[k] = (above + 8) ^ (minus & 15);
            if (!rest) continue;
            vf t = __builtin_convertvector(code[k], vf) - 7.5f;
            store(rest + i + (size_t)k * LANES, x - GAUSSIAN_LEVEL(t) * step);
        }
        store_bytes(codes + i, code);
    }
}

/* Codes; with `rest`, which may be y, also y - value(code). */
INLINE void quantise_as(int bits, const uint8_t *dither, float *rest, const float *y, size_t count,
                        float step, uint8_t *codes) {
    float inverse = step > 0 ? 1.0f / step : 0.0f;
    for (size_t i = 0; i < count; i += 4 * LANES) {
        vi code[4];
        vf shift[4], x[4];
        if (dither) shifts_of(dither + i, bits, shift);
        for (int k = 0; k < 4; k++) {
            x[k] = load(y + i + (size_t)k * LANES);
            if (bits == 1 && !dither) {
                code[k] = (x[k] < 0) & 1;
                continue;
            }
            vf t = x[k] * inverse;
            if (bits == 1) t *= -0.5f;
            t = dither ? t + shift[k] : t + (zero_of(bits) + 0.5f);
            if (bits == 1)
                code[k] = (t >= 1) & 1;
            else
                code[k] = __builtin_convertvector(clamp(t, low_of(bits), high_of(bits)), vi);
        }
        store_bytes(codes + i, code);
        if (rest)
            for (int k = 0; k < 4; k++) {
                vf level = __builtin_convertvector(code[k], vf);
                level = bits == 1 ? 1 - 2 * level : level - zero_of(bits);
                store(rest + i + (size_t)k * LANES, x[k] - level * step);
            }
    }
}

INLINE void quantise_with(int bits, const uint8_t *dither, float *rest, const float *y,
                          size_t count, float step, uint8_t *codes) {
    if (dither && rest)
        quantise_as(bits, dither, rest, y, count, step, codes);
    else if (dither)
        quantise_as(bits, dither, NULL, y, count, step, codes);
    else if (rest)
        quantise_as(bits, NULL, rest, y, count, step, codes);
    else
        quantise_as(bits, NULL, NULL, y, count, step, codes);
}

/* For a multiple of 64 values. */
static __attribute__((noinline)) void quantise_whole(int bits, const uint8_t *dither, float *rest,
                                                     const float *y, size_t count, float step,
                                                     uint8_t *codes) {
    if (bits == GAUSSIAN && rest)
        quantise_gaussian(rest, y, count, step, codes);
    else if (bits == GAUSSIAN)
        quantise_gaussian(NULL, y, count, step, codes);
    else if (bits == 8)
        quantise_with(8, dither, rest, y, count, step, codes);
    else if (bits == 4)
        quantise_with(4, dither, rest, y, count, step, codes);
    else if (bits == 2)
        quantise_with(2, dither, rest, y, count, step, codes);
    else
        quantise_with(1, dither, rest, y, count, step, codes);
}

/* For any number of values of one block. */
static void quantise(int bits, const uint8_t *dither, float *rest, const float *y, size_t count,
                     float step, uint8_t *codes) {
    size_t whole = count / 64 * 64, tail = count - whole;
    quantise_whole(bits, dither, rest, y, whole, step, codes);
    if (!tail) return;
    float of_y[64] = {0};
    uint8_t of_dither[64] = {0}, of_codes[64];
    memcpy(of_y, y + whole, 4 * tail);
    if (dither) memcpy(of_dither, dither + whole, tail);
    quantise_whole(bits, dither ? of_dither : NULL, rest ? of_y : NULL, of_y, 64, step, of_codes);
    memcpy(codes + whole, of_codes, tail);
    if (rest) memcpy(rest + whole, of_y, 4 * tail);
}

/* total += values of codes, times the weight if weighted; if `first`, total starts at zero. */
INLINE void add_values_as(int bits, int weighted, int first, float *total, const uint8_t *codes,
                          size_t count, float step, float weight) {
    size_t whole = count / (4 * LANES) * (4 * LANES);
    for (size_t i = 0; i < whole; i += 4 * LANES) {
        vi code[4];
        load_bytes(codes + i, code);
        for (int k = 0; k < 4; k++) {
            vf level = __builtin_convertvector(code[k], vf);
            if (bits == GAUSSIAN)
                level = GAUSSIAN_LEVEL(level - 7.5f) * step;
            else
                level = (bits == 1 ? 1 - 2 * level : level - zero_of(bits)) * step;
            if (weighted) level *= weight;
            float *at = total + i + (size_t)k * LANES;
            store(at, (first ? every(0) : load(at)) + level);
        }
    }
    for (size_t i = whole; i < count; i++) {
        float level = codes[i];
        if (bits == GAUSSIAN)
            level = GAUSSIAN_LEVEL(level - 7.5f) * step;
        else
            level = (bits == 1 ? 1 - 2 * level : level - zero_of(bits)) * step;
        if (weighted) level *= weight;
        total[i] = (first ? 0 : total[i]) + level;
    }
}

INLINE void add_values_with(int bits, const float *weight, int first, float *total,
                            const uint8_t *codes, size_t count, float step) {
    if (weight && first)
        add_values_as(bits, 1, 1, total, codes, count, step, *weight);
    else if (weight)
        add_values_as(bits, 1, 0, total, codes, count, step, *weight);
    else if (first)
        add_values_as(bits, 0, 1, total, codes, count, step, 1);
    else
        add_values_as(bits, 0, 0, total, codes, count, step, 1);
}

static void add_values(int bits, const float *weight, int first, float *total,
                       const uint8_t *codes, size_t count, float step) {
    if (bits == GAUSSIAN)
        add_values_with(GAUSSIAN, weight, first, total, codes, count, step);
    else if (bits == 8)
        add_values_with(8, weight, first, total, codes, count, step);
    else if (bits == 4)
        add_values_with(4, weight, first, total, codes, count, step);
    else if (bits == 2)
        add_values_with(2, weight, first, total, codes, count, step);
    else
        add_values_with(1, weight, first, total, codes, count, step);
}
