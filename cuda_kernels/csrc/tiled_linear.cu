// y = x · Wᵀ with weights of 2, 4, 8 or 16 bits streamed once, for few rows of x: dense layers and routed experts.
//
// A pair is 32 outputs (two 16-channel tiles, or 16 gates and their 16 ups). A block computes WARPS_N pairs of one tile
// of rows, side by side so that they find x in the L1 cache; the warps of a pair share K chunk by chunk. Their sums meet
// in shared memory, in the order of the warps: a row's result does not depend on the rows beside it.
#include "tiled_rows.cuh"

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
    // Eight (of 16-bit weights: four) values from k on; zeros past the end.
    DEVICE Words4 load(int n, int k) const {
        if (k >= length) return {0, 0, 0, 0};
        const u16* place = x + (long)offset[n] * 8 + k;
        if (BITS != 16) return *(const Words4*)place;
        return {((const u32*)place)[0], ((const u32*)place)[1], 0, 0};
    }
};

struct Chunk {
    Words4 tile[2], beside;
};

// One chunk: k_lane is where this lane's values begin.
DEVICE void multiply(Sums& sums, const Chunk& chunk, const Input& input, int k_lane) {
    const Words4 &tile0 = chunk.tile[0], &tile1 = chunk.tile[1], &beside = chunk.beside;
    Channel channels[] = {{tile0.x, tile0.y, beside.x},
                          {tile0.z, tile0.w, beside.y},
                          {tile1.x, tile1.y, beside.z},
                          {tile1.z, tile1.w, beside.w}};
#pragma unroll
    for (int part = 0; part < (MMAS + 1) / 2; ++part) {
        Words4 x[TOKEN_TILES];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) x[n] = input.load(n, k_lane + 8 * part);
#pragma unroll
        for (int index = 2 * part; index < smaller(MMAS, 2 * part + 2); ++index) {
            u32 a[2][4];
#pragma unroll
            for (int c = 0; c < 4; ++c) channels[c].pairs(index, a[c / 2][c % 2], a[c / 2][c % 2 + 2]);
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                u32 b0 = index % 2 ? x[n].z : x[n].x, b1 = index % 2 ? x[n].w : x[n].y;
                mma_bfloat(sums.of[0][n], a[0], b0, b1, sums.of[0][n]);
                mma_bfloat(sums.of[1][n], a[1], b0, b1, sums.of[1][n]);
            }
        }
    }
}

DEVICE int my_chunks(int chunks) { return (chunks - my_warp_k() + WARPS_K - 1) / WARPS_K; }

// This warp's chunks, every WARPS_K-th, STAGES of them in flight.
struct Stream {
    const Words4* next;  // this lane's share of the chunk to be loaded
    int left;            // chunks that are not loaded yet
    Chunk ring[STAGES];

    DEVICE void load(Chunk& chunk) {
        if (left-- <= 0) return;
        int lane = threadIdx.x % 32;
        chunk.tile[0] = load_once16(next);
        chunk.tile[1] = load_once16(next + 32);
        if (BITS == 2) chunk.beside = load_once16(next + 64 - lane + lane / 4);
        next += WARPS_K * CHUNK_WORDS;
    }
    DEVICE void start(const Words4* weights, int chunks) {
        next = weights + my_warp_k() * CHUNK_WORDS + threadIdx.x % 32;
        left = my_chunks(chunks);
#pragma unroll
        for (auto& chunk : ring) load(chunk);
    }
};

DEVICE void sweep(Sums& sums, Stream& stream, const Input& input, int chunks) {
    int mine = my_chunks(chunks), k = my_warp_k() * K_CHUNK + threadIdx.x % 4 * K_LANE;
    while (mine > 0) {
#pragma unroll
        for (auto& chunk : stream.ring) {
            if (mine-- <= 0) break;
            Chunk taken = chunk;
            stream.load(chunk);
            multiply(sums, taken, input, k);
            k += WARPS_K * K_CHUNK;
        }
    }
}

// Block (WARPS_N pairs, tile). `tiles` null: dense, row tiles of `num_rows`.
KERNEL(THREADS, BLOCKS) tiled_linear(const Words4* weights, const float* scales, int pairs, int chunks, const u16* x,
                                     int length, int num_rows, const int* sorted, int experts_per_token,
                                     const Tile* tiles, const int* num_tiles, void* values,
                                     const float* expert_weights, int channels) {
    DYNAMIC_SHARED(shared);
    int first_pair = blockIdx.x * WARPS_N, first = blockIdx.y * ROWS;
    Tile tile = {0, first, smaller(ROWS, num_rows - first), 0};
    Rows rows = {sorted, experts_per_token};
    Stream stream;
    if (tiles) {
        wait_for_earlier_kernels();
        if (blockIdx.y >= *num_tiles) return;
        tile = tiles[blockIdx.y];
    }
    long stored_pair = (long)tile.expert * pairs + first_pair;
    bool is_real = first_pair + my_warp_n() < pairs;
    if (is_real) stream.start(weights + (stored_pair + my_warp_n()) * chunks * CHUNK_WORDS, chunks);
    if (!tiles) wait_for_earlier_kernels();  // whose result is x, while the weights are on their way
    let_next_kernel_start();
    Input input = {x, length};
    input.locate(rows, tile);
    Sums sums = {};
    if (is_real) sweep(sums, stream, input, chunks);
    put(sums, (float*)shared);
    sync_block();
    Output{values, scales, expert_weights, channels}.write((const float*)shared, rows, tile, first_pair, stored_pair);
}
