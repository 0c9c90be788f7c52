// One projection of WINT2 experts over routed rows, for several rows an expert: the decode kernel (moe_wint2.cu) with
// token tiles of ROWS = 16 or more rows, so that a weight is decoded once for all of them. Their activations do not fit
// in shared memory, so they stream through it as well, beside the weights:
//
//      panel   WARPS pairs of 16-channel tiles: a warp has a pair, and all of K, for itself; its sums stay in registers
//      weights a lane's own ring, as in moe_wint2.cu
//      tokens  a ring of SLOTS chunks (CHUNK steps of K of the whole tile), copied by all and read by all
//
// The warps drift apart by at most a chunk. One split barrier says both that a chunk has come and that one may go; at
// the beginning of chunk c a warp
//
//      waits     until all have begun chunk c-1, that is, until chunk c is there and chunk c-2 was read by all,
//      arrives   once its own copies of chunk c+1 have landed,
//      copies    its share of chunk c+2, into the slot of chunk c-2
//
// and the sequence of chunks runs on over panels, tiles and experts, as the weights do.
//
// Compile-time parameters: GATED, ROWS, STAGES; WARPS_K is 1.
#include "activations.cuh"
#include "expert_pair.cuh"

constexpr int CHUNK = 4, SLOTS = 4;
constexpr int CHUNK_FRAGMENTS = CHUNK * 4 * FRAGMENT_BYTES, CHUNK_STARTS = CHUNK * 2 * START_BYTES;
constexpr int CHUNK_BYTES = CHUNK_FRAGMENTS + CHUNK_STARTS;
constexpr int PIECES = CHUNK_FRAGMENTS / 16 / THREADS;   // of 16 bytes, that a thread copies
constexpr int HALVES_AT_ONCE = THREADS / 4 / ROWS;        // halves of 64-groups that all threads together copy at once
static_assert(WARPS_K == 1 && ROWS % 8 == 0 && THREADS % (4 * ROWS) == 0 && CHUNK * 2 * ROWS <= THREADS, "");

// Rows as `fragment_rows` leaves them.
struct Halves {
    const u8* fragments;   // Words4 [*, half 64-groups, 4]
    const float* starts;   // [*, 64-groups]
    const float* inverse;  // [*]
    const int* sorted;
    int experts_per_token, steps;
    DEVICE int source(int position) const { return GATED ? sorted[position] / experts_per_token : position; }
    DEVICE int chunks() const { return (steps + CHUNK - 1) / CHUNK; }
};

// What the chunks' copies need to know, beside a thread's own progress.
struct Batch {
    const Share& share;
    const Halves& halves;
    SplitBarrier* begun;
    u32 ring;
};

// The chunks on their way, as one thread sees them: it copies pieces of one row, and start values of another. Lies in
// shared memory: it is needed once a chunk, and registers are for the loop over steps.
struct Tokens {
    int tile, panel, chunk;  // the next to be copied (a panel goes by its first pair),
    int to, turn;            // the slot to copy to, how many chunks have been begun,
    int taken;               // steps of weights that this warp took in the last,
    const u8* pieces;        // and the thread's share of the tile to be copied
    const float* start_values;

    DEVICE void start(const Batch& of) {
        tile = of.share.first_tile();
        panel = of.share.first_pair(tile);
        chunk = to = turn = taken = 0;
        point(of);
        copy(of);
        copy(of);
        wait_copies<0>();
        sync_block();
    }

    DEVICE void point(const Batch& of) {
        const Tile& at = of.share.routing.tiles[tile];
        int thread = thread_index();
        int row = of.halves.source(at.first + smaller(thread / 4 % ROWS, at.rows - 1));
        pieces = of.halves.fragments + row * (of.halves.steps * 256L) + thread / (4 * ROWS) * 64 + thread % 4 * 16;
        row = of.halves.source(at.first + smaller(thread % ROWS, at.rows - 1));
        start_values = of.halves.starts + row * (of.halves.steps * 2L) + thread / ROWS;
    }

