/* gradcodec.reference.topk_encode: the k largest magnitudes of a chunk, exactly.
 *
 * Magnitudes have the order of the 31 bits below their sign. The threshold's upper 15 bits are
 * bisected by counting, over 16-bit values. Few candidates share these upper bits, and the lower
 * 16 are bisected among them alone. Of values equal to the threshold, the first are taken.
 */
struct topk_scratch {
    float *y; /* [chunk] */
    int16_t *upper; /* [chunk], padded with -1 to a multiple of 64 */
    uint8_t *flags; /* as long as `upper` */
    uint16_t *equal; /* [chunk] positions that share the threshold's upper bits */
};

static size_t count_at_least(const int16_t *upper, size_t padded, int16_t threshold) {
    size_t count = 0;
    for (size_t i = 0; i < padded;) {
        /* 16-bit sums of at most 32,767 ones. */
        size_t end = least(padded, i + 32704);
        int16_t sum = 0;
        for (; i < end; i++) sum = (int16_t)(sum + (upper[i] >= threshold));
        count += (size_t)sum;
    }
    return count;
}

INLINE uint32_t magnitude(const float *y, size_t at) { return bits_of_float(y[at]) & 0x7FFFFFFF; }

/* The largest lower 16 bits at or above which at least `wanted` of the candidates lie. */
static uint32_t bisect_lower(const float *y, const uint16_t *equal, size_t count, size_t wanted) {
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 15; bit; bit >>= 1) {
        size_t above = 0;
        for (size_t i = 0; i < count; i++)
            above += (magnitude(y, equal[i]) & 0xFFFF) >= (threshold | bit);
        if (above >= wanted) threshold |= bit;
    }
    return threshold;
}

/* Positions of the k largest, increasing. */
static void largest(const struct topk_scratch *at, size_t chunk, size_t k, uint16_t *index) {
    size_t padded = (chunk + 63) / 64 * 64;
    const i32_any *bits = (const i32_any *)at->y;
    for (size_t i = 0; i < chunk; i++) at->upper[i] = (int16_t)((bits[i] & 0x7FFFFFFF) >> 16);
    for (size_t i = chunk; i < padded; i++) at->upper[i] = -1;
    int16_t threshold = 0;
    size_t reach = chunk; /* how many are at or above the threshold */
    for (int bit = 1 << 14; bit; bit >>= 1) {
        size_t count = count_at_least(at->upper, padded, (int16_t)(threshold | bit));
        if (count < k) continue;
        threshold = (int16_t)(threshold | bit);
        reach = count;
        if (count == k) break;
    }
    for (size_t i = 0; i < padded; i++) at->flags[i] = at->upper[i] >= threshold;
    uint32_t lower = 0;
    size_t ties = k; /* how many that equal the threshold in all bits are still to be taken */
    int exact = reach == k;
    if (!exact) {
        size_t equal = 0, above = 0;
        for (size_t i = 0; i < chunk; i += 8) {
            uint64_t eight;
            memcpy(&eight, at->flags + i, 8);
            for (; eight; eight &= eight - 1) {
                size_t j = i + (size_t)__builtin_ctzll(eight) / 8;
                if (at->upper[j] == threshold)
                    at->equal[equal++] = (uint16_t)j;
                else
                    above++;
            }
        }
        lower = bisect_lower(at->y, at->equal, equal, k - above);
        ties = k - above;
        for (size_t i = 0; i < equal; i++)
            ties -= (magnitude(at->y, at->equal[i]) & 0xFFFF) > lower;
    }
    size_t found = 0;
    for (size_t i = 0; i < chunk && found < k; i += 8) {
        uint64_t eight;
        memcpy(&eight, at->flags + i, 8);
        for (; eight; eight &= eight - 1) {
            size_t j = i + (size_t)__builtin_ctzll(eight) / 8;
            if (!exact && at->upper[j] == threshold) {
                uint32_t mine = magnitude(at->y, j) & 0xFFFF;
                if (mine < lower || (mine == lower && !ties)) continue;
                ties -= mine == lower;
            }
            index[found++] = (uint16_t)j;
        }
    }
}

