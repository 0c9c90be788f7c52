// A GPU's CTA on one host thread: every CUDA thread is a fiber, warp instructions and barriers are rendezvous. The same
// .cu files build against it. It finds wrong arithmetic, wrong layouts, missing or divergent barriers and wrong
// addresses; it does not model time, the memory model, or bank conflicts.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.h"

#define DEVICE inline
#define KERNEL(threads, blocks) static void
#define DYNAMIC_SHARED(name) u8* name = emulator::cta.shared
#define __align__(n) alignas(n)

struct Index {
    int x, y;
};
inline Index blockIdx, gridDim;

namespace emulator {

constexpr int WARP = 32, MAX_WORDS = 24;

// Where the lanes of a warp meet: the last to arrive computes for all.
struct Meeting {
    int arrived = 0;
    uint64_t generation = 0;
    u32 in[WARP][MAX_WORDS], out[WARP][MAX_WORDS];
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Thread {
    Fiber fiber;
    std::vector<std::vector<Copy>> groups;  // copies in flight, oldest group first
    std::vector<Copy> open;
};

struct Cta {
    u8* shared = nullptr;
    int threads = 0, current = 0, finished = 0, at_barrier = 0;
    uint64_t barrier_generation = 0, progress = 0;
    std::vector<Thread> thread;
    std::vector<Meeting> warp;
    std::map<const void*, std::vector<Copy>> blocks;  // in flight, by the barrier they arrive at
};
inline Cta cta;

inline void yield() { cta.thread[cta.current].fiber.leave(); }

// What went wrong first; the launch ends with it.
inline char failure[200];
inline void note_failure(const char* what) {
    if (*failure) return;
    snprintf(failure, sizeof failure, "%s (block %d,%d thread %d)", what, blockIdx.x, blockIdx.y, cta.current);
}
[[noreturn]] inline void fail(const char* what) {
    note_failure(what);
    for (;;) yield();
}

// Every lane brings `in`; `compute(meeting)` fills `out` of all lanes once.
template <class F>
void meet(const u32* in, int words_in, u32* out, int words_out, F compute) {
    Meeting& m = cta.warp[cta.current / WARP];
    int lane = cta.current % WARP;
    memcpy(m.in[lane], in, 4 * words_in);
    uint64_t generation = m.generation;
    if (++m.arrived == WARP) {
        compute(m);
        m.arrived = 0;
        ++m.generation;
        ++cta.progress;
    } else {
        while (m.generation == generation) yield();
    }
    memcpy(out, m.out[lane], 4 * words_out);
}

template <class F>
void run_cta(int threads, size_t shared_bytes, unsigned seed, F body) {
    std::vector<u8> shared(shared_bytes + 128, 0xFF);  // poison: NaN, and far outside any array
    cta.shared = shared.data() + (128 - (uintptr_t)shared.data() % 128) % 128;
    cta.threads = threads;
    cta.finished = cta.at_barrier = 0;
    cta.thread = std::vector<Thread>(threads);
    cta.warp = std::vector<Meeting>((threads + WARP - 1) / WARP);
    cta.blocks.clear();
    std::vector<int> order(threads);
    for (int i = 0; i < threads; ++i) order[i] = i;
    std::mt19937 random(seed);
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (int i = 0; i < threads; ++i) {
        cta.thread[i].fiber.start([&body] {
            body();
            ++cta.finished;
            ++cta.progress;
        });
    }
    for (int idle = 0; cta.finished < threads;) {
        uint64_t before = cta.progress;
        for (int i : order) {
            cta.current = i;
            if (!cta.thread[i].fiber.done) cta.thread[i].fiber.enter();
            if (*failure) return;
        }
        idle = cta.progress == before ? idle + 1 : 0;
        if (idle == 3) {
            note_failure("deadlock: threads wait for one another at different barriers or warp instructions");
            return;
        }
    }
}

// `arguments` as cuLaunchKernel takes them.
template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<P>*)arguments[I]...);
}
template <class... P>
const char* launch(void (*kernel)(P...), int grid_x, int grid_y, int threads, size_t shared_bytes, unsigned seed,
                   void** arguments) {
    gridDim = {grid_x, grid_y};
    *failure = 0;
    for (int y = 0; y < grid_y; ++y) {
        for (int x = 0; x < grid_x; ++x) {
            blockIdx = {x, y};
            run_cta(threads, shared_bytes, seed, [&] { call(kernel, arguments, std::index_sequence_for<P...>()); });
            if (*failure) return failure;
        }
    }
    return nullptr;
}

