// What the kernels of tiled weights share: the rows of a tile, and what becomes of the warps' sums.
#pragma once
#include "tiled.cuh"

constexpr int THREADS = 32 * WARPS, WARPS_K = WARPS / WARPS_N;
constexpr int ROWS = 8 * TOKEN_TILES;             // of x in one tile
constexpr int STRIDE = 36;                        // of one row's 32 sums: 4t+g meet 32 different banks
enum { PLAIN = 0, GATED = 1, WEIGHTED = 2 };      // OUTPUT: bfloat y, bfloat silu(gate)·up, float y · expert weight

struct Tile {
    int expert, first, rows, unused;
};

// Which rows of x and of the output a tile's rows are. Dense layers: their own number. Experts: `first` and on in the
// sorted order, whose entries are token·A + slot; up reads tokens and writes sorted rows, down the other way round.
struct Rows {
    const int* sorted;
    int experts_per_token;  // up's A; 0 for down
    DEVICE int input(int row) const { return sorted && experts_per_token ? sorted[row] / experts_per_token : row; }
    DEVICE int output(int row) const { return sorted && !experts_per_token ? sorted[row] : row; }
};

DEVICE int my_warp_n() { return threadIdx.x / 32 % WARPS_N; }
DEVICE int my_warp_k() { return threadIdx.x / 32 / WARPS_N; }

struct Sums {
    float of[2][TOKEN_TILES][4];
};

// partial [WARPS_K, WARPS_N, ROWS, STRIDE]
DEVICE void put(const Sums& sums, float* partial) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            int row = 8 * n + 2 * t + c % 2, channel = 16 * (c / 4) + g + 8 * (c / 2 % 2);
            partial[(warp * ROWS + row) * STRIDE + channel] = sums.of[c / 4][n][c % 4];
        }
    }
}

DEVICE float total(const float* partial, int warp_n, int row, int channel) {
    float sum = 0;
    for (int k = 0; k < WARPS_K; ++k) sum += partial[((k * WARPS_N + warp_n) * ROWS + row) * STRIDE + channel];
    return sum;
}

struct Output {
    void* values;
    const float* scales;          // [E, P, 2, 16], or null
    const float* expert_weights;  // of token·A + slot
    int channels;

    DEVICE float scale(long pair, int channel) const { return scales ? scales[pair * 32 + channel] * LEVEL_UNIT : 1.f; }

    // `first_pair` of the block's pairs, `stored_pair` the same with its expert's.
    DEVICE void write(const float* partial, const Rows& rows, const Tile& tile, int first_pair, long stored_pair) const {
        constexpr int WIDTH = OUTPUT == GATED ? 16 : 32;
        for (int i = threadIdx.x; i < tile.rows * WIDTH * WARPS_N; i += THREADS) {
            int channel = i % WIDTH, warp_n = i / WIDTH % WARPS_N, row = i / (WIDTH * WARPS_N);
            int n = (first_pair + warp_n) * WIDTH + channel;
            if (n >= channels) continue;
            float y = total(partial, warp_n, row, channel) * scale(stored_pair + warp_n, channel);
            long place = rows.output(tile.first + row);
            if (OUTPUT == GATED) {
                float up = total(partial, warp_n, row, channel + 16) * scale(stored_pair + warp_n, channel + 16);
                y = y * up / (1.f + fast_exp(-y));
            }
            if (OUTPUT == WEIGHTED) {
                ((float*)values)[place * channels + n] = y * expert_weights[place];
            } else {
                ((u16*)values)[place * channels + n] = float_bfloat(y);
            }
        }
    }
};
