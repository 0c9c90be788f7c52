// One projection of WINT2 experts over many routed rows (prefill): Y^T = W^T·X^T, the weights decoded in registers and
// multiplied with up to TOKENS rows of one expert at a time.
//
//      unit      one token tile (at most TOKENS routed rows of an expert) × one panel (8 pairs of 16-channel tiles)
//      warp      one pair: gate and up of 16 features, or 32 outputs of the down projection, for all the tokens
//      tokens    half precision, gathered row by row into a ring of STAGES steps (128 of K) of shared memory
//      weights   straight from memory to registers, one step ahead
//
// Here the local scale goes into the weight: (level - 32)·scale is an integer of at most nine bits, exact in half
// precision, so that one accumulator runs over all of K. The products run on while the warp decodes the next weights.
//
// Compile-time parameters: GATED, TOKENS (16, 32, 64, 128), STAGES.
#include "activations.cuh"
#include "token_mma.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int AHEAD = STAGES - 2;           // steps of tokens on their way; two slots are being read
constexpr int BLOCK = TOKENS * 128;         // bytes of one 64-group of the token tile
constexpr int CHUNKS = 2 * TOKENS * 8;      // of 16 bytes in one step
static_assert(STAGES >= 3 && CHUNKS % THREADS == 0, "a thread copies whole chunks");

struct Tile {
    int expert, first, rows, unused;
};

struct Weights {
    const u8* records;          // as in expert_stream.cuh
    const Words4* channels;
    const u32* arithmetic;
    const float* super_scales;
    int pairs, steps;
};

// One pair's codes and local scales of one step, for one lane.
struct Step {
    Words4 codes[2];
    u32 scales;
};

struct PairReader {
    const u8* record;
    int code_offset;

    DEVICE void point(const Weights& weights, long index) {
        code_offset = (weights.steps * 32 + 127) & ~127;
        record = weights.records + index * (code_offset + weights.steps * 1024L);
    }
    DEVICE Step read(int step) const {
        int lane = thread_index() % 32;
        const u8* codes = record + code_offset + step * 1024 + lane * 16;
        return {{load_once16(codes), load_once16(codes + 512)}, *(const u32*)(record + step * 32 + lane / 4 * 4)};
    }
};

// A row's local scale s of one group, as what turns fields into weights: (1024 + 2f)·(s/2) - 544·s = (f - 32)·s, and
// (1024 + 16f)·(s/16) - 96·s likewise.
struct HalfScale {
    u32 odd, odd_offset, even, even_offset;

    // `biased` holds 1024 + s·unit in both halves.
    DEVICE void make(u32 biased, bool is_sixteenfold) {
        odd = is_sixteenfold ? fused_half2(biased, 0x28002800, 0xD000D000)   // /32 - 32
                             : fused_half2(biased, 0x38003800, 0xE000E000);  // /2 - 512
        odd_offset = fused_half2(odd, 0xE440E440, 0);                        // -1088
        even = fused_half2(odd, 0x30003000, 0);                              // /8
        even_offset = fused_half2(even, 0xE600E600, 0);                      // -1536
    }
};

// The scales of rows g and g+8 of one tile and group.
DEVICE void expand_scales(u32 word, int tile, int group, HalfScale (&scales)[2]) {
    u32 both = prmt(word, 0, tile ? 0x3232 : 0x1010);
    if (group) both >>= 8;
    scales[0].make(and_or(both, 0x000F000Fu, 0x64006400u), false);
    scales[1].make(and_or(both, 0x00F000F0u, 0x64006400u), true);
}

// Registers 0 and 2 belong to row g, 1 and 3 to row g+8; 0 and 1 hold fields 3 or 1, 2 and 3 hold fields 2 or 0.
DEVICE void scale_fragment(u32 (&a)[4], const HalfScale (&scales)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        a[r] = fused_half2(a[r], scales[r].odd, scales[r].odd_offset);
        a[2 + r] = fused_half2(a[2 + r], scales[r].even, scales[r].even_offset);
    }
}

// The token tile's rows on their way through shared memory.
struct Tokens {
    const u8* values;  // halves [*, row_bytes/2], in the order of the weights' fragments
    long row_bytes;
    int steps;
    const int* sources;  // shared, [TOKENS]
    u32 ring;

    DEVICE u32 slot(int step) const { return ring + step % STAGES * 2 * BLOCK; }

    DEVICE void copy(int step) const {
        if (step < steps) {
#pragma unroll 4
            for (int i = 0; i < CHUNKS / THREADS; ++i) {
                int index = i * THREADS + thread_index(), chunk = index % 8, row = index / 8 % TOKENS, h = index / 8 / TOKENS;
                copy16(slot(step) + h * BLOCK + swizzled(row, chunk),
                       values + sources[row] * row_bytes + (step * 2 + h) * 128L + chunk * 16);
            }
        }
        commit_copies();
    }
};

