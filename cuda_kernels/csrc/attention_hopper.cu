// As attention_prefill.cu, of a cache of bfloats on Hopper: a block a tile of 128 query rows and KV head.
//
//     producer     one warpgroup: keys and values, 128 at a time, in turn into a ring of slots
//     consumers    two warpgroups of 64 rows; the scores of the next keys and the products with the last values
//                  are on their way while the weights between them are computed
//
//     tile i       scores(i + 1) | weights(i + 1)
//                  products(i) .................   | sums rescaled
#include "attention.cuh"
#include "warpgroup.cuh"

constexpr int GROUPS = 2, ROWS = 64 * GROUPS, KEYS = 128, THREADS = 128 * (GROUPS + 1), VECTORS = HEAD_DIM / 8;
constexpr int BLOCK = KEYS * 128, SLOT = HALVES * BLOCK, SLOTS = 6;  // bytes; a block is 64 features of 128 rows
constexpr int LAG = 2;                                               // slots whose copies are under way at once

struct Ring {
    u32 slots;
    SplitBarrier *filled, *emptied;
    SplitBarrier* loaded;  // the queries

    DEVICE u32 slot(int item) const { return slots + item % SLOTS * SLOT; }
    DEVICE void wait_filled(int item) const { wait_for_phase(&filled[item % SLOTS], item / SLOTS); }
    DEVICE void release(int item) const {
        if (threadIdx.x % 32 == 0) arrive_at(&emptied[item % SLOTS]);
    }
};

// Positions first .. first + 127 on their way to a slot; past the end the last one again. Sixteen are in one block.
DEVICE void fetch(u32 slot, const Vector* from, const Cache& cache, int first, int length) {
    int thread = threadIdx.x % 128, chunk = thread % VECTORS;
    for (int base = 0; base < KEYS; base += 16) {
        int position = smaller(first + base, (length - 1) & ~15);
        const Vector* rows = from + cache.row(position) + chunk;
#pragma unroll
        for (int i = thread / VECTORS; i < 16; i += 128 / VECTORS) {
            int key = smaller(i, length - 1 - position);
            copy16(slot + chunk / 8 * BLOCK + swizzled(base + i, chunk % 8), rows + (long)key * cache.kv_heads * VECTORS);
        }
    }
}

// Items 2i and 2i + 1 of the ring are tile i's keys and values.
DEVICE void produce(const Ring& ring, const Cache& cache, int tiles, int length) {
    for (int item = 0; item < 2 * tiles + LAG; ++item) {
        if (item < 2 * tiles) {
            if (item >= SLOTS) wait_for_phase(&ring.emptied[item % SLOTS], item / SLOTS - 1);
            fetch(ring.slot(item), item % 2 ? cache.values : cache.keys, cache, item / 2 * KEYS, length);
        }
        commit_copies();
        wait_copies<LAG>();
        show_shared();
        if (item >= LAG) arrive_at(&ring.filled[(item - LAG) % SLOTS]);
    }
}

using Scores = float[KEYS / 8][4];
using Sums = float[HEAD_DIM / 8][4];
using Weights = u32[KEYS / 16][4];

DEVICE void begin_scores(Scores& scores, u32 queries, u32 keys) {
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; ++k)
        multiply_rows(scores, queries + k / 4 * (ROWS * 128), keys + k / 4 * BLOCK, k % 4, k > 0);
    commit_multiplying();
}

DEVICE void begin_products(Sums& sums, const Weights& weights, u32 values) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) multiply_columns(sums, weights[k], values, BLOCK, k);
    commit_multiplying();
}

struct Softmax {
    float top[2], total[2];  // of rows g and g + 8; `total` counts this lane's keys only
    int last[2];             // the last key that these rows see
    float scale;

    DEVICE void mask(Scores& scores, int first) const {
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (first + 8 * n + 2 * ((int)threadIdx.x % 4) + i % 2 > last[i / 2]) scores[n][i] = NEVER;
    }

    // Scores to weights 2^(scale·score - top) in place; `factor` is for what was summed below the earlier top. Every row
    // sees the first key, so that a top is a real score from the first tile on.
    DEVICE void soften(Scores& scores, float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float highest = NEVER;
#pragma unroll
            for (auto& tile : scores) highest = larger(highest, larger(tile[2 * i], tile[2 * i + 1]));
            highest = larger(top[i], quad_max(highest) * scale);
            factor[i] = fast_exp2(top[i] - highest);
            top[i] = highest;
            float sum = 0;
#pragma unroll
            for (auto& tile : scores) {
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) {
                    tile[j] = fast_exp2(fused(tile[j], scale, -highest));
                    sum += tile[j];
                }
            }
            total[i] = total[i] * factor[i] + sum;
        }
    }
};

DEVICE void pack(Weights& weights, const Scores& scores) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            weights[k][i] = pack_bfloat2(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1]);
}

