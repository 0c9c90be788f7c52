// Weights of 2, 4, 8 or 16 bits in the order of mma.m16n8k16's A fragments. A chunk of K is 16 bytes a lane and tile:
//
//     lane 4g+t    | channel g, K_LANE values from k = t * K_LANE on | channel g+8, the same k |
//
// The matching B fragments are consecutive values of x, so that x is read as it lies, 16 bytes a lane.
//     8 bits    level + 128
//     4 bits    level + 8; of each eight values the even ones are nibbles 0..3, the odd ones nibbles 4..7
//     2 bits    WINT2T's string, two words of 16 values, the first in the highest bits. Behind the lanes of both tiles lies
//               what a chunk needs beside them, for each g a word of tile 0's channels g, g+8 and of tile 1's:
//                    31      24 23        20 19       16 15                  0
//                   |    0     | local even | local odd | 16 bits before these |    of the two groups of 64
#pragma once
#include "common.cuh"

constexpr int K_LANE = 64 / BITS, K_CHUNK = 4 * K_LANE, MMAS = K_LANE / 4;
constexpr int CHUNK_WORDS = BITS == 2 ? 72 : 64;  // of 16 bytes, of a pair

// What decode() leaves to be multiplied with the sums: a byte or nibble is read as a subnormal bfloat, which one fused
// multiply-add makes the level times 2^-6.
constexpr float LEVEL_UNIT = BITS == 16 || BITS == 2 ? 1.f : 64.f;

// The two mma operand registers of one channel: values 4·index, +1 and 4·index + 2, +3 of its eight bytes.
DEVICE void decode(u32 low, u32 high, int index, u32& first, u32& second) {
    if (BITS == 16) {
        first = low, second = high;
    } else if (BITS == 8) {
        // A byte b in the low half of a bfloat is b·2^-133, subnormal or not; times 2^127, less 128·2^-6.
        u32 word = index ? high : low;
        first = fused_bfloat2(prmt(word, 0, 0x4140), 0x7F007F00u, 0xC000C000u);
        second = fused_bfloat2(prmt(word, 0, 0x4342), 0x7F007F00u, 0xC000C000u);
    } else {
        // Nibbles i and i + 4 are neighbours along K; likewise, the upper ones times 2^123, less 8·2^-6.
        u32 word = (index < 2 ? low : high) >> 8 * (index % 2);
        first = fused_bfloat2(word & 0x000F000Fu, 0x7F007F00u, 0xBE00BE00u);
        second = fused_bfloat2(word & 0x00F000F0u, 0x7D007D00u, 0xBE00BE00u);
    }
}

// One channel's values in a lane. Of two bits: the word before them, which another lane has or `beside` ends with, and
// the local scale, for a lane's values are of one group.
struct Channel {
    u32 low, high, before;
    float local, base;

    DEVICE Channel(u32 low, u32 high, u32 beside) : low(low), high(high) {
        if (BITS != 2) return;
        int t = threadIdx.x % 4;
        u32 other = shuffle_up(high, 1);
        before = t ? other : beside;
        local = (float)(beside >> (t < 2 ? 20 : 16) & 15);
        base = local * -12582912.f;
    }

    // A word's four bytes are added to a float of ulp one, 1.5 * 2^23 - 510, to be the level above 1.5 * 2^23; all that
    // the fused multiply-add takes is exact.
    DEVICE float value(int i) const {
        u32 above = i < 16 ? before : low, word = i < 16 ? low : high;
        u32 state = (u32)(((u64)above << 32 | word) >> (30 - i % 16 * 2)) & 0xFFFFu;
        return fused(bits_float(dot_bytes(state * 34038481u + 76625530u, 0x01010101u, 0x4B400000u - 510u)), local, base);
    }

    DEVICE void pairs(int index, u32& first, u32& second) const {
        if (BITS == 2) {
            first = pack_bfloat2(value(4 * index), value(4 * index + 1));
            second = pack_bfloat2(value(4 * index + 2), value(4 * index + 3));
        } else {
            decode(low, high, index, first, second);
        }
    }
};
