// How a projection's work is cut and shared out: token tiles of routed rows, panels of channels, steps along K.
#pragma once
#include "common.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS, WARPS_N = WARPS / WARPS_K;
constexpr int MAX_SORTED_HERE = 128;  // routed rows that a CTA sorts by itself; more come sorted from `dispatch`

// At most ROWS routed rows of one expert: positions first..first+rows-1 of the sorted order.
struct Tile {
    int expert, first, rows, unused;
};

// This thread's lane, and its warp's place in a panel.
DEVICE int my_lane() { return thread_index() % 32; }
DEVICE int my_warp() { return thread_index() / 32; }
DEVICE int my_warp_n() { return thread_index() / 32 / WARPS_K; }
DEVICE int my_warp_k() { return thread_index() / 32 % WARPS_K; }

// The routed rows in the order of their experts, and the token tiles.
struct Routing {
    const int* sorted;  // position -> token·num_experts_per_token + slot
    const Tile* tiles;
    const int* num_tiles;
};

// Where a CTA that sorts by itself keeps the result.
struct SortedHere {
    int sorted[MAX_SORTED_HERE];
    Tile tiles[MAX_SORTED_HERE];
    int num_tiles;
};

// Every routed row finds its own position by counting the rows that come before it: for few rows this takes less time
// than to wait for another kernel. `space`: room for 2·MAX_SORTED_HERE integers, for the time being.
DEVICE Routing sort_here(SortedHere& result, int* space, const int* expert_ids, int num_routed) {
    int *ids = space, *begins_tile = space + MAX_SORTED_HERE;
    int me = threadIdx.x, expert = 0, before = 0, position = 0, alike = 0;
    if (me < num_routed) ids[me] = expert_ids[me];
    sync_block();
    if (me < num_routed) {
        expert = ids[me];
        for (int other = 0; other < num_routed; ++other) {
            int theirs = ids[other];
            before += theirs < expert;
            alike += theirs == expert;
            position += theirs < expert || (theirs == expert && other < me);
        }
        result.sorted[position] = me;
        begins_tile[position] = (position - before) % ROWS == 0;
    }
    sync_block();
    if (me < num_routed && begins_tile[position]) {
        int tile = 0, rows = smaller(ROWS, before + alike - position);
        for (int earlier = 0; earlier < position; ++earlier) tile += begins_tile[earlier];
        result.tiles[tile] = {expert, position, rows, 0};
        if (position + rows == num_routed) result.num_tiles = tile + 1;
    }
    sync_block();
    return {result.sorted, result.tiles, &result.num_tiles};
}

// Where a pass begins and ends along K, in steps.
struct Span {
    int begin, end;
};
DEVICE Span pass_span(int pass, int pass_steps, int steps) {
    return {pass * pass_steps, smaller((pass + 1) * pass_steps, steps)};
}
// One warp's part of it.
DEVICE int own_steps(Span span) { return (span.end - span.begin - my_warp_k() + WARPS_K - 1) / WARPS_K; }

// The CTA's run of the flat list of (tile, pair), and its pairs of a tile; in shared memory.
struct Share {
    Routing routing;
    int begin, end, pairs;
    DEVICE int first_tile() const { return begin / pairs; }
    DEVICE bool has_tile(int tile) const { return tile * pairs < end; }
    DEVICE int first_pair(int tile) const { return tile * pairs < begin ? begin - tile * pairs : 0; }
    DEVICE int end_pair(int tile) const { return smaller(end - tile * pairs, pairs); }
};

// Shares are cut between panels, so that no warp is left without a pair where a CTA comes to another tile. Where nobody
// gets more panels by it, every tile has CTAs of its own: its rows are then prepared in fewer of them.
DEVICE Share my_share(const Routing& routing, int pairs) {
    int tiles = *routing.num_tiles, ctas = gridDim.x, me = blockIdx.x;
    int panels = (pairs + WARPS_N - 1) / WARPS_N, all = tiles * panels, own = ctas / tiles;
    int tile = 0, begin = all * me / ctas, end = all * (me + 1) / ctas;
    if (own && (panels + own - 1) / own <= (all + ctas - 1) / ctas) {
        tile = me / own;
        begin = tile < tiles ? panels * (me % own) / own : 0;
        end = tile < tiles ? panels * (me % own + 1) / own : 0;
    }
    auto pair = [&](int panel) { return (tile + panel / panels) * pairs + panel % panels * WARPS_N; };
    return {routing, pair(begin), pair(end), pairs};
}
