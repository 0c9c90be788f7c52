// WINT2 codes to tensor-core fragments, in registers.
//
// A byte b of channel n means the 15-bit number u = floor(b·code_scale[n] + code_zp[n] + 1/2), whose four overlapping
// six-bit fields are four weights plus 32:
//
//      bit of u   14 13 12 | 11 10  9 |  8  7  6 |  5  4  3 |  2  1  0
//                '----- field 0 -----'
//                           '----- field 1 -----'
//                                      '----- field 2 -----'
//                                                 '----- field 3 -----'
//
// Packing (cuda_kernels/packing.py) finds integers A, B with u = (b·A + B) >> 17 for all 256 bytes, so that one IMAD
// leaves u in bits 17..31; overflow is harmless, u counts modulo 2^15. The upper halves of two such words make one
// register Q, each half holding u in bits 1..15:
//
//      half precision    Q & 0x007E | 0x6400 = 1024 + 2·field 3      Q>>6 & 0x007E | 0x6400 = 1024 + 2·field 1
//      (10-bit mantissa) Q & 0x03F0 | 0x6400 = 1024 + 16·field 2     Q>>6 & 0x03F0 | 0x6400 = 1024 + 16·field 0
//
// Two fields of four are in place; one shift brings the other two there. The bfloat mantissa has seven bits: there the
// fields are brought one after another to 128 + 2·field. The factors (2, 16) divide the activations, the offsets
// (1024 + 2·32, ...) leave through the accumulator's start value, so neither costs an instruction per weight.
//
// Bytes hold two fields a code, for they are six bits apart where bytes are eight:
//
//      Q<<1 & 0x3FFC = 4·field 3 | field 1 << 8      Q>>2 & 0x3FFC = 4·field 2 | field 0 << 8
#pragma once
#include "common.cuh"

// The constants of the two rows (g and g+8) of one lane in one 16-channel tile.
struct Channels {
    u32 a[2], b[2];
};

#ifdef WINT2_BFLOAT
constexpr float FACTOR_ODD = 0.5f, FACTOR_EVEN = 0.5f;             // of the activation that meets fields 3, 1 | 2, 0
constexpr float OFFSET_ODD = 128 + 64, OFFSET_EVEN = 128 + 64;     // what the field's register holds at weight zero
DEVICE u32 pack_activations(float low, float high) { return pack_bfloat2(low, high); }
DEVICE float unpack_activation(u32 half) { return low_bfloat(half); }
DEVICE float activation_scale(u32) { return 1.f; }
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) { mma_bfloat(d, a, b0, b1, c); }
DEVICE void fields(u32 q, u32& field3, u32& field2, u32& field1, u32& field0) {
    field3 = and_or(q, 0x007E007Eu, 0x43004300u);
    field2 = and_or(q >> 3, 0x007E007Eu, 0x43004300u);
    field1 = and_or(q >> 6, 0x007E007Eu, 0x43004300u);
    field0 = and_or(q >> 9, 0x007E007Eu, 0x43004300u);
}
#else
constexpr float FACTOR_ODD = 0.5f, FACTOR_EVEN = 0.0625f;
constexpr float OFFSET_ODD = 1024 + 64, OFFSET_EVEN = 1024 + 512;
DEVICE u32 pack_activations(float low, float high) { return pack_half2(low, high); }
DEVICE float unpack_activation(u32 half) { return half_float((u16)half); }
// The power of two that brings a row's largest magnitude into [2^14, 2^15): bfloat values down to 2^-28 of it stay
// exact in half precision, factors included.
DEVICE float activation_scale(u32 max_bits) {
    int exponent = (int)(max_bits >> 23);
    if (exponent == 0) return 1.f;
    int wanted = 127 + 14 + 127 - exponent;
    return bits_float((u32)(wanted < 1 ? 1 : wanted > 253 ? 253 : wanted) << 23);
}
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) { mma_half(d, a, b0, b1, c); }
DEVICE void fields(u32 q, u32& field3, u32& field2, u32& field1, u32& field0) {
    field3 = and_or(q, 0x007E007Eu, 0x64006400u);
    field2 = and_or(q, 0x03F003F0u, 0x64006400u);
    u32 shifted = q >> 6;
    field1 = and_or(shifted, 0x007E007Eu, 0x64006400u);
    field0 = and_or(shifted, 0x03F003F0u, 0x64006400u);
}
#endif

// How a pair's bytes become u; packing picks the cheapest that is exact for all of its channels.
enum Arithmetic {
    FLOATS = 0,       // a, b are the floats code_scale and code_zp + 1/2; before it wraps, u is below 2^22
    INTEGERS = 1,     // 17 fraction bits: u in bits 17..31
    SHORT = 2,        // 9 fraction bits, a of 16 bits: u in bits 9..23, byte selection and product in one instruction
    WIDE_FLOATS = 3,  // floats of any size
};

