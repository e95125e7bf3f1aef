// SPDX-License-Identifier: Apache-2.0
// What describes weights on the device to the kernels: tensor maps, tables of pointers, activation
// parameters, row exponents, and codes that are packed. The other weights stay where the caller put
// them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "device/memory.h"
#include "gemm/sm90/grouped_gemm_sm90.h"
#include "plan/backend_sm90.h"

namespace hopyard::sm90 {

// One matrix per expert of a group.
struct GroupMatrix {
  gemm::sm90::MatrixArgs args;
  gemm::sm90::MapShape shape;           // of all experts; `values` is the first one's
  const void* const* values = nullptr;  // device [experts], where row exponents are computed
  uint8_t* row_exponents = nullptr;     // device [experts][rows], or null
  gemm::PackedOrder packed;             // of the first expert, where args.packed is
};

// Local or shared experts; per-segment arrays are device memory and begin with the group's first.
struct Group {
  int32_t segment_begin = 0;
  int32_t segment_end = 0;
  GroupMatrix first;   // gate, or GEMM1's only matrix
  GroupMatrix second;  // up
  GroupMatrix down;
  const float* alpha = nullptr;  // null: neutral for every expert
  const float* beta = nullptr;
  const float* limit = nullptr;
  const float* gemm2_input_scale = nullptr;
  int64_t gemm2_input_scale_stride = 0;
};

struct DeviceWeights {
  Group routed;
  Group shared;
  const float* gemm1_input_scale = nullptr;
  std::vector<device::Buffer> tables;
};

// The device of `weights` must be the current one. Synchronises.
[[nodiscard]] std::shared_ptr<const DeviceWeights> MakeDeviceWeights(const Weights::Impl& weights);

// Writes a slice and what follows from it, in stream order.
void WriteSlice(const Weights::Impl& weights, const Update& update, void* stream);

}  // namespace hopyard::sm90
