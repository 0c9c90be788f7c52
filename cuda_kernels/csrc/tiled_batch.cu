// y = x · Wᵀ with weights of 4, 8 or 16 bits, for more rows than tiled_linear.cu: there every 32 outputs read x anew, here
// the outputs of a block share it through shared memory.
//
// A block computes WARPS_N pairs (of 32 outputs) of one tile of rows. K goes in stages, STAGES - 1 of them on their way:
//
//      stage    x        [WARPS_K parts, ROWS, 64 of K], by all threads; a part is 8 pieces of 16 bytes a row, permuted so
//                        that the lanes' reads meet different banks
//               weights  [WARPS, chunks of 64 of K], each lane its own
//      warp     one pair and one part of each stage
//
// What lies beyond the end of K is zeros in x. The sums of a pair's WARPS_K warps meet in shared memory, in the order of
// the warps: a row's result does not depend on the rows beside it.
#include "tiled_rows.cuh"

constexpr int PART = 64, CHUNKS = PART / K_CHUNK;   // of K in a part, and the weights' chunks of it
constexpr int X_BYTES = ROWS * WARPS_K * PART * 2, WEIGHT_BYTES = WARPS * CHUNKS * 1024;
constexpr int STAGE_K = WARPS_K * PART, STAGE_BYTES = X_BYTES + WEIGHT_BYTES;
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
    int k, length, rows;    // where its piece begins; rows from its first one on
    int chunks;             // of the weights from the warp's part of the stage on
    u32 into, end;          // the stage's place in the ring, and where the ring ends
    u32 to_x, to_weights;   // from there on

    DEVICE void next() {
#pragma unroll
        for (int i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
            bool is_live = k < length && i * ROWS_AT_ONCE < rows;
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
        weights += WARPS_K * CHUNKS * 64;
        chunks -= WARPS_K * CHUNKS;
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

// Block (tile of rows, WARPS_N pairs): the tiles of the same outputs run side by side and find the weights in the L2 cache.
KERNEL(THREADS, 1) tiled_batch(const Words4* weights, const float* scales, int pairs, int chunks, const u16* x,
                               int length, int num_rows, void* values, int channels) {
    DYNAMIC_SHARED(shared);
    int first_pair = blockIdx.y * WARPS_N, first = blockIdx.x * ROWS, lane = threadIdx.x % 32;
    Tile tile = {0, first, smaller(ROWS, num_rows - first), 0};
    int piece = threadIdx.x % 8, part = threadIdx.x / 8 % WARPS_K, row = threadIdx.x / (8 * WARPS_K);
    int k = part * PART + piece * 8, my_chunks = first_pair + my_warp_n() < pairs ? chunks - my_warp_k() * CHUNKS : 0;
    u32 ring = shared_address(shared), own_weights = X_BYTES + threadIdx.x / 32 * (CHUNKS * 1024) + lane * 16;
    Copies copies = {x + (long)(first + row) * length + k,
                     weights + ((long)(first_pair + my_warp_n()) * chunks + my_warp_k() * CHUNKS) * 64 + lane,
                     k, length, tile.rows - row, my_chunks, ring, ring + STAGES * STAGE_BYTES,
                     (u32)(part * (ROWS * PART * 2) + place_of(row, piece)), own_weights};
    wait_for_earlier_kernels();
    let_next_kernel_start();
    for (int stage = 0; stage < STAGES - 1; ++stage) copies.next();
    Sums sums = {};
    u32 from = ring;
    for (int left = chunks; left > 0; left -= CHUNKS * WARPS_K) {
        wait_copies<STAGES - 2>();
        sync_block();
        copies.next();
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) multiply(sums, from + own_weights + i * 1024, from + my_warp_k() * (ROWS * PART * 2), i);
        from = from + STAGE_BYTES == ring + STAGES * STAGE_BYTES ? ring : from + STAGE_BYTES;
    }
    wait_copies<0>();
    sync_block();
    put(sums, (float*)shared);
    sync_block();
    Output{values, scales, 0, channels}.write((const float*)shared, {}, tile, first_pair, first_pair);
}
