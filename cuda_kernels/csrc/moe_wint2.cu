// One projection of WINT2 experts over routed rows: Y^T = W^T·X^T, the weights as the tensor core's 16-row operand and
// up to 8 token rows as its columns, so that a weight is read and decoded once for all the tokens of its expert.
//
// One persistent CTA an SM. Its work is a run of the flat list (token tile, panel); a token tile is at most ROWS routed
// rows of one expert, a panel is WARPS_N pairs of 16-channel tiles. The token tile's activations stay in shared memory
// while the weights of its panels stream past:
//
//      panel   16·2·WARPS_N channels          the WARPS_K warps of a pair take turns along K, one 128-step each;
//              ┌──┬──┬──┬──┬──┬──┬──┬──┐      their sums meet in shared memory once a panel
//      pair 0  │0 │1 │2 │3 │0 │1 │2 │..│ K
//      pair 1  │4 │5 │6 │7 │4 │5 │6 │..│
//              └──┴──┴──┴──┴──┴──┴──┴──┘
//
// A lane copies its own weights to its own slots of shared memory and reads back only those: the pipeline needs no
// barrier, and runs on across panels, tiles and experts. When the activations of a token tile do not fit, K is cut in
// passes, each over all the CTA's panels of that tile, and the sums rest in `scratch` between them.
//
// Compile-time parameters: GATED (a pair is gate and up: SwiGLU in registers; else two tiles of the down projection),
// WARPS_K, ROWS, STAGES, WINT2_BFLOAT (wint2.cuh).
#include "expert_rows.cuh"
#include "expert_stream.cuh"

constexpr int SPLITS = 4 / WARPS_N;  // threads that share one output's sum over warps
constexpr int ADDENDS = WARPS_K / SPLITS;
constexpr int PARTIAL = 256 + 32 / SPLITS;  // floats of one warp's sums, padded so that a sum's readers differ in bank
static_assert(WARPS_N * WARPS_K == WARPS && SPLITS * WARPS_N == 4, "WARPS_K must be 4, 8 or 16");

using Sums = float[2][4];

// Where one lane reads the activations of its next step.
struct Operands {
    u32 fragments, starts;  // addresses in shared memory

    // Columns without a row repeat the last one: what they sum up to is dropped.
    DEVICE void point(const Activations& x, int step, int rows) {
        int g = my_lane() / 4, t = my_lane() % 4;
        fragments = shared_address(x.fragments + smaller(g, rows - 1) * 4 + t) + step * 4 * FRAGMENT_BYTES;
        starts = shared_address(x.starts + t) + step * 2 * START_BYTES;
    }

    DEVICE void advance(int steps) {
        fragments += steps * 4 * FRAGMENT_BYTES;
        starts += steps * 2 * START_BYTES;
    }
};

// acc += (both tiles' weights of one 128-step) · (the token tile's activations).
template <Arithmetic kArithmetic>
DEVICE void multiply(Sums& acc, const Words4 (&codes)[2], u32 scales, const Channels (&channels)[2],
                     const Operands& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const Words4* fragments = (const Words4*)(shared_bytes(x.fragments) + 2 * h * FRAGMENT_BYTES);
        const Words4 b[2] = {fragments[0], fragments[FRAGMENT_BYTES / 16]};
        Floats4 start = *(const Floats4*)(shared_bytes(x.starts) + h * START_BYTES);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float c[4];
            u32 row = h ? codes[i].z : codes[i].x, row8 = h ? codes[i].w : codes[i].y;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                u32 first[4], second[4];
                decode<kArithmetic>(row, row8, pair, channels[i], first, second);
                mma(c, first, b[pair].x, b[pair].y, pair ? c : start.v);
                mma(c, second, b[pair].z, b[pair].w, c);
            }
            u32 word = i ? scales >> 16 : scales;
            float scale = h ? local_scale<2>(word) : local_scale<0>(word);
            float scale8 = h ? local_scale<3>(word) : local_scale<1>(word);
            acc[i][0] += scale * c[0];
            acc[i][1] += scale * c[1];
            acc[i][2] += scale8 * c[2];
            acc[i][3] += scale8 * c[3];
        }
    }
}

// `count` of this warp's steps: the loop that the kernel's time goes to.
template <Arithmetic kArithmetic>
DEVICE void multiply_steps(Sums& acc, Stream& stream, const Channels (&channels)[2], Operands& x, int count) {
#pragma unroll(kArithmetic == FLOATS ? 1 : 2)
    for (; count > 0; --count) {
        Words4 codes[2];
        u32 scales;
        stream.take(codes, scales);
        multiply<kArithmetic>(acc, codes, scales, channels, x);
        x.advance(WARPS_K);
    }
}

