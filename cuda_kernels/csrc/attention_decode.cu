// Attention of sequences with one new token, over the paged cache: a block a sequence, KV head and share of the keys.
//
// The queries of a KV head's group are the rows of one mma tile, so that a key is read once for all of them. Four warps
// take every fourth sixteen keys of the share. Of several shares the block that ends last adds up all of them, in
// their order: the result does not depend on which one that was.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 16, KEYS = 16, MIN_KEYS = 2 * WARPS * KEYS;

struct Share {
    int begin, end;  // keys
};

// Rows g and g + 8 of the group's queries; zeros where there is none.
DEVICE void load_query(Query& query, const Words4* rows, int group) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < STEPS; ++c) {
        query.low[c] = query.high[c] = {0, 0, 0, 0};
        if (g < group) query.low[c] = rows[g * (HEAD_DIM / 8) + 4 * c + t];
        if (g + 8 < group) query.high[c] = rows[(g + 8) * (HEAD_DIM / 8) + 4 * c + t];
    }
}

DEVICE Words4 load_vector(const Words4* from) { return load_once16(from); }
DEVICE Words2 load_vector(const Words2* from) { return load_once8(from); }

// What a lane reads of sixteen keys, as the cache has it.
struct Keys {
    Vector of[2][STEPS];
    float scales[4];

    DEVICE void expand_tile(int tile, Words4 (&key)[STEPS]) const {
#pragma unroll
        for (int c = 0; c < STEPS; ++c) key[c] = expand(of[tile][c]);
    }
};
struct StoredValues {
    Vector of[4][HALVES];
    float scales[4];

    DEVICE Values expanded() const {
        Values values;
#pragma unroll
        for (int i = 0; i < 4 * HALVES; ++i) values.of[i / HALVES][i % HALVES] = expand(of[i / HALVES][i % HALVES]);
        return values;
    }
};

DEVICE void load_scales(float (&scales)[4], const float* from) {
    if constexpr (IS_SCALED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scales[i] = from[2 * (threadIdx.x % 4) + i % 2 + i / 2 * 8];
    }
}

DEVICE void load_keys(Keys& keys, const Cache& cache, int position) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Vector* row = cache.keys + cache.row(position) + g * cache.kv_heads * (HEAD_DIM / 8) + t;
    load_scales(keys.scales, cache.key_scales + (IS_SCALED ? cache.scale(position) : 0));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int c = 0; c < STEPS; ++c)
            keys.of[tile][c] = load_vector(row + tile * 8 * cache.kv_heads * (HEAD_DIM / 8) + 4 * c);
}

// Past the end the last one again: what lies there may be NaN, which no weight of 0 would hide.
DEVICE void load_values(StoredValues& values, const Cache& cache, int position, int end) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const Vector* row = cache.values + cache.row(position) + g;
    load_scales(values.scales, cache.value_scales + (IS_SCALED ? cache.scale(position) : 0));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int key = smaller(2 * t + i % 2 + i / 2 * 8, end - 1 - position);
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
            values.of[i][h] = load_vector(row + key * cache.kv_heads * (HEAD_DIM / 8) + 8 * h);
    }
}

// Scores of keys from `end` on count for nothing.
DEVICE void mask(float (&scores)[2][4], int position, int end) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (position + i / 4 * 8 + 2 * t + i % 2 >= end) scores[i / 4][i % 4] = NEVER;
}

DEVICE void sweep(Answer& answer, const Query& query, const Cache& cache, Share share, float scale) {
    int position = share.begin + threadIdx.x / 32 * KEYS;
    if (position >= share.end) return;
    Keys keys;
    StoredValues values;
    load_keys(keys, cache, position);
    load_values(values, cache, position, share.end);
    for (; position < share.end; position += WARPS * KEYS) {
        bool has_next = position + WARPS * KEYS < share.end;
        float scores[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            Words4 key[STEPS];
            keys.expand_tile(tile, key);
            score(scores[tile], query, key);
        }
        if constexpr (IS_SCALED) apply_scales(scores[0], scores[1], keys.scales);
        if (has_next) load_keys(keys, cache, position + WARPS * KEYS);
        mask(scores, position, share.end);
        soften(scores, answer, scale);
        if constexpr (IS_SCALED) apply_scales(scores[0], scores[1], values.scales);
        multiply(answer, scores[0], scores[1], values.expanded());
        if (has_next) load_values(values, cache, position + WARPS * KEYS, share.end);
    }
}

// Sums of one row: HEAD_DIM products, then the top and the total, in floats.
constexpr int ROW = HEAD_DIM + 4, ROW_VECTORS = ROW / 4, FEATURE_VECTORS = HEAD_DIM / 4, MAX_SHARES = 32;

// The warp's rows to `partial` [ROWS, ROW].
DEVICE void put(Answer& answer, float* partial) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float* row = partial + (g + 8 * i) * ROW;
        float total = quad_sum(answer.total[i]);
        if (t == 0) row[HEAD_DIM] = answer.top[i], row[HEAD_DIM + 1] = total;
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
            for (int j = 0; j < 16; ++j) row[64 * h + 16 * t + j] = answer.sums[h][j % 8][2 * i + j / 8];
    }
}

