// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "device/cuda_check.h"
#include "gemm/slice_write.h"

namespace hopyard::gemm {
namespace {

constexpr int kThreads = 256;

// A thread an element: updates are rare, and every layout is a scatter of single bytes to some
// other one.
__global__ void __launch_bounds__(kThreads) WriteSliceKernel(const __grid_constant__ SliceWrite w) {
  const int64_t count = w.rows * w.cols;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t r = i / w.cols;
    const int64_t c = i - r * w.cols;
    const uint8_t* const from = w.source + r * w.row_stride + c * w.col_stride;
    uint8_t* const to = Destination(w, r, c);
    for (int64_t b = 0; b < w.size; ++b) {
      to[b] = from[b];
    }
  }
}

__global__ void __launch_bounds__(kThreads) PackKernel(const __grid_constant__ PackArgs args) {
  const int64_t count = args.from.rows * args.to.groups;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    PackRow(args, i / args.to.groups, i % args.to.groups);
  }
}

unsigned BlocksFor(int64_t count) {
  constexpr int64_t kMaxBlocks = 132 * 16;
  return static_cast<unsigned>(std::min(kMaxBlocks, (count + kThreads - 1) / kThreads));
}

}  // namespace

void WriteSliceSm90(const SliceWrite& write, void* stream) {
  const int64_t count = write.rows * write.cols;
  if (count == 0) {
    return;
  }
  WriteSliceKernel<<<BlocksFor(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(write);
  HOPYARD_CUDA(cudaGetLastError());
}

void PackSm90(const PackArgs& args, void* stream) {
  const int64_t count = args.from.rows * args.to.groups;
  if (count == 0) {
    return;
  }
  PackKernel<<<BlocksFor(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  HOPYARD_CUDA(cudaGetLastError());
}

}  // namespace hopyard::gemm