// The constants of one pair; loaded before the sums of the pair before are reduced, which hides the wait.
struct PairConstants {
    Words4 a, b;
    u32 arithmetic;
    DEVICE void load(const Weights& weights, int expert, int panel) {
        int pair = panel * WARPS_N + my_warp_n();
        if (pair >= weights.pairs) return;
        long index = (long)expert * weights.pairs + pair;
        const Words4* mine = weights.channels + (index * 8 + my_lane() / 4) * 2;
        a = mine[0];
        b = mine[1];
        arithmetic = weights.arithmetic[index];
        prefetch(weights.super_scales + index * 32 + my_lane());
    }
};

// All of this warp's steps of one panel, in runs that end where the copies, which are ahead, come to another panel.
DEVICE void sweep(Sums& acc, Stream& stream, const PairConstants& constants, const Activations& activations, Span span,
                  int rows) {
    Channels channels[2] = {{{constants.a.x, constants.a.y}, {constants.b.x, constants.b.y}},
                            {{constants.a.z, constants.a.w}, {constants.b.z, constants.b.w}}};
    Operands x;
    x.point(activations, my_warp_k(), rows);
    for (int count = own_steps(span); count > 0;) {
        int run = smaller(count, stream.left);
        count -= run;
        stream.left -= run;
        switch (constants.arithmetic) {
            case SHORT: multiply_steps<SHORT>(acc, stream, channels, x, run); break;
            case INTEGERS: multiply_steps<INTEGERS>(acc, stream, channels, x, run); break;
            default: multiply_steps<FLOATS>(acc, stream, channels, x, run);
        }
        if (stream.left == 0) stream.advance();
    }
}

struct Output {
    void* values;                 // GATED: bfloat h [R, channels]; else float [R, channels], by token and slot
    const float* expert_weights;  // else: the routing weight of each (token, slot)
    float* scratch;               // sums between passes, [CTAs, panels_kept, 4, 2, 128]
    int channels, panels_kept;
};

DEVICE float silu(float x) { return fast_divide(x, 1.f + fast_exp(-x)); }

// Writes one pair of outputs, or the h of one gate and up.
DEVICE void write(const Output& out, const Rows& rows, int routed, int pair, int row, float first, float second) {
    if (GATED) {
        int channel = pair * 16 + row;
        if (channel >= out.channels) return;
        ((u16*)out.values)[(long)routed * out.channels + channel] = float_bfloat(silu(first) * second);
        return;
    }
    int slot = rows.share.routing.sorted[routed], channel = pair * 32 + row;
    float weight = out.expert_weights[slot];
    float* y = (float*)out.values + (long)slot * out.channels;
    if (channel < out.channels) y[channel] = first * weight;
    if (channel + 16 < out.channels) y[channel + 16] = second * weight;
}

// One panel of a token tile, once per pass.
struct Place {
    const Tile& tile;
    int panel, kept;  // `kept` numbers the panel among those whose sums this CTA keeps between passes
    bool is_first_pass, is_last_pass;
};

// The warps' sums of a panel meet in shared memory, a panel later than they were made: nobody waits for the slowest
// warp, who is at most one panel behind. A thread owns element (g, t, c) of one pair's accumulator fragments, and
// shares it with SPLITS - 1 others.
//
//      warp      multiply 0 │ put 0 │ multiply 1 │ wait: all have put 0 │ put 1, add up 0 │ multiply 2 │ ...
//      buffers                  0                                           1
struct Reduction {
    static constexpr int BUFFER = WARPS * PARTIAL;
    float* partial;  // two buffers of [WARPS, PARTIAL]
    SplitBarrier* put_by_all;
    int turn;  // panels that this warp has put

    DEVICE void put(const Sums& acc) {
        float* mine = partial + (turn & 1) * BUFFER + my_warp() * PARTIAL + my_lane() * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) *(Floats4*)(mine + i * 128) = {acc[i][0], acc[i][1], acc[i][2], acc[i][3]};
        ++turn;
    }

    // This warp has put a panel, and has added up the one before, whose buffer is free once all have arrived.
    DEVICE void arrive() {
        sync_warp();
        if (my_lane() == 0) arrive_at(put_by_all);
    }

    DEVICE void wait() { wait_for_phase(put_by_all, turn - 1); }

    DEVICE void sum(int turn, int warp_n, int element, int split, float& first, float& second) {
        const float* p = partial + (turn & 1) * BUFFER + (warp_n * WARPS_K + split) * PARTIAL + element;
        first = second = 0.f;
#pragma unroll
        for (int j = 0; j < ADDENDS; ++j, p += SPLITS * PARTIAL) {
            first += p[0];
            second += p[128];
        }
#pragma unroll
        for (int lanes = 1; lanes < SPLITS; lanes *= 2) {
            first += shuffle_xor(first, lanes);
            second += shuffle_xor(second, lanes);
        }
    }

    // Adds up and writes the panel that was put at `turn`.
    DEVICE void finish(int turn, const Output& out, const Rows& rows, const Weights& weights, const Activations& x,
                       const Place& place) {
        int split = thread_index() % SPLITS, element = thread_index() / SPLITS % 128;
        int warp_n = thread_index() / SPLITS / 128, pair = place.panel * WARPS_N + warp_n;
        int row = (element >> 4) + 8 * ((element >> 1) & 1), column = 2 * ((element >> 2) & 3) + (element & 1);
        float first, second;
        sum(turn, warp_n, element, split, first, second);
        if (split || column >= place.tile.rows || pair >= weights.pairs) return;
        float* kept = out.scratch + ((long)blockIdx.x * out.panels_kept + place.kept) * 1024 + warp_n * 256 + element;
        if (!place.is_first_pass) {
            first += kept[0];
            second += kept[128];
        }
        if (place.is_last_pass) {
            const float* scale = weights.super_scales + ((long)place.tile.expert * weights.pairs + pair) * 32 + row;
            float factor = 1.f / x.row_scale(column);
            write(out, rows, place.tile.first + column, pair, row, first * factor * scale[0],
                  second * factor * scale[16]);
        } else {
            kept[0] = first;
            kept[128] = second;
        }
    }
};

