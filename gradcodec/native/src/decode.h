/* gradcodec.reference.decode_mean, a chunk at a time. */

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* The codes of a payload's values start .. start + count; start a multiple of 8. Writes up to a
 * multiple of 64. */
static void read_codes(uint8_t *codes, const uint8_t *payload, size_t start, size_t count,
                       int bits) {
    const uint8_t *from = payload + start * (size_t)bits / 8;
    uint8_t padded[64] = {0};
    size_t whole = count / 64 * 64, tail = count - whole;
    unpack(codes, from, whole, bits);
    if (!tail) return;
    memcpy(padded, from + whole * (size_t)bits / 8, (tail * (size_t)bits + 7) / 8);
    unpack(codes + whole, padded, 64, bits);
}

/* The mean of values start .. start + count (at most a chunk), rotated if they were coded so. */
static void mean_of(const struct payloads *of, size_t start, size_t count, int bits, size_t block,
                    int gaussian, float *mean) {
    uint8_t codes[CHUNK] ALIGNED;
    for (size_t w = 0; w < of->world; w++) {
        read_codes(codes, of->packed + w * of->stride, start, count, bits);
        for (size_t at = 0, run; at < count; at += run) {
            size_t its = (start + at) / block;
            run = least(count - at, (its + 1) * block - start - at);
            float step = float_of_bf16(of->deltas[w * of->blocks + its]);
            const float *weight = of->weights ? of->weights + w : NULL;
            add_values(gaussian ? GAUSSIAN : bits, weight, w == 0, mean + at, codes + at, run, step);
        }
    }
    if (of->weights) return;
    float factor = (float)(1.0 / (double)of->world);
    for (size_t i = 0; i < count; i++) mean[i] *= factor;
}

static void decode(const struct decode_job *job) {
    float local[CHUNK] ALIGNED;
    for (size_t start = 0; start < job->total; start += CHUNK) {
        size_t count = least(CHUNK, job->total - start), wanted = least(count, job->numel - start);
        int direct = job->dtype == FP32 && wanted == count;
        float *mean = direct ? (float *)job->out + start : local;
        mean_of(&job->of, start, count, job->bits, job->block, job->gaussian, mean);
        if (job->rotate) rotate_back(mean);
        if (!direct) write_floats(job->out, job->dtype, start, mean, wanted);
    }
}
