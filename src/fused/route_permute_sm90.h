// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 and the rounding of hidden states, which all come ahead of the first GEMM, in as
// few launches as the number of tokens allows: the outputs of RouteSm90, PlaceSm90, PermuteSm90 and
// RoundRowsSm90 in a row, bit for bit.
#pragma once

#include "device/queue.h"
#include "stages/1_route/route_sm90.h"
#include "stages/2_permute/permute_sm90.h"
#include "stages/2_permute/place_sm90.h"
#include "stages/3_gemm1/rows_sm90.h"

namespace hopyard::fused {

// Three calls with the same tokens: max_tokens, num_tokens; route.ids and route.weights are
// place.ids and place.weights, place.local_slots is permute.local_slots.
struct RoutePermuteCalls {
  bool routes = true;  // false: no routing, place.source says where the caller's choices are
  route::RouteSm90Args route;
  permute::PlaceSm90Args place;
  permute::PermuteSm90Args permute;
};

inline constexpr int kMaxRoundings = 2;

// What is rounded reads and writes nothing of the other calls.
struct RoutePermuteArgs : RoutePermuteCalls {
  gemm1::RoundRowsArgs rounding[kMaxRoundings];
  int roundings = 0;
};

enum class RoutePermuteWay : uint8_t {
  kOneBlock,    // one launch: one block routes, places and permutes, others round
  kTokenBlock,  // two, or four beyond kPermuteChunk slots: a block per token routes and places it,
                // others round; then PermuteSm90
  kApart,       // each call by itself
};
[[nodiscard]] RoutePermuteWay WayFor(const RoutePermuteArgs& args);

// Enqueues the kernels. Precondition: `way` is WayFor(args), or kApart. Throws Error{kCuda} when a
// launch fails.
void RoutePermuteSm90(const RoutePermuteArgs& args, RoutePermuteWay way,
                      const device::Queue& queue);

}  // namespace hopyard::fused
