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
// WARPS_K, ROWS, STAGES, PIECES (the fullest tile whose activations are taken as int8 pieces, expert_pieces.cuh; fuller ones
// are taken in half precision, or bfloat with WINT2_BFLOAT, wint2.cuh).
#include "expert_pieces.cuh"

constexpr int SPLITS = WARPS_N < 4 ? 4 / WARPS_N : 1;  // threads that share one output's sum over warps,
constexpr int TURNS = WARPS_N < 4 ? 1 : WARPS_N / 4;     // or sums that one thread makes, one after another
constexpr int ADDENDS = WARPS_K / SPLITS;
constexpr int PARTIAL = 256 + (SPLITS > 1 ? 32 / SPLITS : 0);  // floats of one warp's: a sum's readers differ in bank
static_assert(WARPS_N * WARPS_K == WARPS, "WARPS_K must divide the warps");

constexpr int HALF_STEP_BYTES = 4 * FRAGMENT_BYTES + 2 * START_BYTES;
constexpr int PIECE_STEP_BYTES = PIECE_ROWS ? 2 * PIECE_GROUP_BYTES + PIECE_STARTS_BYTES : 0;
constexpr int STAGED_BYTES = HALF_STEP_BYTES > PIECE_STEP_BYTES ? HALF_STEP_BYTES : PIECE_STEP_BYTES;  // of a step

// A warp's way through the CTA's share: panel by panel and, inside a tile, pass by pass.
struct Route {
    const Share& share;
    int passes, pass_steps, steps;
    int tile, pass, panel;  // the next; a panel goes by its first pair

    DEVICE void start() {
        tile = share.first_tile();
        pass = 0;
        panel = share.first_pair(tile);
    }

    DEVICE Stretch next() {
        while (share.has_tile(tile)) {
            Span span = pass_span(pass, pass_steps, steps);
            int pair = panel + my_warp_n(), count = pair < share.end_pair(tile) ? own_steps(span) : 0;
            int expert = share.routing.tiles[tile].expert;
            leave_panel();
            if (count > 0) return {expert, pair, span.begin + my_warp_k(), count};
        }
        return {0, 0, 0, steps < WARPS_K ? 1 : steps / WARPS_K};
    }

    DEVICE void leave_panel() {
        if ((panel += WARPS_N) < share.end_pair(tile)) return;
        if (++pass == passes) {
            pass = 0;
            ++tile;
        }
        panel = share.first_pair(tile);
    }
};

// The sums of the panels that a CTA keeps between passes.
struct Kept {
    float* sums;  // [CTAs, panels, WARPS_N, 2, column 8, row 16]
    int panels;
    DEVICE float* of(int panel, int warp_n, int row, int column) const {
        return sums + (((long)blockIdx.x * panels + panel) * WARPS_N + warp_n) * 256 + column * 16 + row;
    }
};

// One panel of a token tile, once per pass.
struct Place {
    const Tile& tile;
    int panel, end;  // its first pair, and where the CTA's pairs of the tile end
    int kept;        // its number among the panels whose sums this CTA keeps between passes
    bool is_first_pass, is_last_pass, is_in_pieces;
};

// What becomes of a panel's sums.
struct Results {
    const Weights& weights;
    const Rows& rows;
    const Activations& x;
    const Pieces& pieces;
    Output out;
    Kept between;

    // A warp's sums of its steps of one pair, from the activations' form at hand.
    DEVICE void multiply(Sums& acc, Stream<Route>& stream, const PairConstants& constants, const Place& place,
                         Span span) const {
        int rows = place.tile.rows, count = own_steps(span);
        if constexpr (PIECE_ROWS > 0) {
            if (place.is_in_pieces) return sweep<1>(acc, stream, constants, pieces.operands(my_warp_k(), rows), count);
        }
        sweep<1>(acc, stream, constants, x.operands(my_warp_k(), rows), count);
    }

