// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel of a layer's call. For .cu files, and the GEMM's launchers that
// they instantiate.
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

#include "device/cuda_check.h"
#include "device/queue.h"

namespace hopyard::device {

struct Grid {
  unsigned blocks = 1;
  unsigned threads = 1;
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;     // blocks that run together; divides `blocks`
};

// Enqueues kernel(args). Throws Error{kCuda} when the launch fails. With queue.overlap the kernel
// may start early, so it must call what device/sm90/dependent.cuh has.
template <class Args>
void Launch(const Queue& queue, const Grid& grid, void (*kernel)(Args), const Args& args) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (queue.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {grid.cluster, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, args);
  if (launched != cudaSuccess) {
    // It is reported here: the caller's next look at the last error must not find it.
    static_cast<void>(cudaGetLastError());
  }
  HOPYARD_CUDA(launched);
}

}  // namespace hopyard::device