struct ThreadIndex {
    struct X {
        operator int() const { return cta.current; }
    } x;
};

inline float to_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline u32 to_bits(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
inline float half_to_float(u32 h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                  : exponent == 0 ? std::ldexp((float)mantissa, -24)
                                  : std::ldexp((float)(mantissa | 1024), exponent - 25);
    return h & 0x8000 ? -value : value;
}
inline u32 float_to_half(float f) {
    u32 sign = to_bits(f) >> 16 & 0x8000;
    float a = std::fabs(f);
    if (std::isnan(f)) return 0x7FFF;
    if (a >= 65520.f) return sign | 0x7C00;
    int exponent = a < 0x1p-14f ? -14 : std::ilogb(a);
    u32 mantissa = (u32)std::nearbyint(std::ldexp(a, 10 - exponent));  // may carry into the exponent: that is right
    return sign | (a < 0x1p-14f ? mantissa : mantissa + ((u32)(exponent + 14) << 10));
}
inline float bfloat_to_float(u32 h) { return to_float(h << 16); }
inline u32 float_to_bfloat(float f) {
    u32 bits = to_bits(f);
    if (std::isnan(f)) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <class Convert>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4], Convert value) {
    u32 in[10] = {a[0], a[1], a[2], a[3], b0, b1, to_bits(c[0]), to_bits(c[1]), to_bits(c[2]), to_bits(c[3])}, out[4];
    meet(in, 10, out, 4, [&](Meeting& m) {
        float A[16][16], B[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; ++r) {
                for (int i = 0; i < 2; ++i) {
                    A[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = value(m.in[lane][r] >> 16 * i & 0xFFFF);
                    if (r < 2) B[2 * t + i + 8 * r][g] = value(m.in[lane][4 + r] >> 16 * i & 0xFFFF);
                }
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
                double sum = to_float(m.in[lane][6 + i]);
                for (int k = 0; k < 16; ++k) sum += (double)A[row][k] * B[k][column];
                m.out[lane][i] = to_bits((float)sum);
            }
        }
    });
    for (int i = 0; i < 4; ++i) d[i] = to_float(out[i]);
}

inline u32 shuffle(u32 x, int lanes) {
    u32 in[2] = {x, (u32)lanes}, out;
    meet(in, 2, &out, 1, [](Meeting& m) {
        for (int i = 0; i < WARP; ++i) m.out[i][0] = m.in[i ^ m.in[i][1]][0];
    });
    return out;
}

inline u32 shuffle_up(u32 x, int lanes) {
    u32 in[2] = {x, (u32)lanes}, out;
    meet(in, 2, &out, 1, [](Meeting& m) {
        for (int i = 0; i < WARP; ++i) m.out[i][0] = m.in[i < (int)m.in[i][1] ? i : i - m.in[i][1]][0];
    });
    return out;
}

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
    uint64_t bytes = a | (uint64_t)b << 32;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) d |= (u32)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return d;
}
DEVICE u32 dot_bytes(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
    return c;
}
DEVICE u32 dot_low(u32 a, u32 b, u32 c) { return c + (a & 0xFFFF) * (b & 255) + (a >> 16) * (b >> 8 & 255); }
DEVICE u32 dot_high(u32 a, u32 b, u32 c) { return dot_low(a, b >> 16, c); }
DEVICE u32 and_or(u32 a, u32 mask, u32 bits) { return (a & mask) | bits; }
DEVICE u32 float_bits(float x) { return emulator::to_bits(x); }
DEVICE float bits_float(u32 x) { return emulator::to_float(x); }
DEVICE u32 pack_half2(float low, float high) {
    return emulator::float_to_half(low) | emulator::float_to_half(high) << 16;
}
DEVICE u32 pack_bfloat2(float low, float high) {
    return emulator::float_to_bfloat(low) | emulator::float_to_bfloat(high) << 16;
}
DEVICE u32 fused_bfloat2(u32 a, u32 b, u32 c) {
    auto value = [](u32 pair, int i) { return (double)emulator::bfloat_to_float(pair >> 16 * i & 0xFFFF); };
    auto half = [&](int i) { return (float)(value(a, i) * value(b, i) + value(c, i)); };
    return pack_bfloat2(half(0), half(1));
}
DEVICE u32 fused_half2(u32 a, u32 b, u32 c) {
    auto value = [](u32 pair, int i) { return (double)emulator::half_to_float(pair >> 16 * i & 0xFFFF); };
    auto half = [&](int i) { return (float)(value(a, i) * value(b, i) + value(c, i)); };
    return pack_half2(half(0), half(1));
}
DEVICE float half_float(u16 x) { return emulator::half_to_float(x); }

