// One projection of WINT2 experts over routed rows: Y^T = W^T·X^T, the weights as the tensor core's 16-row operand and
// up to 8 token rows as its columns, so that a weight is read and decoded once for all the tokens of its expert.
//
// One persistent CTA an SM. Its work is a run of the flat list (token tile, panel); a token tile is at most ROWS routed
// rows of one expert, a panel is WARPS_N pairs of 16-channel tiles. The token tile's activations stay in shared memory
// while the weights of its panels stream past:
//
//      panel   16·2·WARPS_N channels          the WARPS_K warps of a pair take turns along K, one 128-step each;
//              ┌──┬──┬──┬──┬──┬──┬──┬──┐      their sums meet in shared memory once a panel
//      pair 0  │0 │1 │2 │3 │0 │1 │2 │..│ K
//      pair 1  │4 │5 │6 │7 │4 │5 │6 │..│
//              └──┴──┴──┴──┴──┴──┴──┴──┘
//
// A lane copies its own weights to its own slots of shared memory and reads back only those: the pipeline needs no
// barrier, and runs on across panels, tiles and experts. When the activations of a token tile do not fit, K is cut in
// passes, each over all the CTA's panels of that tile, and the sums rest in `scratch` between them.
//
// Compile-time parameters: GATED (a pair is gate and up: SwiGLU in registers; else two tiles of the down projection),
// WARPS_K, ROWS, STAGES, WINT2_BFLOAT (wint2.cuh).
#include "wint2.cuh"

constexpr int WARPS = 16, THREADS = 32 * WARPS, WARPS_N = WARPS / WARPS_K;
constexpr int TOKEN_TILES = (ROWS + 7) / 8;
constexpr int SPLITS = 4 / WARPS_N;  // threads that share one output's sum over warps
constexpr int ADDENDS = WARPS_K / SPLITS;
constexpr int FRAGMENT_BYTES = ROWS * 64;  // of half a 64-group of the token tile
constexpr int START_BYTES = TOKEN_TILES * 64;
constexpr int SLOT = 1152;  // bytes of one step: two tiles' codes and their scales
constexpr int PARTIAL = 256 + 32 / SPLITS;  // floats of one warp's sums, padded so that a sum's readers differ in bank
static_assert(WARPS_N * WARPS_K == WARPS && SPLITS * WARPS_N == 4, "WARPS_K must be 4, 8 or 16");

struct Weights {
    const u8* records;          // [E, pairs] of (scales u32 [steps, 8], codes Words4 [steps, 2, 32])
    const Words4* channels;     // [E, pairs, 8, 2]: A of rows g, g+8 of both tiles, then B
    const u32* arithmetic;      // [E, pairs]: which Arithmetic A and B are for
    const float* super_scales;  // [E, pairs, 2, 16]
    int pairs, steps, panels;
    DEVICE int code_offset() const { return (steps * 32 + 127) & ~127; }
    DEVICE long record_bytes() const { return code_offset() + steps * 1024L; }
};

struct Rows {
    const u16* values;     // bfloat [*, stride]
    const u32* max_bits;   // largest magnitude of each row
    const int* sorted;     // routed row -> token·num_experts_per_token + slot
    int stride, length;    // elements; beyond `length` a row reads as zero
    int experts_per_token;
    int lane_stride, pair_stride;  // of a lane's row index inside a 64-group: the K order of the file
    DEVICE int source(int routed) const { return GATED ? sorted[routed] / experts_per_token : routed; }
};

struct Tile {
    int expert, first, rows, unused;
};

// This thread's lane, and its warp's place in a panel.
DEVICE int my_lane() { return thread_index() % 32; }
DEVICE int my_warp() { return thread_index() / 32; }
DEVICE int my_warp_n() { return thread_index() / 32 / WARPS_K; }
DEVICE int my_warp_k() { return thread_index() / 32 % WARPS_K; }

// Where a pass begins and ends along K, in steps.
struct Span {
    int begin, end;
};
DEVICE Span pass_span(int pass, int pass_steps, int steps) {
    return {pass * pass_steps, smaller((pass + 1) * pass_steps, steps)};
}
// One warp's part of it.
DEVICE int own_steps(Span span) { return (span.end - span.begin - my_warp_k() + WARPS_K - 1) / WARPS_K; }