static int topk(const struct topk_job *job) {
    size_t chunk = job->chunk, padded = (chunk + 63) / 64 * 64;
    struct topk_scratch at;
    uint8_t *memory = malloc(padded * (4 + 2 + 1 + 2) + 4 * job->k);
    if (!memory) return 1;
    at.y = (float *)memory;
    float *kept = at.y + padded;
    at.upper = (int16_t *)(kept + job->k);
    at.equal = (uint16_t *)(at.upper + padded);
    at.flags = (uint8_t *)(at.equal + padded);
    uint16_t *index = job->index;
    for (size_t start = 0, row = 0; start < job->numel; start += chunk, row++, index += job->k) {
        size_t count = least(chunk, job->numel - start);
        read_floats(at.y, job->values, job->values_dtype, start, count);
        memset(at.y + count, 0, 4 * (chunk - count));
        if (job->residual) add_floats(at.y, job->residual, job->residual_dtype, start, count);
        largest(&at, chunk, job->k, index);
        for (size_t i = 0; i < job->k; i++) {
            kept[i] = at.y[index[i]];
            at.y[index[i]] = 0;
        }
        write_floats(job->kept, job->values_dtype, row * job->k, kept, job->k);
        if (job->residual)
            write_floats(job->residual, job->residual_dtype, start, at.y, count);
    }
    free(memory);
    return 0;
}

/* gradcodec.reference.top_rows: the position replaces the low 6 bits of a magnitude. */
#define ROW 64

static void rows(const struct topk_job *job) {
    float y[ROW] ALIGNED, kept[2];
    int32_t places[ROW] ALIGNED, keys[ROW] ALIGNED;
    uint8_t *index = job->index;
    const i32_any *bits = (const i32_any *)y;
    for (int i = 0; i < ROW; i++) places[i] = ROW - 1 - i;
    for (size_t start = 0, row = 0; start < job->numel; start += ROW, row++) {
        size_t count = least(ROW, job->numel - start);
        read_floats(y, job->values, job->values_dtype, start, count);
        memset(y + count, 0, 4 * (ROW - count));
        if (job->residual) add_floats(y, job->residual, job->residual_dtype, start, count);
        int32_t most = -1;
        for (int i = 0; i < ROW; i++) {
            keys[i] = (bits[i] & 0x7FFFFFC0) | places[i];
            most = keys[i] > most ? keys[i] : most;
        }
        for (size_t j = 0; j < job->k; j++) {
            int32_t before = most;
            if (j) {
                most = -1;
                for (int i = 0; i < ROW; i++) {
                    int32_t key = keys[i] < before ? keys[i] : -1;
                    most = key > most ? key : most;
                }
            }
            size_t where = ROW - 1 - (size_t)(most & (ROW - 1));
            kept[j] = y[where];
            index[row * job->k + j] = (uint8_t)where;
        }
        write_floats(job->kept, job->values_dtype, row * job->k, kept, job->k);
        if (!job->residual) continue;
        for (size_t j = 0; j < job->k; j++) y[index[row * job->k + j]] = 0;
        write_floats(job->residual, job->residual_dtype, start, y, count);
    }
}

/* gradcodec.reference.sparse_mean: lists added in their order, a chunk at a time. */
static int sparse_mean(const struct sparse_job *job) {
    float factor = (float)(1.0 / (double)job->world), part[64];
    for (size_t c = 0; c < job->chunks; c++) {
        size_t start = c * job->chunk, length = least(job->chunk, job->numel - start);
        float *out = job->out + start;
        memset(out, 0, 4 * length);
        for (size_t w = 0; w < job->world; w++) {
            size_t list = (w * job->chunks + c) * job->k;
            for (size_t first = 0; first < job->k; first += 64) {
                size_t count = least(64, job->k - first);
                read_floats(part, job->kept, job->dtype, list + first, count);
                for (size_t i = 0; i < count; i++) {
                    size_t where = job->index[list + first + i];
                    if (where >= job->chunk) return 1;
                    if (where < length) out[where] += part[i] * factor;
                }
            }
        }
    }
    return 0;
}