// A copy lands when it is waited for, and not before.
DEVICE void queue_copy(void* to, const void* from, int bytes) {
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes) emulator::fail("misaligned copy");
    emulator::cta.thread[emulator::cta.current].open.push_back({to, from, bytes});
}
struct alignas(16) Words4 {
    u32 x, y, z, w;
};
struct alignas(8) Words2 {
    u32 x, y;
};
DEVICE u32 shared_address(const void* p) { return (u32)((u8*)p - emulator::cta.shared); }
DEVICE Words4 load_once16(const void* global) { return *(const Words4*)global; }
DEVICE Words2 load_once8(const void* global) { return *(const Words2*)global; }
DEVICE u8* shared_pointer(u32 address) { return emulator::cta.shared + address; }
DEVICE const u8* shared_bytes(u32 address) { return emulator::cta.shared + address; }
DEVICE Words4 load_shared16(u32 address) { return *(const Words4*)shared_pointer(address); }
DEVICE Words2 load_shared8(u32 address) { return *(const Words2*)shared_pointer(address); }
DEVICE u32 load_shared4(u32 address) { return *(const u32*)shared_pointer(address); }
template <int kOffset = 0>
DEVICE void copy16(u32 shared, const void* global) {
    queue_copy(shared_pointer(shared + kOffset), (const u8*)global + kOffset, 16);
}
DEVICE void copy16_or_zeros(u32 shared, const void* global, bool is_live) {
    alignas(16) static const u8 zeros[16] = {};
    queue_copy(shared_pointer(shared), is_live ? global : zeros, 16);
}
DEVICE void copy4(u32 shared, const void* global) { queue_copy(shared_pointer(shared), global, 4); }
DEVICE void commit_copies() {
    auto& thread = emulator::cta.thread[emulator::cta.current];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}
template <int kInFlight>
DEVICE void wait_copies() {
    auto& groups = emulator::cta.thread[emulator::cta.current].groups;
    while (groups.size() > kInFlight) {
        for (auto& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    emulator::mma_m16n8k16(d, a, b0, b1, c, emulator::half_to_float);
}
DEVICE void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    emulator::mma_m16n8k16(d, a, b0, b1, c, emulator::bfloat_to_float);
}

DEVICE void mma_bytes(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) {
    u32 in[10] = {a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]};
    emulator::meet(in, 10, d, 4, [](emulator::Meeting& m) {
        for (int out = 0; out < 128; ++out) {
            int lane = out / 4, i = out % 4, column = lane % 4 * 2 + i % 2;
            u32 sum = m.in[lane][6 + i];
            for (int k = 0; k < 32; ++k) {
                u32 weights = m.in[lane / 4 * 4 + k % 16 / 4][i / 2 + k / 16 * 2];
                u32 values = m.in[column * 4 + k % 16 / 4][4 + k / 16];
                sum += (u8)(weights >> k % 4 * 8) * (int)(signed char)(values >> k % 4 * 8);
            }
            m.out[lane][i] = sum;
        }
    });
}

