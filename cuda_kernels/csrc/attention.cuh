// Sixteen query rows of one warp against keys and values, bfloat in, float sums, softmax on the way.
//
// FORMAT is what the cache holds: 0 bfloats, 1 int8 and 2 e4m3 levels. A level is a bfloat too; its scale, one a key and
// head, goes to the score, or to the weight that multiplies the value.
//
// Queries are the A operand of mma.m16n8k16, keys and then values the B operand. A lane's share of B is eight
// consecutive features: of key g for the scores, which only permutes the features that are summed over, and of keys
// 2t, 2t+1, 2t+8, 2t+9 for the products, where column g of the j-th mma is feature 8g + j:
//
//     scores      lane 4g+t reads 16 bytes, features 32c + 8t .., of key g        c: step of 32 features
//     products    lane 4g+t reads 16 bytes, features 64h + 8g .., of four keys    h: half of 64 features
//                 and ends with features 64h + 16t .. 64h + 16t + 15 of rows g and g + 8
#pragma once
#include "common.cuh"

#if FORMAT
using Vector = Words2;  // eight neighbouring features
#else
using Vector = Words4;
#endif
constexpr bool IS_SCALED = FORMAT != 0;
constexpr int STEPS = HEAD_DIM / 32, HALVES = HEAD_DIM / 64;
constexpr float NEVER = -1e30f;  // below every score; finite, so that a row with no key yet gives no NaN

struct Query {
    Words4 low[STEPS], high[STEPS];  // rows g and g + 8
};

struct Answer {
    float sums[HALVES][8][4];  // of mma j: row g columns 2t and 2t+1, row g + 8 the same
    float top[2], total[2];    // of rows g and g + 8; `total` counts this lane's keys only

    DEVICE void clear() {
        *this = {};
        top[0] = top[1] = NEVER;
    }
    DEVICE void rescale(const float (&factor)[2]) {
        for (int i = 0; i < 2; ++i) total[i] *= factor[i];
        for (auto& half : sums)
            for (auto& columns : half)
                for (int i = 0; i < 4; ++i) columns[i] *= factor[i / 2];
    }
};

// Scores of eight keys.
DEVICE void score(float (&scores)[4], const Query& query, const Words4 (&key)[STEPS]) {
    for (float& s : scores) s = 0;
#pragma unroll
    for (int c = 0; c < STEPS; ++c) {
        const u32 first[4] = {query.low[c].x, query.high[c].x, query.low[c].y, query.high[c].y};
        const u32 second[4] = {query.low[c].z, query.high[c].z, query.low[c].w, query.high[c].w};
        mma_bfloat(scores, first, key[c].x, key[c].y, scores);
        mma_bfloat(scores, second, key[c].z, key[c].w, scores);
    }
}

// Four levels as bfloats, two to a word.
DEVICE void expand(u32 levels, u32& low, u32& high) {
    if constexpr (FORMAT == 1) {
        float level[4];
        for (int i = 0; i < 4; ++i)
            level[i] = bits_float(prmt(levels ^ 0x80808080u, 0x4B000000u, 0x7440u + i)) - (0x1p23f + 128);
        low = pack_bfloat2(level[0], level[1]), high = pack_bfloat2(level[2], level[3]);
    } else {
        // Sign, four bits of exponent, three of mantissa, where a bfloat has them; its exponent counts from 120 more.
        u32 pairs[2] = {prmt(levels, 0, 0x1404u), prmt(levels, 0, 0x3424u)};
        for (u32& pair : pairs)
            pair = fused_bfloat2(and_or(pair >> 4, 0x07F007F0u, pair & 0x80008000u), 0x7B807B80u, 0);
        low = pairs[0], high = pairs[1];
    }
}
DEVICE Words4 expand(const Words2& levels) {
    Words4 d;
    expand(levels.x, d.x, d.y);
    expand(levels.y, d.z, d.w);
    return d;
}
DEVICE Words4 expand(const Words4& bfloats) { return bfloats; }

DEVICE float quad_max(float x) {
    x = larger(x, shuffle_xor(x, 1));
    return larger(x, shuffle_xor(x, 2));
}
DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// Masked scores to weights 2^(scale·score - top) in place, after which the answer has the same top.
template <int kTiles>
DEVICE void soften(float (&scores)[kTiles][4], Answer& answer, float scale) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = NEVER;
#pragma unroll
        for (auto& tile : scores) top = larger(top, larger(tile[2 * i], tile[2 * i + 1]));
        top = larger(answer.top[i], quad_max(top) * scale);
        factor[i] = fast_exp2(answer.top[i] - top);
        answer.top[i] = top;
    }
    answer.rescale(factor);
#pragma unroll
    for (auto& tile : scores) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            tile[i] = tile[i] == NEVER ? 0.f : fast_exp2(fused(tile[i], scale, -answer.top[i / 2]));
            answer.total[i / 2] += tile[i];
        }
    }
}

// The lane's values of sixteen keys: keys 2t, 2t+1, 2t+8, 2t+9.
struct Values {
    Words4 of[4][HALVES];
};

// The lane's scores, or weights, of sixteen keys times the scales of keys 2t, 2t+1, 2t+8, 2t+9. A weight of 0 stays: what
// lies past the end has any scale.
DEVICE void apply_scales(float (&low)[4], float (&high)[4], const float (&scales)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low[i] = low[i] == 0 ? 0.f : low[i] * scales[i % 2];
        high[i] = high[i] == 0 ? 0.f : high[i] * scales[2 + i % 2];
    }
}

DEVICE void multiply(Answer& answer, const float (&low)[4], const float (&high)[4], const Values& values) {
    const u32 a[4] = {pack_bfloat2(low[0], low[1]), pack_bfloat2(low[2], low[3]), pack_bfloat2(high[0], high[1]),
                      pack_bfloat2(high[2], high[3])};
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            auto column = [&](int key) {
                const Words4 &even = values.of[key][h], &odd = values.of[key + 1][h];
                u32 from[4] = {even.x, even.y, even.z, even.w}, with[4] = {odd.x, odd.y, odd.z, odd.w};
                return prmt(from[j / 2], with[j / 2], j % 2 ? 0x7632u : 0x5410u);
            };
            mma_bfloat(answer.sums[h][j], a, column(0), column(2), answer.sums[h][j]);
        }
    }
}

// Where the cache keeps a sequence's tokens: vectors of eight features. A block has 2^block_bits slots.
struct Cache {
    const Vector *keys, *values;
    const float *key_scales, *value_scales;
    const int* blocks;  // of this sequence
    int block_bits, kv_heads, kv_head;

    DEVICE long row(int position) const {
        long block = blocks[position >> block_bits], slot = (block << block_bits) + (position & ((1 << block_bits) - 1));
        return (slot * kv_heads + kv_head) * (HEAD_DIM / 8);
    }
    DEVICE long scale(int position) const {
        long head = (long)blocks[position >> block_bits] * kv_heads + kv_head;
        return (head << block_bits) + (position & ((1 << block_bits) - 1));
    }
};

// Where a block of the prefill kernels works.
struct Place {
    int sequence, first;  // the tile's first token, from the sequence's first new one
};

// Tile u of the grid: sequence s owns numbers from starts[s] / tile_tokens + s on, more than it can need.
DEVICE Place find(const int* starts, int sequences, int tile_tokens, int tile) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (starts[middle] / tile_tokens + middle <= tile) low = middle;
        else high = middle - 1;
    }
    return {low, (tile - starts[low] / tile_tokens - low) * tile_tokens};
}
