// Weights of 4, 8 or 16 bits in the order of mma.m16n8k16's A fragments. A chunk of K is 16 bytes a lane and tile:
//
//     lane 4g+t    | channel g, K_LANE values from k = t * K_LANE on | channel g+8, the same k |
//
// The matching B fragments are consecutive values of x, so that x is read as it lies, 16 bytes a lane.
//     8 bits    level + 128
//     4 bits    level + 8; of each eight values the even ones are nibbles 0..3, the odd ones nibbles 4..7
#pragma once
#include "common.cuh"

constexpr int K_LANE = 64 / BITS, K_CHUNK = 4 * K_LANE, MMAS = K_LANE / 4;

// What decode() leaves to be multiplied with the sums: a byte or nibble is read as a subnormal bfloat, which one fused
// multiply-add makes the level times 2^-6.
constexpr float LEVEL_UNIT = BITS == 16 ? 1.f : 64.f;

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