// The CTA's run of units (tile, panel), and its panels in a tile.
struct Share {
    int begin, end, panels;
    DEVICE int first_tile() const { return begin / panels; }
    DEVICE bool has_tile(int tile) const { return tile * panels < end; }
    DEVICE int first_panel(int tile) const { return tile * panels < begin ? begin - tile * panels : 0; }
    DEVICE int last_panel(int tile) const { return smaller(end - tile * panels, panels); }
};
DEVICE Share my_share(int units, int panels) {
    return {(int)((long)units * blockIdx.x / gridDim.x), (int)((long)units * (blockIdx.x + 1) / gridDim.x), panels};
}

// One warp's ring of weights on their way. The copies run STAGES - 1 steps ahead of the arithmetic, over panels, tiles
// and experts alike.
struct Stream {
    Weights weights;
    const Share& share;
    const Tile* tiles;
    int passes, pass_steps;
    u32 ring_codes, ring_scales;  // this lane's, in the first of STAGES slots (codes Words4 [2, 32], scales u32 [32])
    int tile, pass, panel;    // what the next copy belongs to,
    int left;                 // how many steps of it remain to be copied by this warp,
    const u8 *codes, *scales;  // and this lane's share of the next
    int slot, free;           // bytes into the ring: the oldest step, and the one used last

    DEVICE void start() {
        tile = share.first_tile();
        pass = 0;
        panel = share.first_panel(tile);
        seek();
        slot = 0;
        free = (STAGES - 1) * SLOT;
        for (int i = 0; i < STAGES - 1; ++i) {
            copy(i * SLOT);
            if (--left == 0) advance();
        }
    }

    DEVICE void advance() {
        next_panel();
        seek();
    }

    // Finds the first panel from here on of which this warp has a step. At the end of the work one block is copied
    // again and again, so that the loop over steps need not know.
    DEVICE void seek() {
        for (; share.has_tile(tile); next_panel()) {
            Span span = pass_span(pass, pass_steps, weights.steps);
            int pair = panel * WARPS_N + my_warp_n();
            left = own_steps(span);
            if (left > 0 && pair < weights.pairs) {
                point(((long)tiles[tile].expert * weights.pairs + pair) * weights.record_bytes(), span.begin + my_warp_k());
                return;
            }
        }
        left = 1;
        point(0, 0);
    }

    DEVICE void point(long record, int step) {
        scales = weights.records + record + step * 32 + my_lane() / 4 * 4;
        codes = weights.records + record + weights.code_offset() + step * 1024L + my_lane() * 16;
    }

    DEVICE void next_panel() {
        if (++panel < share.last_panel(tile)) return;
        if (++pass == passes) {
            pass = 0;
            ++tile;
        }
        panel = share.first_panel(tile);
    }

    DEVICE void copy(int into) {
        copy16(ring_codes + into, codes);
        copy16<512>(ring_codes + into, codes);
        copy4(ring_scales + into, scales);
        commit_copies();
        codes += WARPS_K * 1024;
        scales += WARPS_K * 32;
    }

    // The oldest step's weights. The slot that was used last is filled again.
    DEVICE void take(Words4 (&words)[2], u32& scale_word) {
        wait_copies<STAGES - 2>();
        copy(free);
        words[0] = load_shared16(ring_codes + slot);
        words[1] = load_shared16(ring_codes + slot + 512);
        scale_word = load_shared4(ring_scales + slot);
        free = slot;
        slot = slot == (STAGES - 1) * SLOT ? 0 : slot + SLOT;
    }
};

// A token tile's activations as B fragments, and what the accumulators start from.
struct Activations {
    Words4* fragments;  // [groups, 2, ROWS, 4]: the lane's values for two mma's
    Floats4* starts;    // [groups, TOKEN_TILES, 4]: minus the offsets' share, twice (rows g and g+8)
    float* inverse;     // [ROWS]: undoes the row's scale

    // One thread takes a lane's sixteen values of one 64-group of one row.
    DEVICE void stage(const Rows& rows, const Tile& tile, Span span) {
        int count = (span.end - span.begin) * 2 * ROWS * 4;
        for (int base = 0; base < count; base += THREADS) {
            int index = base + threadIdx.x, t = index & 3, row = (index >> 2) % ROWS, group = index / (4 * ROWS);
            bool live = index < count && row < tile.rows;
            float offset = live ? stage_lane(rows, rows.source(tile.first + row), span, group, row, t) : 0.f;
            offset += shuffle_xor(offset, 1);
            offset += shuffle_xor(offset, 2);
            if (live && t == 0) {
                float* start = starts[(group * TOKEN_TILES + row / 8) * 4 + row % 8 / 2].v;
                start[row & 1] = start[2 + (row & 1)] = -offset;
            }
        }
        for (int row = threadIdx.x; row < tile.rows; row += THREADS) {
            inverse[row] = 1.f / activation_scale(rows.max_bits[rows.source(tile.first + row)]);
        }
    }

