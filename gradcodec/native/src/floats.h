/* fp32, bf16 and fp16 in memory; fp32 inside. Integer conversions, which vectorise everywhere. */
INLINE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

/* To nearest, ties to even. */
INLINE uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of_float(x);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

INLINE float float_of_fp16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7FFF);
    /* Exponents up by 224, then the value down by 2^-112, so that those of Inf arrive at 255. */
    float normal = float_of_bits((rest << 13) + (0xE0u << 23)) * 0x1p-112f;
    float subnormal = float_of_bits(rest | (126u << 23)) - 0.5f;
    return float_of_bits(sign | bits_of_float(rest < 0x400 ? subnormal : normal));
}

/* To nearest, ties to even: adding a power of two lets the fp32 sum round at the right place. */
INLINE uint16_t fp16_of_float(float x) {
    uint32_t bits = bits_of_float(x), twice = bits + bits;
    float base = float_of_bits(bits & 0x7FFFFFFF) * 0x1p+112f * 0x1p-110f;
    uint32_t bias = twice & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    uint32_t sum = bits_of_float(float_of_bits((bias >> 1) + 0x07800000u) + base);
    uint32_t rest = (sum >> 13 & 0x7C00) + (sum & 0xFFF);
    return (uint16_t)((bits >> 16 & 0x8000) | (twice > 0xFF000000u ? 0x7E00 : rest));
}

static void read_floats(float *to, const void *from, int dtype, size_t start, size_t count) {
    const uint16_t *half = (const uint16_t *)from + start;
    if (dtype == FP32)
        memcpy(to, (const float *)from + start, 4 * count);
    else if (dtype == BF16)
        for (size_t i = 0; i < count; i++) to[i] = float_of_bf16(half[i]);
    else
        for (size_t i = 0; i < count; i++) to[i] = float_of_fp16(half[i]);
}

static void write_floats(void *to, int dtype, size_t start, const float *from, size_t count) {
    uint16_t *half = (uint16_t *)to + start;
    if (dtype == FP32)
        memcpy((float *)to + start, from, 4 * count);
    else if (dtype == BF16)
        for (size_t i = 0; i < count; i++) half[i] = bf16_of_float(from[i]);
    else
        for (size_t i = 0; i < count; i++) half[i] = fp16_of_float(from[i]);
}

/* y += values, whatever their type. */
static void add_floats(float *y, const void *values, int dtype, size_t start, size_t count) {
    if (dtype == FP32) {
        const float *e = (const float *)values + start;
        for (size_t i = 0; i < count; i++) y[i] += e[i];
    } else if (dtype == BF16) {
        const uint16_t *e = (const uint16_t *)values + start;
        for (size_t i = 0; i < count; i++) y[i] += float_of_bf16(e[i]);
    } else {
        const uint16_t *e = (const uint16_t *)values + start;
        for (size_t i = 0; i < count; i++) y[i] += float_of_fp16(e[i]);
    }
}