// `seen_by_all`: keys that every row of the block sees.
DEVICE void consume(Sums& sums, Softmax& softmax, const Ring& ring, u32 queries, int tiles, int seen_by_all) {
    Scores scores;
    Weights weights;
    float factor[2];
    ring.wait_filled(0);
    begin_multiplying();
    begin_scores(scores, queries, ring.slot(0));
    wait_multiplied<0>();
    take_sums(scores);
    ring.release(0);
    if (KEYS > seen_by_all) softmax.mask(scores, 0);
    softmax.soften(scores, factor);
    pack(weights, scores);
    for (int tile = 1; tile < tiles; ++tile) {
        ring.wait_filled(2 * tile);
        begin_multiplying();
        begin_scores(scores, queries, ring.slot(2 * tile));
        ring.wait_filled(2 * tile - 1);
        begin_products(sums, weights, ring.slot(2 * tile - 1));
        wait_multiplied<1>();
        take_sums(scores);
        ring.release(2 * tile);
        if ((tile + 1) * KEYS > seen_by_all) softmax.mask(scores, tile * KEYS);
        softmax.soften(scores, factor);
        wait_multiplied<0>();
        take_sums(sums);
        ring.release(2 * tile - 1);
#pragma unroll
        for (auto& columns : sums)
            for (int i = 0; i < 4; ++i) columns[i] *= factor[i / 2];
        pack(weights, scores);
    }
    ring.wait_filled(2 * tiles - 1);
    begin_multiplying();
    begin_products(sums, weights, ring.slot(2 * tiles - 1));
    wait_multiplied<0>();
    take_sums(sums);
}

KERNEL(THREADS, 1) attention_hopper(const Words4* query, const Vector* keys, const Vector* values,
                                    const float* key_scales, const float* value_scales, const int* tables,
                                    const int* starts, const int* context_lens, u32* out, int sequences,
                                    int tile_tokens, int tiles, int heads, int kv_heads, int query_stride,
                                    int block_bits, int table_width, float scale) {
    DYNAMIC_SHARED(shared);
    wait_for_earlier_kernels();
    let_next_kernel_start();
    // The tiles that see the most keys begin first.
    Place place = find(starts, sequences, tile_tokens, tiles - 1 - (int)blockIdx.x);
    int group = heads / kv_heads, kv_head = blockIdx.y, start = starts[place.sequence];
    int num_queries = starts[place.sequence + 1] - start, length = context_lens[place.sequence];
    if (num_queries < 2 || place.first >= num_queries) return;

    auto token_of = [&](int row) { return smaller(place.first + row / group, num_queries - 1); };
    u32 queries = shared_address(shared);
    SplitBarrier* barriers = (SplitBarrier*)(shared + (SLOTS + 1) * SLOT);
    Ring ring = {queries + SLOT, barriers, barriers + SLOTS, barriers + 2 * SLOTS};
    for (int i = threadIdx.x; i < SLOTS; i += THREADS) {
        init_barrier(&ring.filled[i], 128);
        init_barrier(&ring.emptied[i], 4 * GROUPS);
        if (i == 0) init_barrier(ring.loaded, 128 * GROUPS);
    }
    sync_block();

    Cache cache = {keys, values, key_scales, value_scales, tables + (long)place.sequence * table_width, block_bits,
                   kv_heads, kv_head};
    int old = length - num_queries, end = old + smaller(place.first + tile_tokens, num_queries);
    int key_tiles = (end + KEYS - 1) / KEYS;
    if (threadIdx.x >= 128 * GROUPS) {
        give_registers<40>();
        return produce(ring, cache, key_tiles, length);
    }
    take_registers<232>();
    for (int i = threadIdx.x; i < ROWS * VECTORS; i += 128 * GROUPS) {
        int row = i / VECTORS, chunk = i % VECTORS, token = token_of(row);
        const Words4* from = query + (long)(start + token) * query_stride + (kv_head * group + row % group) * VECTORS;
        copy16(queries + chunk / 8 * (ROWS * 128) + swizzled(row, chunk % 8), from + chunk);
    }
    commit_copies();
    wait_copies<0>();
    show_shared();
    arrive_at(ring.loaded);
    wait_for_phase(ring.loaded, 0);

    int first_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    Softmax softmax = {{NEVER, NEVER}, {0, 0}, {old + token_of(first_row), old + token_of(first_row + 8)}, scale};
    Sums sums = {};
    consume(sums, softmax, ring, queries + threadIdx.x / 128 * 8192, key_tiles, old + place.first + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int row = first_row + 8 * i, token = place.first + row / group;
        float factor = 1.f / quad_sum(softmax.total[i]);
        if (row >= tile_tokens * group || token >= num_queries) continue;
        u32* to = out + (((long)(start + token) * heads + kv_head * group + row % group) * HEAD_DIM) / 2;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; ++n)
            to[4 * n + threadIdx.x % 4] = pack_bfloat2(sums[n][2 * i] * factor, sums[n][2 * i + 1] * factor);
    }
}