// How the upper or lower halves of two words become Q, and the bit of its halves at which u begins.
template <Arithmetic kArithmetic>
constexpr u32 BOTH_CODES = kArithmetic == FLOATS ? 0x5410 : kArithmetic == SHORT ? 0x6521 : 0x7632;
template <Arithmetic kArithmetic>
constexpr bool IS_FLOAT = kArithmetic == FLOATS || kArithmetic == WIDE_FLOATS;
template <Arithmetic kArithmetic>
constexpr int FIRST_BIT = kArithmetic == FLOATS ? 0 : 1;

// Byte `index` (0..3) of a word as a float, by the multiplier's pipe: it is added to the mantissa of 2^23.
DEVICE float byte_float(u32 word, int index) {
    return bits_float(dot_bytes(word, 1u << 8 * index, 0x4B000000u)) - 0x1p23f;
}

// A local scale as a float that sums are multiplied with, and what makes such sums their true size.
#ifdef WINT2_BFLOAT
DEVICE float scale_float(u32 word, int index) { return byte_float(word, index); }
DEVICE float true_size(float sum) { return sum; }
#else
// 2^-134 of it, in one instruction: shifted into a mantissa without an exponent, where it is a denormal. Sums of products
// as small keep a float's precision down to 2^-126 and are exact to 2^-149; a 64-group's is around 2^-115, for
// activations are scaled to 2^14.
DEVICE float scale_float(u32 word, int index) {
    u32 factor = index % 2 ? 0x80000000u : 0x8000u;
    return bits_float(index < 2 ? dot_low(factor, word, 0) : dot_high(factor, word, 0));
}
DEVICE float true_size(float sum) { return sum * 0x1p67f * 0x1p67f; }
#endif

template <Arithmetic kArithmetic>
DEVICE u32 expand(u32 word, int byte, u32 a, u32 b) {
    if (kArithmetic == SHORT) {
        u32 factor = byte % 2 ? a << 16 : a;
        return byte < 2 ? dot_low(factor, word, b) : dot_high(factor, word, b);
    }
    // Not by the logic pipe, which is the bottleneck.
    if (kArithmetic == INTEGERS) return dot_bytes(word, 1u << 8 * byte, 0) * a + b;
    float value = fused(byte_float(word, byte), bits_float(a), bits_float(b));
    if (kArithmetic == FLOATS) return float_bits(add_down(value, 0x1.8p23f));  // u in bits 0..14 of the mantissa
    float u = round_down(value), wrapped = fused(-round_down(u * 0x1p-15f), 0x1p15f, u);
    return (u32)to_int(wrapped) << 17;
}

// Q of codes 2·pair and 2·pair+1 of one row's word.
template <Arithmetic kArithmetic>
DEVICE u32 expand_both(u32 word, int pair, u32 a, u32 b) {
    u32 low = expand<kArithmetic>(word, 2 * pair, a, b), high = expand<kArithmetic>(word, 2 * pair + 1, a, b);
    return prmt(low, high, BOTH_CODES<kArithmetic>);
}

// Those codes' eight weights in four registers.
template <Arithmetic kArithmetic>
DEVICE void expand_pair(u32 word, int pair, u32 a, u32 b, u32& field3, u32& field2, u32& field1, u32& field0) {
    u32 q = expand_both<kArithmetic>(word, pair, a, b);
    fields(FIRST_BIT<kArithmetic> ? q : q << 1, field3, field2, field1, field0);
}

// The same in two, as bytes: fields 3 and 1, fields 2 and 0; fields 3 and 2 four times.
template <Arithmetic kArithmetic>
DEVICE void expand_bytes(u32 word, int pair, u32 a, u32 b, u32& odd, u32& even) {
    u32 q = expand_both<kArithmetic>(word, pair, a, b);
    odd = q << (2 - FIRST_BIT<kArithmetic>) & 0x3FFC3FFCu;
    even = q >> (1 + FIRST_BIT<kArithmetic>) & 0x3FFC3FFCu;
}

// A fragments of mma number 2·pair (fields 3 and 2) and 2·pair+1 (fields 1 and 0) of one 64-group.
template <Arithmetic kArithmetic>
DEVICE void decode(u32 row, u32 row8, int pair, const Channels& channels, u32 (&first)[4], u32 (&second)[4]) {
    expand_pair<kArithmetic>(row, pair, channels.a[0], channels.b[0], first[0], first[2], second[0], second[2]);
    expand_pair<kArithmetic>(row8, pair, channels.a[1], channels.b[1], first[1], first[3], second[1], second[3]);
}

// The A fragment of bytes, of both rows.
template <Arithmetic kArithmetic>
DEVICE void decode_bytes(u32 row, u32 row8, int pair, const Channels& channels, u32 (&a)[4]) {
    expand_bytes<kArithmetic>(row, pair, channels.a[0], channels.b[0], a[0], a[2]);
    expand_bytes<kArithmetic>(row8, pair, channels.a[1], channels.b[1], a[1], a[3]);
}
