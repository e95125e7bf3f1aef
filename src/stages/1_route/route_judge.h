// SPDX-License-Identifier: Apache-2.0
// Whether a selection of experts is right: the oracle's own, or one that FP32 scores may give.
#pragma once

#include <cstdint>
#include <vector>

#include "hopyard/routing.h"

namespace hopyard::route {

// Scores of every expert of one token in double, without and with the rule's bias; NaN where the
// logit is NaN.
struct SelectionScores {
  std::vector<double> plain;
  std::vector<double> biased;  // what selection ranks
};
[[nodiscard]] SelectionScores SelectionScoresRef(const RoutingRule& rule, const RouteInputs& inputs,
                                                 int64_t token);

enum class SelectionMatch : uint8_t {
  kEqual,      // the ids and order of RouteRef
  kTied,       // others, but every choice that differs is between scores within 4 ulp of FP32
  kDifferent,  // wrong
};

// Judges ids [K] of one token that were selected from logits (no forced ids, no table). A row that
// holds a NaN knows no ties: its ids must be equal.
[[nodiscard]] SelectionMatch JudgeSelection(const RoutingRule& rule, const RouteInputs& inputs,
                                            int64_t token, const std::vector<int32_t>& ids);

}  // namespace hopyard::route