    DEVICE void copy(const Batch& of) {
        if (of.share.has_tile(tile)) {
            copy_fragments(of);
            copy_starts(of);
            if (++chunk == of.halves.chunks()) advance(of);
        }
        commit_copies();
        to = (to + 1) % SLOTS;
    }

    DEVICE void advance(const Batch& of) {
        chunk = 0;
        if ((panel += WARPS_N) < of.share.end_pair(tile)) return;
        panel = 0;
        if (of.share.has_tile(++tile)) point(of);
    }

    // Consecutive threads: the four lanes' words, then the rows, then the halves of 64-groups.
    DEVICE void copy_fragments(const Batch& of) const {
        int thread = thread_index(), left = (of.halves.steps - chunk * CHUNK) * 4 - thread / (4 * ROWS);
        u32 into = of.ring + to * CHUNK_BYTES + thread * 16;
        const u8* piece = pieces + chunk * (CHUNK * 256L);
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            if (i * HALVES_AT_ONCE < left) copy16(into + i * THREADS * 16, piece + i * HALVES_AT_ONCE * 64);
        }
    }

    // Twice: for rows g and g+8 of the weights.
    DEVICE void copy_starts(const Batch& of) const {
        int row = thread_index() % ROWS, group = thread_index() / ROWS;
        if (group >= smaller(CHUNK, of.halves.steps - chunk * CHUNK) * 2) return;
        u32 into = of.ring + to * CHUNK_BYTES + CHUNK_FRAGMENTS + group * START_BYTES + row / 2 * 16 + row % 2 * 4;
        copy4(into, start_values + chunk * CHUNK * 2);
        copy4(into + 8, start_values + chunk * CHUNK * 2);
    }

    // Begins a chunk: where this lane reads its tokens. Waiting for weights was waiting for all copied before them.
    DEVICE Operands next(const Batch& of) {
        if (turn) wait_for_phase(of.begun, turn - 1);
        if (taken < STAGES - 1) wait_copies<0>();
        sync_warp();
        if (my_lane() == 0) arrive_at(of.begun);
        copy(of);
        u32 slot = of.ring + turn++ % SLOTS * CHUNK_BYTES;
        return {slot + my_lane() * 16, slot + CHUNK_FRAGMENTS + my_lane() % 4 * 16};
    }
};

// Two outputs of each row of the tile, for the lane's channels g and g+8 of both tiles.
DEVICE void write_all(const Output& out, const Halves& halves, const Tile& tile, int pair, const Sums& acc,
                      const float* super_scales) {
    int g = my_lane() / 4, t = my_lane() % 4;
    float scales[2][2] = {{super_scales[g], super_scales[16 + g]}, {super_scales[8 + g], super_scales[24 + g]}};
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int row = 8 * n + 2 * t + i % 2, position = tile.first + row;
            if (row >= tile.rows) continue;
            float factor = halves.inverse[halves.source(position)];
            write(out, halves.sorted, position, pair, g + 8 * (i / 2), acc[0][n][i] * factor * scales[i / 2][0],
                  acc[1][n][i] * factor * scales[i / 2][1]);
        }
    }
}

// This CTA's panels of a token tile.
DEVICE void run_tile(const Weights& weights, const Output& out, const Halves& halves, Stream& stream, const Batch& batch,
                     Tokens& tokens, int tile_index) {
    const Share& share = batch.share;
    const Tile& tile = share.routing.tiles[tile_index];
    PairConstants constants;
    int pair = share.first_pair(tile_index) + my_warp_n();
    constants.load(weights, tile.expert, pair);
    for (; pair - my_warp_n() < share.end_pair(tile_index); pair += WARPS_N) {
        Sums acc = {};
        for (int step = 0; step < weights.steps; step += CHUNK) {
            Operands x = tokens.next(batch);
            int taken = tokens.taken = pair < share.end_pair(tile_index) ? smaller(CHUNK, weights.steps - step) : 0;
            if (tile.rows <= 8) {
                sweep<1>(acc, stream, constants, x, taken);
            } else {
                sweep<COLUMNS>(acc, stream, constants, x, taken);
            }
        }
        constants.load(weights, tile.expert, pair + WARPS_N);
        if (pair < share.end_pair(tile_index)) {
            write_all(out, halves, tile, pair, acc, weights.super_scales + ((long)tile.expert * weights.pairs + pair) * 32);
        }
    }
}

