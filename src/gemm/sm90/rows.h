// SPDX-License-Identifier: Apache-2.0
// configs.def as an array, and who launches each row: every family is a translation unit of its own
// that gives an array as long, with null for the rows of others.
#pragma once

#include "gemm/sm90/config.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

struct KernelRow {
  std::string_view name;
  GemmConfig config;
};
inline constexpr KernelRow kKernelRows[] = {
#define HOPYARD_GEMM_CONFIG(name, ...) {#name, {__VA_ARGS__}},
#include "gemm/sm90/configs.def"
#undef HOPYARD_GEMM_CONFIG
};

// Enqueues with at most `processors` blocks.
using LaunchRow = void (*)(const GroupedGemmArgs& args, int processors, const device::Queue& queue);

// Null where the row is of another family.
LaunchRow LaunchOfBf16(int index);
LaunchRow LaunchOfFp8(int index);
LaunchRow LaunchOfFp8AsBf16(int index);
LaunchRow LaunchOfMxFp8AsBf16(int index);
LaunchRow LaunchOfMxFp4AsBf16(int index);
LaunchRow LaunchOfNvFp4AsBf16(int index);
LaunchRow LaunchOfMxInt4AsBf16(int index);
LaunchRow LaunchOfMxFp4AsFp8(int index);

}  // namespace hopyard::gemm::sm90
