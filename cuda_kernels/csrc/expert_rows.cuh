// A token tile's activations in shared memory, in the order in which the fragments of the weights meet them.
#pragma once
#include "expert_work.cuh"
#include "wint2.cuh"

constexpr int FRAGMENT_BYTES = ROWS * 64;  // of half a 64-group of the token tile
constexpr int START_BYTES = 64;

struct Rows {
    const u16* values;     // bfloat [*, stride]
    const Share& share;
    int stride, length;    // elements; beyond `length` a row reads as zero
    int experts_per_token;
    int lane_stride, pair_stride;  // of a lane's row index inside a 64-group: the K order of the file
    DEVICE int source(int routed) const { return GATED ? share.routing.sorted[routed] / experts_per_token : routed; }
};

// The larger of the low and of the high halves, as unsigned numbers.
DEVICE u32 larger_halves(u32 a, u32 b) {
    u32 low = (a & 0xFFFF) > (b & 0xFFFF) ? a : b, high = a > b ? a : b;
    return prmt(low, high, 0x7610);
}

// As B fragments, with what the accumulators start from.
struct Activations {
    Words4* fragments;  // [groups, 2, ROWS, 4]: the lane's values for two mma's
    Floats4* starts;    // [groups, 4]: minus the offsets' share, twice (rows g and g+8)
    u32* largest;       // [ROWS]: bits of each row's largest magnitude

    // Finds the rows' largest magnitudes, over all of K; a warp takes 512 values at a time.
    DEVICE void measure(const Rows& rows, const Tile& tile) {
        if (threadIdx.x < ROWS) largest[threadIdx.x] = 0;
        sync_block();
        int pieces = (rows.length + 511) / 512;
        for (int i = threadIdx.x / 32; i < pieces * tile.rows; i += WARPS) {
            int row = i / pieces, first = i % pieces * 512 + threadIdx.x % 32 * 2;
            const u16* values = rows.values + (long)rows.source(tile.first + row) * rows.stride;
            u32 both = 0;
#pragma unroll
            for (int k = 0; k < 512; k += 64) {
                u32 pair = first + k < rows.length ? *(const u32*)(values + first + k) & 0x7FFF7FFFu : 0;
                both = larger_halves(both, pair);
            }
            u32 low = both << 16, high = both & 0xFFFF0000u, size = largest_in_warp(low > high ? low : high);
            if (threadIdx.x % 32 == 0) atomic_max(&largest[row], size);
        }
        sync_block();
    }

    DEVICE float row_scale(int row) const { return activation_scale(largest[row]); }

    // One thread takes a lane's sixteen values of one 64-group of one row.
    DEVICE void stage(const Rows& rows, const Tile& tile, Span span) {
        int count = (span.end - span.begin) * 2 * ROWS * 4;
        for (int base = 0; base < count; base += THREADS) {
            int index = base + threadIdx.x, t = index & 3, row = (index >> 2) % ROWS, group = index / (4 * ROWS);
            bool live = index < count && row < tile.rows;
            float offset = live ? stage_lane(rows, rows.source(tile.first + row), span, group, row, t) : 0.f;
            offset += shuffle_xor(offset, 1);
            offset += shuffle_xor(offset, 2);
            if (live && t == 0) {
                float* start = starts[group * 4 + row / 2].v;
                start[row & 1] = start[2 + (row & 1)] = -offset;
            }
        }
    }

    DEVICE float stage_lane(const Rows& rows, int source, Span span, int group, int row, int t) {
        float scale = row_scale(row);
        const u16* values = rows.values + (long)source * rows.stride;
        int first = (span.begin * 2 + group) * 64 + t * rows.lane_stride;
        float x[16];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int k = first + i * rows.pair_stride;
            u32 pair = k < rows.length ? *(const u32*)(values + k) : 0;
            x[2 * i] = low_bfloat(pair) * scale;
            x[2 * i + 1] = high_bfloat(pair) * scale;
        }
        float offset = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* a = x + 8 * half;  // the fields of codes 2·half and 2·half+1
            Words4 words = {pack_activations(a[3] * FACTOR_ODD, a[7] * FACTOR_ODD),
                            pack_activations(a[2] * FACTOR_EVEN, a[6] * FACTOR_EVEN),
                            pack_activations(a[1] * FACTOR_ODD, a[5] * FACTOR_ODD),
                            pack_activations(a[0] * FACTOR_EVEN, a[4] * FACTOR_EVEN)};
            fragments[((group * 2 + half) * ROWS + row) * 4 + t] = words;
            offset += OFFSET_ODD * (rounded_sum(words.x) + rounded_sum(words.z));
            offset += OFFSET_EVEN * (rounded_sum(words.y) + rounded_sum(words.w));
        }
        return offset;
    }

    DEVICE float rounded_sum(u32 pair) { return unpack_activation(pair & 0xFFFFu) + unpack_activation(pair >> 16); }
};
