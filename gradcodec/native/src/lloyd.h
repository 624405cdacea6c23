/* gradcodec.reference.two_means: two bits with two fitted magnitudes, a block at a time. */
#define LLOYD_STEPS 8

/* How many magnitudes of y are above a threshold, and their sum in fp64. */
static size_t sum_above(const float *y, size_t count, float threshold, double *sum) {
    vd sums[4] = {{0}};
    vi hits = {0};
    size_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES)
        for (size_t k = 0; k < 2; k++) {
            vi size = (vi)load(y + i + k * LANES) & 0x7FFFFFFF;
            vi large = (vf)size > every(threshold);
            add_doubles(sums + 2 * k, (vf)(size & large));
            hits -= large;
        }
    *sum = sum_doubles((sums[0] + sums[1]) + (sums[2] + sums[3]));
    size_t found = (size_t)sum_lanes(hits);
    for (; i < count; i++) {
        float size = __builtin_fabsf(y[i]);
        if (!(size > threshold)) continue;
        *sum += (double)size;
        found++;
    }
    return found;
}

/* Blocks that are fitted in turns: a block's step waits for its previous one, but not for those of
 * other blocks. */
#define FITTED 4

/* The two levels, bf16, of each block of `count` values, at most FITTED blocks. */
static void fit(const float *y, size_t count, size_t block, uint16_t *levels) {
    double total[FITTED], lo[FITTED], hi[FITTED];
    float threshold[FITTED];
    int fitted[FITTED] = {0};
    size_t blocks = (count + block - 1) / block;
    for (size_t b = 0; b < blocks; b++) {
        size_t size = least(block, count - b * block);
        total[b] = sum_of_sizes(y + b * block, size, 0);
        lo[b] = hi[b] = total[b] / (double)size;
    }
    for (int step = 0; step < LLOYD_STEPS; step++)
        for (size_t b = 0; b < blocks; b++) {
            float next = (float)((lo[b] + hi[b]) / 2);
            fitted[b] = fitted[b] || (step && next == threshold[b]); /* the same classes again */
            if (fitted[b]) continue;
            threshold[b] = next;
            size_t size = least(block, count - b * block);
            double above;
            size_t large = sum_above(y + b * block, size, next, &above);
            hi[b] = large ? above / (double)large : (double)next;
            lo[b] = large < size ? (total[b] - above) / (double)(size - large) : 0;
        }
    for (size_t b = 0; b < blocks; b++) {
        levels[2 * b] = bf16_of_float((float)(lo[b] > 0 ? lo[b] : 0));
        levels[2 * b + 1] = bf16_of_float((float)hi[b]);
    }
}

/* Codes of a multiple of 4 * LANES values; with `rest`, which may be y, also y - value(code). */
static void classes_whole(const float *y, size_t count, float lo, float hi, uint8_t *codes,
                          float *rest) {
    float threshold = (lo + hi) / 2;
    for (size_t i = 0; i < count; i += 4 * LANES) {
        vi code[4];
        for (int k = 0; k < 4; k++) {
            vf x = load(y + i + (size_t)k * LANES);
            vf size = (vf)((vi)x & 0x7FFFFFFF);
            vi minus = x < 0, large = size > every(threshold);
            code[k] = (minus & 1) | (large & 2);
            if (!rest) continue;
            vi level = ((vi)every(hi) & large) | ((vi)every(lo) & ~large);
            level ^= minus & (int32_t)0x80000000;
            store(rest + i + (size_t)k * LANES, x - (vf)level);
        }
        store_bytes(codes + i, code);
    }
}

static void classes(const float *y, size_t count, const uint16_t levels[2], uint8_t *codes,
                    float *rest) {
    float lo = float_of_bf16(levels[0]), hi = float_of_bf16(levels[1]);
    size_t whole = count / 64 * 64, tail = count - whole;
    classes_whole(y, whole, lo, hi, codes, rest);
    if (!tail) return;
    float of_y[64] = {0};
    uint8_t of_codes[64];
    memcpy(of_y, y + whole, 4 * tail);
    classes_whole(of_y, 64, lo, hi, of_codes, rest ? of_y : NULL);
    memcpy(codes + whole, of_codes, tail);
    if (rest) memcpy(rest + whole, of_y, 4 * tail);
}