    DEVICE float stage_lane(const Rows& rows, int source, Span span, int group, int row, int t) {
        float scale = activation_scale(rows.max_bits[source]);
        const u16* values = rows.values + (long)source * rows.stride;
        int first = (span.begin * 2 + group) * 64 + t * rows.lane_stride;
        float x[16];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int k = first + i * rows.pair_stride;
            u32 pair = k < rows.length ? *(const u32*)(values + k) : 0;
            x[2 * i] = low_bfloat(pair) * scale;
            x[2 * i + 1] = high_bfloat(pair) * scale;
        }
        float offset = 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* a = x + 8 * half;  // the fields of codes 2·half and 2·half+1
            Words4 words = {pack_activations(a[3] * FACTOR_ODD, a[7] * FACTOR_ODD),
                            pack_activations(a[2] * FACTOR_EVEN, a[6] * FACTOR_EVEN),
                            pack_activations(a[1] * FACTOR_ODD, a[5] * FACTOR_ODD),
                            pack_activations(a[0] * FACTOR_EVEN, a[4] * FACTOR_EVEN)};
            fragments[((group * 2 + half) * ROWS + row) * 4 + t] = words;
            offset += OFFSET_ODD * (rounded_sum(words.x) + rounded_sum(words.z));
            offset += OFFSET_EVEN * (rounded_sum(words.y) + rounded_sum(words.w));
        }
        return offset;
    }

    DEVICE float rounded_sum(u32 pair) { return unpack_activation(pair & 0xFFFFu) + unpack_activation(pair >> 16); }
};

using Sums = float[2][TOKEN_TILES][4];

// Where one lane reads the activations of its next step.
struct Operands {
    const u8* fragments[TOKEN_TILES];
    const u8* starts;

    // Columns without a row repeat the last one: what they sum up to is dropped.
    DEVICE void point(const Activations& x, int step, int rows) {
        int g = my_lane() / 4, t = my_lane() % 4;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
            fragments[n] = (const u8*)(x.fragments + smaller(8 * n + g, rows - 1) * 4 + t) + step * 4 * FRAGMENT_BYTES;
        }
        starts = (const u8*)(x.starts + t) + step * 2 * START_BYTES;
    }

    DEVICE void advance(int steps) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) fragments[n] += steps * 4 * FRAGMENT_BYTES;
        starts += steps * 2 * START_BYTES;
    }
};

// acc += (both tiles' weights of one 128-step) · (activations of kTiles token tiles).
template <Arithmetic kArithmetic, int kTiles>
DEVICE void multiply(Sums& acc, const Words4 (&codes)[2], u32 scales, const Channels (&channels)[2],
                     const Operands& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        Words4 b[kTiles][2];
        Floats4 start[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            b[n][0] = *(const Words4*)(x.fragments[n] + 2 * h * FRAGMENT_BYTES);
            b[n][1] = *(const Words4*)(x.fragments[n] + (2 * h + 1) * FRAGMENT_BYTES);
            start[n] = *(const Floats4*)(x.starts + h * START_BYTES + n * 64);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float c[kTiles][4];
            u32 row = h ? codes[i].z : codes[i].x, row8 = h ? codes[i].w : codes[i].y;
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                u32 first[4], second[4];
                decode<kArithmetic>(row, row8, pair, channels[i], first, second);
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    mma(c[n], first, b[n][pair].x, b[n][pair].y, pair ? c[n] : start[n].v);
                    mma(c[n], second, b[n][pair].z, b[n][pair].w, c[n]);
                }
            }
            u32 word = i ? scales >> 16 : scales;
            float scale = h ? local_scale<2>(word) : local_scale<0>(word);
            float scale8 = h ? local_scale<3>(word) : local_scale<1>(word);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                acc[i][n][0] += scale * c[n][0];
                acc[i][n][1] += scale * c[n][1];
                acc[i][n][2] += scale8 * c[n][2];
                acc[i][n][3] += scale8 * c[n][3];
            }
        }
    }
}

// `count` of this warp's steps: the loop that the kernel's time goes to.
template <Arithmetic kArithmetic, int kTiles>
DEVICE void multiply_steps(Sums& acc, Stream& stream, const Channels (&channels)[2], Operands& x, int count) {
#pragma unroll(kArithmetic == FLOATS || TOKEN_TILES > 1 ? 1 : 2)
    for (; count > 0; --count) {
        Words4 codes[2];
        u32 scales;
        stream.take(codes, scales);
        multiply<kArithmetic, kTiles>(acc, codes, scales, channels, x);
        x.advance(WARPS_K);
    }
}

