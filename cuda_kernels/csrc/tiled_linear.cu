// y = x · Wᵀ with weights of 4, 8 or 16 bits streamed once, for few rows of x: dense layers and routed experts.
//
// A block computes 32 outputs (two 16-channel tiles, or 16 gates and their 16 ups) of one tile of rows. Its warps share
// K chunk by chunk. Sums meet in shared memory, in the order of the warps: a row's result does not depend on the
// rows beside it.
#include "tiled.cuh"

constexpr int THREADS = 32 * WARPS;
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

struct Input {
    const u16* x;
    int length;
    int offset[TOKEN_TILES];  // of this lane's row in each tile of eight, in elements

    DEVICE void locate(const Rows& rows, const Tile& tile) {
        for (int n = 0; n < TOKEN_TILES; ++n) {
            int row = smaller(8 * n + (int)threadIdx.x % 32 / 4, tile.rows - 1);  // past the end: any row, not written
            offset[n] = rows.input(tile.first + row) * (length / 8);
        }
    }
    // Eight (of 16-bit weights: four) values from k on; zeros past the end, where the weights are zeros too.
    DEVICE Words4 load(int n, int k) const {
        if (k >= length) return {0, 0, 0, 0};
        const u16* place = x + (long)offset[n] * 8 + k;
        if (BITS != 16) return *(const Words4*)place;
        return {((const u32*)place)[0], ((const u32*)place)[1], 0, 0};
    }
};

struct Sums {
    float of[2][TOKEN_TILES][4];
};

// One chunk: k_lane is where this lane's values begin.
DEVICE void multiply(Sums& sums, const Words4& tile0, const Words4& tile1, const Input& input, int k_lane) {
#pragma unroll
    for (int part = 0; part < (MMAS + 1) / 2; ++part) {
        Words4 x[TOKEN_TILES];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) x[n] = input.load(n, k_lane + 8 * part);
#pragma unroll
        for (int index = 2 * part; index < smaller(MMAS, 2 * part + 2); ++index) {
            u32 a[2][4];
            decode(tile0.x, tile0.y, index, a[0][0], a[0][2]);
            decode(tile0.z, tile0.w, index, a[0][1], a[0][3]);
            decode(tile1.x, tile1.y, index, a[1][0], a[1][2]);
            decode(tile1.z, tile1.w, index, a[1][1], a[1][3]);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                u32 b0 = index % 2 ? x[n].z : x[n].x, b1 = index % 2 ? x[n].w : x[n].y;
                mma_bfloat(sums.of[0][n], a[0], b0, b1, sums.of[0][n]);
                mma_bfloat(sums.of[1][n], a[1], b0, b1, sums.of[1][n]);
            }
        }
    }
}

struct Stream {
    const Words4* next;  // this lane's share of the chunk to be loaded
    int left;            // chunks of this warp that are not loaded yet

    DEVICE void load(Words4 (&chunk)[2]) {
        if (left-- <= 0) return;
        chunk[0] = load_once16(next);
        chunk[1] = load_once16(next + 32);
        next += WARPS * 64;
    }
};

// This warp's chunks, every WARPS-th, STAGES of them in flight.
DEVICE void sweep(Sums& sums, const Words4* weights, const Input& input, int chunks) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int mine = (chunks - warp + WARPS - 1) / WARPS, k = warp * K_CHUNK + lane % 4 * K_LANE;
    Stream stream = {weights + warp * 64 + lane, mine};
    Words4 ring[STAGES][2];
#pragma unroll
    for (auto& chunk : ring) stream.load(chunk);
    while (mine > 0) {
#pragma unroll
        for (auto& chunk : ring) {
            if (mine-- <= 0) break;
            Words4 tile0 = chunk[0], tile1 = chunk[1];
            stream.load(chunk);
            multiply(sums, tile0, tile1, input, k);
            k += WARPS * K_CHUNK;
        }
    }
}

// partial [WARPS, ROWS, STRIDE]
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

DEVICE float total(const float* partial, int row, int channel) {
    float sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += partial[(warp * ROWS + row) * STRIDE + channel];
    return sum;
}

struct Output {
    void* values;
    const float* scales;          // [E, P, 2, 16], or null
    const float* expert_weights;  // of token·A + slot
    int channels;

    DEVICE float scale(long pair, int channel) const { return scales ? scales[pair * 32 + channel] : 1.f; }

    DEVICE void write(const float* partial, const Rows& rows, const Tile& tile, int pair, long stored_pair) const {
        constexpr int WIDTH = OUTPUT == GATED ? 16 : 32;
        for (int i = threadIdx.x; i < tile.rows * WIDTH; i += THREADS) {
            int row = i / WIDTH, channel = i % WIDTH, n = pair * WIDTH + channel;
            if (n >= channels) continue;
            float y = total(partial, row, channel) * scale(stored_pair, channel);
            long place = rows.output(tile.first + row);
            if (OUTPUT == GATED) {
                float up = total(partial, row, channel + 16) * scale(stored_pair, channel + 16);
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

// Block (pair, tile). `tiles` null: dense, row tiles of `num_rows`.
KERNEL(THREADS, BLOCKS) tiled_linear(const Words4* weights, const float* scales, int pairs, int chunks, const u16* x,
                                     int length, int num_rows, const int* sorted, int experts_per_token,
                                     const Tile* tiles, const int* num_tiles, void* values,
                                     const float* expert_weights, int channels) {
    DYNAMIC_SHARED(shared);
    int pair = blockIdx.x, first = blockIdx.y * ROWS;
    if (tiles && blockIdx.y >= *num_tiles) return;
    Tile tile = {0, first, smaller(ROWS, num_rows - first), 0};
    if (tiles) tile = tiles[blockIdx.y];
    Rows rows = {sorted, experts_per_token};
    long stored_pair = (long)tile.expert * pairs + pair;
    Input input = {x, length};
    input.locate(rows, tile);
    Sums sums = {};
    sweep(sums, weights + stored_pair * chunks * 64, input, chunks);
    put(sums, (float*)shared);
    sync_block();
    Output{values, scales, expert_weights, channels}.write((const float*)shared, rows, tile, pair, stored_pair);
}
