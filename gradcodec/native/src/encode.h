/* gradcodec.reference.encode: a tile of at most a chunk is fetched, measured, quantised and packed
 * while it is in the first cache. */

struct tile {
    size_t start, count;
    const float *y; /* the buffer, or the caller's values if nothing is done to them */
    float buffer[CHUNK] ALIGNED;
    uint8_t dither[CHUNK + 256] ALIGNED;
    uint8_t codes[CHUNK] ALIGNED;
};

/* Which levels: a number of bits, or GAUSSIAN. */
INLINE int levels_of(const struct encode_job *job) { return job->gaussian ? GAUSSIAN : job->bits; }

/* y = R x + e of the tile. */
static void fetch(const struct encode_job *job, struct tile *tile) {
    float *y = tile->buffer;
    tile->y = y;
    if (job->values_dtype == FP32 && !job->rotate && !job->residual) {
        tile->y = (const float *)job->values + tile->start;
        return;
    }
    size_t real = least(tile->count, job->numel - tile->start);
    read_floats(y, job->values, job->values_dtype, tile->start, real);
    if (job->rotate) {
        memset(y + real, 0, 4 * (tile->count - real));
        rotate(y);
    }
    if (job->residual) add_floats(y, job->residual, job->residual_dtype, tile->start, tile->count);
}

/* Deltas of all blocks: a separate pass, needed if tiles do not hold whole blocks. */
static void measure(const struct encode_job *job) {
    struct tile tile;
    struct size size = {0};
    for (tile.start = 0; tile.start < job->total; tile.start += CHUNK) {
        tile.count = least(CHUNK, job->total - tile.start);
        fetch(job, &tile);
        for (size_t at = 0, run; at < tile.count; at += run) {
            size_t from = tile.start + at, its = from / job->block;
            size_t end = least((its + 1) * job->block, job->total);
            run = least(tile.count - at, end - from);
            add_size(&size, tile.y + at, run, job->scale);
            if (from + run < end) continue;
            job->deltas[its] = delta_of(size, end - its * job->block, levels_of(job), job->scale,
                                        job->stochastic);
            size = (struct size){0};
        }
    }
}

static void write_codes(const struct encode_job *job, struct tile *tile) {
    size_t bits = (size_t)job->bits, whole = tile->count / 64 * 64, tail = tile->count - whole;
    uint8_t *to = job->packed + tile->start * bits / 8, padded[64] = {0}, its[64];
    pack(to, tile->codes, whole, job->bits);
    if (!tail) return;
    memcpy(padded, tile->codes + whole, tail);
    pack(its, padded, 64, job->bits);
    memcpy(to + whole * bits / 8, its, (tail * bits + 7) / 8);
}

static void encode(const struct encode_job *job) {
    struct tile tile;
    size_t block = job->block, step = CHUNK;
    /* Tiles start at whole bytes and whole counters of the dither. */
    int fits = block <= CHUNK && block % 16 == 0;
    if (fits)
        step = CHUNK / block * block;
    else
        measure(job);
    for (tile.start = 0; tile.start < job->total; tile.start += step) {
        tile.count = least(step, job->total - tile.start);
        fetch(job, &tile);
        const uint8_t *dither = job->stochastic ? tile.dither : NULL;
        if (dither) {
            int next = job->values_dtype == FP32 && tile.start + step < job->numel;
            const void *ahead = next ? (const float *)job->values + tile.start + step : NULL;
            random_bytes(tile.start, tile.count, job->seed, tile.dither, ahead);
        }
        float *rest = NULL;
        if (job->residual)
            rest = job->residual_dtype == FP32 ? (float *)job->residual + tile.start : tile.buffer;
        for (size_t at = 0, run; at < tile.count; at += run) {
            size_t its = (tile.start + at) / block;
            run = least(tile.count - at, (its + 1) * block - tile.start - at);
            if (fits) {
                struct size size = {0};
                add_size(&size, tile.y + at, run, job->scale);
                job->deltas[its] = delta_of(size, run, levels_of(job), job->scale, job->stochastic);
            }
            quantise(levels_of(job), dither ? dither + at : NULL, rest ? rest + at : NULL,
                     tile.y + at, run, float_of_bf16(job->deltas[its]), tile.codes + at);
        }
        if (rest == tile.buffer)
            write_floats(job->residual, job->residual_dtype, tile.start, rest, tile.count);
        write_codes(job, &tile);
    }
}
