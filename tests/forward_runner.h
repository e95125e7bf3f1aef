// SPDX-License-Identifier: Apache-2.0
// Runs hopyard::Forward the hostile way (poisoned workspace of exactly the planned size, poisoned
// outputs, canaries around everything) and judges it against the oracle.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/error.h"
#include "hopyard/forward.h"

#include "tests/inputs.h"
#include "tests/numerics.h"
#include "tests/weights.h"

namespace hopyard::test {

struct RunOptions {
  PlanOptions plan;         // max_tokens 0: the number of tokens
  int64_t width = 0;        // output columns; 0: H
  bool accumulate = false;  // onto `initial`
  std::vector<uint16_t> initial;
  bool extras = true;      // ask for every optional output
  bool no_output = false;  // rows instead
  bool replay = true;      // among the extras
  bool rows = true;
  bool activation = true;
  int64_t spare_replay_rows = 3;
  int16_t replay_poison = -1;  // every element of replay before the call
  DType load_dtype = DType::kInt32;
};

// Contents of every output; those not asked for stay empty. Poison shows as 0xFFFF or -1.
struct RunResult {
  std::vector<uint16_t> output;  // [T, W]
  std::vector<int16_t> replay;   // [T + spare, K]
  std::vector<int32_t> load;     // [E], what the call added
  std::vector<float> weights;    // [T, K + S]
  std::vector<int32_t> ids;
  std::vector<uint16_t> rows;        // [T * (K + S), H]
  std::vector<int32_t> slot_to_row;  // [T, K + S]
  std::vector<uint16_t> activation;  // [T * (K + S), I]
  std::string kernel;                // the chosen one
};

// The outputs that `options` ask for in host memory, poisoned or preset.
struct OutputBuffers {
  Arena arena;
  MoeOutputs outputs;
};
void AddOutputs(const MoeSpec& spec, int64_t tokens, const RunOptions& options,
                OutputBuffers* buffers);
// The contents of outputs that AddOutputs has made.
[[nodiscard]] RunResult ResultOf(const MoeOutputs& outputs);
// The plan's options with their capacity.
[[nodiscard]] PlanOptions PlanOptionsOf(const RunOptions& options, int64_t tokens);

[[nodiscard]] RunResult RunLayer(const MoeSpec& spec, const Weights& weights,
                                 const MoeInputs& inputs, const RunOptions& options = {});

// `result` against the oracle, which takes the ids that `result` reports. `tokens` names the rows
// to judge; empty: all.
[[nodiscard]] ::testing::AssertionResult MatchesOracle(const MoeSpec& spec, const Weights& weights,
                                                       const MoeInputs& inputs,
                                                       const RunResult& result,
                                                       const std::vector<int64_t>& tokens = {});

// The weighted sum over the unfinalised rows, as MoeOutputs::rows documents it.
[[nodiscard]] std::vector<uint16_t> FinalizeByHand(const MoeSpec& spec, const RunResult& result,
                                                   int64_t tokens);

// Names of the kernels that run here for the spec.
[[nodiscard]] std::vector<std::string> RunnableKernels(const MoeSpec& spec);

// Calls `action` and returns the Error's kind and message; fails the test when none is thrown.
struct Caught {
  ErrorKind kind = ErrorKind::kInternal;
  std::string message;
};
[[nodiscard]] Caught CatchError(const std::function<void()>& action);

}  // namespace hopyard::test
