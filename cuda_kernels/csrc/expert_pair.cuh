// One warp's pair of 16-channel tiles: its weights times a token tile's activations, and what becomes of the sums.
#pragma once
#include "expert_stream.cuh"
#include "wint2.cuh"

constexpr int COLUMNS = (ROWS + 7) / 8;            // mma's of 8 token rows that share a decoded weight
static_assert(COLUMNS <= 2, "as many as registers hold");
constexpr int FRAGMENT_BYTES = ROWS * 64;          // of half a 64-group of the token tile
constexpr int START_BYTES = COLUMNS * 64;

using Sums = float[2][COLUMNS][4];

// Where one lane reads the activations of its next step, in shared memory:
//
//      fragments  Words4 [half 64-group, ROWS, 4]: lane t's operands of two mma's, for each token row
//      starts     Floats4 [64-group, COLUMNS, 4]: lane t's start values: what leaves for the fields' offsets
struct Operands {
    u32 fragments, starts;

    DEVICE void advance(int steps) {
        fragments += steps * 4 * FRAGMENT_BYTES;
        starts += steps * 2 * START_BYTES;
    }
};

// acc += (both tiles' weights of one 128-step) · (the activations of the token tile's columns kFirst..kEnd-1), in units of
// scale_float's.
template <Arithmetic kArithmetic, int kFirst, int kEnd>
DEVICE void multiply(Sums& acc, const Words4 (&codes)[2], u32 scales, const Channels (&channels)[2],
                     const Operands& x) {
    u32 scales_g = scales & 0x0F0F0F0Fu, scales_g8 = scales >> 4 & 0x0F0F0F0Fu;  // byte 2·tile + h, of rows g and g+8
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Words4 b[kEnd][2];
        Floats4 start[kEnd];
#pragma unroll
        for (int n = kFirst; n < kEnd; ++n) {
            const u8* fragments = shared_bytes(x.fragments) + 2 * h * FRAGMENT_BYTES + n * 512;
            b[n][0] = *(const Words4*)fragments;
            b[n][1] = *(const Words4*)(fragments + FRAGMENT_BYTES);
            start[n] = *(const Floats4*)(shared_bytes(x.starts) + h * START_BYTES + n * 64);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float c[kEnd][4];
            u32 row = h ? codes[i].z : codes[i].x, row8 = h ? codes[i].w : codes[i].y;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                u32 first[4], second[4];
                decode<kArithmetic>(row, row8, pair, channels[i], first, second);
#pragma unroll
                for (int n = kFirst; n < kEnd; ++n) {
                    mma(c[n], first, b[n][pair].x, b[n][pair].y, pair ? c[n] : start[n].v);
                    mma(c[n], second, b[n][pair].z, b[n][pair].w, c[n]);
                }
            }
            float scale = scale_float(scales_g, 2 * i + h), scale8 = scale_float(scales_g8, 2 * i + h);
#pragma unroll
            for (int n = kFirst; n < kEnd; ++n) {
                acc[i][n][0] += scale * c[n][0];
                acc[i][n][2] += scale8 * c[n][2];
                if (ROWS == 1) continue;  // a lane has two columns
                acc[i][n][1] += scale * c[n][1];
                acc[i][n][3] += scale8 * c[n][3];
            }
        }
    }
}

// One step of kColumns columns. The float code takes too many registers for several at once: there a weight is decoded
// for each.
template <Arithmetic kArithmetic, int kColumns>
DEVICE void multiply_step(Sums& acc, const Words4 (&codes)[2], u32 scales, const Channels (&channels)[2],
                          const Operands& x) {
    constexpr int kAtOnce = IS_FLOAT<kArithmetic> ? 1 : kColumns;
    multiply<kArithmetic, 0, kAtOnce>(acc, codes, scales, channels, x);
    if (kAtOnce < kColumns) multiply<kArithmetic, kAtOnce, kColumns>(acc, codes, scales, channels, x);
}

// `count` of this warp's steps: the loop that the kernel's time goes to. `X` is the form of the activations.
template <Arithmetic kArithmetic, int kColumns, class Stream, class X>
DEVICE void multiply_steps(Sums& acc, Stream& stream, const Channels (&channels)[2], X& x, int count) {
#pragma unroll(IS_FLOAT<kArithmetic> || kColumns > 1 ? 1 : 2)  // two steps as far as registers go
    for (; count > 0; --count) {
        Words4 codes[2];
        u32 scales;
        stream.take(codes, scales);
        multiply_step<kArithmetic, kColumns>(acc, codes, scales, channels, x);
        x.advance(WARPS_K);
    }
}

// The constants of one pair; brought near a pair before they are needed, which hides the wait.
struct PairConstants {
    Words4 a, b;
    u32 arithmetic;

    static DEVICE void bring_near(const Weights& weights, int expert, int pair) {
        if (pair >= weights.pairs) return;
        long index = expert * weights.pairs + pair;
        prefetch(weights.channels + (index * 8 + my_lane() / 4) * 2);
        prefetch(weights.arithmetic + index);
        prefetch(weights.super_scales + index * 32 + my_lane());
    }

    DEVICE void load(const Weights& weights, int expert, int pair) {
        if (pair >= weights.pairs) return;
        long index = (long)expert * weights.pairs + pair;
        const Words4* mine = weights.channels + (index * 8 + my_lane() / 4) * 2;
        a = mine[0];
        b = mine[1];
        arithmetic = weights.arithmetic[index];
    }
};

// `count` of this warp's steps of one panel, in runs that end where the copies, which are ahead, come to another stretch.
template <int kColumns, class Stream, class X>
DEVICE void sweep(Sums& acc, Stream& stream, const PairConstants& constants, X x, int count) {
    Channels channels[2] = {{{constants.a.x, constants.a.y}, {constants.b.x, constants.b.y}},
                            {{constants.a.z, constants.a.w}, {constants.b.z, constants.b.w}}};
    while (count > 0) {
        int run = smaller(count, stream.left);
        count -= run;
        stream.left -= run;
        switch (constants.arithmetic) {
            case SHORT: multiply_steps<SHORT, kColumns>(acc, stream, channels, x, run); break;
            case INTEGERS: multiply_steps<INTEGERS, kColumns>(acc, stream, channels, x, run); break;
            case FLOATS: multiply_steps<FLOATS, kColumns>(acc, stream, channels, x, run); break;
            default: multiply_steps<WIDE_FLOATS, kColumns>(acc, stream, channels, x, run);
        }
        if (stream.left == 0) stream.advance();
    }
}

struct Output {
    void* values;                 // GATED: bfloat h [R, channels]; else float [R, channels], by token and slot
    const float* expert_weights;  // else: the routing weight of each (token, slot)
    int channels;
};

DEVICE float silu(float x) { return fast_divide(x, 1.f + fast_exp(-x)); }

// Writes one pair of outputs of the row at a position of the sorted order, or the h of one gate and up.
DEVICE void write(const Output& out, const int* sorted, int position, int pair, int row, float first, float second) {
    if (GATED) {
        int channel = pair * 16 + row;
        if (channel >= out.channels) return;
        ((u16*)out.values)[(long)position * out.channels + channel] = float_bfloat(silu(first) * second);
        return;
    }
    int slot = sorted[position], channel = pair * 32 + row;
    float weight = out.expert_weights[slot];
    float* y = (float*)out.values + (long)slot * out.channels;
    if (channel < out.channels) y[channel] = first * weight;
    if (channel + 16 < out.channels) y[channel + 16] = second * weight;
}
