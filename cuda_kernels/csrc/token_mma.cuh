// Products of many tokens with 16 weights of K: on Hopper one instruction of a warpgroup (four warps, 64 channels), which
// reads the weights from registers, the tokens from shared memory, and runs on while the warps decode; elsewhere, and in
// the emulator, a loop of one warp's mma over the tokens. A warp brings its own 16 channels either way.
// Tokens lie in shared memory as warpgroup.cuh has it, rows of 64 halves of K.
#pragma once
#include "warpgroup.cuh"

using TokenSums = float[TOKENS / 8][4];  // [tile of 8 tokens][as of m16n8k16]

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// d += weights · (halves 16·slice.. of the block's rows).
DEVICE void multiply_tokens(TokenSums& d, const u32 (&a)[4], u32 block, int slice) {
    u64 b = describe_rows(block) + 2 * slice;
#define SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define A_AND_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#if TOKENS == 16
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7},"
        " {%8, %9, %10, %11}, %12, add, 1, 1, 0; }"
        : SUMS(0), SUMS(1)
        : A_AND_B);
#elif TOKENS == 32
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
        " {%16, %17, %18, %19}, %20, add, 1, 1, 0; }"
        : SUMS(0), SUMS(1), SUMS(2), SUMS(3)
        : A_AND_B);
#elif TOKENS == 64
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"
        " {%32, %33, %34, %35}, %36, add, 1, 1, 0; }"
        : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7)
        : A_AND_B);
#elif TOKENS == 128
    asm volatile(
        "{ .reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"
        " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"
        " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"
        " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63},"
        " {%64, %65, %66, %67}, %68, add, 1, 1, 0; }"
        : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7),
          SUMS(8), SUMS(9), SUMS(10), SUMS(11), SUMS(12), SUMS(13), SUMS(14), SUMS(15)
        : A_AND_B);
#endif
#undef SUMS
#undef A_AND_B
}
#else
DEVICE void multiply_tokens(TokenSums& d, const u32 (&a)[4], u32 block, int slice) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n) {
        int row = 8 * n + g;
        u32 b0 = load_shared4(block + swizzled(row, 2 * slice) + t * 4);
        u32 b1 = load_shared4(block + swizzled(row, 2 * slice + 1) + t * 4);
        mma_half(d[n], a, b0, b1, d[n]);
    }
}
#endif
