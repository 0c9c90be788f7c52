// Rows to experts and back: the sorted order of routed rows, the token tiles, and the sum over a token's experts.
#include "common.cuh"

constexpr int THREADS = 1024, WARPS = THREADS / 32;

struct Tile {
    int expert, first, rows, unused;
};

// a[i] becomes a[0] + ... + a[i-1], for all i <= n, by the whole block; n < THREADS.
DEVICE void sum_before(int* a, int n) {
    int me = threadIdx.x, own = me < n ? a[me] : 0;
    for (int distance = 1; distance < n; distance *= 2) {
        int earlier = me >= distance && me < n ? a[me - distance] : 0;
        sync_block();
        if (me < n) a[me] += earlier;
        sync_block();
    }
    int total = me < n ? a[me] : 0;
    sync_block();
    if (me < n) a[me] = total - own;
    if (me == n - 1) a[n] = total;
    sync_block();
}

// Sorts the routed rows by expert, stably: warp w takes the w-th run of (token, slot) pairs; counts[w][e] becomes the
// position of that warp's first row of expert e.
struct Sorter {
    const int* expert_ids;
    int num_routed, num_experts;
    int* counts;  // shared, [WARPS + 1, E]; the last row holds the experts' first positions

    DEVICE int run_length() const { return (num_routed + THREADS - 1) / THREADS * 32; }

    // Calls visit(pair, expert, position) for the warp's pairs, moving its counts on.
    template <class Visit>
    DEVICE void sweep(Visit visit) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = run_length();
        for (int i = 0; i < length; i += 32) {
            int pair = warp * length + i + lane;
            bool live = pair < num_routed;
            int expert = live ? expert_ids[pair] : num_experts;
            u32 same = lanes_like_mine((u32)expert), earlier = same & ((1u << lane) - 1);
            int* count = &counts[warp * num_experts + (live ? expert : 0)];
            int position = *count + popcount(earlier);
            sync_warp();
            if (live && earlier == 0) *count += popcount(same);
            sync_warp();
            if (live) visit(pair, expert, position);
        }
    }

    DEVICE void count() {
        for (int i = threadIdx.x; i < WARPS * num_experts; i += THREADS) counts[i] = 0;
        sync_block();
        sweep([](int, int, int) {});
        sync_block();
    }

    // Exclusive sums: over warps inside an expert (one thread an expert), then over experts.
    DEVICE void scan() {
        int* totals = counts + WARPS * num_experts;
        for (int e = threadIdx.x; e < num_experts; e += THREADS) {
            int sum = 0;
            for (int w = 0; w < WARPS; ++w) {
                int own = counts[w * num_experts + e];
                counts[w * num_experts + e] = sum;
                sum += own;
            }
            totals[e] = sum;
        }
        sync_block();
        sum_before(totals, num_experts);
        for (int i = threadIdx.x; i < WARPS * num_experts; i += THREADS) counts[i] += totals[i % num_experts];
        sync_block();
    }
};

// One block: `sorted` [R] (position -> token·A + slot), `tiles` of at most tile_rows rows of one expert, `num_tiles`.
KERNEL(THREADS, 1) dispatch(const int* expert_ids, int num_routed, int num_experts, int tile_rows, int* sorted,
                            Tile* tiles, int* num_tiles) {
    DYNAMIC_SHARED(shared);
    wait_for_earlier_kernels();
    Sorter sorter = {expert_ids, num_routed, num_experts, (int*)shared};
    sorter.count();
    sorter.scan();
    sorter.sweep([&](int pair, int, int position) { sorted[position] = pair; });
    sync_block();
    const int* first = sorter.counts + WARPS * num_experts;
    int *full = sorter.counts, *others = full + num_experts + 1, e = threadIdx.x;
    int rows = e < num_experts ? first[e + 1] - first[e] : 0, last = rows % tile_rows;
    bool is_full = last * 2 > tile_rows;
    if (e < num_experts) {
        full[e] = rows / tile_rows + is_full;
        others[e] = last && !is_full;
    }
    sync_block();
    sum_before(full, num_experts);
    sum_before(others, num_experts);
    if (e < num_experts) {
        for (int i = 0; i * tile_rows < rows; ++i) {
            int left = rows - i * tile_rows, place = left * 2 > tile_rows ? full[e] + i : full[num_experts] + others[e];
            tiles[place] = {e, first[e] + i * tile_rows, smaller(tile_rows, left), 0};
        }
    }
    if (e == 0) *num_tiles = full[num_experts] + others[num_experts];
}

// out[token] = bfloat of the sum of its experts' rows, in slot order; the rows come weighted.
// Its blocks are small enough for the registers that the projection before it leaves, and wait in place.
KERNEL(128, 8) combine(const float* rows, u16* out, int channels, int experts_per_token) {
    int channel = (blockIdx.y * 128 + threadIdx.x) * 4;
    if (channel >= channels) return;
    wait_for_earlier_kernels();
    const float* row = rows + (long)blockIdx.x * experts_per_token * channels + channel;
    Floats4 sum = *(const Floats4*)row;
    for (int slot = 1; slot < experts_per_token; ++slot) {
        Floats4 value = *(const Floats4*)(row + (long)slot * channels);
        for (int i = 0; i < 4; ++i) sum.v[i] += value.v[i];
    }
    u32* packed = (u32*)(out + (long)blockIdx.x * channels + channel);
    packed[0] = pack_bfloat2(sum.v[0], sum.v[1]);
    packed[1] = pack_bfloat2(sum.v[2], sum.v[3]);
}