// How `count` partial sums of each of the group's rows, [count, ROWS, ROW], add up: first the factor of each part.
struct Merger {
    const float* parts;
    float* factors;  // shared [ROWS, MAX_SHARES]
    float* ends;     // shared [ROWS, 2]: top and total of the whole
    int count, group;

    DEVICE void weigh() {
        for (int i = threadIdx.x; i < group * count; i += THREADS) {
            factors[i / count * MAX_SHARES + i % count] = parts[(i % count * ROWS + i / count) * ROW + HEAD_DIM];
        }
        sync_block();
        for (int row = threadIdx.x; row < group; row += THREADS) {
            float top = NEVER, total = 0, *mine = factors + row * MAX_SHARES;
            for (int i = 0; i < count; ++i) top = larger(top, mine[i]);
            for (int i = 0; i < count; ++i) {
                mine[i] = fast_exp2(mine[i] - top);
                total += mine[i] * parts[(i * ROWS + row) * ROW + HEAD_DIM + 1];
            }
            ends[2 * row] = top, ends[2 * row + 1] = total;
        }
        sync_block();
    }

    // Four neighbouring products of a row.
    DEVICE Floats4 products(int row, int vector) const {
        const Floats4* part = (const Floats4*)parts + row * ROW_VECTORS + vector;
        Floats4 sums = {};
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
            Floats4 some = part[i * ROWS * ROW_VECTORS];
            for (int j = 0; j < 4; ++j) sums.v[j] += factors[row * MAX_SHARES + i] * some.v[j];
        }
        return sums;
    }

    DEVICE void write(u32* result) const {
        for (int i = threadIdx.x; i < group * FEATURE_VECTORS; i += THREADS) {
            int row = i / FEATURE_VECTORS;
            Floats4 y = products(row, i % FEATURE_VECTORS);
            float factor = 1.f / ends[2 * row + 1];
            result[2 * i] = pack_bfloat2(y.v[0] * factor, y.v[1] * factor);
            result[2 * i + 1] = pack_bfloat2(y.v[2] * factor, y.v[3] * factor);
        }
    }

    // As one part of a larger whole, [ROWS, ROW].
    DEVICE void pass_on(float* part) const {
        for (int i = threadIdx.x; i < group * FEATURE_VECTORS; i += THREADS) {
            int row = i / FEATURE_VECTORS, vector = i % FEATURE_VECTORS;
            ((Floats4*)part)[row * ROW_VECTORS + vector] = products(row, vector);
            if (vector < 2) part[row * ROW + HEAD_DIM + vector] = ends[2 * row + vector];
        }
    }
};

// Block (sequence · G + KV head, share). scratch [S·G, shares, ROWS, ROW]; counters [S·G] zero before and after.
KERNEL(THREADS, 2) attention_decode(const Words4* query, const Vector* keys, const Vector* values,
                                    const float* key_scales, const float* value_scales, const int* tables,
                                    const int* query_starts, const int* context_lens, u16* out, float* scratch,
                                    u32* counters, int shares, int heads, int kv_heads, int query_stride,
                                    int block_bits, int table_width, float scale) {
    DYNAMIC_SHARED(shared);
    float *partial = (float*)shared, *factors = partial + WARPS * ROWS * ROW, *ends = factors + ROWS * MAX_SHARES;
    int* is_last = (int*)(ends + 2 * ROWS);
    wait_for_earlier_kernels();
    let_next_kernel_start();
    int sequence = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads, group = heads / kv_heads;
    long token = query_starts[sequence];
    int length = context_lens[sequence];
    if (query_starts[sequence + 1] - token != 1) return;
    int share_keys = ((length + shares - 1) / shares + MIN_KEYS - 1) / MIN_KEYS * MIN_KEYS;
    int live = (length + share_keys - 1) / share_keys;
    Share share = {(int)blockIdx.y * share_keys, smaller(length, (int)(blockIdx.y + 1) * share_keys)};
    if (share.begin >= length) return;

    Cache cache = {keys, values, key_scales, value_scales, tables + (long)sequence * table_width, block_bits, kv_heads,
                   kv_head};
    Query rows;
    load_query(rows, query + token * query_stride + (long)kv_head * group * (HEAD_DIM / 8), group);
    Answer answer;
    answer.clear();
    sweep(answer, rows, cache, share, scale);
    put(answer, partial + threadIdx.x / 32 * ROWS * ROW);
    sync_block();

    u32* result = (u32*)(out + (token * heads + (long)kv_head * group) * HEAD_DIM);
    float* parts = scratch + (long)blockIdx.x * shares * ROWS * ROW;
    Merger warps = {partial, factors, ends, WARPS, group};
    warps.weigh();
    if (live == 1) return warps.write(result);
    warps.pass_on(parts + blockIdx.y * ROWS * ROW);
    sync_block();
    if (threadIdx.x == 0) *is_last = arrive(&counters[blockIdx.x]) + 1 == (u32)live;
    sync_block();
    if (!*is_last) return;
    see_arrived();
    Merger all = {parts, factors, ends, live, group};
    all.weigh();
    all.write(result);
    if (threadIdx.x == 0) counters[blockIdx.x] = 0;
}
