// The only door to the hardware: every instruction that is not plain C++ has one name here. The same names exist in
// C++ for the host emulator (tests/cuda_kernels/emulator/device.h), so that the kernels run, and are tested, with no GPU.
// No CUDA header is included: there is no include path to get wrong.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#ifdef WINT2_EMULATOR
#include "device.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// The sum of products of four bytes, plus c: with a one-hot `b` it selects a byte, on the multiplier's pipe.
DEVICE u32 dot_bytes(u32 a, u32 b, u32 c) {
    u32 d;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// c + a's halves times bytes 0 and 1, or 2 and 3, of b.
DEVICE u32 dot_low(u32 a, u32 b, u32 c) {
    u32 d;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 dot_high(u32 a, u32 b, u32 c) {
    u32 d;
    asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// (a & mask) | bits in one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

// Two floats to two halves in one register, `low` in the low half, rounded to nearest even.
DEVICE u32 pack_half2(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE u32 pack_bfloat2(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
// a·b + c on both bfloats of a register.
DEVICE u32 fused_bfloat2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// a·b + c of both halves.
DEVICE u32 fused_half2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE float half_float(u16 x) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
}

// Shared memory by its own 32-bit address, where the address arithmetic of a hot loop must stay small.
struct __align__(16) Words4 {
    u32 x, y, z, w;
};
struct __align__(8) Words2 {
    u32 x, y;
};
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE const u8* shared_bytes(u32 address) { return (const u8*)__cvta_shared_to_generic(address); }
DEVICE Words4 load_shared16(u32 address) {
    Words4 d;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
                 : "r"(address)
                 : "memory");
    return d;
}
DEVICE Words2 load_shared8(u32 address) {
    Words2 d;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "r"(address) : "memory");
    return d;
}
DEVICE u32 load_shared4(u32 address) {
    u32 d;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(d) : "r"(address) : "memory");
    return d;
}

// Copies that bypass registers. They land in the order of their groups; wait_copies<n> leaves the n newest in flight.
template <int kOffset = 0>  // of both addresses
DEVICE void copy16(u32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %2], [%1 + %2], 16;" ::"r"(shared), "l"(global), "n"(kOffset)
                 : "memory");
}
// Zeros where there is nothing to be copied.
DEVICE void copy16_or_zeros(u32 shared, const void* global, bool is_live) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(is_live ? 16 : 0)
                 : "memory");
}
DEVICE void copy4(u32 shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

// Sixteen bytes that are read once: past the L1 cache, which keeps what is read often.
DEVICE Words4 load_once16(const void* global) {
    Words4 d;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
        : "l"(global));
    return d;
}

DEVICE Words2 load_once8(const void* global) {
    Words2 d;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(d.x), "=r"(d.y) : "l"(global));
    return d;
}

// D = A·B + C on one warp's m16n8k16 fragments, float accumulators. Lane 4g+t holds, of A: rows g (a0, a2) and g+8
// (a1, a3), columns 2t.. (a0, a1) and 2t+8.. (a2, a3); of B: rows 2t.. (b0) and 2t+8.. (b1) of column g; of C and D:
// row g (c0, c1) and g+8 (c2, c3), columns 2t and 2t+1.
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
DEVICE void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The same with m16n8k32 fragments of bytes, A unsigned and B signed, and 32-bit sums: four bytes stand where two halves did.
DEVICE void mma_bytes(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const u32 (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Programmatic dependent launch: a kernel launched to overlap starts while the one before it ends, and may touch
// what that one writes only after waiting. Before Hopper a kernel starts when the one before it has ended.
DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A barrier in two halves: arriving does not wait, and waiting for a phase does not arrive. Phases count from zero.
using SplitBarrier = u64;
DEVICE void init_barrier(SplitBarrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE void arrive_at(SplitBarrier* barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(barrier))
                 : "memory");
}
DEVICE void wait_for_phase(SplitBarrier* barrier, int phase) {
    u32 done = 0;
    while (!done) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(phase & 1)
                     : "memory");
    }
}

// One warp copies `bytes` (a multiple of 16); a phase of `landed`, which expects BLOCK_ARRIVALS, is complete once all
// have come.
#if __CUDA_ARCH__ >= 900
constexpr int BLOCK_ARRIVALS = 1;
DEVICE void copy_block(u32 shared, const void* global, int bytes, SplitBarrier* landed) {
    if (threadIdx.x % 32) return;
    u32 barrier = shared_address(landed);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // after what the warp read there
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}
#else
constexpr int BLOCK_ARRIVALS = 32;
DEVICE void copy_block(u32 shared, const void* global, int bytes, SplitBarrier* landed) {
    for (int at = threadIdx.x % 32 * 16; at < bytes; at += 512) copy16(shared + at, (const u8*)global + at);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(landed)) : "memory");
}
#endif

// How often this was called before for the same counter in shared memory; what the callers before did is seen.
DEVICE u32 count_call(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.cta.shared.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(shared_address(counter)) : "memory");
    return before;
}

// threadIdx.x, read anew: what is derived from it is not kept in registers across a hot loop.
DEVICE int thread_index() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
DEVICE u32 shuffle_xor(u32 x, int lanes) { return __shfl_xor_sync(~0u, x, lanes); }
DEVICE u32 shuffle_up(u32 x, int lanes) { return __shfl_up_sync(~0u, x, lanes); }  // the first lanes' is their own
DEVICE u32 lanes_like_mine(u32 x) { return __match_any_sync(~0u, x); }
DEVICE u32 largest_in_warp(u32 x) { return __reduce_max_sync(~0u, x); }
DEVICE int popcount(u32 x) { return __popc(x); }
DEVICE void atomic_max(u32* p, u32 x) { atomicMax(p, x); }
// One more block has arrived; its earlier writes are seen by whoever counts later. The blocks that came before.
DEVICE u32 arrive(u32* counter) {
    __threadfence();
    return atomicAdd(counter, 1u);
}
DEVICE void see_arrived() { __threadfence(); }

DEVICE float fast_exp(float x) { return __expf(x); }
DEVICE float fast_exp2(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}
DEVICE float inverse_root(float x) { return rsqrtf(x); }
DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }
DEVICE float round_down(float x) { return floorf(x); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float add_down(float a, float b) { return __fadd_rd(a, b); }  // rounded towards minus infinity
DEVICE int to_int(float x) { return __float2int_rz(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number the number
DEVICE float smaller(float a, float b) { return fminf(a, b); }
#endif

DEVICE float bfloat_float(u16 x) { return bits_float((u32)x << 16); }
DEVICE float low_bfloat(u32 pair) { return bits_float(pair << 16); }
DEVICE float high_bfloat(u32 pair) { return bits_float(pair & 0xFFFF0000u); }
DEVICE u16 float_bfloat(float x) { return (u16)pack_bfloat2(x, 0.f); }
DEVICE float positive(float x) { return bits_float(float_bits(x) & 0x7FFFFFFFu); }
DEVICE int smaller(int a, int b) { return a < b ? a : b; }

struct __align__(16) Floats4 {
    float v[4];
};