// The four warps of a product must issue it together: where the pairs of a panel differ in their arithmetic, only the
// decoding branches.
constexpr Arithmetic MIXED = (Arithmetic)4;

template <Arithmetic kArithmetic>
DEVICE void decode_as(u32 kind, u32 row, u32 row8, int pair, const Channels& channels, u32 (&first)[4],
                      u32 (&second)[4]) {
    if (kArithmetic == SHORT || (kArithmetic == MIXED && kind == SHORT)) {
        decode<SHORT>(row, row8, pair, channels, first, second);
    } else if (kArithmetic == INTEGERS || kind == INTEGERS) {
        decode<INTEGERS>(row, row8, pair, channels, first, second);
    } else if (kind == FLOATS) {
        decode<FLOATS>(row, row8, pair, channels, first, second);
    } else {
        decode<WIDE_FLOATS>(row, row8, pair, channels, first, second);
    }
}

// sums[i] += (weights of the pair's tile i in one step) · tokens.
template <Arithmetic kArithmetic>
DEVICE void multiply_step(TokenSums (&sums)[2], const Step& step, u32 kind, const Channels (&channels)[2], u32 slot) {
    u32 a[2][2][4];  // two sets in turn: one is read by products under way
#pragma unroll
    for (int tile_of_group = 0; tile_of_group < 4; ++tile_of_group) {
        int h = tile_of_group / 2, i = tile_of_group % 2;
        u32 row = h ? step.codes[i].z : step.codes[i].x, row8 = h ? step.codes[i].w : step.codes[i].y;
        HalfScale scales[2];
        expand_scales(step.scales, i, h, scales);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            wait_multiplied<1>();
            decode_as<kArithmetic>(kind, row, row8, pair, channels[i], a[pair][0], a[pair][1]);
            scale_fragment(a[pair][0], scales);
            scale_fragment(a[pair][1], scales);
            begin_multiplying();
            multiply_tokens(sums[i], a[pair][0], slot + h * BLOCK, 2 * pair);
            multiply_tokens(sums[i], a[pair][1], slot + h * BLOCK, 2 * pair + 1);
            commit_multiplying();
        }
    }
}

template <Arithmetic kArithmetic>
DEVICE void multiply_all(TokenSums (&sums)[2], const PairReader& reader, u32 kind, const Channels (&channels)[2],
                         const Tokens& tokens) {
    for (int step = 0; step < AHEAD; ++step) tokens.copy(step);
    Step next = reader.read(0);
    for (int step = 0; step < tokens.steps; ++step) {
        wait_copies<AHEAD - 1>();
        show_shared();
        sync_block();
        tokens.copy(step + AHEAD);
        Step now = next;
        next = reader.read(smaller(step + 1, tokens.steps - 1));
        multiply_step<kArithmetic>(sums, now, kind, channels, tokens.slot(step));
    }
    wait_multiplied<0>();
    take_sums(sums[0]);
    take_sums(sums[1]);
}

// What the CTA shares about the unit at hand.
struct Unit {
    int sources[TOKENS];   // rows of the tokens,
    int targets[TOKENS];   // rows of the result: routed positions of h, or (token, slot) of y
    float factors[TOKENS]; // undo the rows' powers of two; y's carry the routing weight
    u32 kinds[WARPS];      // the pairs' arithmetic

    DEVICE bool is_uniform() const {
        bool same = true;
        for (int i = 1; i < WARPS; ++i) same &= kinds[i] == kinds[0];
        return same && (kinds[0] == SHORT || kinds[0] == INTEGERS);
    }
};

DEVICE float silu(float x) { return fast_divide(x, 1.f + fast_exp(-x)); }

// Two outputs of a token: h of one gate and up, or two of y's, 16 channels apart.
DEVICE void write(void* values, int target, int channels, int pair, int row, float first, float second) {
    if (GATED) {
        int channel = pair * 16 + row;
        if (channel < channels) ((u16*)values)[(long)target * channels + channel] = float_bfloat(silu(first) * second);
        return;
    }
    int channel = pair * 32 + row;
    float* y = (float*)values + (long)target * channels;
    if (channel < channels) y[channel] = first;
    if (channel + 16 < channels) y[channel + 16] = second;
}

DEVICE void write_all(void* values, int channels, const TokenSums (&sums)[2], const Unit& unit, int rows, int pair,
                      const float* super_scales) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float scales[2][2] = {{super_scales[g], super_scales[16 + g]}, {super_scales[8 + g], super_scales[24 + g]}};
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int r = i / 2, token = 8 * n + 2 * t + i % 2;
            if (token >= rows) continue;
            float factor = unit.factors[token];
            write(values, unit.targets[token], channels, pair, g + 8 * r, sums[0][n][i] * factor * scales[r][0],
                  sums[1][n][i] * factor * scales[r][1]);
        }
    }
}