// One pass of one token tile over this CTA's panels of it.
DEVICE void run_tile(const Weights& weights, const Rows& rows, const Output& out, const Share& share, Stream& stream,
                     Activations& x, Reduction& reduction, int tile_index, int pass, int passes) {
    const Tile& tile = share.routing.tiles[tile_index];
    Span span = pass_span(pass, stream.pass_steps, weights.steps);
    int first = share.first_panel(tile_index), last = share.last_panel(tile_index);
    sync_block();
    if (pass == 0) x.measure(rows, tile);
    x.stage(rows, tile, span);
    PairConstants constants;
    constants.load(weights, tile.expert, first);
    sync_block();
    for (int panel = first; panel <= last; ++panel) {
        Place before = {tile, panel - 1, panel - 1 - first, pass == 0, pass + 1 == passes};
        Sums acc = {};
        if (panel < last) {
            if (panel * WARPS_N + my_warp_n() < weights.pairs) sweep(acc, stream, constants, x, span, tile.rows);
            constants.load(weights, tile.expert, panel + 1);
        }
        if (panel > first) reduction.wait();
        if (panel < last) reduction.put(acc);
        if (panel > first) reduction.finish(reduction.turn - (panel < last ? 2 : 1), out, rows, weights, x, before);
        if (panel < last) reduction.arrive();
    }
}

KERNEL(THREADS, 1) expert_projection(const u8* records, const Words4* channel_constants, const u32* arithmetic,
                                     const float* super_scales, int pairs, int steps, const u16* x, int x_stride,
                                     int x_length, int lane_stride, int pair_stride, const int* expert_ids,
                                     int num_routed, int experts_per_token, const int* sorted, const Tile* tiles,
                                     const int* num_tiles, void* values, const float* expert_weights, float* scratch,
                                     int out_channels, int panels_kept, int passes) {
    DYNAMIC_SHARED(shared);
    int panels = (pairs + WARPS_N - 1) / WARPS_N, pass_steps = (steps + passes - 1) / passes;
    Weights weights = {records, channel_constants, arithmetic, super_scales, pairs, steps, panels};
    Output out = {values, expert_weights, scratch, out_channels, panels_kept};

    u8* space = shared + WARPS * STAGES * SLOT;
    SplitBarrier* put_by_all = (SplitBarrier*)space;
    Share& share = *(Share*)(space + 16);
    Reduction reduction = {(float*)(space + 64), put_by_all, 0};
    Activations activations;
    activations.starts = (Floats4*)(reduction.partial + 2 * Reduction::BUFFER);
    activations.fragments = (Words4*)(activations.starts + pass_steps * 2 * 4);
    activations.largest = (u32*)(activations.fragments + pass_steps * 4 * ROWS * 4);
    SortedHere& sorted_here = *(SortedHere*)(activations.largest + ROWS);

    if (GATED) wait_for_earlier_kernels();
    let_next_kernel_start();
    Routing routing = {sorted, tiles, num_tiles};
    if (num_routed <= MAX_SORTED_HERE) {
        routing = sort_here(sorted_here, (int*)reduction.partial, expert_ids, num_routed);
    }
    if (threadIdx.x == 0) {
        share = my_share(routing, panels);
        init_barrier(put_by_all, WARPS);
    }
    sync_block();
    if (share.begin == share.end) return;

    Rows rows = {x, share, x_stride, x_length, experts_per_token, lane_stride, pair_stride};
    u32 ring = shared_address(shared) + my_warp() * STAGES * SLOT;
    Stream stream = {weights, share, passes, pass_steps, ring + my_lane() * 16, ring + 1024 + my_lane() * 4};
    stream.start();
    if (!GATED) wait_for_earlier_kernels();
    for (int tile = share.first_tile(); share.has_tile(tile); ++tile) {
        for (int pass = 0; pass < passes; ++pass) {
            run_tile(weights, rows, out, share, stream, activations, reduction, tile, pass, passes);
        }
    }
}
