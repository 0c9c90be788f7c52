// The inner loop of the decode kernel alone, in each arithmetic: a warp's pair of 16-channel tiles times up to 8 token
// rows, over and over, with weights and activations in shared memory, so that nothing but instructions takes time.
//
// Compile-time parameters: CODES (wint2.cuh's Arithmetic), WINT2_BFLOAT, and PIECES of the activations:
//
//      0     half precision, or bfloat with WINT2_BFLOAT: eight rows
//      1     int8, four rows: columns 0..3 of an mma have their upper pieces, 4..7 the lower ones
//      2     int8, eight rows: an mma for the upper pieces, another for the lower ones
//
// Bytes hold fields 3 and 2 four times (wint2.cuh): the four divides the activations before they are rounded, the fields' offset of 32 is the start value of each group's
// sum, and a group's integer sum times its local scale adds up in 32 bits: exact, in any order.
#include "wint2.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr Arithmetic kCodes = (Arithmetic)CODES;
constexpr int ROW_BYTES = PIECES == 1 ? 8 : 16;    // a lane's operands of half a 64-group, of one column
constexpr int HALF_BYTES = 8 * 4 * ROW_BYTES;      // of all of a warp's columns
constexpr int SETS = PIECES == 2 ? 2 : 1;          // mma's with operands of their own for one fragment of weights

using Sums = u32[SETS][4];  // the bits of floats, or int32

#if PIECES > 0
DEVICE void multiply_half(Sums& c, u32 row, u32 row8, int pair, const Channels& channels, u32 operands) {
    u32 a[4];
    decode_bytes<kCodes>(row, row8, pair, channels, a);
    if (PIECES == 1) {
        Words2 b = *(const Words2*)shared_bytes(operands);
        mma_bytes(c[0], a, b.x, b.y, c[0]);
    } else {
        Words4 b = *(const Words4*)shared_bytes(operands);
        mma_bytes(c[0], a, b.x, b.y, c[0]);
        mma_bytes(c[SETS - 1], a, b.z, b.w, c[SETS - 1]);
    }
}

DEVICE void add_scaled(u32& sum, u32 scale, u32 c) { sum += scale * c; }
template <int kIndex>
DEVICE u32 scale_of(u32 word) { return word >> 4 * kIndex & 15u; }
#else
DEVICE void multiply_half(Sums& c, u32 row, u32 row8, int pair, const Channels& channels, u32 operands) {
    u32 first[4], second[4];
    decode<kCodes>(row, row8, pair, channels, first, second);
    Words4 b = *(const Words4*)shared_bytes(operands);
    float sums[4] = {bits_float(c[0][0]), bits_float(c[0][1]), bits_float(c[0][2]), bits_float(c[0][3])};
    mma(sums, first, b.x, b.y, sums);
    mma(sums, second, b.z, b.w, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[0][i] = float_bits(sums[i]);
}

DEVICE void add_scaled(u32& sum, float scale, u32 c) { sum = float_bits(bits_float(sum) + scale * bits_float(c)); }
template <int kIndex>
DEVICE float scale_of(u32 word) { return byte_float(word >> kIndex % 2 * 4 & 0x0F0F0F0Fu, kIndex / 2); }
#endif

// One 64-group `h` of both tiles of a step.
template <int kGroup>
DEVICE void multiply_group(Sums (&acc)[2], const Words4 (&codes)[2], u32 scales, const Channels (&channels)[2],
                           u32 fragments, u32 starts) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        Sums c;
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            Words4 start = *(const Words4*)shared_bytes(starts + (kGroup * SETS + set) * 64);
            c[set][0] = start.x, c[set][1] = start.y, c[set][2] = start.z, c[set][3] = start.w;
        }
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            multiply_half(c, kGroup ? codes[i].z : codes[i].x, kGroup ? codes[i].w : codes[i].y, pair, channels[i],
                          fragments + (2 * kGroup + pair) * HALF_BYTES);
        }
        u32 word = i ? scales >> 16 : scales;
        auto scale = scale_of<2 * kGroup>(word), scale8 = scale_of<2 * kGroup + 1>(word);
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            add_scaled(acc[i][set][0], scale, c[set][0]);
            add_scaled(acc[i][set][1], scale, c[set][1]);
            add_scaled(acc[i][set][2], scale8, c[set][2]);
            add_scaled(acc[i][set][3], scale8, c[set][3]);
        }
    }
}

// sums u32 [CTAs, WARPS, 2, SETS, 4, 32]: `repeats` times what one pass over K gives.
KERNEL(THREADS, 1) decode_variant(const u8* records, const Words4* channel_constants, const Words4* fragments,
                                  const Words4* starts, u32* sums, int steps, int repeats) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int scale_bytes = (steps * 32 + 127) & ~127, record_bytes = scale_bytes + steps * 1024;
    int fragment_bytes = steps * 4 * HALF_BYTES, start_bytes = steps * 2 * SETS * 64;
    const Words4* sources[3] = {(const Words4*)records, fragments, starts};
    int sizes[3] = {WARPS * record_bytes, fragment_bytes, start_bytes};
    Words4* into = (Words4*)shared;
    for (int part = 0; part < 3; ++part) {
        for (int i = threadIdx.x; i < sizes[part] / 16; i += THREADS) into[i] = sources[part][i];
        into += sizes[part] / 16;
    }
    sync_block();

    const Words4* mine = channel_constants + (warp * 8 + lane / 4) * 2;
    Words4 a = mine[0], b = mine[1];
    Channels channels[2] = {{{a.x, a.y}, {b.x, b.y}}, {{a.z, a.w}, {b.z, b.w}}};
    u32 record = shared_address(shared) + warp * record_bytes;
    u32 operands = shared_address(shared) + sizes[0] + lane * ROW_BYTES;
    u32 first_start = shared_address(shared) + sizes[0] + sizes[1] + lane % 4 * 16;
    Sums acc[2] = {};
    for (int repeat = 0; repeat < repeats; ++repeat) {
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            u32 code = record + scale_bytes + step * 1024 + lane * 16;
            Words4 codes[2] = {load_shared16(code), load_shared16(code + 512)};
            u32 scales = load_shared4(record + step * 32 + lane / 4 * 4);
            u32 x = operands + step * 4 * HALF_BYTES, start = first_start + step * 2 * SETS * 64;
            multiply_group<0>(acc, codes, scales, channels, x, start);
            multiply_group<1>(acc, codes, scales, channels, x, start);
        }
    }
    u32* out = sums + ((long)blockIdx.x * WARPS + warp) * 2 * SETS * 4 * 32 + lane;
#pragma unroll
    for (int i = 0; i < 2 * SETS * 4; ++i) out[i * 32] = acc[i / (4 * SETS)][i / 4 % SETS][i % 4];
}
