// SPDX-License-Identifier: Apache-2.0
#include "spec/names.h"

namespace hopyard::spec {

std::string_view NameOf(RoutingScore score) {
  switch (score) {
    case RoutingScore::kLogit:
      return "logit";
    case RoutingScore::kSoftmax:
      return "softmax";
    case RoutingScore::kSigmoid:
      return "sigmoid";
    case RoutingScore::kSqrtSoftplus:
      return "sqrt_softplus";
  }
  return "?";
}

std::string_view NameOf(RoutingWeight weight) {
  switch (weight) {
    case RoutingWeight::kScore:
      return "score";
    case RoutingWeight::kSoftmaxSelected:
      return "softmax_selected";
    case RoutingWeight::kSigmoidSelected:
      return "sigmoid_selected";
  }
  return "?";
}

std::string_view NameOf(Renormalise renormalise) {
  switch (renormalise) {
    case Renormalise::kNone:
      return "none";
    case Renormalise::kSumPlusEpsilon:
      return "sum_plus_epsilon";
    case Renormalise::kSumAtLeast:
      return "sum_at_least";
  }
  return "?";
}

std::string_view NameOf(ExpertMap::Kind kind) {
  switch (kind) {
    case ExpertMap::Kind::kAll:
      return "all";
    case ExpertMap::Kind::kRange:
      return "range";
    case ExpertMap::Kind::kTable:
      return "table";
  }
  return "?";
}

}  // namespace hopyard::spec
