// SPDX-License-Identifier: Apache-2.0
#include <array>

#include "device/cuda_check.h"
#include "gemm/sm90/grouped_gemm_sm90.h"
#include "gemm/sm90/rows.h"

namespace hopyard::gemm::sm90 {
namespace {

constexpr int kNumRows = static_cast<int>(std::size(kKernelRows));

std::array<LaunchRow, kNumRows> MakeLaunchTable() {
  constexpr LaunchRow (*kFamilies[])(int) = {
      LaunchOfBf16,        LaunchOfFp8,         LaunchOfFp8AsBf16,    LaunchOfMxFp8AsBf16,
      LaunchOfMxFp4AsBf16, LaunchOfNvFp4AsBf16, LaunchOfMxInt4AsBf16, LaunchOfMxFp4AsFp8};
  std::array<LaunchRow, kNumRows> table{};
  for (int i = 0; i < kNumRows; ++i) {
    for (const auto family : kFamilies) {
      const LaunchRow launch = family(i);
      table[static_cast<size_t>(i)] = launch != nullptr ? launch : table[static_cast<size_t>(i)];
    }
  }
  return table;
}

// Multiprocessors of the current device, asked once per device.
int Processors() {
  constexpr int kMaxDevices = 64;
  static std::array<int, kMaxDevices> known{};
  int device = 0;
  HOPYARD_CUDA(cudaGetDevice(&device));
  int count = device < kMaxDevices ? known[static_cast<size_t>(device)] : 0;
  if (count == 0) {
    HOPYARD_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < kMaxDevices) {
      known[static_cast<size_t>(device)] = count;
    }
  }
  return count;
}

}  // namespace

void RunGroupedGemm(int index, const GroupedGemmArgs& args, const device::Queue& queue) {
  static const std::array<LaunchRow, kNumRows> table = MakeLaunchTable();
  if (args.max_tiles > 0) {
    table[static_cast<size_t>(index)](args, Processors(), queue);
  }
}

}  // namespace hopyard::gemm::sm90
