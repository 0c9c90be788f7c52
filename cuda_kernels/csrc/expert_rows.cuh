// A token tile's activations in shared memory, in the order in which the fragments of the weights meet them.
#pragma once
#include "activations.cuh"
#include "expert_pair.cuh"

static_assert(COLUMNS == 1, "the columns of one mma");

struct Rows {
    const u16* values;     // bfloat [*, stride]
    const Share& share;
    int stride, length;    // elements; beyond `length` a row reads as zero
    int experts_per_token;
    int lane_stride, pair_stride;  // of a lane's row index inside a 64-group: the K order of the file
    DEVICE int source(int routed) const { return GATED ? share.routing.sorted[routed] / experts_per_token : routed; }
};

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

    // Of this lane, from a step on. Columns without a row repeat the last one: what they sum up to is dropped.
    DEVICE Operands operands(int step, int rows) const {
        int g = my_lane() / 4, t = my_lane() % 4;
        return {shared_address(fragments + smaller(g, rows - 1) * 4 + t) + step * 4 * FRAGMENT_BYTES,
                shared_address(starts + t) + step * 2 * START_BYTES};
    }

    DEVICE float row_scale(int row) const { return activation_scale(largest[row]); }
    DEVICE float inverse_row_scale(int row) const { return bits_float((254u << 23) - float_bits(row_scale(row))); }

    // One thread takes a lane's sixteen values of one 64-group of one row.
    DEVICE void stage(const Rows& rows, const Tile& tile, Span span) {
        int lanes = (span.end - span.begin) * 8, count = lanes * tile.rows;
        for (int base = 0; base < count; base += THREADS) {
            int index = base + threadIdx.x, t = index & 3, row = index / lanes, group = index % lanes / 4;
            bool live = index < count;
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
        LaneRow lane = {rows.values + (long)source * rows.stride, rows.length,
                        (span.begin * 2 + group) * 64 + t * rows.lane_stride, rows.pair_stride, row_scale(row)};
        float offset = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            fragments[((group * 2 + half) * ROWS + row) * 4 + t] = lane.half_fragment(half, offset);
        }
        return offset;
    }
};
