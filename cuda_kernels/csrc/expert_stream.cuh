// The weights on their way from memory to the warps that multiply them.
#pragma once
#include "expert_work.cuh"

constexpr int SLOT = 1152;  // bytes of one step: two tiles' codes and their scales

struct Weights {
    const u8* records;          // [E, pairs] of (scales u32 [steps, 8], codes Words4 [steps, 2, 32])
    const Words4* channels;     // [E, pairs, 8, 2]: A of rows g, g+8 of both tiles, then B
    const u32* arithmetic;      // [E, pairs]: which Arithmetic A and B are for
    const float* super_scales;  // [E, pairs, 2, 16]
    int pairs, steps;
    DEVICE int code_offset() const { return (steps * 32 + 127) & ~127; }
    DEVICE u32 record_bytes() const { return code_offset() + steps * 1024; }
};

// Consecutive own steps of one pair.
struct Stretch {
    int expert, pair, step, count;
};

// One warp's ring of weights on their way. The copies run STAGES - 1 steps ahead of the arithmetic, over panels, tiles
// and experts alike. `Route::next()` tells one stretch after another that this warp multiplies; after the last one it
// goes on with any others, which are copied and not used, so that the loop over steps need not know.
template <class Route>
struct Stream {
    Weights weights;
    Route route;
    u32 ring_codes, ring_scales;  // this lane's, in the first of STAGES slots (codes Words4 [2, 32], scales u32 [32])
    int left;                  // how many steps of the stretch remain to be copied,
    const u8 *codes, *scales;  // and this lane's share of the next
    int slot, free;            // bytes into the ring: the oldest step, and the one used last

    DEVICE void start() {
        advance();
        slot = 0;
        free = (STAGES - 1) * SLOT;
        for (int i = 0; i < STAGES - 1; ++i) {
            copy(i * SLOT);
            if (--left == 0) advance();
        }
    }

    DEVICE void advance() {
        Stretch next = route.next();
        left = next.count;
        u32 index = next.expert * weights.pairs + next.pair;
        const u8* record = weights.records + (u64)index * weights.record_bytes();
        scales = record + next.step * 32 + my_lane() / 4 * 4;
        codes = record + weights.code_offset() + next.step * 1024 + my_lane() * 16;
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
