// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory: boxes of a tensor by the copy engine, 16-byte pieces by
// threads.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "device/sm90/mbarrier.cuh"

namespace hopyard::sm90 {

__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (x, y, z), x innermost, of a 3-D tensor; its bytes count on `barrier`.
__device__ __forceinline__ void CopyBox(const CUtensorMap* map, uint32_t shared, Barrier barrier,
                                        int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier.address), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// 16 bytes, of which the first `valid` are read and the others zero.
__device__ __forceinline__ void CopyPiece(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid)
               : "memory");
}
__device__ __forceinline__ void CommitPieces() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void WaitPieces() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace hopyard::sm90
