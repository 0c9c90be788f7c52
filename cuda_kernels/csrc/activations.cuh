// Rows of bfloat to the operands that the fields of WINT2 weights meet.
#pragma once
#include "wint2.cuh"

// The larger of the low and of the high halves, as unsigned numbers.
DEVICE u32 larger_halves(u32 a, u32 b) {
    u32 low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a > b ? a : b;
    return prmt(low, high, 0x7610);
}

// The power of two for one row, by a block of 256 threads; `largest` is a word of shared memory.
DEVICE float find_scale(const u16* row, int length, u32* largest) {
    if (threadIdx.x == 0) *largest = 0;
    sync_block();
    u32 both = 0;
#pragma unroll 8
    for (int k = threadIdx.x * 2; k < length; k += 512) both = larger_halves(both, *(const u32*)(row + k) & 0x7FFF7FFFu);
    u32 low = both << 16, high = both & 0xFFFF0000u, size = largest_in_warp(low > high ? low : high);
    if (threadIdx.x % 32 == 0) atomic_max(largest, size);
    sync_block();
    return activation_scale(*largest);
}

// One lane's values of one row in one 64-group.
struct LaneRow {
    const u16* row;
    int length, first, pair_stride;  // elements; the lane's first value, and the distance between its pairs of values
    float scale;                     // the power of two that goes onto the values

    DEVICE u32 pair(int i) const {
        int k = first + i * pair_stride;
        return k < length ? *(const u32*)(row + k) : 0;
    }

    // Its operands for the fields of codes 2·half and 2·half+1; adds what the fields' offsets make of them to `offset`.
    DEVICE Words4 half_fragment(int half, float& offset) const {
        float x[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 both = pair(4 * half + i);
            x[2 * i] = low_bfloat(both) * scale;
            x[2 * i + 1] = high_bfloat(both) * scale;
        }
        Words4 words = {
            pack_activations(x[3] * FACTOR_ODD, x[7] * FACTOR_ODD), pack_activations(x[2] * FACTOR_EVEN, x[6] * FACTOR_EVEN),
            pack_activations(x[1] * FACTOR_ODD, x[5] * FACTOR_ODD), pack_activations(x[0] * FACTOR_EVEN, x[4] * FACTOR_EVEN)};
        offset += OFFSET_ODD * (rounded_sum(words.x) + rounded_sum(words.z));
        offset += OFFSET_EVEN * (rounded_sum(words.y) + rounded_sum(words.w));
        return words;
    }

    DEVICE float rounded_sum(u32 both) const {
        return unpack_activation(both & 0xFFFFu) + unpack_activation(both >> 16);
    }
};
