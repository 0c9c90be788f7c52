// One projection of WINT2 experts over routed rows, for several rows an expert: the decode kernel (moe_wint2.cu) with
// token tiles of ROWS = 16 rows, so that a weight is decoded once for all of them. Their activations do not fit in
// shared memory, so they stream through it as well, beside the weights:
//
//      panel   WARPS pairs of 16-channel tiles: a warp has a pair, and all of K, for itself; its sums stay in registers
//      weights a lane's own ring, as in moe_wint2.cu
//      tokens  a ring of SLOTS chunks (CHUNK steps of K of the whole tile), read by all warps
//
//          chunk   0                1                2                3
//      warp 0   ────────────────┼────────────────┼──●
//      warp 1   ────────────────┼─────────────●                        ● where a warp is
//      warp 2   ────────────────┼──●
//      slot        0                1                0                1
//
// A warp waits only for what it reads: for a chunk to come. The last warp to leave a chunk has its slot filled again, by
// one bulk copy of the chunk SLOTS further on: what lies there is what `fragment_tiles` wrote, a tile's chunk in one
// piece. The sequence of chunks runs on over panels and tiles, as the weights do.
//
// The CTAs take the panels of all tiles in turn. The fuller tiles come first, so the shares differ by a panel of a tile
// that is less full.
//
// Compile-time parameters: GATED, ROWS, STAGES; WARPS_K is 1.
#include "activations.cuh"
#include "expert_pair.cuh"

constexpr int CHUNK = 16, SLOTS = 2;
constexpr int CHUNK_FRAGMENTS = CHUNK * 4 * FRAGMENT_BYTES, CHUNK_BYTES = CHUNK_FRAGMENTS + CHUNK * 2 * START_BYTES;
constexpr int WEIGHT_BYTES = WARPS * STAGES * SLOT;

// The panels of all token tiles, one tile after another.
struct Panels {
    const Tile* tiles;
    int per_tile, total, pairs, steps;
    DEVICE int chunks() const { return (steps + CHUNK - 1) / CHUNK; }
    DEVICE int tile(int panel) const { return panel / per_tile; }
    DEVICE int expert(int panel) const { return tiles[tile(panel)].expert; }
    DEVICE int pair(int panel) const { return panel % per_tile * WARPS + my_warp(); }
    DEVICE bool has_pair(int panel) const { return pair(panel) < pairs; }
};

// One warp's way: CTA b has every gridDim-th panel from b on.
struct Turns {
    const Panels& panels;
    int panel;

    DEVICE Stretch next() {
        for (; panel < panels.total; panel += gridDim.x) {
            if (!panels.has_pair(panel)) continue;
            Stretch all = {panels.expert(panel), panels.pair(panel), 0, panels.steps};
            panel += gridDim.x;
            return all;
        }
        return {0, 0, 0, 1};
    }
};

// Where a thread is. In shared memory, for it is needed once a chunk, and registers are for the loop over steps.
struct Place {
    int panel, rows, end;  // the rows of its tile, and the steps of the warp's pair, if it has one
    int step, turn;        // `turn` counts chunks

    DEVICE void begin(const Panels& panels, int which) {
        panel = which;
        step = 0;
        if (which >= panels.total) return;
        rows = panels.tiles[panels.tile(which)].rows;
        end = panels.has_pair(which) ? panels.steps : 0;
    }
};

// Of a row of a tile: where its result goes, and what undoes its power of two; y's carry the routing weight.
struct Target {
    int row;
    float factor;
};

// The ring of chunks; behind the weights' in shared memory.
struct Ring {
    SplitBarrier landed[SLOTS];
    u32 leavings[SLOTS];  // how often a warp has left each slot
    int panel, chunk;     // the next to be copied
    const u8* chunks;     // [tiles, chunks, CHUNK_BYTES]
    Panels panels;
    Place places[THREADS];

    DEVICE void start() {
        panel = blockIdx.x;
        chunk = 0;
        for (int i = 0; i < SLOTS; ++i) {
            init_barrier(&landed[i], BLOCK_ARRIVALS);
            leavings[i] = 0;
        }
    }

    DEVICE u32 slot(int i) { return shared_address(this) - (SLOTS - i) * CHUNK_BYTES; }

