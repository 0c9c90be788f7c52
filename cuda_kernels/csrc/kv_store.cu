// Keys and values of a step to their slots of the paged cache.
#include "common.cuh"

// Block t copies token t's key and value, `vectors` of 16 bytes each; strides count in such vectors too.
KERNEL(256, 4) kv_store(const Words4* key, const Words4* value, Words4* key_cache, Words4* value_cache,
                        const long* slots, int key_stride, int value_stride, int vectors) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    long token = blockIdx.x, slot = slots[token];
    if (slot < 0) return;
    for (int i = threadIdx.x; i < 2 * vectors; i += 256) {
        if (i < vectors) {
            key_cache[slot * vectors + i] = key[token * key_stride + i];
        } else {
            value_cache[slot * vectors + i - vectors] = value[token * value_stride + i - vectors];
        }
    }
}

DEVICE float round_even(float x) { return x + 0x1.8p23f - 0x1.8p23f; }  // |x| < 2^22

// x / step of int8 or e4m3 (|x| <= 448 · step), to nearest even.
template <bool kIsFloat8>
DEVICE u32 level(float x, float step) {
    x = x / step;
    if (!kIsFloat8) return (u32)to_int(round_even(x)) & 255;
    u32 sign = float_bits(x) >> 24 & 128, bits = float_bits(x) & 0x7FFFFFFF;
    // Below 2^-6 levels are 2^-9 apart; above, three bits of mantissa are kept, and the exponent counts from -7.
    if (bits < 0x3C800000) return sign | float_bits(bits_float(bits) + 0x1p14f) - float_bits(0x1p14f);
    return sign | (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3);
}

// One head: pairs of bfloats to pairs of levels, by one warp.
template <bool kIsFloat8>
DEVICE void store_head(const u32* from, u16* to, float* scale, int pairs) {
    int lane = threadIdx.x % 32;
    u32 peak = 0;  // floats without sign are ordered as their bits; NaN above all
    for (int i = lane; i < pairs; i += 32) {
        u32 low = float_bits(positive(low_bfloat(from[i]))), high = float_bits(positive(high_bfloat(from[i])));
        peak = peak > low ? peak : low;
        peak = peak > high ? peak : high;
    }
    float largest = bits_float(largest_in_warp(peak));
    float step = (largest <= 1e-30f ? 1e-30f : largest) / (kIsFloat8 ? 448.f : 127.f);
    for (int i = lane; i < pairs; i += 32) {
        u32 low = level<kIsFloat8>(low_bfloat(from[i]), step), high = level<kIsFloat8>(high_bfloat(from[i]), step);
        to[i] = (u16)(low | high << 8);
    }
    if (lane == 0) *scale = step;
}

// Block t stores token t's heads as levels. Strides and `pairs`, of a head, count in pairs of features.
template <bool kIsFloat8>
DEVICE void store_token(const u32* key, const u32* value, u16* key_cache, u16* value_cache, float* key_scales,
                        float* value_scales, const long* slots, int key_stride, int value_stride, int heads, int pairs,
                        int block_size) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    long token = blockIdx.x, slot = slots[token];
    if (slot < 0) return;
    for (int i = threadIdx.x / 32; i < 2 * heads; i += 8) {
        int head = i % heads;
        long from = token * (i < heads ? key_stride : value_stride) + head * pairs, to = (slot * heads + head) * pairs;
        float* scale = (i < heads ? key_scales : value_scales) + (slot / block_size * heads + head) * block_size;
        store_head<kIsFloat8>((i < heads ? key : value) + from, (i < heads ? key_cache : value_cache) + to,
                              scale + slot % block_size, pairs);
    }
}
KERNEL(256, 4) kv_store_int8(const u32* key, const u32* value, u16* key_cache, u16* value_cache, float* key_scales,
                             float* value_scales, const long* slots, int key_stride, int value_stride, int heads,
                             int pairs, int block_size) {
    store_token<false>(key, value, key_cache, value_cache, key_scales, value_scales, slots, key_stride, value_stride,
                       heads, pairs, block_size);
}
KERNEL(256, 4) kv_store_fp8(const u32* key, const u32* value, u16* key_cache, u16* value_cache, float* key_scales,
                            float* value_scales, const long* slots, int key_stride, int value_stride, int heads,
                            int pairs, int block_size) {
    store_token<true>(key, value, key_cache, value_cache, key_scales, value_scales, slots, key_stride, value_stride,
                      heads, pairs, block_size);
}
