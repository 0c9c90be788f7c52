// A token for each row of logits, and edits of them: see cuda_kernels/sampling.py. One block a row, which it reads again in
// every pass, from the L2 cache, and weighs anew: e^((logit - peak) / temperature), so that the likeliest weighs 1.
#include "common.cuh"

constexpr int MAX_THREADS = 1024, EDIT_THREADS = 256;
constexpr u32 ONE = 0x3F800000;  // as bits; those of floats that are not negative order as the floats do
constexpr u32 MINUS_INFINITY = 0xFF800000;  // as bits

struct Pair {
    float x;
    u32 n;
};

template <class Combine>
DEVICE Pair fold_warp(Pair mine, Combine combine) {
    for (int lanes = 16; lanes; lanes /= 2) {
        Pair other = {shuffle_xor(mine.x, lanes), shuffle_xor(mine.n, lanes)};
        mine = combine(mine, other);
    }
    return mine;
}

DEVICE Pair sum_of(Pair a, Pair b) { return {a.x + b.x, a.n + b.n}; }
DEVICE Pair better_of(Pair a, Pair b) { return b.x > a.x || (b.x == a.x && b.n < a.n) ? b : a; }

struct Row {
    const float* logits;
    int width, threads;
    Pair* shared;  // one for each warp
    float peak, factor;

    DEVICE float weight(int i) const { return fast_exp((logits[i] - peak) * factor); }

    // Every thread brings one and gets all, combined in the order of the warps.
    template <class Combine>
    DEVICE Pair fold(Pair mine, Combine combine) const {
        mine = fold_warp(mine, combine);
        sync_block();  // what the last fold left has been read
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
        sync_block();
        Pair all = shared[0];
        for (int warp = 1; warp < threads / 32; ++warp) all = combine(all, shared[warp]);
        return all;
    }

    // The first of the largest logits; a NaN if there is one.
    DEVICE Pair find_peak() const {
        Pair best = {bits_float(MINUS_INFINITY), 0};
        float poison = 0;
#pragma unroll 8
        for (int i = threadIdx.x; i < width; i += threads) {
            float x = logits[i];
            best = better_of(best, {x, (u32)i});
            if (x != x) poison = x;
        }
        best = fold(best, [](Pair a, Pair b) { return better_of(a, b); });
        poison = fold({poison, 0}, [](Pair a, Pair b) { return sum_of(a, b); }).x;
        return {best.x + poison, best.n};
    }

    // Mass and number of the weights that are not below the threshold.
    DEVICE Pair tally(float threshold) const {
        Pair kept = {0, 0};
#pragma unroll 8
        for (int i = threadIdx.x; i < width; i += threads) {
            float w = weight(i);
            if (w >= threshold) kept = sum_of(kept, {w, 1});
        }
        return fold(kept, [](Pair a, Pair b) { return sum_of(a, b); });
    }

    // The largest threshold that keeps as much mass and as many weights, one of which is 0: halves the range of bits
    // until one weight at most is left in it.
    DEVICE float find_threshold(float wanted_mass, u32 wanted_count) const {
        u32 low = 0, high = ONE + 1, num_low = width + 1, num_high = 0;
        while (high - low > 1 && num_low - num_high > 1) {
            u32 middle = (low + high) / 2;
            Pair kept = tally(bits_float(middle));
            if (kept.x >= wanted_mass && kept.n >= wanted_count) {
                low = middle;
                num_low = kept.n;
            } else {
                high = middle;
                num_high = kept.n;
            }
        }
        return bits_float(low);
    }

    // The smallest weight that top_k, then top_p, then min_p keep.
    DEVICE float cut(int top_k, float top_p, float min_p) const {
        float threshold = 0;
        if (0 < top_k && top_k < width) threshold = find_threshold(0, top_k);
        if (top_p < 1) threshold = larger(threshold, find_threshold(top_p * tally(threshold).x, 0));
        return larger(threshold, min_p);
    }

