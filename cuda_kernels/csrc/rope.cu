// Rotary embedding of bfloat queries and keys, in place: features (2i, 2i+1) of a head turn by the angle of pair i.
#include "common.cuh"

struct __align__(16) Pairs {
    u32 pair[4];
};

DEVICE u32 rotate(u32 pair, float cos, float sin) {
    float x = low_bfloat(pair), y = high_bfloat(pair);
    return pack_bfloat2(x * cos - y * sin, y * cos + x * sin);
}

// Block (token, part): a thread turns four pairs. Strides, and the vectors of a token's queries and of both, count in
// vectors of eight features; `cos_sin` has head_dim / 2 cosines, then as many sines, for each position.
KERNEL(256, 4) rope(Pairs* query, Pairs* key, const long* positions, const float* cos_sin, int query_stride,
                    int key_stride, int query_vectors, int vectors, int head_dim) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    int vector = blockIdx.y * 256 + threadIdx.x;
    if (vector >= vectors) return;
    long token = blockIdx.x;
    bool is_query = vector < query_vectors;
    Pairs* place = is_query ? query + token * query_stride + vector : key + token * key_stride + vector - query_vectors;
    const Floats4* cosines = (const Floats4*)(cos_sin + positions[token] * head_dim + vector * 8 % head_dim / 2);
    const Floats4* sines = (const Floats4*)((const float*)cosines + head_dim / 2);
    Pairs x = *place;
    Floats4 cos = *cosines, sin = *sines;
    for (int i = 0; i < 4; ++i) x.pair[i] = rotate(x.pair[i], cos.v[i], sin.v[i]);
    *place = x;
}