KERNEL(THREADS, 1) expert_batch(const u8* records, const Words4* channel_constants, const u32* arithmetic,
                                const float* super_scales, int pairs, int steps, const u8* fragments,
                                const float* starts, const float* inverse, const int* sorted, int experts_per_token,
                                const Tile* tiles, const int* num_tiles, void* values, const float* expert_weights,
                                int out_channels) {
    DYNAMIC_SHARED(shared);
    u8* space = shared + WARPS * STAGES * SLOT + SLOTS * CHUNK_BYTES;
    SplitBarrier* begun = (SplitBarrier*)space;
    Share& share = *(Share*)(space + 16);
    Weights weights = {records, channel_constants, arithmetic, super_scales, pairs, steps};
    Output out = {values, expert_weights, out_channels};
    Halves halves = {fragments, starts, inverse, sorted, experts_per_token, steps};
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        share = my_share({sorted, tiles, num_tiles}, pairs);
        init_barrier(begun, WARPS);
    }
    sync_block();
    if (share.begin == share.end) return;
    u32 ring = shared_address(shared) + my_warp() * STAGES * SLOT;
    Stream stream = {weights, share, 1, steps, ring + my_lane() * 16, ring + 1024 + my_lane() * 4};
    stream.start();
    wait_for_earlier_kernels();
    Batch batch = {share, halves, begun, shared_address(shared) + WARPS * STAGES * SLOT};
    Tokens& tokens = ((Tokens*)(space + 64))[threadIdx.x];
    tokens.start(batch);
    for (int tile = share.first_tile(); share.has_tile(tile); ++tile) {
        run_tile(weights, out, halves, stream, batch, tokens, tile);
    }
}

// Rows of bfloat as Halves, a power of two away from their values: one CTA a row.
KERNEL(256, 4) fragment_rows(const u16* x, int length, int steps, int lane_stride, int pair_stride, Words4* fragments,
                             float* starts, float* inverse) {
    DYNAMIC_SHARED(shared);
    u32* largest = (u32*)shared;
    wait_for_earlier_kernels();
    let_next_kernel_start();
    const u16* row = x + (long)blockIdx.x * length;
    if (threadIdx.x == 0) *largest = 0;
    sync_block();
    u32 both = 0;
#pragma unroll 4
    for (int k = threadIdx.x * 2; k < length; k += 512) both = larger_halves(both, *(const u32*)(row + k) & 0x7FFF7FFFu);
    u32 low = both << 16, high = both & 0xFFFF0000u, size = largest_in_warp(low > high ? low : high);
    if (threadIdx.x % 32 == 0) atomic_max(largest, size);
    sync_block();
    float scale = activation_scale(*largest);
    if (threadIdx.x == 0) inverse[blockIdx.x] = 1.f / scale;
    // Eight threads a 64-group: two halves of four lanes.
    for (int index = threadIdx.x; index < (steps * 16 + 255) / 256 * 256; index += 256) {
        int group = index / 8, half = index / 4 % 2, t = index % 4;
        bool is_live = group < steps * 2;
        float offset = 0.f;
        if (is_live) {
            LaneRow source = {row, length, group * 64 + t * lane_stride, pair_stride, scale};
            fragments[(long)blockIdx.x * steps * 16 + index] = source.half_fragment(half, offset);
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) offset += shuffle_xor(offset, lanes);
        if (is_live && index % 8 == 0) starts[(long)blockIdx.x * steps * 2 + group] = -offset;
    }
}
