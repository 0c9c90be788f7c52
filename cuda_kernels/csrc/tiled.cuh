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

// The two mma operand registers of one channel: values 4·index, +1 and 4·index + 2, +3 of its eight bytes.
DEVICE void decode(u32 low, u32 high, int index, u32& first, u32& second) {
    if (BITS == 16) {
        first = low, second = high;
    } else if (BITS == 8) {
        u32 word = index ? high : low;
        float level[4];
        for (int i = 0; i < 4; ++i) level[i] = bits_float(prmt(word, 0x4B000000u, 0x7440u + i)) - (0x1p23f + 128);
        first = pack_bfloat2(level[0], level[1]), second = pack_bfloat2(level[2], level[3]);
    } else {
        // Nibbles i and i + 4 are neighbours along K: in a bfloat's mantissa they are 128 + level + 8.
        u32 word = (index < 2 ? low : high) >> 8 * (index % 2);
        first = fused_bfloat2(and_or(word, 0x000F000Fu, 0x43004300u), 0x3F803F80u, 0xC308C308u);
        second = fused_bfloat2(and_or(word >> 4, 0x000F000Fu, 0x43004300u), 0x3F803F80u, 0xC308C308u);
    }
}
