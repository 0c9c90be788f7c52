// A token tile of few rows as exact integers: a step's values of a row are multiples of a power of two, sixteen bits in
// two pieces of eight, and products of bytes add them up without a rounding. One mma of eight columns serves four rows:
//
//      column   2r = upper piece of row r, 2r + 1 = lower piece: lane 4g+t finds both sums of its row t in its own C
//
//      sum of a 64-group     Σ (field - 32)·x = 256·upper + lower, the offset of 32 being C's start value
//      sum of a step         Σ local scale·sum, below 2^31 whatever the values are
//      sum of all of K       Σ unit·sum, in floats
//
// bfloat has eight significant bits, so a value is exact down to 2^-8 of its step's largest (2^-6 for fields that come
// four times), and all of a step's rounding is below 2^-10 of its norm. That is below what bfloat arithmetic does to any
// weights that do not shun the largest values of a step. So that ours is not the worse one even if they do, a row is kept
// in pieces only where its rounding is below 2^-10 of the norm without its outliers (a value whose square is more than an
// eighth of all its step's), over its K of one pass; else its tile is taken in half precision (expert_rows.cuh).
#pragma once
#include "expert_rows.cuh"

constexpr int PIECE_ROWS = PIECES < ROWS ? PIECES : ROWS;  // the fullest tile that is taken in pieces; 0: none is
static_assert(PIECE_ROWS <= 4, "two of an mma's eight columns a row");
constexpr int PIECE_GROUP_BYTES = PIECE_ROWS * 128;        // a 64-group's fragments
constexpr int PIECE_STARTS_BYTES = 2 * 64 + 16;            // a step's start values and units
constexpr float LOSS_ALLOWED = 0x1p-20f;                   // of the square of a norm

// Where one lane reads its next step, in shared memory:
//
//      fragments  Words4 [64-group, PIECE_ROWS, piece, 4]: lane t's operands of two mma's
//      starts     (Words4 [2, 4], float [4]) [step]: row t's start values of each 64-group, twice (channels g and g+8);
//                 and the rows' units
struct PieceOperands {
    u32 fragments, starts, unit;

    DEVICE void advance(int steps) {
        fragments += steps * 2 * PIECE_GROUP_BYTES;
        starts += steps * PIECE_STARTS_BYTES;
        unit += steps * PIECE_STARTS_BYTES;
    }
};

// acc += (both tiles' weights of one 128-step) · (the activations); of acc, a lane has elements 0 and 2: row t's.
template <Arithmetic kArithmetic, int kColumns>
DEVICE void multiply_step(Sums& acc, const Words4 (&codes)[2], u32 scales, const Channels (&channels)[2],
                          const PieceOperands& x) {
    u32 scales_g = scales & 0x0F0F0F0Fu, scales_g8 = scales >> 4 & 0x0F0F0F0Fu;  // byte 2·tile + h, of rows g and g+8
    u32 sums[2][2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Words4 b = *(const Words4*)(shared_bytes(x.fragments) + h * PIECE_GROUP_BYTES);
        Words4 start = *(const Words4*)(shared_bytes(x.starts) + h * 64);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 c[4] = {start.x, start.y, start.z, start.w}, a[4];
            u32 row = h ? codes[i].z : codes[i].x, row8 = h ? codes[i].w : codes[i].y;
            decode_bytes<kArithmetic>(row, row8, 0, channels[i], a);
            mma_bytes(c, a, b.x, b.y, c);
            decode_bytes<kArithmetic>(row, row8, 1, channels[i], a);
            mma_bytes(c, a, b.z, b.w, c);
            sums[i][0] += dot_bytes(scales_g, 1u << 8 * (2 * i + h), 0) * (256 * c[0] + c[1]);
            sums[i][1] += dot_bytes(scales_g8, 1u << 8 * (2 * i + h), 0) * (256 * c[2] + c[3]);
        }
    }
    float unit = *(const float*)shared_bytes(x.unit);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        acc[i][0][0] += unit * (float)(int)sums[i][0];
        acc[i][0][2] += unit * (float)(int)sums[i][1];
    }
}

// The squares of what rounding takes from a row's values, and of those that are no outliers.
struct Loss {
    float lost, of;

    DEVICE void add(float value, float kept, float outlier) {
        float error = value - kept, square = value * value;
        if (error != 0.f) lost += error * error + 0x1p-100f;  // more than nothing, even if too small for a float
        if (square <= outlier) of += square;
    }
    DEVICE void add(const Loss& other) {
        lost += other.lost;
        of += other.of;
    }
    DEVICE bool is_allowed() const { return lost <= LOSS_ALLOWED * of && lost < 0x1p126f; }  // infinite or NaN: no
};

// One lane's sixteen values of one row in one 64-group, as multiples of its step's unit.
struct Quantizer {
    static constexpr float WHOLE = 0x1.8p23f;  // what is added to it loses its fraction, and stands in its last bits
    float unit, inverse, outlier;  // `outlier`: a square above it is one's
    int sum, upper_sum;            // of the multiples as the weights meet them: fields 3 and 2 come four times

    // `size`: the bits of the step's largest magnitude, a bfloat. It becomes at most 2^15 units.
    DEVICE Quantizer(u32 size, float squares) : outlier(squares * 0.125f), sum(0), upper_sum(0) {
        u32 exponent = size >> 7 > 14 ? (size >> 7) - 14 : 1;
        unit = bits_float(exponent << 23);
        inverse = bits_float((254 - exponent) << 23);
    }

