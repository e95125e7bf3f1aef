// SPDX-License-Identifier: Apache-2.0
// Argument rules of routing and permutation. All throw Error{kInvalidArgument}.
#pragma once

#include "hopyard/permute.h"
#include "hopyard/routing.h"

#include "spec/validate.h"

namespace hopyard::spec {

// A rule that can be applied to `num_experts` logits to choose `top_k`.
void ValidateRule(const RoutingRule& rule, int num_experts, int top_k);

// What errors call the arguments that another entry point has under another name.
struct RouteNames {
  const char* logits = "logits";
  const char* expert_ids = "expert_ids";
  const char* weights = "weights";
};

// One call of Route. Values are judged on the CPU only.
void ValidateRoute(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
                   const RouteOutputs& outputs, const Place& place, const RouteNames& names = {});

// Options alone: what MaxTiles and MaxRows need.
void ValidatePermuteOptions(int64_t num_slots, const PermuteOptions& options);

// One call of Permute.
void ValidatePermute(const TensorView& local_slots, const PermuteOptions& options,
                     const PermuteOutputs& outputs);

}  // namespace hopyard::spec
