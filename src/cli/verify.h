// SPDX-License-Identifier: Apache-2.0
// Comparison of a run with the double-precision oracle on sampled tokens.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/forward.h"

#include "cli/console.h"

namespace hopyard::cli {

struct VerifyInputs {
  const MoeSpec& spec;
  const Weights& weights;
  const MoeInputs& inputs;
  TensorView output;       // [T, H] bf16, the whole result
  TensorView routing_ids;  // [T, K + S] i32
};

// All conditions must hold: everything finite, expert ids a right selection, max error at most
// twice that of a plain implementation in the same formats plus a floor, and every sampled row
// within tolerance. Without tokens nothing is judged: `passed` is set, sampled_tokens is 0, and the
// texts say so.
struct Verification {
  bool passed = false;
  std::vector<std::string> failures;  // one line per broken condition
  int64_t sampled_tokens = 0;
  int64_t tied_tokens = 0;  // went to other experts than the oracle's, at scores that tie
  double max_error = 0.0;
  double plain_max_error = 0.0;
  double allowed_error = 0.0;
  double worst_row_error = 0.0;  // relative, Euclidean
  double row_tolerance = 0.0;
  int64_t worst_row = -1;
  double oracle_rms = 0.0;
};

// Largest relative row error that rounding activations to `format` explains.
[[nodiscard]] double RowTolerance(ActivationFormat format);

// Compares `samples` tokens, spread evenly, of a call with logits or given ids (kReplay).
[[nodiscard]] Verification Verify(const VerifyInputs& run, int64_t samples);

[[nodiscard]] Json ToJson(const Verification& verification);
[[nodiscard]] std::string ToText(const Verification& verification);

}  // namespace hopyard::cli
