// SPDX-License-Identifier: Apache-2.0
#include <iterator>
#include <string>

#include <fmt/format.h>

#include "hopyard/tune.h"

#include "tune/field_text.h"
#include "tune/key_fields.h"

namespace hopyard {

TuningKey KeyOf(const MoeSpec& spec, const PlanOptions& options) {
  TuningKey key;
  key.hidden_size = spec.hidden_size;
  key.intermediate_size = spec.intermediate_size;
  key.num_experts = spec.num_experts;
  key.local_experts = spec.num_local_experts();
  key.local = spec.local.kind;
  key.top_k = spec.top_k;
  key.routing = spec.routing;
  key.activation = spec.activation.kind;
  key.weights = spec.weights;
  key.activations = spec.activations;
  if (spec.shared.count > 0) {
    key.shared = spec.shared;  // else its other fields mean nothing
  }
  key.router_weight_on_input = spec.router_weight_on_input;
  key.overlap_launches = options.overlap_launches;
  key.path = options.path;
  key.weight_orders = options.weight_orders;
  if (spec.shared.count == 0) {
    key.weight_orders.shared_gemm1 = ReadOrder::kKMajor;
    key.weight_orders.shared_gemm2 = ReadOrder::kKMajor;
  }
  return key;
}

std::string ToString(const TuningKey& key) {
  std::string text;
  tune::VisitFields(key, [&text](const char* name, const auto& field) {
    fmt::format_to(std::back_inserter(text), "{}{}={}", text.empty() ? "" : " ", name,
                   tune::FieldText(field));
  });
  return text;
}

}  // namespace hopyard
