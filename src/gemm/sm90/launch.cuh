// SPDX-License-Identifier: Apache-2.0
// Launchers of one family's rows, for the translation unit of that family.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>

#include "device/launch.cuh"
#include "gemm/sm90/kernel.cuh"
#include "gemm/sm90/plain.h"
#include "gemm/sm90/rows.h"

namespace hopyard::gemm::sm90 {
namespace {

// Row `kIndex` of the table: the kernel's name in a profile, and its traits.
template <int kIndex, bool kIsPlain>
struct TableRow {
  static constexpr GemmConfig kConfig = kKernelRows[kIndex].config;
  static constexpr bool kPlain = kIsPlain;
  static_assert(IsValid(kConfig), "a row nobody can run");
};

template <class Row>
void Launch(const GroupedGemmArgs& args, const LaunchDevice& device, const device::Queue& queue) {
  constexpr GemmConfig kConfig = Row::kConfig;
  // Once per kernel and device; the attribute holds from then on. Doing it twice does no harm.
  static std::array<std::atomic<bool>, kMaxDevices> prepared{};
  std::atomic<bool>& done = prepared[static_cast<size_t>(device.index)];
  if (!done.load(std::memory_order_relaxed)) {
    HOPYARD_CUDA(cudaFuncSetAttribute(GroupedGemmKernel<Row>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      SharedBytes(Row::kConfig)));
    done.store(true, std::memory_order_relaxed);
  }
  const int64_t blocks = (args.features + FeaturesPerBlock(kConfig) - 1) /
                         FeaturesPerBlock(kConfig) * args.max_tiles * kConfig.k_parts;
  // Tiles come in whole clusters, and so do the places for them.
  const int64_t places =
      device.processors / kConfig.cluster * kConfig.cluster * BlocksPerProcessor(kConfig);
  constexpr auto kCluster = static_cast<unsigned>(BlocksPerCluster(kConfig));
  const auto grid = static_cast<unsigned>(std::min(places, blocks));
  device::Launch(queue, {grid, ThreadsPerBlock(kConfig), SharedBytes(kConfig), kCluster},
                 GroupedGemmKernel<Row>, args);
}

template <int kIndex>
void LaunchEither(const GroupedGemmArgs& args, const LaunchDevice& device,
                  const device::Queue& queue) {
  const bool plain = IsPlain(kKernelRows[kIndex].config, args);
  (plain ? &Launch<TableRow<kIndex, true>> : &Launch<TableRow<kIndex, false>>)(args, device, queue);
}

template <Family kFamily, int kIndex>
LaunchRow FindLaunch(int index) {
  if constexpr (kIndex < static_cast<int>(std::size(kKernelRows))) {
    if constexpr (kKernelRows[kIndex].config.family == kFamily) {
      if (index == kIndex) {
        return &LaunchEither<kIndex>;
      }
    }
    return FindLaunch<kFamily, kIndex + 1>(index);
  } else {
    return nullptr;
  }
}

}  // namespace
}  // namespace hopyard::gemm::sm90
