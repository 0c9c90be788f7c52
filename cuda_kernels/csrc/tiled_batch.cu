// y = x · Wᵀ with weights of 4, 8 or 16 bits, for more rows than tiled_linear.cu: there every 32 outputs read x anew, here
// the outputs of a block share it through shared memory.
//
// A tile is WARPS_N pairs (of 32 outputs) of ROWS rows. Its K goes in stages, of which STAGES - 1 are on their way:
//
//      stage    x        [WARPS_K parts, ROWS, 64 of K], by all threads; a part is 8 pieces of 16 bytes a row, permuted so
//                        that the lanes' reads meet different banks
//               weights  [WARPS, chunks of 64 of K], each lane its own
//      warp     one pair and one part of each stage
//
// What lies beyond the end of K is zeros in x. The stages of all tiles, one tile after the other, are shared evenly:
//
//      tile     |         0         |         1         |         2         |
//      block    |     0     |     1     |     2     |     3     |     4     |     0 and 1 meet for tile 0, 1 to 3 for 1
//
// or, with as many blocks as tiles, each has one to itself. Sums of a pair's WARPS_K warps meet in shared memory and are
// added in their order, those of a tile's blocks in global memory, in theirs: a result is the same whoever comes first, and
// whatever the rows beside it are. It does depend on how many these are, which says where K is cut.
#include "tiled_rows.cuh"

constexpr int PART = 64, CHUNKS = PART / K_CHUNK;   // of K in a part, and the weights' chunks of it
constexpr int X_BYTES = ROWS * WARPS_K * PART * 2, WEIGHT_BYTES = WARPS * CHUNKS * 1024;
constexpr int STAGE_K = WARPS_K * PART, STAGE_CHUNKS = WARPS_K * CHUNKS, STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
constexpr int TILE_SUMS = WARPS_N * ROWS * 32;
constexpr int ROWS_AT_ONCE = THREADS / (8 * WARPS_K);  // of which all threads together copy their pieces
static_assert(ROWS_AT_ONCE % 4 == 0 && ROWS % ROWS_AT_ONCE == 0, "pieces are permuted alike in every fourth row");

// Where piece 0..7 of a row of a part lies. A quarter of a warp reads 16 bytes of 4 pieces of 2 rows; of 16-bit weights
// half a warp 8 bytes of 2 pieces of 4 rows.
DEVICE int place_of(int row, int piece) {
    int flip = BITS == 8 ? row % 2 * 4 : BITS == 4 ? row % 2 : row % 4 * 2;
    return row * PART * 2 + (piece ^ flip) * 16;
}

// What one thread copies: the same piece of some rows, and its own weights.
struct Copies {
    const u16* x;           // of its first row, in the stage to be copied
    const Words4* weights;
    int length, rows;       // of all of K; from its first row on
    int k, end_k;           // where its piece begins, and where the block's stages of the tile end
    int chunks;             // of the weights until then, from the warp's part of the stage on
    u32 into, end;          // the stage's place in the ring, and where the ring ends
    u32 to_x, to_weights;   // from there on

    DEVICE void next() {
#pragma unroll
        for (int i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
            bool is_live = k < end_k && i * ROWS_AT_ONCE < rows;
            copy16_or_zeros(into + to_x + i * ROWS_AT_ONCE * PART * 2, x + (long)i * ROWS_AT_ONCE * length, is_live);
        }
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            copy16_or_zeros(into + to_weights + i * 1024, weights + i * 64, i < chunks);
            copy16_or_zeros(into + to_weights + i * 1024 + 512, weights + i * 64 + 32, i < chunks);
        }
        commit_copies();
        x += STAGE_K;
        k += STAGE_K;
        weights += STAGE_CHUNKS * 64;
        chunks -= STAGE_CHUNKS;
        into = into + STAGE_BYTES == end ? end - STAGES * STAGE_BYTES : into + STAGE_BYTES;
    }
};