struct Rows {
    const float* inverse;         // of each row of x
    const int* sorted;            // position -> token·num_experts_per_token + slot
    const float* expert_weights;  // of each (token, slot); for y
    int experts_per_token;

    DEVICE void describe(Unit& unit, const Tile& tile, int token) const {
        int position = tile.first + smaller(token, tile.rows - 1), slot = sorted[position];
        int source = GATED ? slot / experts_per_token : position;
        unit.sources[token] = source;
        unit.targets[token] = GATED ? position : slot;
        unit.factors[token] = GATED ? inverse[source] : inverse[source] * expert_weights[slot];
    }
};

KERNEL(THREADS, TOKENS <= 16 ? 2 : 1)
expert_gemm(const u8* records, const Words4* channel_constants, const u32* arithmetic, const float* super_scales,
            int pairs, int steps, const u8* x, const float* x_inverse, const int* sorted, int experts_per_token,
            const Tile* tiles, const int* num_tiles, void* values, const float* expert_weights, int out_channels) {
    DYNAMIC_SHARED(shared);
    u8* ring = shared + (1024 - shared_address(shared) % 1024) % 1024;
    Unit& unit = *(Unit*)(ring + STAGES * 2 * BLOCK);
    Weights weights = {records, channel_constants, arithmetic, super_scales, pairs, steps};
    Rows rows = {x_inverse, sorted, expert_weights, experts_per_token};
    Tokens tokens = {x, steps * 256L, steps, unit.sources, shared_address(ring)};
    wait_for_earlier_kernels();
    let_next_kernel_start();
    int panels = (pairs + WARPS - 1) / WARPS, units = *num_tiles * panels;
    for (int index = blockIdx.x; index < units; index += gridDim.x) {
        const Tile& tile = tiles[index / panels];
        int warp = threadIdx.x / 32, pair = index % panels * WARPS + warp;
        bool is_live = pair < pairs;
        if (!is_live) pair = pairs - 1;  // takes part in the products and barriers
        long record = (long)tile.expert * pairs + pair;
        u32 kind = arithmetic[record];
        sync_block();
        if (threadIdx.x < TOKENS) rows.describe(unit, tile, threadIdx.x);
        unit.kinds[warp] = kind;
        sync_block();
        Words4 a = weights.channels[(record * 8 + threadIdx.x % 32 / 4) * 2];
        Words4 b = weights.channels[(record * 8 + threadIdx.x % 32 / 4) * 2 + 1];
        Channels channels[2] = {{{a.x, a.y}, {b.x, b.y}}, {{a.z, a.w}, {b.z, b.w}}};
        PairReader reader;
        reader.point(weights, record);
        TokenSums sums[2] = {};
        switch (unit.is_uniform() ? kind : MIXED) {
            case SHORT: multiply_all<SHORT>(sums, reader, kind, channels, tokens); break;
            case INTEGERS: multiply_all<INTEGERS>(sums, reader, kind, channels, tokens); break;
            default: multiply_all<MIXED>(sums, reader, kind, channels, tokens);
        }
        if (is_live) write_all(values, out_channels, sums, unit, tile.rows, pair, super_scales + record * 32);
    }
}

// Rows of bfloat as halves in the order of the weights' fragments, a power of two away from their values: one CTA a row.
//
//      16-byte chunk 2s+e of a 64-group: field 3, 2, 1 or 0 (s even: 3 - e; s odd: 1 - e) of codes 2·(s/2) and
//      2·(s/2) + 1 of each of the four lanes t
KERNEL(256, 4) halve_rows(const u16* x, int length, int padded_length, int lane_stride, int pair_stride, Words4* halves,
                          float* inverse) {
    DYNAMIC_SHARED(shared);
    wait_for_earlier_kernels();
    let_next_kernel_start();
    const u16* row = x + (long)blockIdx.x * length;
    float scale = find_scale(row, length, (u32*)shared);
    if (threadIdx.x == 0) inverse[blockIdx.x] = 1.f / scale;
    for (int chunk = threadIdx.x; chunk < padded_length / 8; chunk += 256) {
        int s = chunk % 8 / 2, field = (s % 2 ? 1 : 3) - chunk % 2;
        u32 words[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            float value[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int j = (s / 2 * 2 + i) * 4 + field;
                int k = chunk / 8 * 64 + t * lane_stride + j / 2 * pair_stride + j % 2;
                value[i] = k < length ? bfloat_float(row[k]) * scale : 0.f;
            }
            words[t] = pack_half2(value[0], value[1]);
        }
        halves[(long)blockIdx.x * (padded_length / 8) + chunk] = {words[0], words[1], words[2], words[3]};
    }
}