template <Arithmetic kArithmetic>
DEVICE void multiply_live(Sums& acc, Stream& stream, const Channels (&channels)[2], Operands& x, int count, int rows) {
    if (TOKEN_TILES > 1 && rows > 8) {
        multiply_steps<kArithmetic, TOKEN_TILES>(acc, stream, channels, x, count);
    } else {
        multiply_steps<kArithmetic, 1>(acc, stream, channels, x, count);
    }
}

// The constants of one pair; loaded before the sums of the pair before are reduced, which hides the wait.
struct PairConstants {
    Words4 a, b;
    u32 arithmetic;
    DEVICE void load(const Weights& weights, int expert, int panel) {
        int pair = panel * WARPS_N + my_warp_n();
        if (pair >= weights.pairs) return;
        long index = (long)expert * weights.pairs + pair;
        const Words4* mine = weights.channels + (index * 8 + my_lane() / 4) * 2;
        a = mine[0];
        b = mine[1];
        arithmetic = weights.arithmetic[index];
    }
};

// All of this warp's steps of one panel, in runs that end where the copies, which are ahead, come to another panel.
DEVICE void sweep(Sums& acc, Stream& stream, const PairConstants& constants, const Activations& activations, Span span,
                  int rows) {
    Channels channels[2] = {{{constants.a.x, constants.a.y}, {constants.b.x, constants.b.y}},
                            {{constants.a.z, constants.a.w}, {constants.b.z, constants.b.w}}};
    Operands x;
    x.point(activations, my_warp_k(), rows);
    for (int count = own_steps(span); count > 0;) {
        int run = smaller(count, stream.left);
        count -= run;
        stream.left -= run;
        switch (constants.arithmetic) {
            case SHORT: multiply_live<SHORT>(acc, stream, channels, x, run, rows); break;
            case INTEGERS: multiply_live<INTEGERS>(acc, stream, channels, x, run, rows); break;
            default: multiply_live<FLOATS>(acc, stream, channels, x, run, rows);
        }
        if (stream.left == 0) stream.advance();
    }
}

struct Output {
    void* values;              // GATED: bfloat h [R, channels]; else float [R, channels], by token and slot
    u32* max_bits;             // GATED: largest |h| of each routed row, to be raised
    const float* expert_weights;  // else: the routing weight of each (token, slot)
    float* scratch;            // sums between passes, [CTAs, panels_kept, TOKEN_TILES, 2, 4·128]
    int channels, panels_kept;
};

DEVICE float silu(float x) { return fast_divide(x, 1.f + fast_exp(-x)); }

// Writes one pair of outputs, or the h of one gate and up.
DEVICE void write(const Output& out, const Rows& rows, int routed, int pair, int row, float first, float second) {
    if (GATED) {
        int channel = pair * 16 + row;
        if (channel >= out.channels) return;
        u16 h = float_bfloat(silu(first) * second);
        ((u16*)out.values)[(long)routed * out.channels + channel] = h;
        u32 size = (u32)(h & 0x7FFF) << 16;
        if (size > out.max_bits[routed]) atomic_max(&out.max_bits[routed], size);
        return;
    }
    int slot = rows.sorted[routed], channel = pair * 32 + row;
    float weight = out.expert_weights[slot];
    float* y = (float*)out.values + (long)slot * out.channels;
    if (channel < out.channels) y[channel] = first * weight;
    if (channel + 16 < out.channels) y[channel + 16] = second * weight;
}

// The warps' sums of one panel, added and written. A thread owns element (g, t, c) of one pair's accumulator fragments,
// and shares it with SPLITS - 1 others.
struct Reduction {
    float* partial;  // [TOKEN_TILES, WARPS, PARTIAL]