static int lloyd(const struct lloyd_job *job) {
    /* At the start: the codes that are not written yet, fewer than a chunk. */
    uint8_t codes[64 + CHUNK] ALIGNED, *to = job->packed, last[64] = {0}, its[16];
    size_t block = job->block, held = 0, step = FITTED * block <= CHUNK ? FITTED * block : block;
    /* fp32 values without a residual are read in place. */
    int copied = job->values_dtype != FP32 || job->residual;
    float local[CHUNK] ALIGNED, *copy = local;
    if (copied && step > CHUNK && !(copy = malloc(4 * least(step, job->numel) + 4))) return 1;
    for (size_t start = 0; start < job->numel; start += step) {
        size_t count = least(step, job->numel - start);
        const float *y = (const float *)job->values + start;
        uint16_t *levels = job->levels + 2 * (start / block);
        if (copied) {
            read_floats(copy, job->values, job->values_dtype, start, count);
            if (job->residual) add_floats(copy, job->residual, job->residual_dtype, start, count);
            y = copy;
        }
        fit(y, count, block, levels);
        for (size_t at = 0, run; at < count; at += run) {
            size_t b = at / block;
            run = least(least(count, (b + 1) * block) - at, CHUNK - held / 64 * 64);
            classes(y + at, run, levels + 2 * b, codes + held, job->residual ? copy + at : NULL);
            held += run;
            if (held < CHUNK) continue;
            size_t whole = held / 64 * 64;
            pack(to, codes, whole, 2);
            to += whole / 4;
            held -= whole;
            memmove(codes, codes + whole, held);
        }
        if (job->residual) write_floats(job->residual, job->residual_dtype, start, copy, count);
    }
    if (copy != local) free(copy);
    size_t whole = held / 64 * 64;
    pack(to, codes, whole, 2);
    memcpy(last, codes + whole, held - whole);
    pack(its, last, 64, 2);
    memcpy(to + whole / 4, its, (held - whole + 3) / 4);
    return 0;
}

/* total += levels of codes, times the weight if weighted; if `first`, total starts at zero. */
INLINE void add_levels_as(int weighted, int first, float *total, const uint8_t *codes, size_t count,
                          float lo, float hi, float weight) {
    size_t whole = count / (4 * LANES) * (4 * LANES);
    for (size_t i = 0; i < whole; i += 4 * LANES) {
        vi code[4];
        load_bytes(codes + i, code);
        for (int k = 0; k < 4; k++) {
            vi large = code[k] > 1;
            vi bits = ((vi)every(hi) & large) | ((vi)every(lo) & ~large);
            vf level = (vf)(bits ^ (code[k] << 31));
            if (weighted) level *= weight;
            float *at = total + i + (size_t)k * LANES;
            store(at, (first ? every(0) : load(at)) + level);
        }
    }
    for (size_t i = whole; i < count; i++) {
        float level = codes[i] > 1 ? hi : lo;
        if (codes[i] & 1) level = -level;
        if (weighted) level *= weight;
        total[i] = (first ? 0 : total[i]) + level;
    }
}

static void lloyd_mean(const struct lloyd_mean_job *job) {
    uint8_t codes[CHUNK] ALIGNED;
    float factor = (float)(1.0 / (double)job->of.world);
    for (size_t start = 0; start < job->numel; start += CHUNK) {
        size_t count = least(CHUNK, job->numel - start);
        float *sum = job->out + start;
        for (size_t w = 0; w < job->of.world; w++) {
            read_codes(codes, job->of.packed + w * job->of.stride, start, count, 2);
            for (size_t at = 0, run; at < count; at += run) {
                size_t its = (start + at) / job->block;
                run = least(count - at, (its + 1) * job->block - start - at);
                const uint16_t *levels = job->of.deltas + 2 * (w * job->of.blocks + its);
                float lo = float_of_bf16(levels[0]), hi = float_of_bf16(levels[1]);
                if (job->of.weights)
                    add_levels_as(1, w == 0, sum + at, codes + at, run, lo, hi, job->of.weights[w]);
                else
                    add_levels_as(0, w == 0, sum + at, codes + at, run, lo, hi, 1);
            }
        }
        if (job->of.weights || job->of.world == 1) continue;
        for (size_t i = 0; i < count; i++) sum[i] *= factor;
    }
}
