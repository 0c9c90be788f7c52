// Root-mean-square normalization of bfloat rows, alone or after adding a row to the residual stream.
#include "common.cuh"

constexpr int THREADS = 1024, MAX_VECTORS = 2;  // a thread's share of a row, in vectors of eight

struct __align__(16) Eight {
    u32 pair[4];
};

// The sum over the block's threads, in the same order whatever the row.
DEVICE float block_sum(float x, float* shared, int threads) {
    for (int lanes = 16; lanes; lanes /= 2) x += shuffle_xor(x, lanes);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    sync_block();
    float sum = 0;
    for (int warp = 0; warp < threads / 32; ++warp) sum += shared[warp];
    return sum;
}

DEVICE u32 add_pairs(u32 a, u32 b) {
    return pack_bfloat2(low_bfloat(a) + low_bfloat(b), high_bfloat(a) + high_bfloat(b));
}

DEVICE float square_sum(const Eight& x) {
    float sum = 0;
    for (u32 pair : x.pair) sum += low_bfloat(pair) * low_bfloat(pair) + high_bfloat(pair) * high_bfloat(pair);
    return sum;
}

// bfloat(x · factor) · weight, each product rounded, as the oracle has it.
DEVICE u32 scale_pair(u32 x, float factor, u32 weight) {
    u32 scaled = pack_bfloat2(low_bfloat(x) * factor, high_bfloat(x) * factor);
    return pack_bfloat2(low_bfloat(scaled) * low_bfloat(weight), high_bfloat(scaled) * high_bfloat(weight));
}

// One block a row. `residual` null: out = norm(x). Else sum = residual + x and out = norm(sum).
KERNEL(THREADS, 1) rms_norm(const Eight* x, const Eight* residual, const Eight* weight, Eight* out, Eight* sum,
                            int vectors, int threads, float eps) {
    DYNAMIC_SHARED(shared);
    wait_for_earlier_kernels();
    let_next_kernel_start();
    long row = (long)blockIdx.x * vectors;
    Eight values[MAX_VECTORS];
    float squares = 0;
#pragma unroll
    for (int k = 0; k < MAX_VECTORS; ++k) {
        int i = threadIdx.x + k * threads;
        if (i >= vectors) break;
        values[k] = x[row + i];
        if (residual) {
            Eight other = residual[row + i];
            for (int j = 0; j < 4; ++j) values[k].pair[j] = add_pairs(other.pair[j], values[k].pair[j]);
            sum[row + i] = values[k];
        }
        squares += square_sum(values[k]);
    }
    float factor = inverse_root(block_sum(squares, (float*)shared, threads) / (8 * vectors) + eps);
#pragma unroll
    for (int k = 0; k < MAX_VECTORS; ++k) {
        int i = threadIdx.x + k * threads;
        if (i >= vectors) break;
        Eight scale = weight[i];
        for (int j = 0; j < 4; ++j) values[k].pair[j] = scale_pair(values[k].pair[j], factor, scale.pair[j]);
        out[row + i] = values[k];
    }
}
