// Products of a warpgroup: four warps, sixteen rows of A each, with operands in shared memory, which on Hopper run on while
// the warps do something else. Elsewhere, and in the emulator, the same with one warp's mma.
//
// Operands lie in shared memory as blocks of rows of 64 halves, 128 bytes, whose eight 16-byte chunks are permuted so that
// eight rows' equal chunks are in different banks: chunk c of row r is at place c ^ (r & 7). A block begins at a multiple
// of 1024 bytes.
#pragma once
#include "common.cuh"

DEVICE u32 swizzled(int row, int chunk) { return (u32)(row * 128 + (chunk ^ (row & 7)) * 16); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
DEVICE void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_multiplying() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `kInFlight` committed groups of products still read their operands.
template <int kInFlight>
DEVICE void wait_multiplied() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}
// Ends the asynchronous life of the sums: they may be read now.
template <int kTiles>
DEVICE void take_sums(float (&d)[kTiles][4]) {
    for (auto& tile : d) {
        for (float& x : tile) asm volatile("" : "+f"(x)::"memory");
    }
}
// What this thread wrote to shared memory is seen by the products that begin after the next barrier.
DEVICE void show_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The registers of each thread of the warpgroup from here on: some give what others take.
template <int kCount>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Rows of 128 bytes, groups of eight rows 1024 bytes apart, 128-byte swizzle; addresses in units of 16. Read across, K
// runs over the rows, and columns 64 to 127 are those of another block, `next` bytes on.
DEVICE u64 describe_rows(u32 block) { return (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16 | (block & 0x3FFFF) >> 4; }
DEVICE u64 describe_columns(u32 block, int next) {
    return (u64)1 << 62 | (u64)64 << 32 | (u64)(next >> 4) << 16 | (block & 0x3FFFF) >> 4;
}

#define SUMS4(j) SUMS(j), SUMS(j + 1), SUMS(j + 2), SUMS(j + 3)
#define SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LIST32                                                                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define LIST64                                                                                                    \
    LIST32                                                                                                        \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = (d if `adds`) + A's 64 rows · B's 128 rows, over bfloats 16·slice .. of both.
DEVICE void multiply_rows(float (&d)[16][4], u32 a, u32 b, int slice, bool adds) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST64
        "}, %64, %65, add, 1, 1, 0, 0; }"
        : SUMS4(0), SUMS4(4), SUMS4(8), SUMS4(12)
        : "l"(describe_rows(a) + 2 * slice), "l"(describe_rows(b) + 2 * slice), "r"((int)adds));
}
// d += A (of one warp's mma, in registers) · rows 16·slice .. of B, whose blocks of 64 columns are `next` bytes apart.
DEVICE void multiply_columns(float (&d)[16][4], const u32 (&a)[4], u32 b, int next, int slice) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST64
        "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1; }"
        : SUMS4(0), SUMS4(4), SUMS4(8), SUMS4(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_columns(b + slice * 2048, next)));
}
DEVICE void multiply_columns(float (&d)[8][4], const u32 (&a)[4], u32 b, int next, int slice) {
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST32
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
        : SUMS4(0), SUMS4(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_columns(b + slice * 2048, next)));
}
#undef LIST64
#undef LIST32
#undef SUMS4
#undef SUMS
#else
DEVICE void begin_multiplying() {}
DEVICE void commit_multiplying() {}
template <int kInFlight>
DEVICE void wait_multiplied() {}
template <int kTiles>
DEVICE void take_sums(float (&)[kTiles][4]) {}
DEVICE void show_shared() {}
template <int kCount>
DEVICE void give_registers() {}
template <int kCount>
DEVICE void take_registers() {}

DEVICE void multiply_rows(float (&d)[16][4], u32 a, u32 b, int slice, bool adds) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, row = threadIdx.x / 32 % 4 * 16 + g;
    auto word = [&](u32 block, int row, int chunk) { return load_shared4(block + swizzled(row, chunk) + t * 4); };
    u32 of_a[4];
    for (int i = 0; i < 4; ++i) of_a[i] = word(a, row + i % 2 * 8, 2 * slice + i / 2);
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        if (!adds) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0;
        mma_bfloat(d[n], of_a, word(b, 8 * n + g, 2 * slice), word(b, 8 * n + g, 2 * slice + 1), d[n]);
    }
}
template <int kTiles>
DEVICE void multiply_columns(float (&d)[kTiles][4], const u32 (&a)[4], u32 b, int next, int slice) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
        auto pair = [&](int row) {
            auto half = [&](int r) { return *(const u16*)shared_bytes(b + n / 8 * next + swizzled(r, n % 8) + 2 * g); };
            return half(row) | (u32)half(row + 1) << 16;
        };
        mma_bfloat(d[n], a, pair(16 * slice + 2 * t), pair(16 * slice + 2 * t + 8), d[n]);
    }
}
#endif
