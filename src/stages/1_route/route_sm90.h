// SPDX-License-Identifier: Apache-2.0
// Stage 1 on Hopper: one launch for any number of tokens, experts and slots; the bits of RouteCpu.
#pragma once

#include <cstdint>

#include "device/queue.h"
#include "stages/1_route/route_row.h"

namespace hopyard::route {

// One call; every pointer is device memory, rows are contiguous. Meaning as in RouteInputs and
// RouteOutputs; optional pointers are null.
struct RouteSm90Args {
  RoutingRule rule;
  int num_experts = 0;
  int top_k = 0;
  IdSource source = IdSource::kSelect;
  DType logits_dtype = DType::kFloat32;
  DType bias_dtype = DType::kFloat32;
  DType forced_dtype = DType::kInt32;
  DType token_dtype = DType::kInt32;
  DType weights_dtype = DType::kFloat32;
  DType load_dtype = DType::kInt32;
  int64_t max_tokens = 0;
  const int32_t* num_tokens = nullptr;  // read by the kernel, clamped to [0, max_tokens]
  const void* logits = nullptr;
  const void* bias = nullptr;
  const void* forced_ids = nullptr;
  const void* token_ids = nullptr;
  const int32_t* table = nullptr;
  int64_t table_rows = 0;
  int32_t* ids = nullptr;
  void* weights = nullptr;
  int16_t* replay = nullptr;
  void* load = nullptr;
};

// Enqueues the kernel. Throws Error{kCuda} when the launch fails.
void RouteSm90(const RouteSm90Args& args, const device::Queue& queue);

}  // namespace hopyard::route
