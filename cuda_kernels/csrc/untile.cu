// Tiled weights back to rows of bfloat, for products with many rows of x, where the matrix library is the faster.
#include "tiled.cuh"

DEVICE u32 scaled(u32 pair, float scale) { return pack_bfloat2(low_bfloat(pair) * scale, high_bfloat(pair) * scale); }

// One channel's share of a lane: K_LANE values from `out` on, eight at a time, as far as they are within the row.
DEVICE void write(u32 low, u32 high, float scale, u16* out, int left) {
#pragma unroll
    for (int part = 0; part < MMAS / 2; ++part) {
        if (8 * part >= left) return;
        u32 pairs[4];
        decode(low, high, 2 * part, pairs[0], pairs[1]);
        decode(low, high, 2 * part + 1, pairs[2], pairs[3]);
        for (u32& pair : pairs) pair = scaled(pair, scale * LEVEL_UNIT);
        ((Words4*)out)[part] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
}

// Block (pair, eight chunks): a warp a chunk, both tiles. `half` is the distance of up rows from gate rows, or zero.
KERNEL(256, 4) untile(const Words4* weights, const float* scales, u16* out, int pairs, int chunks, int channels,
                      int length, int half) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    int pair = blockIdx.x, chunk = blockIdx.y * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (chunk >= chunks) return;
    int k = chunk * K_CHUNK + lane % 4 * K_LANE;
    for (int tile = 0; tile < 2; ++tile) {
        Words4 words = load_once16(weights + ((long)pair * chunks + chunk) * 64 + tile * 32 + lane);
        int channel = lane / 4, first = half ? pair * 16 + tile * half : pair * 32 + tile * 16;
        int end = half ? half * (tile + 1) : channels;
        const float* scale = scales + (pair * 2 + tile) * 16 + channel;
        u16* row = out + (long)(first + channel) * length + k;
        if (first + channel < end) write(words.x, words.y, scale[0], row, length - k);
        if (first + channel + 8 < end) write(words.z, words.w, scale[8], row + 8l * length, length - k);
    }
}