    DEVICE u32 round(float value, int times, Loss& loss) {
        float shifted = smaller(value * inverse / times, 127 * 256.f + 127.f) + WHOLE;
        int whole = (int)(float_bits(shifted) - float_bits(WHOLE));
        loss.add(value, (shifted - WHOLE) * times * unit, outlier);
        sum += whole * times;
        upper_sum += (whole + 128 >> 8) * times;
        return (u32)whole;
    }

    // The pieces of what two codes' fields meet, in the order of expand_bytes; `pairs`: two values each.
    DEVICE void cut(const u32* pairs, u32& upper_odd, u32& upper_even, u32& lower_odd, u32& lower_even, Loss& loss) {
        u32 whole[8];  // of fields 3, 1, 2, 0 of each code
#pragma unroll
        for (int code = 0; code < 2; ++code) {
            whole[2 * code] = round(high_bfloat(pairs[2 * code + 1]), 4, loss);
            whole[2 * code + 1] = round(high_bfloat(pairs[2 * code]), 1, loss);
            whole[4 + 2 * code] = round(low_bfloat(pairs[2 * code + 1]), 4, loss);
            whole[4 + 2 * code + 1] = round(low_bfloat(pairs[2 * code]), 1, loss);
        }
        lower_odd = bytes<0>(whole), lower_even = bytes<0>(whole + 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) whole[i] += 128;  // the lower piece is signed
        upper_odd = bytes<1>(whole), upper_even = bytes<1>(whole + 4);
    }

    template <int kByte>
    DEVICE u32 bytes(const u32* words) const {
        constexpr u32 kSelector = kByte + (kByte + 4) * 16;
        return prmt(prmt(words[0], words[1], kSelector), prmt(words[2], words[3], kSelector), 0x5410);
    }
};

// A token tile's activations in pieces, in the shared memory where `Activations` has them as halves.
struct Pieces {
    u8* starts;     // [steps, PIECE_STARTS_BYTES]
    u8* fragments;  // [steps, 2, PIECE_GROUP_BYTES]
    Loss* losses;   // [WARPS]

    DEVICE PieceOperands operands(int step, int rows) const {
        int column = smaller(my_lane() / 4, 2 * rows - 1), row = smaller(my_lane() % 4, rows - 1);
        u32 start = shared_address(starts) + step * PIECE_STARTS_BYTES;
        u32 fragment = shared_address(fragments) + step * 2 * PIECE_GROUP_BYTES;
        return {fragment + column * 64 + my_lane() % 4 * 16, start + row * 16, start + 128 + row * 4};
    }

    // Equally many warps take each row, 4 steps at once; false, for all threads, if a row loses too much.
    DEVICE bool stage(const Rows& rows, const Tile& tile, Span span) const {
        int count = ROWS == 1 ? 1 : tile.rows, warps = WARPS / count, row = my_warp() / warps;
        Loss loss = {};
        for (int base = my_warp() % warps * 4; base < span.end - span.begin && row < count; base += warps * 4) {
            stage_lane(rows, rows.source(tile.first + row), span, base + my_lane() / 8, row, loss);
        }
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) loss.add({shuffle_xor(loss.lost, lanes), shuffle_xor(loss.of, lanes)});
        if (my_lane() == 0) losses[my_warp()] = loss;
        sync_block();
        return are_allowed(count, warps);
    }

    DEVICE bool are_allowed(int rows, int warps) const {
        bool allowed = true;
        for (int row = 0; row < rows; ++row) {
            Loss all = {};
            for (int i = 0; i < warps; ++i) all.add(losses[row * warps + i]);
            allowed &= all.is_allowed();
        }
        return allowed;
    }

    // Eight lanes take a step, four a 64-group, each its own sixteen values of the row.
    DEVICE void stage_lane(const Rows& rows, int source, Span span, int step, int row, Loss& loss) const {
        int h = my_lane() / 4 % 2, t = my_lane() % 4;
        bool is_live = span.begin + step < span.end;
        LaneRow lane = {rows.values + (long)source * rows.stride, is_live ? rows.length : 0,
                        ((span.begin + step) * 2 + h) * 64 + t * rows.lane_stride, rows.pair_stride, 1.f};
        u32 pairs[8], both = 0;
        float squares = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            pairs[i] = lane.pair(i);
            both = larger_halves(both, pairs[i] & 0x7FFF7FFFu);
            squares += low_bfloat(pairs[i]) * low_bfloat(pairs[i]) + high_bfloat(pairs[i]) * high_bfloat(pairs[i]);
        }
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) {
            both = larger_halves(both, shuffle_xor(both, lanes));
            squares += shuffle_xor(squares, lanes);
        }
        Quantizer quantizer(both >> 16 > (both & 0xFFFF) ? both >> 16 : both & 0xFFFF, squares);
        Words4 upper, lower;
        quantizer.cut(pairs, upper.x, upper.y, lower.x, lower.y, loss);
        quantizer.cut(pairs + 4, upper.z, upper.w, lower.z, lower.w, loss);
        u32 sum = quantizer.sum, upper_sum = quantizer.upper_sum;
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            sum += shuffle_xor(sum, lanes);
            upper_sum += shuffle_xor(upper_sum, lanes);
        }
        if (!is_live) return;
        Words4* fragment = (Words4*)(fragments + (step * 2 + h) * PIECE_GROUP_BYTES + row * 128 + t * 16);
        fragment[0] = upper;
        fragment[4] = lower;
        u8* start = starts + step * PIECE_STARTS_BYTES;
        u32 upper_start = 0 - 32 * upper_sum, lower_start = 0 - 32 * (sum - 256 * upper_sum);
        if (t == 0) *(Words4*)(start + h * 64 + row * 16) = {upper_start, lower_start, upper_start, lower_start};
        if (h == 0 && t == 0) *(float*)(start + 128 + row * 4) = quantizer.unit;
    }
};
