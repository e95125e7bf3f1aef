// SPDX-License-Identifier: Apache-2.0
// Between routing and permutation on Hopper: global ids -> segments of this rank, shared slots, the
// optional routing outputs; ids and weights that the caller computed are taken here as well.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"

namespace hopyard::permute {

// Where ids and weights come from: the routing kernel, or the caller.
enum class PlaceSource : uint8_t { kRouted, kPacked, kUnpacked };

// All pointers are device memory; optional ones are null.
struct PlaceSm90Args {
  PlaceSource source = PlaceSource::kRouted;
  int num_experts = 0;
  int top_k = 0;
  int shared = 0;
  ExpertMap local;
  int64_t max_tokens = 0;
  const int32_t* num_tokens = nullptr;  // read by the kernel, clamped to [0, max_tokens]
  const int32_t* packed_ids = nullptr;  // kPacked
  const int32_t* expert_ids = nullptr;  // kUnpacked
  const void* expert_weights = nullptr;
  DType expert_weights_dtype = DType::kFloat32;
  int32_t* ids = nullptr;  // [T, K]: input for kRouted, otherwise written
  float* weights = nullptr;
  int16_t* replay = nullptr;  // kPacked and kUnpacked only, as `load`
  void* load = nullptr;
  DType load_dtype = DType::kInt32;
  const int32_t* expert_table = nullptr;  // ExpertMap::kTable
  const void* shared_weights = nullptr;   // null: the constant
  DType shared_weights_dtype = DType::kFloat32;
  float shared_weight = 0.0F;
  float* slot_weights = nullptr;  // [T, K + S] out
  int32_t* local_slots = nullptr;
  int32_t* routing_ids = nullptr;  // [T, K + S] optional out
  float* routing_weights = nullptr;
};

// Enqueues the kernel on `stream` (a cudaStream_t). Throws Error{kCuda} when the launch fails.
void PlaceSm90(const PlaceSm90Args& args, void* stream);

}  // namespace hopyard::permute
