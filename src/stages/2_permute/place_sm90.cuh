// SPDX-License-Identifier: Apache-2.0
// A slot by one thread: what the caller or the routing chose, and where it is computed.
#pragma once

#include <cstdint>

#include "device/sm90/numbers.cuh"
#include "stages/2_permute/place_sm90.h"

namespace hopyard::permute {

// A slot's logical expert (-1: skipped) and router weight.
struct Choice {
  int32_t id;
  float weight;
};

__device__ __forceinline__ float LoadWeight(const void* data, DType dtype, int64_t at) {
  return dtype == DType::kBf16 ? sm90::WidenBf16(static_cast<const uint16_t*>(data)[at])
                               : static_cast<const float*>(data)[at];
}

__device__ __forceinline__ int32_t LocalSlotOf(const PlaceSm90Args& args, int32_t id) {
  const bool all = args.local.kind == ExpertMap::Kind::kAll;
  const int32_t count = all ? args.num_experts : args.local.count;
  int32_t slot = id;
  if (args.local.kind == ExpertMap::Kind::kRange) {
    slot = id - args.local.offset;
  } else if (args.local.kind == ExpertMap::Kind::kTable) {
    slot = id >= 0 && id < args.num_experts ? args.expert_table[id] : -1;
  }
  return slot >= 0 && slot < count ? slot : -1;
}

// What the caller computed for choice `at` of [T, K], recorded and counted.
__device__ __forceinline__ Choice TakeChoice(const PlaceSm90Args& args, int64_t at) {
  Choice choice;
  if (args.source == PlaceSource::kPacked) {
    // The arithmetic shift keeps negative ids negative.
    const int32_t word = args.packed_ids[at];
    choice.id = word >> 16;
    choice.weight = sm90::WidenBf16(static_cast<uint16_t>(word & 0xFFFF));
  } else {
    choice.id = args.expert_ids[at];
    choice.weight = LoadWeight(args.expert_weights, args.expert_weights_dtype, at);
  }
  if (choice.id < 0 || choice.id >= args.num_experts) {
    choice = {-1, 0.0F};
  }
  args.ids[at] = choice.id;
  args.weights[at] = choice.weight;
  if (args.replay != nullptr) {
    args.replay[at] = static_cast<int16_t>(choice.id);
  }
  // Integer sums: any order gives the same counters.
  if (args.load != nullptr && choice.id >= 0) {
    if (args.load_dtype == DType::kInt64) {
      atomicAdd(static_cast<unsigned long long*>(args.load) + choice.id, 1ULL);
    } else {
      atomicAdd(static_cast<int32_t*>(args.load) + choice.id, 1);
    }
  }
  return choice;
}

// What the slot holds.
__device__ __forceinline__ Choice ChoiceOf(const PlaceSm90Args& args, int64_t token, int slot) {
  if (slot < args.top_k) {
    const int64_t at = token * args.top_k + slot;
    return args.source == PlaceSource::kRouted ? Choice{args.ids[at], args.weights[at]}
                                               : TakeChoice(args, at);
  }
  const int shared = slot - args.top_k;
  const float weight = args.shared_weights == nullptr
                           ? args.shared_weight
                           : LoadWeight(args.shared_weights, args.shared_weights_dtype,
                                        token * args.shared + shared);
  return {args.num_experts + shared, weight};
}

// Writes the slot; returns where it is computed: the local slot, or -1.
__device__ __forceinline__ int32_t PutSlot(const PlaceSm90Args& args, int64_t token, int slot,
                                           const Choice& choice) {
  const bool all = args.local.kind == ExpertMap::Kind::kAll;
  const int32_t local = slot < args.top_k ? LocalSlotOf(args, choice.id)
                                          : (all ? args.num_experts : args.local.count) +
                                                (choice.id - args.num_experts);
  const int64_t out = token * (args.top_k + args.shared) + slot;
  args.slot_weights[out] = choice.weight;
  args.local_slots[out] = local;
  if (args.routing_ids != nullptr) {
    args.routing_ids[out] = choice.id;
  }
  if (args.routing_weights != nullptr) {
    args.routing_weights[out] = choice.weight;
  }
  return local;
}

__device__ __forceinline__ int32_t PlaceSlot(const PlaceSm90Args& args, int64_t token, int slot) {
  return PutSlot(args, token, slot, ChoiceOf(args, token, slot));
}

}  // namespace hopyard::permute