    // Writes element (g, t, c) of one pair's sums, or keeps it for the next pass.
    DEVICE void settle(const Place& place, int warp_n, int element, float first, float second) const {
        int pair = place.panel + warp_n;
        int row = (element >> 4) + 8 * ((element >> 1) & 1), t = (element >> 2) & 3;
        int column = !place.is_in_pieces ? 2 * t + (element & 1) : element & 1 ? ROWS : t;
        if (column >= place.tile.rows || pair >= place.end) return;
        if (!place.is_in_pieces) {
            float factor = x.inverse_row_scale(column);
            first = true_size(first) * factor;
            second = true_size(second) * factor;
        }
        float* kept = between.of(place.kept, warp_n, row, column);
        if (!place.is_first_pass) {
            first += kept[0];
            second += kept[128];
        }
        if (place.is_last_pass) {
            const float* scale = weights.super_scales + ((long)place.tile.expert * weights.pairs + pair) * 32 + row;
            write(out, rows.share.routing.sorted, place.tile.first + column, pair, row, first * scale[0],
                  second * scale[16]);
        } else {
            kept[0] = first;
            kept[128] = second;
        }
    }
};

// The warps' sums of a panel meet in shared memory, a panel later than they were made: nobody waits for the slowest
// warp, who is at most one panel behind. A thread owns element (g, t, c) of one pair's accumulator fragments, and
// shares it with SPLITS - 1 others.
//
//      warp      multiply 0 │ put 0 │ multiply 1 │ wait: all have put 0 │ put 1, add up 0 │ multiply 2 │ ...
//      buffers                  0                                           1
struct Reduction {
    static constexpr int BUFFER = WARPS * PARTIAL;
    static constexpr int SPACE = WARPS_K > 1 ? 2 * BUFFER : 2 * MAX_SORTED_HERE;  // what sorting takes, at least
    float* partial;  // two buffers of [WARPS, PARTIAL]
    SplitBarrier* put_by_all;
    int turn;  // panels that this warp has put

    DEVICE void put(const Sums& acc) {
        float* mine = partial + (turn & 1) * BUFFER + my_warp() * PARTIAL + my_lane() * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float(&sums)[4] = acc[i][0];
            *(Floats4*)(mine + i * 128) = {sums[0], sums[1], sums[2], sums[3]};
        }
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
    DEVICE void finish(int turn, const Results& results, const Place& place) {
        int split = thread_index() % SPLITS, element = thread_index() / SPLITS % 128;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            int warp_n = i * 4 + thread_index() / SPLITS / 128;
            float first, second;
            sum(turn, warp_n, element, split, first, second);
            if (split == 0) results.settle(place, warp_n, element, first, second);
        }
    }
};

// One pass of one token tile over this CTA's panels of it, where a warp has a pair for itself: nothing has to meet.
DEVICE void run_alone(const Results& results, Stream<Route>& stream, Place place, Span span) {
    const Weights& weights = results.weights;
    PairConstants constants;
    constants.load(weights, place.tile.expert, place.panel + my_warp_n());
    for (; place.panel + my_warp_n() < place.end; place.panel += WARPS_N, ++place.kept) {
        PairConstants::bring_near(weights, place.tile.expert, place.panel + WARPS_N + my_warp_n());
        Sums acc = {};
        results.multiply(acc, stream, constants, place, span);
        constants.load(weights, place.tile.expert, place.panel + WARPS_N + my_warp_n());
#pragma unroll
        for (int i = 0; i < 4; ++i) results.settle(place, my_warp_n(), my_lane() * 4 + i, acc[0][0][i], acc[1][0][i]);
    }
}

// The same where warps share a pair.
DEVICE void run_together(const Results& results, Stream<Route>& stream, Reduction& reduction, Place place, Span span) {
    const Weights& weights = results.weights;
    PairConstants constants;
    constants.load(weights, place.tile.expert, place.panel + my_warp_n());
    for (bool is_first = true, is_live = true; is_live; is_first = false) {
        int panel = is_first ? place.panel : place.panel + WARPS_N;
        Sums acc = {};
        is_live = panel < place.end;
        if (is_live) {
            PairConstants::bring_near(weights, place.tile.expert, panel + WARPS_N + my_warp_n());
            if (panel + my_warp_n() < place.end) results.multiply(acc, stream, constants, place, span);
            constants.load(weights, place.tile.expert, panel + WARPS_N + my_warp_n());
        }
        if (!is_first) reduction.wait();
        if (is_live) reduction.put(acc);
        if (!is_first) {
            reduction.finish(reduction.turn - (is_live ? 2 : 1), results, place);
            place.panel = panel;
            ++place.kept;
        }
        if (is_live) reduction.arrive();
    }
}

