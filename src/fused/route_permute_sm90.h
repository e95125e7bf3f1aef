// SPDX-License-Identifier: Apache-2.0
// Stages 1 and 2 of a few tokens in one launch by one block: the outputs of RouteSm90, PlaceSm90
// and PermuteSm90 in a row, bit for bit.
#pragma once

#include "device/queue.h"
#include "stages/1_route/route_sm90.h"
#include "stages/2_permute/permute_sm90.h"
#include "stages/2_permute/place_sm90.h"

namespace hopyard::fused {

// The three calls with the same tokens: max_tokens, num_tokens; route.ids and route.weights are
// place.ids and place.weights, place.local_slots is permute.local_slots.
struct RoutePermuteArgs {
  bool routes = true;  // false: no routing, place.source says where the caller's choices are
  route::RouteSm90Args route;
  permute::PlaceSm90Args place;
  permute::PermuteSm90Args permute;
};

// Whether one block is meant to take these tokens, and can.
[[nodiscard]] bool FitsOneBlock(const RoutePermuteArgs& args);

// Enqueues the kernel. Precondition: FitsOneBlock. Throws Error{kCuda} when the launch fails.
void RoutePermuteSm90(const RoutePermuteArgs& args, const device::Queue& queue);

}  // namespace hopyard::fused