    // By a whole warp, and no other meanwhile.
    DEVICE void fill(int i) {
        sync_warp();
        int at_panel = panel, at_chunk = chunk;
        sync_warp();
        if (at_panel >= panels.total) return;
        long place = (long)panels.tile(at_panel) * panels.chunks() + at_chunk;
        copy_block(slot(i), chunks + place * CHUNK_BYTES, CHUNK_BYTES, &landed[i]);
        bool is_end = at_chunk + 1 == panels.chunks();
        if (my_lane() == 0) {
            chunk = is_end ? 0 : at_chunk + 1;
            panel = is_end ? at_panel + (int)gridDim.x : at_panel;
        }
    }

    DEVICE Operands enter(int turn) {
        wait_for_phase(&landed[turn % SLOTS], turn / SLOTS);
        u32 chunk = slot(turn % SLOTS);
        return {chunk + my_lane() * 16, chunk + CHUNK_FRAGMENTS + my_lane() % 4 * 16};
    }

    // In PTX's memory model a warp's reads of a chunk come before its first lane's count (`bar.warp.sync`), which
    // releases them; the last count reads from the chain of all earlier ones, so it acquires them; and `fill` begins
    // with another `bar.warp.sync`. So all reads of a chunk come before the copy into its slot, in causality order.
    DEVICE void leave(int turn) {
        sync_warp();
        u32 before = my_lane() == 0 ? count_call(&leavings[turn % SLOTS]) : 0;
        if ((largest_in_warp(before) + 1) % WARPS == 0) fill(turn % SLOTS);
    }
};

DEVICE u8* shared_memory() {
    DYNAMIC_SHARED(shared);
    return shared;
}
DEVICE Ring& the_ring() { return *(Ring*)(shared_memory() + WEIGHT_BYTES + SLOTS * CHUNK_BYTES); }
DEVICE Place& my_place() { return the_ring().places[thread_index()]; }

// Two outputs of a row: h of one gate and up, or two of y's, 16 channels apart.
DEVICE void write(const Output& out, const Target& target, int pair, int row, float first, float second) {
    first = true_size(first) * target.factor;
    second = true_size(second) * target.factor;
    long place = (long)target.row * out.channels;
    int channel = pair * (GATED ? 16 : 32) + row;
    if (GATED) {
        if (channel < out.channels) ((u16*)out.values)[place + channel] = float_bfloat(silu(first) * second);
        return;
    }
    if (channel < out.channels) ((float*)out.values)[place + channel] = first;
    if (channel + 16 < out.channels) ((float*)out.values)[place + channel + 16] = second;
}

// Of each row of the tile, for the lane's channels g and g+8 of both 16-channel tiles.
DEVICE void write_all(const Output& out, const Target* targets, int rows, int pair, const Sums& acc,
                      const float* super_scales) {
    int g = my_lane() / 4, t = my_lane() % 4;
    float scales[2][2] = {{super_scales[g], super_scales[16 + g]}, {super_scales[8 + g], super_scales[24 + g]}};
    Target target[COLUMNS][2];  // beyond the last row its own, for nothing
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
        target[n][0] = targets[smaller(8 * n + 2 * t, rows - 1)];
        target[n][1] = targets[smaller(8 * n + 2 * t + 1, rows - 1)];
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (8 * n + 2 * t + i % 2 >= rows) continue;
            write(out, target[n][i % 2], pair, g + 8 * (i / 2), acc[0][n][i] * scales[i / 2][0],
                  acc[1][n][i] * scales[i / 2][1]);
        }
    }
}

// This warp's sums of its pair of the panel, or its part in waiting for those who have one.
DEVICE void multiply_panel(Sums& acc, Stream<Turns>& stream, const PairConstants& constants, int steps) {
    Ring& ring = the_ring();
    for (; my_place().step < steps; my_place().step += CHUNK) {
        const Place& place = my_place();
        Operands x = ring.enter(place.turn);
        int count = smaller(CHUNK, place.end - place.step);
        if (place.rows <= 8) {
            sweep<1>(acc, stream, constants, x, count);
        } else {
            sweep<COLUMNS>(acc, stream, constants, x, count);
        }
        ring.leave(my_place().turn++);
    }
}