// The lane's operands of mma 2·half and 2·half+1 of a chunk, from one row of the part.
DEVICE Words4 load_tokens(u32 x, int row, int chunk, int half) {
    int t = threadIdx.x % 4;
    if (BITS == 16) {
        Words2 both = load_shared8(x + place_of(row, chunk * 2 + t / 2) + t % 2 * 8);
        return {both.x, both.y, 0, 0};
    }
    return load_shared16(x + place_of(row, BITS == 8 ? chunk * 4 + t : 2 * t + half));
}

// One chunk of the part.
DEVICE void multiply(Sums& sums, u32 weights, u32 x, int chunk) {
    constexpr int AT_ONCE = MMAS < 2 ? MMAS : 2;
    Words4 tile0 = load_shared16(weights), tile1 = load_shared16(weights + 512);
#pragma unroll
    for (int half = 0; half < (MMAS + 1) / 2; ++half) {
        u32 a[AT_ONCE][2][4];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            decode(tile0.x, tile0.y, 2 * half + i, a[i][0][0], a[i][0][2]);
            decode(tile0.z, tile0.w, 2 * half + i, a[i][0][1], a[i][0][3]);
            decode(tile1.x, tile1.y, 2 * half + i, a[i][1][0], a[i][1][2]);
            decode(tile1.z, tile1.w, 2 * half + i, a[i][1][1], a[i][1][3]);
        }
        Words4 b[TOKEN_TILES];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) b[n] = load_tokens(x, 8 * n + threadIdx.x % 32 / 4, chunk, half);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
                for (int n = 0; n < TOKEN_TILES; ++n) {
                    float (&sum)[4] = sums.of[tile][n];
                    mma_bfloat(sum, a[i][tile], i ? b[n].z : b[n].x, i ? b[n].w : b[n].y, sum);
                }
            }
        }
    }
}

// Shares: equal runs of the stages of all tiles.
struct Shares {
    int total, stages;  // of all tiles, of one

    DEVICE int begin(int block) const { return (int)((long)total * block / gridDim.x); }
    DEVICE int block_of(int stage) const { return (int)(((long)gridDim.x * (stage + 1) - 1) / total); }
};

// What of a share is of one tile.
struct Run {
    int index, stage, count;  // of the tile, of its first stage, of stages
    int first_pair;
    Tile tile;

    DEVICE Run(const Shares& shares, int begin, int end, int num_rows) {
        int row_tiles = (num_rows + ROWS - 1) / ROWS;
        index = begin / shares.stages, stage = begin % shares.stages;
        count = smaller(end - begin, shares.stages - stage);
        first_pair = index / row_tiles * WARPS_N;
        int first = index % row_tiles * ROWS;
        tile = {0, first, smaller(ROWS, num_rows - first), 0};
    }
};

// Where blocks that have a part of a tile each meet: the last to come adds up what all have left there. A block leaves
// sums of two tiles at most: of the one that it goes on with, and of the one that others go on with.
struct Meeting {
    float* scratch;  // [block, 2, TILE_SUMS]
    u32* counters;   // of each tile's blocks; zeros, and left as zeros

    DEVICE float* left(int block, int first) const { return scratch + ((long)block * 2 + (block == first)) * TILE_SUMS; }

    // `partial` is this block's sums; then, if it is the last of the tile's blocks, those of all as one part.
    DEVICE bool is_over(float* partial, const Run& run, const Shares& shares) const {
        int start = run.index * shares.stages;
        int first = shares.block_of(start), last = shares.block_of(start + shares.stages - 1);
        float* mine = left(blockIdx.x, first);
        for (int i = threadIdx.x; i < TILE_SUMS; i += THREADS) {
            mine[i] = total(partial, i / 32 / ROWS, i / 32 % ROWS, i % 32, WARPS_K);
        }
        sync_block();
        u32* is_last = (u32*)partial + 32;  // no sum's place: a row has 32 of STRIDE
        if (threadIdx.x == 0) *is_last = arrive(&counters[run.index]) == (u32)(last - first);
        sync_block();
        if (!*is_last) return false;
        see_arrived();
        for (int i = threadIdx.x; i < TILE_SUMS; i += THREADS) {
            float sum = 0;
            for (int block = first; block <= last; ++block) sum += left(block, first)[i];
            partial[i / 32 * STRIDE + i % 32] = sum;
        }
        if (threadIdx.x == 0) counters[run.index] = 0;
        sync_block();
        return true;
    }
};

