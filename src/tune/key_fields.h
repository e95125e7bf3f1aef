// SPDX-License-Identifier: Apache-2.0
// The one list of a key's fields and their names in files: its text, writing and reading go by it.
#pragma once

#include "hopyard/tune.h"

namespace hopyard::tune {

// visit(name, field) for each field of a key, which may be const.
template <class Key, class Visit>
void VisitFields(Key& key, Visit&& visit) {
  visit("hidden_size", key.hidden_size);
  visit("intermediate_size", key.intermediate_size);
  visit("num_experts", key.num_experts);
  visit("local_experts", key.local_experts);
  visit("local", key.local);
  visit("top_k", key.top_k);
  visit("routing.score", key.routing.score);
  visit("routing.weight", key.routing.weight);
  visit("routing.renormalise", key.routing.renormalise);
  visit("routing.use_bias", key.routing.use_bias);
  visit("routing.num_groups", key.routing.num_groups);
  visit("routing.top_groups", key.routing.top_groups);
  visit("routing.scaling_factor", key.routing.scaling_factor);
  visit("activation", key.activation);
  visit("weights", key.weights);
  visit("activations", key.activations);
  visit("shared.count", key.shared.count);
  visit("shared.per_token_weight", key.shared.per_token_weight);
  visit("shared.weight", key.shared.weight);
  visit("shared.weights", key.shared.weights);
  visit("router_weight_on_input", key.router_weight_on_input);
  visit("overlap_launches", key.overlap_launches);
  visit("path.ids", key.path.ids);
  visit("path.unfinalised", key.path.unfinalised);
  visit("path.replay", key.path.replay);
  visit("weight_orders.gemm1", key.weight_orders.gemm1);
  visit("weight_orders.gemm2", key.weight_orders.gemm2);
  visit("weight_orders.shared_gemm1", key.weight_orders.shared_gemm1);
  visit("weight_orders.shared_gemm2", key.weight_orders.shared_gemm2);
}

}  // namespace hopyard::tune