// Whether the tile's activations now lie there in pieces; the same for all threads.
DEVICE bool stage_pieces(const Results& results, const Tile& tile, Span span) {
    if constexpr (PIECE_ROWS > 0) return tile.rows <= PIECE_ROWS && results.pieces.stage(results.rows, tile, span);
    return false;
}

DEVICE void run_tile(const Results& results, Stream<Route>& stream, Activations& x, Reduction& reduction, int tile_index,
                     int pass, int passes) {
    const Share& share = results.rows.share;
    const Tile& tile = share.routing.tiles[tile_index];
    Span span = pass_span(pass, stream.route.pass_steps, results.weights.steps);
    PairConstants::bring_near(results.weights, tile.expert, share.first_pair(tile_index) + my_warp_n());
    sync_block();
    bool is_in_pieces = stage_pieces(results, tile, span);
    if (!is_in_pieces) {
        x.measure(results.rows, tile);
        x.stage(results.rows, tile, span);
        sync_block();
    }
    Place first = {tile, share.first_pair(tile_index), share.end_pair(tile_index), 0, pass == 0, pass + 1 == passes,
                   is_in_pieces};
    if (WARPS_K == 1) {
        run_alone(results, stream, first, span);
    } else {
        run_together(results, stream, reduction, first, span);
    }
}

KERNEL(THREADS, 1) expert_projection(const u8* records, const Words4* channel_constants, const u32* arithmetic,
                                     const float* super_scales, int pairs, int steps, const u16* x, int x_stride,
                                     int x_length, int lane_stride, int pair_stride, const int* expert_ids,
                                     int num_routed, int experts_per_token, const int* sorted, const Tile* tiles,
                                     const int* num_tiles, void* values, const float* expert_weights, float* scratch,
                                     int out_channels, int panels_kept, int passes) {
    DYNAMIC_SHARED(shared);
    int pass_steps = (steps + passes - 1) / passes;
    Weights weights = {records, channel_constants, arithmetic, super_scales, pairs, steps};

    u8* space = shared + WARPS * STAGES * SLOT;
    SplitBarrier* put_by_all = (SplitBarrier*)space;
    Share& share = *(Share*)(space + 16);
    Reduction reduction = {(float*)(space + 64), put_by_all, 0};
    Activations activations;
    u8* staged = (u8*)(reduction.partial + Reduction::SPACE);
    Loss* losses = (Loss*)(staged + pass_steps * STAGED_BYTES);
    Pieces pieces = {staged, staged + pass_steps * PIECE_STARTS_BYTES, losses};
    activations.starts = (Floats4*)staged;
    activations.fragments = (Words4*)(staged + pass_steps * 2 * START_BYTES);
    activations.largest = (u32*)(losses + WARPS);
    SortedHere& sorted_here = *(SortedHere*)(activations.largest + ROWS);

    if (GATED) wait_for_earlier_kernels();
    let_next_kernel_start();
    Routing routing = {sorted, tiles, num_tiles};
    if (num_routed <= MAX_SORTED_HERE) {
        routing = sort_here(sorted_here, (int*)reduction.partial, expert_ids, num_routed);
    }
    if (threadIdx.x == 0) {
        share = my_share(routing, pairs);
        init_barrier(put_by_all, WARPS);
    }
    sync_block();
    if (share.begin == share.end) return;

    Rows rows = {x, share, x_stride, x_length, experts_per_token, lane_stride, pair_stride};
    u32 ring = shared_address(shared) + my_warp() * STAGES * SLOT;
    Route route = {share, passes, pass_steps, steps};
    route.start();
    Stream<Route> stream = {weights, route, ring + my_lane() * 16, ring + 1024 + my_lane() * 4};
    Results results = {weights, rows, activations, pieces, {values, expert_weights, out_channels}, {scratch, panels_kept}};
    stream.start();
    if (!GATED) wait_for_earlier_kernels();
    for (int tile = share.first_tile(); share.has_tile(tile); ++tile) {
        for (int pass = 0; pass < passes; ++pass) {
            run_tile(results, stream, activations, reduction, tile, pass, passes);
        }
    }
}
