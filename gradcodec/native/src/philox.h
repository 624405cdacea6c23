/* Philox4x32-7 (Salmon et al., SC'11): the bytes of gradcodec.reference.philox.
 *
 * A counter lives in a 64-bit lane: the product of a round is 64 bits wide, its halves are words
 * of the next counter, and bits above a word are ignored. The counter's upper words
 * are zero and its second word is the same for a whole run, so the first two rounds are half
 * constant.
 */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u
#define PHILOX_GROUP (VECTOR_BYTES / 8) /* counters of a vector */

/* Bytes of the counters (low + 0..count-1, high), none of which wraps; writes whole groups. Memory
 * is idle meanwhile, so 64 bytes from `ahead` on, 16 floats, are prefetched for each counter. */
static void philox_run(uint32_t low, uint32_t high, size_t count, uint64_t seed, uint8_t *out,
                       const char *ahead) {
    uint32_t k0[7], k1[7];
    for (uint32_t r = 0; r < 7; r++) {
        k0[r] = (uint32_t)seed + r * PHILOX_W0;
        k1[r] = (uint32_t)(seed >> 32) + r * PHILOX_W1;
    }
    /* After round 0 the counter's first word is constant and its second zero. */
    uint64_t fixed = (uint64_t)(high ^ k0[0]) * PHILOX_M0;
    /* Lanes in such an order that interleaving them by halves of 128 bits sorts the counters. */
    vq counter = (vq){0} + low;
    for (int lane = 0; lane < PHILOX_GROUP; lane++)
#if X86
        counter[lane] += (uint64_t)(lane / 2 + (lane & 1) * (PHILOX_GROUP / 2));
#else
        counter[lane] += (uint64_t)lane;
#endif
    for (size_t i = 0; i < count; i += PHILOX_GROUP, out += 16 * PHILOX_GROUP) {
        if (ahead)
            for (int line = 0; line < PHILOX_GROUP; line++, ahead += 64) __builtin_prefetch(ahead);
        vq p0 = multiply_low(counter, PHILOX_M0), p1;
        vq c0, c1, c2 = (p0 >> 32) ^ k1[0], c3 = p0;
        p1 = multiply_low(c2, PHILOX_M1);
        c0 = (p1 >> 32) ^ k0[1];
        c1 = p1;
        c2 = c3 ^ ((fixed >> 32) ^ k1[1]);
        p0 = multiply_low(c0, PHILOX_M0);
        p1 = multiply_low(c2, PHILOX_M1);
        c0 = (p1 >> 32) ^ c1 ^ k0[2];
        c1 = p1;
        c2 = (p0 >> 32) ^ ((uint32_t)fixed ^ k1[2]);
        c3 = p0;
        for (int r = 3; r < 6; r++) {
            p0 = multiply_low(c0, PHILOX_M0);
            p1 = multiply_low(c2, PHILOX_M1);
            c0 = (p1 >> 32) ^ c1 ^ k0[r];
            c1 = p1;
            c2 = (p0 >> 32) ^ c3 ^ k1[r];
            c3 = p0;
        }
        /* Two words to a lane, the first below: halves of a product swapped, xor below only. */
        p0 = multiply_low(c0, PHILOX_M0);
        p1 = multiply_low(c2, PHILOX_M1);
        vq first = ((p1 >> 32) | (p1 << 32)) ^ ((c1 ^ k0[6]) & 0xFFFFFFFFu);
        vq second = ((p0 >> 32) | (p0 << 32)) ^ ((c3 ^ k1[6]) & 0xFFFFFFFFu);
#if X86
        vq even = (vq)MM(unpacklo_epi64)(INTEGERS(first), INTEGERS(second));
        vq odd = (vq)MM(unpackhi_epi64)(INTEGERS(first), INTEGERS(second));
        memcpy(out, &even, VECTOR_BYTES);
        memcpy(out + VECTOR_BYTES, &odd, VECTOR_BYTES);
#else
        for (int lane = 0; lane < PHILOX_GROUP; lane++) {
            uint64_t pair[2] = {first[lane], second[lane]};
            for (int b = 0; b < 16; b++)
                out[16 * lane + b] = (uint8_t)(pair[b / 8] >> (8 * (b % 8)));
        }
#endif
        counter += PHILOX_GROUP;
    }
}

/* Bytes start .. start + count of the stream of a seed; start a multiple of 16. Up to 255 bytes
 * behind the end are written too. */
static void random_bytes(uint64_t start, size_t count, uint64_t seed, uint8_t *out,
                         const char *ahead) {
    uint64_t counter = start / 16;
    size_t left = (count + 15) / 16;
    while (left) {
        uint64_t run = ((uint64_t)1 << 32) - (uint32_t)counter;
        if (run > left) run = left;
        philox_run((uint32_t)counter, (uint32_t)(counter >> 32), run, seed, out, ahead);
        counter += run;
        out += 16 * run;
        left -= run;
    }
}
