// Causal attention of sequences with several new tokens, over the paged cache: a block a tile of 64 query rows and KV head.
//
// A row is one query head of one token, the heads of a KV head's group side by side, so that a key serves all of them;
// a tile holds whole tokens of one sequence. Keys and values pass through shared memory, 64 at a time, the next ones
// arriving meanwhile. Strides in shared memory let the 16-byte reads of eight lanes meet all 32 banks.
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, KEYS = 64, VECTORS = HEAD_DIM / 8;
constexpr int VECTOR_BYTES = sizeof(Vector), ROW_BYTES = VECTORS * VECTOR_BYTES, CHUNKS = ROW_BYTES / 16;
constexpr int KEY_BYTES = ROW_BYTES + 4 * VECTOR_BYTES, VALUE_BYTES = ROW_BYTES + 16;
constexpr int SCALES_AT = KEYS * (KEY_BYTES + VALUE_BYTES), STAGE_BYTES = SCALES_AT + KEYS * 8;

DEVICE void load_query(Words4 (&row)[STEPS], const Words4* from, bool is_real) {
#pragma unroll
    for (int c = 0; c < STEPS; ++c) {
        row[c] = {0, 0, 0, 0};
        if (is_real) row[c] = from[4 * c + threadIdx.x % 4];
    }
}

DEVICE Words4 load_vector(u32 address) { return FORMAT ? expand(load_shared8(address)) : load_shared16(address); }

DEVICE void load_scales(float (&scales)[4], u32 from) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
        scales[i] = bits_float(load_shared4(from + 4 * (2 * (threadIdx.x % 4) + i % 2 + i / 2 * 8)));
}

// Keys and values of positions first .. first + 63 on their way to shared memory; past the end the last one again.
DEVICE void fetch(u32 stage, const Cache& cache, int first, int length) {
    int chunk = threadIdx.x % CHUNKS;
    for (int key = threadIdx.x / CHUNKS; key < KEYS; key += THREADS / CHUNKS) {
        long row = cache.row(smaller(first + key, length - 1)) + chunk * (16 / VECTOR_BYTES);
        copy16(stage + key * KEY_BYTES + chunk * 16, cache.keys + row);
        copy16(stage + KEYS * KEY_BYTES + key * VALUE_BYTES + chunk * 16, cache.values + row);
    }
    if constexpr (IS_SCALED) {
        long at = cache.scale(smaller(first + (int)threadIdx.x % KEYS, length - 1));
        copy4(stage + SCALES_AT + threadIdx.x * 4, (threadIdx.x < KEYS ? cache.key_scales : cache.value_scales) + at);
    }
}

DEVICE void attend(Answer& answer, const Query& query, u32 stage, const int (&last)[2], int first, float scale) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float scores[KEYS / 8][4];
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        Words4 key[STEPS];
#pragma unroll
        for (int c = 0; c < STEPS; ++c) key[c] = load_vector(stage + (8 * n + g) * KEY_BYTES + (4 * c + t) * VECTOR_BYTES);
        score(scores[n], query, key);
    }
    if constexpr (IS_SCALED) {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n += 2) {
            float scales[4];
            load_scales(scales, stage + SCALES_AT + 32 * n);
            apply_scales(scores[n], scores[n + 1], scales);
        }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (first + 8 * n + 2 * t + i % 2 > last[i / 2]) scores[n][i] = NEVER;
    }
    soften(scores, answer, scale);
    u32 values_at = stage + KEYS * KEY_BYTES + 2 * t * VALUE_BYTES + g * VECTOR_BYTES;
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
        Values values;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
                values.of[i][h] = load_vector(values_at + (16 * n + i % 2 + i / 2 * 8) * VALUE_BYTES + h * 8 * VECTOR_BYTES);
        if constexpr (IS_SCALED) {
            float scales[4];
            load_scales(scales, stage + SCALES_AT + (KEYS + 16 * n) * 4);
            apply_scales(scores[2 * n], scores[2 * n + 1], scales);
        }
        multiply(answer, scores[2 * n], scores[2 * n + 1], values);
    }
}

// One row, a lane's sixteen features of each half: registers 2·high and 2·high + 1 of the sums.
DEVICE void write(Words4* row, const Answer& answer, int high) {
    float factor = 1.f / quad_sum(answer.total[high]);
    if (!row) return;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            auto pair = [&](int j) {
                const float(&sums)[8][4] = answer.sums[h];
                return pack_bfloat2(sums[j][2 * high + i] * factor, sums[j + 1][2 * high + i] * factor);
            };
            row[8 * h + 2 * (threadIdx.x % 4) + i] = {pair(0), pair(2), pair(4), pair(6)};
        }
    }
}

KERNEL(THREADS, 2) attention_prefill(const Words4* query, const Vector* keys, const Vector* values,
                                     const float* key_scales, const float* value_scales, const int* tables,
                                     const int* starts, const int* context_lens, Words4* out, int sequences,
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

    Query rows;
    Words4* results[2];
    int last[2];  // the last key that the rows g and g + 8 see
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i, token = place.first + row / group;
        bool is_real = row < tile_tokens * group && token < num_queries;
        int head = kv_head * group + row % group;
        load_query(i ? rows.high : rows.low, query + (long)(start + token) * query_stride + head * VECTORS, is_real);
        results[i] = is_real ? out + ((long)(start + token) * heads + head) * VECTORS : nullptr;
        last[i] = length - num_queries + smaller(token, num_queries - 1);
    }
    Cache cache = {keys, values, key_scales, value_scales, tables + (long)place.sequence * table_width, block_bits,
                   kv_heads, kv_head};
    int end = length - num_queries + smaller(place.first + tile_tokens, num_queries);
    u32 ring = shared_address(shared);
    Answer answer;
    answer.clear();
    fetch(ring, cache, 0, length);
    commit_copies();
    for (int first = 0, turn = 0; first < end; first += KEYS, turn ^= 1) {
        if (first + KEYS < end) fetch(ring + (turn ^ 1) * STAGE_BYTES, cache, first + KEYS, length);
        commit_copies();
        wait_copies<1>();
        sync_block();
        attend(answer, rows, ring + turn * STAGE_BYTES, last, first, scale);
        sync_block();
    }
    write(results[0], answer, 0);
    write(results[1], answer, 1);
}