    DEVICE void put(const Sums& acc) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Floats4 value = {acc[i][n][0], acc[i][n][1], acc[i][n][2], acc[i][n][3]};
                *(Floats4*)(partial + (n * WARPS + my_warp()) * PARTIAL + i * 128 + my_lane() * 4) = value;
            }
        }
    }

    DEVICE void sum(int n, int warp_n, int element, int split, float& first, float& second) {
        first = second = 0.f;
#pragma unroll
        for (int j = 0; j < ADDENDS; ++j) {
            const float* p = partial + (n * WARPS + warp_n * WARPS_K + j * SPLITS + split) * PARTIAL + element;
            first += p[0];
            second += p[128];
        }
#pragma unroll
        for (int lanes = 1; lanes < SPLITS; lanes *= 2) {
            first += shuffle_xor(first, lanes);
            second += shuffle_xor(second, lanes);
        }
    }

    // `place` numbers the panel among those whose sums this CTA keeps between passes.
    DEVICE void finish(const Output& out, const Rows& rows, const Weights& weights, const Tile& tile,
                       const float* inverse, int panel, int place, bool is_first_pass, bool is_last_pass) {
        int split = thread_index() % SPLITS, element = thread_index() / SPLITS % 128;
        int warp_n = thread_index() / SPLITS / 128, pair = panel * WARPS_N + warp_n;
        int row = (element >> 4) + 8 * ((element >> 1) & 1), column = 2 * ((element >> 2) & 3) + (element & 1);
        const float* scale = weights.super_scales + ((long)tile.expert * weights.pairs + pair) * 32 + row;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n, column += 8) {
            float first, second;
            sum(n, warp_n, element, split, first, second);
            if (split || column >= tile.rows || pair >= weights.pairs) continue;
            long kept = ((((long)blockIdx.x * out.panels_kept + place) * TOKEN_TILES + n) * 4 + warp_n) * 256 + element;
            if (!is_first_pass) {
                first += out.scratch[kept];
                second += out.scratch[kept + 128];
            }
            if (is_last_pass) {
                float factor = inverse[column];
                write(out, rows, tile.first + column, pair, row, first * factor * scale[0], second * factor * scale[16]);
            } else {
                out.scratch[kept] = first;
                out.scratch[kept + 128] = second;
            }
        }
    }
};

KERNEL(THREADS, 1) expert_projection(const u8* records, const Words4* channel_constants, const u32* arithmetic,
                                     const float* super_scales, int pairs, int steps, const u16* x, const u32* x_max,
                                     int x_stride, int x_length, int lane_stride, int pair_stride, const int* sorted,
                                     int experts_per_token, const Tile* tiles, const int* num_tiles, void* values,
                                     u32* max_bits, const float* expert_weights, float* scratch, int out_channels,
                                     int panels_kept, int passes) {
    DYNAMIC_SHARED(shared);
    int panels = (pairs + WARPS_N - 1) / WARPS_N, pass_steps = (steps + passes - 1) / passes;
    Weights weights = {records, channel_constants, arithmetic, super_scales, pairs, steps, panels};
    Rows rows = {x, x_max, sorted, x_stride, x_length, experts_per_token, lane_stride, pair_stride};
    Output out = {values, max_bits, expert_weights, scratch, out_channels, panels_kept};

    u8* end_of_rings = shared + WARPS * STAGES * SLOT;
    Share& share = *(Share*)end_of_rings;
    Reduction reduction = {(float*)(end_of_rings + 16)};
    Activations activations;
    activations.starts = (Floats4*)(reduction.partial + TOKEN_TILES * WARPS * PARTIAL);
    activations.fragments = (Words4*)(activations.starts + pass_steps * 2 * TOKEN_TILES * 4);
    activations.inverse = (float*)(activations.fragments + pass_steps * 4 * ROWS * 4);
    if (threadIdx.x == 0) share = my_share(*num_tiles * panels, panels);
    sync_block();
    if (share.begin == share.end) return;

    u32 ring = shared_address(shared) + my_warp() * STAGES * SLOT;
    Stream stream = {weights, share, tiles, passes, pass_steps, ring + my_lane() * 16, ring + 1024 + my_lane() * 4};
    stream.start();
    for (int tile_index = share.first_tile(); share.has_tile(tile_index); ++tile_index) {
        for (int pass = 0; pass < passes; ++pass) {
            const Tile& tile = tiles[tile_index];
            Span span = pass_span(pass, pass_steps, steps);
            sync_block();
            activations.stage(rows, tile, span);
            PairConstants constants;
            constants.load(weights, tile.expert, share.first_panel(tile_index));
            sync_block();
            for (int panel = share.first_panel(tile_index); panel < share.last_panel(tile_index); ++panel) {
                Sums acc = {};
                if (panel * WARPS_N + my_warp_n() < pairs) sweep(acc, stream, constants, activations, span, tile.rows);
                constants.load(weights, tile.expert, panel + 1);
                sync_block();
                reduction.put(acc);
                sync_block();
                reduction.finish(out, rows, weights, tile, activations.inverse, panel,
                                 panel - share.first_panel(tile_index), pass == 0, pass + 1 == passes);
            }
        }
    }
}
