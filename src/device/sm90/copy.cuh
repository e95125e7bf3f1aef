// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory: boxes of a tensor by the copy engine, pieces by threads.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"

namespace hopyard::sm90 {

// `map` points to a CUtensorMap in parameter or global memory.
__device__ __forceinline__ void PrefetchTensorMap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

struct BoxStart {
  int at[5];  // innermost first
};

// The box of a 5-D tensor that begins at `start`; its bytes count on `barrier`.
__device__ __forceinline__ void CopyBox(const void* map, uint32_t shared, Barrier barrier,
                                        const BoxStart& start) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier.address), "r"(start.at[0]), "r"(start.at[1]), "r"(start.at[2]),
      "r"(start.at[3]), "r"(start.at[4])
      : "memory");
}

// What `createpolicy.fractional.L2::evict_first` makes for all of a copy: it leaves the L2 cache
// first.
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;
// The same under such a policy.
__device__ __forceinline__ void CopyBox(const void* map, uint32_t shared, Barrier barrier,
                                        const BoxStart& start, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(map), "r"(barrier.address), "r"(start.at[0]), "r"(start.at[1]), "r"(start.at[2]),
      "r"(start.at[3]), "r"(start.at[4]), "l"(policy)
      : "memory");
}

// The same to this place in the shared memory of the cluster's blocks whose bits `blocks` has, each
// of whose barriers there counts all bytes.
__device__ __forceinline__ void CopyBoxToBlocks(const void* map, uint32_t shared, Barrier barrier,
                                                const BoxStart& start, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(map), "r"(barrier.address), "r"(start.at[0]), "r"(start.at[1]), "r"(start.at[2]),
      "r"(start.at[3]), "r"(start.at[4]), "h"(blocks)
      : "memory");
}

// `bytes` contiguous ones, a multiple of 16, from and to multiples of 16; `barrier` counts them.
__device__ __forceinline__ void CopyBytes(const void* global, uint32_t shared, Barrier barrier,
                                          uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier.address)
      : "memory");
}
// The same under such a policy.
__device__ __forceinline__ void CopyBytes(const void* global, uint32_t shared, Barrier barrier,
                                          uint32_t bytes, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier.address), "l"(policy)
      : "memory");
}

// Four values to this place in the shared memory of the cluster's block `rank`, whose `barrier`
// there counts the bytes.
__device__ __forceinline__ void SendFour(uint32_t shared, Barrier barrier, uint32_t rank,
                                         const float4& values) {
  asm volatile(
      "{\n"
      ".reg .b32 place, counter;\n"
      "mapa.shared::cluster.u32 place, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
      " [place], {%3, %4, %5, %6}, [counter];\n"
      "}\n" ::"r"(shared),
      "r"(barrier.address), "r"(rank), "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w)
      : "memory");
}

// 16 bytes, of which the first `valid` are read and the others zero.
__device__ __forceinline__ void CopyPiece(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid)
               : "memory");
}
// 16 bytes, or zeros where `valid` is false; a length at run time costs four instructions more.
__device__ __forceinline__ void CopyWholePiece(uint32_t shared, const void* global, bool valid) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, p;\n}" ::"r"(shared),
      "l"(global), "r"(static_cast<uint32_t>(valid))
      : "memory");
}
// 4 bytes.
__device__ __forceinline__ void CopyWord(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
// 4 bytes, of which the first `valid` are read and the others zero.
__device__ __forceinline__ void CopyPartOfWord(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid)
               : "memory");
}
// What this thread has asked for since the last call is one group.
__device__ __forceinline__ void CommitPieces() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's groups but the last `kPending`.
template <int kPending>
__device__ __forceinline__ void AwaitPieces() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// One arrival on `barrier`, when all pieces and words that this thread has asked for are there.
__device__ __forceinline__ void ArriveAfterPieces(Barrier barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier.address)
               : "memory");
}

}  // namespace hopyard::sm90
