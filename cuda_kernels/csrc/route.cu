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

// A warp a token; lane l holds experts l, l + 32, ... The chosen one's score is struck out before the next choice.
KERNEL(32 * WARPS, 4) route(const float* logits, const float* bias, int* ids, float* weights, int tokens, int experts,
                            int activated, float norm_min) {
    int token = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    float probability[PER_LANE], score[PER_LANE], top = LOWEST, total = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        int expert = lane + 32 * i;
        probability[i] = expert < experts ? logits[(long)token * experts + expert] : LOWEST;
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
    ids[(long)token * activated + lane] = smaller((int)my_expert, experts - 1);  // logits of NaN choose nobody
    weights[(long)token * activated + lane] = mine / larger(chosen, norm_min);
}
