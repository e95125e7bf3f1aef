// SPDX-License-Identifier: Apache-2.0
// configs.def as an array, and who launches each row: every family is a translation unit of its own
// that gives null for the rows of others.
#pragma once

#include <array>
#include <cstddef>
#include <iterator>
#include <string_view>

#include "gemm/sm90/config.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

struct KernelRow {
  std::string_view name;
  GemmConfig config;
};
inline constexpr KernelRow kConfigTable[] = {
#define HOPYARD_GEMM_CONFIG(name, ...) {#name, {__VA_ARGS__}},
#include "gemm/sm90/configs.def"
#undef HOPYARD_GEMM_CONFIG
};

// HOPYARD_KERNELS=dev defines the macro for host and device code alike.
constexpr bool IsBuilt([[maybe_unused]] const GemmConfig& config) {
#ifdef HOPYARD_KERNELS_DEV
  return IsInDevSubset(config);
#else
  return true;
#endif
}
constexpr size_t CountBuiltRows() {
  size_t count = 0;
  for (const KernelRow& row : kConfigTable) {
    count += IsBuilt(row.config) ? 1 : 0;
  }
  return count;
}
constexpr std::array<KernelRow, CountBuiltRows()> BuiltRows() {
  std::array<KernelRow, CountBuiltRows()> rows{};
  size_t at = 0;
  for (const KernelRow& row : kConfigTable) {
    if (IsBuilt(row.config)) {
      rows[at++] = row;
    }
  }
  return rows;
}
// The kernels of this build: indices into it are theirs everywhere.
inline constexpr auto kKernelRows = BuiltRows();

// What is kept per kernel and device is kept for so many devices of a process.
inline constexpr int kMaxDevices = 64;

// The device that a kernel is launched on.
struct LaunchDevice {
  int index = 0;
  int processors = 0;  // multiprocessors
};
using LaunchRow = void (*)(const GroupedGemmArgs& args, const LaunchDevice& device,
                           const device::Queue& queue);

// Null where the row is of another family.
LaunchRow LaunchOfBf16(int index);
LaunchRow LaunchOfFp8(int index);
LaunchRow LaunchOfFp8AsBf16(int index);
LaunchRow LaunchOfMxFp8AsBf16(int index);
LaunchRow LaunchOfMxFp4AsBf16(int index);
LaunchRow LaunchOfNvFp4AsBf16(int index);
LaunchRow LaunchOfMxInt4AsBf16(int index);
LaunchRow LaunchOfMxFp4AsFp8(int index);
LaunchRow LaunchOfNvFp4AsFp8(int index);

}  // namespace hopyard::gemm::sm90