// This CTA's panels. The next one's constants come while this one's results go.
DEVICE void run_panels(const Weights& weights, const Output& out, const Target* targets, Stream<Turns>& stream) {
    const Panels& panels = the_ring().panels;
    PairConstants constants;
    constants.load(weights, panels.expert(blockIdx.x), panels.pair(blockIdx.x));
    for (int panel = blockIdx.x; panel < panels.total; panel = my_place().panel) {
        Sums acc = {};
        multiply_panel(acc, stream, constants, weights.steps);
        panel = my_place().panel;
        int next = panel + gridDim.x, rows = my_place().rows;
        if (next < panels.total) constants.load(weights, panels.expert(next), panels.pair(next));
        my_place().begin(panels, next);
        if (!panels.has_pair(panel)) continue;
        long record = (long)panels.expert(panel) * weights.pairs + panels.pair(panel);
        write_all(out, targets + panels.tile(panel) * ROWS, rows, panels.pair(panel), acc,
                  weights.super_scales + record * 32);
    }
}

KERNEL(THREADS, 1) expert_batch(const u8* records, const Words4* channel_constants, const u32* arithmetic,
                                const float* super_scales, int pairs, int steps, const u8* chunks,
                                const Target* targets, const Tile* tiles, const int* num_tiles, void* values,
                                int out_channels) {
    Ring& ring = the_ring();
    Weights weights = {records, channel_constants, arithmetic, super_scales, pairs, steps};
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        int per_tile = (pairs + WARPS - 1) / WARPS;
        ring.panels = {tiles, per_tile, *num_tiles * per_tile, pairs, steps};
        ring.chunks = chunks;
        ring.start();
    }
    sync_block();
    if ((int)blockIdx.x >= ring.panels.total) return;
    u32 own = shared_address(shared_memory()) + my_warp() * STAGES * SLOT;
    Turns turns = {ring.panels, (int)blockIdx.x};
    Stream<Turns> stream = {weights, turns, own + my_lane() * 16, own + 1024 + my_lane() * 4};
    stream.start();
    my_place().turn = 0;
    my_place().begin(ring.panels, blockIdx.x);
    wait_for_earlier_kernels();
    for (int i = 0; i < SLOTS && my_warp() == 0; ++i) ring.fill(i);
    run_panels(weights, {values, 0, out_channels}, targets, stream);
}

// Rows of bfloat as a token tile's chunks, a power of two away from their values: one CTA a row of a tile.
KERNEL(256, 4) fragment_tiles(const u16* x, int length, int steps, int lane_stride, int pair_stride,
                              int experts_per_token, const float* expert_weights, const int* sorted, const Tile* tiles,
                              const int* num_tiles, u8* chunks, Target* targets) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    if ((int)blockIdx.x >= *num_tiles || (int)blockIdx.y >= tiles[blockIdx.x].rows) return;
    int row = blockIdx.y, position = tiles[blockIdx.x].first + row, slot = sorted[position];
    const u16* source = x + (long)(GATED ? slot / experts_per_token : position) * length;
    float scale = find_scale(source, length, (u32*)shared_memory());
    if (threadIdx.x == 0) {
        targets[blockIdx.x * ROWS + row] = GATED ? Target{position, 1.f / scale} : Target{slot, expert_weights[slot] / scale};
    }
    u8* of_tile = chunks + (long)blockIdx.x * ((steps + CHUNK - 1) / CHUNK) * CHUNK_BYTES;
    // Eight threads a 64-group: two halves of four lanes.
    for (int index = threadIdx.x; index < (steps * 16 + 255) / 256 * 256; index += 256) {
        int group = index / 8, half = index / 4 % 2, t = index % 4, in_chunk = group % (2 * CHUNK);
        u8* chunk = of_tile + group / (2 * CHUNK) * CHUNK_BYTES;
        bool is_live = group < steps * 2;
        float offset = 0.f;
        if (is_live) {
            LaneRow lane = {source, length, group * 64 + t * lane_stride, pair_stride, scale};
            *(Words4*)(chunk + (in_chunk * 2 + half) * FRAGMENT_BYTES + (row * 4 + t) * 16) = lane.half_fragment(half, offset);
        }
        for (int lanes = 1; lanes < 8; lanes *= 2) offset += shuffle_xor(offset, lanes);
        if (is_live && index % 8 == 0) {
            float* start = (float*)(chunk + CHUNK_FRAGMENTS + in_chunk * START_BYTES + row / 2 * 16) + row % 2;
            start[0] = start[2] = -offset;
        }
    }
}