DEVICE int thread_index() { return emulator::cta.current; }
DEVICE void sync_block() {
    auto& cta = emulator::cta;
    uint64_t generation = cta.barrier_generation;
    if (++cta.at_barrier + cta.finished == cta.threads) {
        cta.at_barrier = 0;
        ++cta.barrier_generation;
        ++cta.progress;
    } else {
        while (cta.barrier_generation == generation) emulator::yield();
    }
}
DEVICE void sync_warp() {
    u32 none = 0;
    emulator::meet(&none, 0, &none, 0, [](emulator::Meeting&) {});
}
DEVICE u32 shuffle_xor(u32 x, int lanes) { return emulator::shuffle(x, lanes); }
DEVICE u32 shuffle_up(u32 x, int lanes) { return emulator::shuffle_up(x, lanes); }
DEVICE float shuffle_xor(float x, int lanes) { return bits_float(emulator::shuffle(float_bits(x), lanes)); }
DEVICE u32 lanes_like_mine(u32 x) {
    u32 out;
    emulator::meet(&x, 1, &out, 1, [](emulator::Meeting& m) {
        for (int i = 0; i < 32; ++i) {
            m.out[i][0] = 0;
            for (int j = 0; j < 32; ++j) m.out[i][0] |= (u32)(m.in[i][0] == m.in[j][0]) << j;
        }
    });
    return out;
}
DEVICE u32 largest_in_warp(u32 x) {
    u32 out;
    emulator::meet(&x, 1, &out, 1, [](emulator::Meeting& m) {
        u32 largest = 0;
        for (int i = 0; i < 32; ++i) largest = std::max(largest, m.in[i][0]);
        for (int i = 0; i < 32; ++i) m.out[i][0] = largest;
    });
    return out;
}
DEVICE void prefetch(const void*) {}
DEVICE void wait_for_earlier_kernels() {}
DEVICE void let_next_kernel_start() {}

struct SplitBarrier {
    u16 arrivals, missing;
    u32 phase;  // the one that is not yet complete
};
DEVICE void init_barrier(SplitBarrier* barrier, int arrivals) { *barrier = {(u16)arrivals, (u16)arrivals, 0}; }
DEVICE void arrive_at(SplitBarrier* barrier) {
    if (--barrier->missing) return;
    barrier->missing = barrier->arrivals;
    ++barrier->phase;
    ++emulator::cta.progress;
}
DEVICE void wait_for_phase(SplitBarrier* barrier, int phase) {
    if ((int)barrier->phase > phase + 1) emulator::fail("waited for a phase that is long past");
    while ((int)barrier->phase <= phase) emulator::yield();
    auto& blocks = emulator::cta.blocks[barrier];
    for (auto& copy : blocks) memcpy(copy.to, copy.from, copy.bytes);
    blocks.clear();
}
// Lands when its barrier is waited for, and not before.
constexpr int BLOCK_ARRIVALS = 1;
DEVICE void copy_block(u32 shared, const void* global, int bytes, SplitBarrier* landed) {
    if (emulator::cta.current % emulator::WARP) return;
    if (shared % 16 || (uintptr_t)global % 16 || bytes % 16) emulator::fail("misaligned copy");
    emulator::cta.blocks[landed].push_back({shared_pointer(shared), global, bytes});
    arrive_at(landed);
}
DEVICE u32 count_call(u32* counter) { return (*counter)++; }
DEVICE int popcount(u32 x) { return __builtin_popcount(x); }
DEVICE void atomic_max(u32* p, u32 x) { *p = *p > x ? *p : x; }
DEVICE u32 arrive(u32* counter) { return (*counter)++; }
DEVICE void see_arrived() {}
DEVICE float fast_exp(float x) { return std::exp(x); }
DEVICE float fast_exp2(float x) { return std::exp2(x); }
DEVICE float inverse_root(float x) { return 1.f / std::sqrt(x); }
DEVICE float fast_divide(float a, float b) { return a / b; }
DEVICE float round_down(float x) { return std::floor(x); }
DEVICE float fused(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float add_down(float a, float b) {
    double sum = (double)a + b;
    float nearest = (float)sum;
    return nearest > sum ? std::nextafter(nearest, -INFINITY) : nearest;
}
DEVICE int to_int(float x) { return (int)x; }
DEVICE float larger(float a, float b) { return std::fmax(a, b); }
DEVICE float smaller(float a, float b) { return std::fmin(a, b); }
