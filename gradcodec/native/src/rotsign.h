/* gradcodec.reference.rotsign: signs of blocks of a power of two, rotated with random signs. A tile
 * of a chunk holds whole blocks, and is rotated and coded while it is in the first cache. */

/* x ^= signs, for a multiple of 64 values; a set bit of a word negates. */
static void flip_by_words(float *x, const uint64_t *words, size_t count) {
    const vi place = 1 << LANE_INDEX;
    for (size_t i = 0; i < count; i += 64) {
        uint64_t word = words[i / 64];
        for (size_t j = 0; j < 64; j += LANES) {
            vi its = ((vi){0} + (int32_t)(word >> j)) & place;
            vu minus = (vu)(its != 0) & 0x80000000u;
            float *at = x + i + j;
            store(at, (vf)((vu)load(at) ^ minus));
        }
    }
}

/* The power of two above a block's largest magnitude, -126 .. 126. */
static int exponent_of(const float *y, size_t block) {
    int exponent = (int)(bits_of_float(absmax(y, block)) >> 23) - 126;
    return exponent > 126 ? 126 : exponent;
}

static float power_of_two(int exponent) { return float_of_bits((uint32_t)(exponent + 127) << 23); }

/* bf16 scale of a rotated block that lacks its factors 2^exponent and sqrt(1/block). */
static uint16_t rotsign_scale(const float *y, size_t block, size_t kept, int exponent) {
    double energy = sum_of_sizes(y, block, 1), total = sum_of_sizes(y, kept, 0);
    double size = total > 0 ? energy / total * (1.0 / __builtin_sqrt((double)block)) : 0;
    return bf16_of_float((float)(size * (double)power_of_two(exponent)));
}

/* A stream of single bits; any number of bits is added at a time. */
struct bit_stream {
    uint8_t *to;
    size_t held; /* bits at the start of `codes` that are not written yet, fewer than 64 */
    uint8_t codes[64 + CHUNK] ALIGNED;
};

static void write_whole_words(struct bit_stream *stream) {
    size_t whole = stream->held / 64 * 64;
    pack(stream->to, stream->codes, whole, 1);
    stream->to += whole / 8;
    stream->held -= whole;
    memmove(stream->codes, stream->codes + whole, stream->held);
}

static void write_the_rest(struct bit_stream *stream) {
    uint8_t last[8];
    memset(stream->codes + stream->held, 0, 64 - stream->held);
    pack(last, stream->codes, 64, 1);
    memcpy(stream->to, last, (stream->held + 7) / 8);
}

/* Values D H y / sqrt(block) of a tile of `count` values, from the codes (signs of y) and scales of
 * its blocks; writes `x` up to a multiple of 64. */
static void rotsign_values(float *x, const uint8_t *codes, const uint16_t *scales,
                           const uint64_t *signs, size_t count, size_t block, size_t kept) {
    size_t length = (count + 63) / 64 * 64;
    /* 1 / sqrt(block): a power of two before the sums, which stay exact and within fp32, and the
     * remaining factor after them. */
    int power = __builtin_ctzll(block);
    float before = power_of_two(-(power / 2)), after = power % 2 ? (float)__builtin_sqrt(0.5) : 1;
    if (kept < block || length > count) memset(x, 0, 4 * length);
    for (size_t b = 0; b * block < count; b++) {
        float step = float_of_bf16(scales[b]) * before;
        add_values(1, NULL, 1, x + b * block, codes + b * kept, kept, step);
    }
    butterflies(x, length, block, after);
    flip_by_words(x, signs, length);
}

static void rotsign(const struct rotsign_job *job) {
    float copy[CHUNK] ALIGNED, y[CHUNK] ALIGNED;
    struct bit_stream stream = {.to = job->packed};
    size_t block = job->block, kept = job->kept;
    size_t total = (job->numel + block - 1) / block * block;
    for (size_t start = 0; start < total; start += CHUNK) {
        size_t count = least(CHUNK, total - start), real = least(count, job->numel - start);
        size_t length = (count + 63) / 64 * 64;
        const float *x = (const float *)job->values + start;
        if (job->values_dtype != FP32 || job->residual || real < length) {
            read_floats(copy, job->values, job->values_dtype, start, real);
            memset(copy + real, 0, 4 * (length - real));
            if (job->residual) add_floats(copy, job->residual, job->residual_dtype, start, real);
            x = copy;
        }
        int exponents[CHUNK / 8];
        memset(y + count, 0, 4 * (length - count));
        for (size_t b = 0; b * block < count; b++) {
            exponents[b] = exponent_of(x + b * block, block);
            float factor = power_of_two(-exponents[b]);
            for (size_t i = b * block; i < (b + 1) * block; i++) y[i] = x[i] * factor;
        }
        flip_by_words(y, job->signs + start / 64, length);
        butterflies(y, length, block, 1);
        uint8_t *codes = stream.codes + stream.held;
        uint16_t *scales = job->scales + start / block;
        for (size_t b = 0; b * block < count; b++) {
            scales[b] = rotsign_scale(y + b * block, block, kept, exponents[b]);
            quantise(1, NULL, NULL, y + b * block, kept, 0, codes + b * kept);
        }
        if (job->residual) {
            rotsign_values(y, codes, scales, job->signs + start / 64, count, block, kept);
            for (size_t i = 0; i < real; i++) y[i] = x[i] - y[i];
            write_floats(job->residual, job->residual_dtype, start, y, real);
        }
        stream.held += count / block * kept;
        write_whole_words(&stream);
    }
    if (total) write_the_rest(&stream);
}

static void rotsign_mean(const struct rotsign_mean_job *job) {
    float x[CHUNK] ALIGNED, sum[CHUNK] ALIGNED;
    uint8_t codes[64 + CHUNK + 64] ALIGNED;
    size_t block = job->block, kept = job->kept, world = job->of.world;
    size_t total = (job->numel + block - 1) / block * block;
    float factor = (float)(1.0 / (double)world);
    for (size_t start = 0; start < total; start += CHUNK) {
        size_t count = least(CHUNK, total - start), real = least(count, job->numel - start);
        /* A chunk of few bits may start within a byte. */
        size_t first = start / block * kept, skip = first % 8, bits = count / block * kept;
        for (size_t w = 0; w < world; w++) {
            read_codes(codes, job->of.packed + w * job->of.stride, first - skip, skip + bits, 1);
            rotsign_values(x, codes + skip, job->of.deltas + w * job->of.blocks + start / block,
                           job->signs + w * job->words + start / 64, count, block, kept);
            if (job->of.weights)
                for (size_t i = 0; i < real; i++) x[i] *= job->of.weights[w];
            if (w)
                for (size_t i = 0; i < real; i++) sum[i] += x[i];
            else
                memcpy(sum, x, 4 * real);
        }
        if (!job->of.weights)
            for (size_t i = 0; i < real; i++) sum[i] *= factor;
        memcpy(job->out + start, sum, 4 * real);
    }
}
