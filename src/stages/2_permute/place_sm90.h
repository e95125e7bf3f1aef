// SPDX-License-Identifier: Apache-2.0
// Between routing and permutation on Hopper: takes ids and weights that the caller computed, and
// says for every slot, shared experts included, where on this rank it is computed and with which
// weight. One launch; the bits of the CPU backend.
#pragma once

#include <cstdint>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"

#include "device/queue.h"

namespace hopyard::permute {

// Where ids and weights come from.
enum class PlaceSource : uint8_t {
  kRouted,    // ids and weights hold what the routing stage wrote
  kPacked,    // packed_ids: (id << 16) | bf16 bits of the weight
  kUnpacked,  // expert_ids and expert_weights
};

// One call; every pointer is device memory, rows are contiguous, optional ones are null. T =
// max_tokens, K = top_k, S = shared. An id outside [0, num_experts) skips its slot.
struct PlaceSm90Args {
  PlaceSource source = PlaceSource::kRouted;
  int num_experts = 0;
  int top_k = 0;
  int shared = 0;   // shared experts: slots top_k .. top_k + shared - 1 of every token
  ExpertMap local;  // shared experts follow the local ones
  int64_t max_tokens = 0;
  const int32_t* num_tokens = nullptr;  // read by the kernel, clamped to [0, max_tokens]
  const int32_t* packed_ids = nullptr;  // [T, K]
  const int32_t* expert_ids = nullptr;  // [T, K]
  const void* expert_weights = nullptr;
  DType expert_weights_dtype = DType::kFloat32;  // or kBf16
  int32_t* ids = nullptr;                        // [T, K]; input of kRouted, otherwise written
  float* weights = nullptr;                      // as ids
  int16_t* replay = nullptr;                     // [T, K], not of kRouted
  void* load = nullptr;                          // [num_experts] counters, not of kRouted: added to
  DType load_dtype = DType::kInt32;              // or kInt64
  const int32_t* expert_table = nullptr;         // [num_experts], of ExpertMap::Kind::kTable
  const void* shared_weights = nullptr;          // [T, S]; null: shared_weight
  DType shared_weights_dtype = DType::kFloat32;  // or kBf16
  float shared_weight = 1.0F;
  float* slot_weights = nullptr;     // [T, K + S]
  int32_t* local_slots = nullptr;    // [T, K + S], -1 = computed elsewhere or nowhere
  int32_t* routing_ids = nullptr;    // [T, K + S] optional, logical ids
  float* routing_weights = nullptr;  // [T, K + S] optional
};

// Enqueues the kernel. Throws Error{kCuda} when the launch fails.
void PlaceSm90(const PlaceSm90Args& args, const device::Queue& queue);

}  // namespace hopyard::permute