struct Operands {
    const Words4* weights;
    const u16* x;
    int pairs, chunks, length;

    // This thread's, of a run; `shared` is the ring's beginning.
    DEVICE Copies copies(const Run& run, u32 shared) const {
        int piece = threadIdx.x % 8, part = threadIdx.x / 8 % WARPS_K, row = threadIdx.x / (8 * WARPS_K);
        int pair = run.first_pair + my_warp_n(), chunk = run.stage * STAGE_CHUNKS + my_warp_k() * CHUNKS;
        int k = run.stage * STAGE_K + part * PART + piece * 8, end = run.stage + run.count;
        int end_chunk = pair < pairs ? smaller(chunks, end * STAGE_CHUNKS) : 0;
        return {x + (long)(run.tile.first + row) * length + k,
                weights + ((long)pair * chunks + chunk) * 64 + threadIdx.x % 32,
                length, run.tile.rows - row, k, smaller(length, end * STAGE_K), end_chunk - chunk,
                shared, shared + STAGES * STAGE_BYTES,
                (u32)(part * (ROWS * PART * 2) + place_of(row, piece)), own_weights()};
    }
    static DEVICE u32 own_weights() { return X_BYTES + threadIdx.x / 32 * (CHUNKS * 1024) + threadIdx.x % 32 * 16; }
};

DEVICE void sweep(Sums& sums, Copies copies, u32 ring, int stages) {
    for (int stage = 0; stage < STAGES - 1; ++stage) copies.next();
    u32 from = ring, to_part = my_warp_k() * (ROWS * PART * 2);
    for (; stages > 0; --stages) {
        wait_copies<STAGES - 2>();
        sync_block();
        copies.next();
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) multiply(sums, from + copies.to_weights + i * 1024, from + to_part, i);
        from = from + STAGE_BYTES == ring + STAGES * STAGE_BYTES ? ring : from + STAGE_BYTES;
    }
    wait_copies<0>();
    sync_block();
}

// Block (share). The tiles of the same outputs run side by side and find the weights in the L2 cache.
KERNEL(THREADS, 1) tiled_batch(const Words4* weights, const float* scales, int pairs, int chunks, const u16* x,
                               int length, int num_rows, void* values, int channels, int tiles, float* scratch,
                               u32* counters) {
    DYNAMIC_SHARED(shared);
    float* partial = (float*)shared;  // in the ring's place
    Operands operands = {weights, x, pairs, chunks, length};
    int stages = (chunks + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
    Shares shares = {tiles * stages, stages};
    wait_for_earlier_kernels();
    let_next_kernel_start();
    int end = shares.begin(blockIdx.x + 1);
    for (int begin = shares.begin(blockIdx.x); begin < end;) {
        Run run(shares, begin, end, num_rows);
        Sums sums = {};
        sweep(sums, operands.copies(run, shared_address(shared)), shared_address(shared), run.count);
        put(sums, partial);
        sync_block();
        bool is_whole = run.count == stages;
        if (is_whole || Meeting{scratch, counters}.is_over(partial, run, shares)) {
            int parts = is_whole ? WARPS_K : 1;
            Output{values, scales, 0, channels}.write(partial, {}, run.tile, run.first_pair, run.first_pair, parts);
        }
        sync_block();  // before the ring takes the sums' place
        begin += run.count;
    }
}
