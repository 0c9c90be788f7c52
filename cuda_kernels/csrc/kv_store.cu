// Keys and values of a step to their slots of the paged cache.
#include "common.cuh"

// Block t copies token t's key and value, `vectors` of 16 bytes each; strides count in such vectors too.
KERNEL(256, 4) kv_store(const Words4* key, const Words4* value, Words4* key_cache, Words4* value_cache,
                        const long* slots, int key_stride, int value_stride, int vectors) {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    long token = blockIdx.x, slot = slots[token];
    if (slot < 0) return;
    for (int i = threadIdx.x; i < 2 * vectors; i += 256) {
        if (i < vectors) {
            key_cache[slot * vectors + i] = key[token * key_stride + i];
        } else {
            value_cache[slot * vectors + i - vectors] = value[token * value_stride + i - vectors];
        }
    }
}
