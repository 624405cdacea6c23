/* Codes of 1, 2, 4 or 8 bits, one to a byte <-> packed, least significant bits first.
 * `count` is a multiple of 64; x86-64 and AArch64 are little-endian, as the stream is. */
static void pack(uint8_t *to, const uint8_t *codes, size_t count, int bits) {
    if (bits == 8) {
        memcpy(to, codes, count);
    } else if (bits == 4) {
        const u16_any *pairs = (const u16_any *)codes;
        for (size_t i = 0; i < count / 2; i++) to[i] = (uint8_t)(pairs[i] | pairs[i] >> 4);
    } else if (bits == 2) {
        const u32_any *fours = (const u32_any *)codes;
        for (size_t i = 0; i < count / 4; i++) {
            uint32_t x = fours[i] | fours[i] >> 6;
            to[i] = (uint8_t)(x | x >> 12);
        }
    } else {
        const u64_any *eights = (const u64_any *)codes;
        for (size_t i = 0; i < count / 8; i++) {
            uint64_t x = eights[i] | eights[i] >> 7;
            x |= x >> 14;
            to[i] = (uint8_t)(x | x >> 28);
        }
    }
}

static void unpack(uint8_t *codes, const uint8_t *from, size_t count, int bits) {
    if (bits == 8) {
        memcpy(codes, from, count);
    } else if (bits == 4) {
        u16_any *pairs = (u16_any *)codes;
        for (size_t i = 0; i < count / 2; i++)
            pairs[i] = (uint16_t)((from[i] | from[i] << 4) & 0x0F0F);
    } else if (bits == 2) {
        u32_any *fours = (u32_any *)codes;
        for (size_t i = 0; i < count / 4; i++) {
            uint32_t x = from[i];
            x = (x | x << 12) & 0x000F000F;
            fours[i] = (x | x << 6) & 0x03030303;
        }
    } else {
        u64_any *eights = (u64_any *)codes;
        for (size_t i = 0; i < count / 8; i++) {
            uint64_t x = from[i];
            x = (x | x << 28) & 0x0000000F0000000F;
            x = (x | x << 14) & 0x0003000300030003;
            eights[i] = (x | x << 7) & 0x0101010101010101;
        }
    }
}