    // The first place where the mass of what is not below the threshold exceeds the uniform share of all. Each turn
    // leaves of [begin, end) the part of one warp.
    DEVICE int locate(float threshold, double uniform) const {
        double target = uniform * tally(threshold).x, before = 0;
        int begin = 0, end = width, warps = threads / 32;
        while (end - begin > 32) {
            int part = (end - begin + warps - 1) / warps;
            part = part < 32 ? 32 : part;
            sum_parts(begin, end, part, threshold);
            int chosen = 0;
            double start = before, sum = before;
            for (int warp = 0; warp < warps; ++warp) {
                if (shared[warp].x <= 0) continue;
                chosen = warp;
                start = sum;
                sum += shared[warp].x;
                if (sum > target) break;
            }
            before = start;
            begin += chosen * part;
            end = smaller(end, begin + part);
        }
        return find_among_few(begin, end, threshold, target - before);
    }

    DEVICE void sum_parts(int begin, int end, int part, float threshold) const {
        int first = begin + threadIdx.x / 32 * part;
        Pair kept = {0, 0};
        for (int i = first + threadIdx.x % 32; i < smaller(end, first + part); i += 32) {
            float w = weight(i);
            if (w >= threshold) kept.x += w;
        }
        kept = fold_warp(kept, [](Pair a, Pair b) { return sum_of(a, b); });
        sync_block();
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = kept;
        sync_block();
    }

    DEVICE int find_among_few(int begin, int end, float threshold, double target) const {
        int found = begin;
        double mass = 0;
        for (int i = begin; i < end; ++i) {
            float w = weight(i);
            if (w < threshold || w <= 0) continue;
            mass += w;
            found = i;
            if (mass > target) break;
        }
        return found;
    }
};

KERNEL(MAX_THREADS, 1) draw(const float* logits, const float* temperature, const int* top_k, const float* top_p,
                            const float* min_p, const double* uniform, long* token_ids, float* peaks, int width,
                            int threads) {
    DYNAMIC_SHARED(shared);
    int s = blockIdx.x;
    Row row = {logits + (long)s * width, width, threads, (Pair*)shared, 0, 0};
    Pair best = row.find_peak();
    int token = best.n;
    if (temperature[s] > 0 && best.x - best.x == 0) {
        row.peak = best.x;
        row.factor = 1 / temperature[s];
        bool is_cut = top_k[s] > 0 || top_p[s] < 1 || min_p[s] > 0;
        float threshold = is_cut ? row.cut(top_k[s], top_p[s], min_p[s]) : 0;
        token = row.locate(threshold, uniform[s]);
    }
    if (threadIdx.x == 0) {
        token_ids[s] = token;
        peaks[s] = best.x;
    }
}

// In place, row positions[x] of the logits by row rows[x] of the tables.
KERNEL(EDIT_THREADS, 1) penalise(float* logits, const long* positions, const long* rows, const float* divisors,
                                    const float* losses, int width, int num_blocks) {
    float* row = logits + positions[blockIdx.x] * width;
    long at = rows[blockIdx.x] * width;
    for (int i = blockIdx.y * EDIT_THREADS + threadIdx.x; i < width; i += num_blocks * EDIT_THREADS) {
        float x = row[i], by = divisors[at + i];
        row[i] = (x > 0 ? x / by : x * by) - losses[at + i];
    }
}

// In place, row positions[x] of the logits where the bits of row x of the masks are 0.
KERNEL(EDIT_THREADS, 1) forbid(float* logits, const long* positions, const int* masks, int width, int num_words,
                               int num_blocks) {
    float* row = logits + positions[blockIdx.x] * width;
    const int* mask = masks + (long)blockIdx.x * num_words;
    for (int i = blockIdx.y * EDIT_THREADS + threadIdx.x; i < width; i += num_blocks * EDIT_THREADS) {
        if (!(mask[i / 32] >> i % 32 & 1)) row[i] = bits_float(MINUS_INFINITY);
    }
}
