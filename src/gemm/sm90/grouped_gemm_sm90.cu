// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <atomic>

#include "device/cuda_check.h"
#include "gemm/sm90/grouped_gemm_sm90.h"
#include "gemm/sm90/rows.h"

namespace hopyard::gemm::sm90 {
namespace {

constexpr int kNumRows = static_cast<int>(std::size(kKernelRows));

std::array<LaunchRow, kNumRows> MakeLaunchTable() {
  constexpr LaunchRow (*kFamilies[])(int) = {
      LaunchOfBf16,         LaunchOfFp8,         LaunchOfFp8AsBf16,
      LaunchOfMxFp8AsBf16,  LaunchOfMxFp4AsBf16, LaunchOfNvFp4AsBf16,
      LaunchOfMxInt4AsBf16, LaunchOfMxFp4AsFp8,  LaunchOfNvFp4AsFp8};
  std::array<LaunchRow, kNumRows> table{};
  for (int i = 0; i < kNumRows; ++i) {
    for (const auto family : kFamilies) {
      const LaunchRow launch = family(i);
      table[static_cast<size_t>(i)] = launch != nullptr ? launch : table[static_cast<size_t>(i)];
    }
  }
  return table;
}

// The current device; its multiprocessors are asked for once.
LaunchDevice CurrentDevice() {
  static std::array<std::atomic<int>, kMaxDevices> known{};
  LaunchDevice device;
  HOPYARD_CUDA(cudaGetDevice(&device.index));
  HOPYARD_CHECK(device.index < kMaxDevices, kCuda)
      << "device " << device.index << "; kernels are prepared for the first " << kMaxDevices;
  std::atomic<int>& count = known[static_cast<size_t>(device.index)];
  device.processors = count.load(std::memory_order_relaxed);
  if (device.processors == 0) {
    HOPYARD_CUDA(
        cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, device.index));
    count.store(device.processors, std::memory_order_relaxed);
  }
  return device;
}

}  // namespace

void RunGroupedGemm(int index, const GroupedGemmArgs& args, const device::Queue& queue) {
  static const std::array<LaunchRow, kNumRows> table = MakeLaunchTable();
  if (args.max_tiles > 0) {
    table[static_cast<size_t>(index)](args, CurrentDevice(), queue);
  }
}

}  // namespace hopyard::gemm::sm90
