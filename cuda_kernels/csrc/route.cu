// Which experts a token goes to: softmax of its logits, the best of probability + bias, their normalized weights.
#include "common.cuh"

constexpr int WARPS = 4;  // a lane holds PER_LANE experts
constexpr float LOWEST = -3.4e38f;

DEVICE float warp_max(float x) {
    for (int lanes = 16; lanes; lanes /= 2) x = larger(x, shuffle_xor(x, lanes));
    return x;
}
DEVICE float warp_sum(float x) {
    for (int lanes = 16; lanes; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}

struct Choice {
    float score;
    u32 expert;
};

DEVICE Choice better(Choice a, Choice b) {
    return a.score > b.score || (a.score == b.score && a.expert < b.expert) ? a : b;
}

DEVICE Choice warp_best(Choice best) {
    for (int lanes = 16; lanes; lanes /= 2) {
        float score = shuffle_xor(best.score, lanes);
        best = better(best, {score, shuffle_xor(best.expert, lanes)});
    }
    return best;
}

struct Chooser {
    const float *logits, *bias;
    int* ids;
    float* weights;
    int experts, activated;
    float norm_min;

    // By one warp; lane l holds experts l, l + 32, ... The chosen one's score is struck out before the next choice.
    DEVICE void choose(long token, int lane) const {
        float probability[PER_LANE], score[PER_LANE], top = LOWEST, total = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            int expert = lane + 32 * i;
            probability[i] = expert < experts ? logits[token * experts + expert] : LOWEST;
            top = larger(top, probability[i]);
        }
        top = warp_max(top);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            probability[i] = lane + 32 * i < experts ? fast_exp(probability[i] - top) : 0.f;
            total += probability[i];
        }
        total = warp_sum(total);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            probability[i] /= total;
            score[i] = lane + 32 * i < experts ? probability[i] + bias[lane + 32 * i] : LOWEST;
        }
        float mine = 0, chosen = 0;  // lane a keeps the a-th choice's probability
        u32 my_expert = 0;
        for (int slot = 0; slot < activated; ++slot) {
            Choice best = {LOWEST, 0xFFFFFFFFu};
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) best = better(best, {score[i], (u32)(lane + 32 * i)});
            best = warp_best(best);
            float taken = 0;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i) {
                bool is_best = best.expert == (u32)(lane + 32 * i);
                taken += is_best ? probability[i] : 0.f;
                score[i] = is_best ? LOWEST : score[i];
            }
            taken = warp_sum(taken);
            chosen += taken;
            mine = lane == slot ? taken : mine;
            my_expert = lane == slot ? best.expert : my_expert;
        }
        if (lane >= activated) return;
        ids[token * activated + lane] = smaller((int)my_expert, experts - 1);  // logits of NaN choose nobody
        weights[token * activated + lane] = mine / larger(chosen, norm_min);
    }
};

// A warp a token.
KERNEL(32 * WARPS, 4) route(const float* logits, const float* bias, int* ids, float* weights, int tokens, int experts,
                            int activated, float norm_min) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    int token = blockIdx.x * WARPS + threadIdx.x / 32;
    Chooser chooser = {logits, bias, ids, weights, experts, activated, norm_min};
    if (token < tokens) chooser.choose(token, threadIdx.x % 32);
}

constexpr int ROUTER_THREADS = 256, ROUTER_WARPS = ROUTER_THREADS / 32;

struct __align__(16) Eight {
    u32 pair[4];
};

// A bfloat row of x and a float row of the weights, eight values of each.
DEVICE float dot(const Eight& x, const Floats4& low, const Floats4& high) {
    float sum = low_bfloat(x.pair[0]) * low.v[0] + high_bfloat(x.pair[0]) * low.v[1];
    sum += low_bfloat(x.pair[1]) * low.v[2] + high_bfloat(x.pair[1]) * low.v[3];
    sum += low_bfloat(x.pair[2]) * high.v[0] + high_bfloat(x.pair[2]) * high.v[1];
    return sum + (low_bfloat(x.pair[3]) * high.v[2] + high_bfloat(x.pair[3]) * high.v[3]);
}

// The router's matrix product and the choice in one launch. A block has EXPERTS experts and TOKENS tokens, each row of
// which it reads once; the last block to come of those with the same tokens chooses for them, a warp a token.
template <int EXPERTS, int TOKENS>
DEVICE void route_block(const Eight* x, const Floats4* weight, int vectors, float* logits, u32* counters,
                        const float* bias, int* ids, float* weights, int tokens, int experts, int activated,
                        float norm_min) {
    DYNAMIC_SHARED(shared);
    float* partial = (float*)shared;  // [TOKENS, EXPERTS, ROUTER_WARPS]
    int* is_last = (int*)(partial + TOKENS * EXPERTS * ROUTER_WARPS);
    int first_expert = blockIdx.x * EXPERTS, first_token = blockIdx.y * TOKENS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[TOKENS][EXPERTS] = {};
    wait_for_earlier_kernels();
    let_next_kernel_start();
    for (int i = threadIdx.x; i < vectors; i += ROUTER_THREADS) {
        Floats4 low[EXPERTS], high[EXPERTS];
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
            const Floats4* row = weight + 2 * ((long)smaller(first_expert + e, experts - 1) * vectors + i);
            low[e] = row[0];
            high[e] = row[1];
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (first_token + t >= tokens) continue;
            Eight values = x[(long)(first_token + t) * vectors + i];
#pragma unroll
            for (int e = 0; e < EXPERTS; ++e) sums[t][e] += dot(values, low[e], high[e]);
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (first_token + t >= tokens) continue;
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) {
            float sum = warp_sum(sums[t][e]);
            if (lane == 0) partial[(t * EXPERTS + e) * ROUTER_WARPS + warp] = sum;
        }
    }
    sync_block();
    int token = first_token + threadIdx.x / EXPERTS, expert = first_expert + threadIdx.x % EXPERTS;
    if (threadIdx.x < TOKENS * EXPERTS && token < tokens && expert < experts) {
        float sum = 0;
        for (int i = 0; i < ROUTER_WARPS; ++i) sum += partial[threadIdx.x * ROUTER_WARPS + i];
        logits[token * experts + expert] = sum;
    }
    sync_block();
    u32* counter = counters + blockIdx.y;
    if (threadIdx.x == 0) *is_last = arrive(counter) + 1 == gridDim.x;
    sync_block();
    if (!*is_last) return;
    see_arrived();
    Chooser chooser = {logits, bias, ids, weights, experts, activated, norm_min};
    if (warp < TOKENS && first_token + warp < tokens) chooser.choose(first_token + warp, lane);
    if (threadIdx.x == 0) *counter = 0;
}

KERNEL(ROUTER_THREADS, 2) router_of_few(const Eight* x, const Floats4* weight, int vectors, float* logits,
                                        u32* counters, const float* bias, int* ids, float* weights, int tokens,
                                        int experts, int activated, float norm_min) {
    route_block<1, 4>(x, weight, vectors, logits, counters, bias, ids, weights, tokens, experts, activated, norm_min);
}

KERNEL(ROUTER_THREADS, 2) router(const Eight* x, const Floats4* weight, int vectors, float* logits, u32* counters,
                                 const float* bias, int* ids, float* weights, int tokens, int experts, int activated,
                                 float norm_min) {
    route_block<4, 8>(x, weight, vectors, logits, counters, bias, ids, weights, tokens, experts, activated, norm_min);
}
