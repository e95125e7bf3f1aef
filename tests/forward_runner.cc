// SPDX-License-Identifier: Apache-2.0
#include "tests/forward_runner.h"

#include <algorithm>
#include <cstring>

#include "formats/codes.h"
#include "stages/layer_ref.h"

namespace hopyard::test {
namespace {

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

template <class T>
std::vector<T> Contents(const TensorView& view) {
  if (!view.defined()) {
    return {};
  }
  return {view.as<const T>(), view.as<const T>() + view.numel()};
}

// Counters as the call finds them: 64-bit ones stand where 32 bits would overflow.
constexpr int32_t kLoadBase32 = 0;
constexpr int64_t kLoadBase64 = int64_t{1} << 40;

std::vector<int32_t> AddedLoad(const TensorView& load) {
  if (!load.defined() || load.dtype == DType::kInt32) {
    return Contents<int32_t>(load);
  }
  std::vector<int32_t> added;
  for (const int64_t count : Contents<int64_t>(load)) {
    added.push_back(static_cast<int32_t>(count - kLoadBase64));
  }
  return added;
}

}  // namespace

void AddOutputs(const MoeSpec& spec, int64_t tokens, const RunOptions& options,
                OutputBuffers* buffers) {
  MoeOutputs& out = buffers->outputs;
  Arena& arena = buffers->arena;
  const int64_t slots = spec.slots_per_token();
  const int64_t width = options.width == 0 ? spec.hidden_size : options.width;
  if (!options.no_output) {
    out.output = arena.Array(DType::kBf16, {tokens, width});
    if (!options.initial.empty()) {
      std::copy(options.initial.begin(), options.initial.end(), out.output.as<uint16_t>());
    }
    out.accumulate = options.accumulate;
  }
  if (!options.extras && !options.no_output) {
    return;
  }
  out.routing_ids = arena.Array(DType::kInt32, {tokens, slots});
  out.routing_weights = arena.Array(DType::kFloat32, {tokens, slots});
  if (options.rows) {
    out.rows = arena.Array(DType::kBf16, {tokens * slots, spec.hidden_size});
  }
  out.slot_to_row = arena.Array(DType::kInt32, {tokens, slots});
  if (options.extras && options.replay) {
    out.replay = arena.Array(DType::kInt16, {tokens + options.spare_replay_rows, spec.top_k});
    std::fill_n(out.replay.as<int16_t>(), out.replay.numel(), options.replay_poison);
  }
  if (options.extras) {
    out.expert_load = arena.Array(options.load_dtype, {spec.num_experts});
    if (options.load_dtype == DType::kInt64) {
      std::fill_n(out.expert_load.as<int64_t>(), spec.num_experts, kLoadBase64);
    } else {
      std::fill_n(out.expert_load.as<int32_t>(), spec.num_experts, kLoadBase32);
    }
  }
  if (options.extras && options.activation) {
    out.gemm1_activation = arena.Array(DType::kBf16, {tokens * slots, spec.intermediate_size});
  }
}

RunResult ResultOf(const MoeOutputs& outputs) {
  RunResult result;
  result.output = Contents<uint16_t>(outputs.output);
  result.replay = Contents<int16_t>(outputs.replay);
  result.load = AddedLoad(outputs.expert_load);
  result.weights = Contents<float>(outputs.routing_weights);
  result.ids = Contents<int32_t>(outputs.routing_ids);
  result.rows = Contents<uint16_t>(outputs.rows);
  result.slot_to_row = Contents<int32_t>(outputs.slot_to_row);
  result.activation = Contents<uint16_t>(outputs.gemm1_activation);
  return result;
}

PlanOptions PlanOptionsOf(const RunOptions& options, int64_t tokens) {
  PlanOptions plan = options.plan;
  if (plan.max_tokens == 0) {
    plan.max_tokens = std::max<int64_t>(1, tokens);
  }
  return plan;
}

RunResult RunLayer(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs,
                   const RunOptions& options) {
  const int64_t tokens = inputs.hidden_states.shape[0];
  const Plan plan = MakePlan(spec, Device{}, PlanOptionsOf(options, tokens));
  OutputBuffers buffers;
  AddOutputs(spec, tokens, options, &buffers);
  const GuardedBuffer workspace(plan.workspace_bytes());
  Forward(plan, weights, inputs, buffers.outputs,
          Workspace{workspace.data(), Index(workspace.bytes())});
  EXPECT_TRUE(workspace.Intact()) << "Forward wrote outside of its workspace";
  EXPECT_TRUE(buffers.arena.Intact()) << "Forward wrote outside of an output";
  RunResult result = ResultOf(buffers.outputs);
  result.kernel = plan.Explain().Chosen();
  return result;
}

::testing::AssertionResult MatchesOracle(const MoeSpec& spec, const Weights& weights,
                                         const MoeInputs& inputs, const RunResult& result,
                                         const std::vector<int64_t>& tokens) {
  const int64_t count = inputs.hidden_states.shape[0];
  if (count == 0) {
    return ::testing::AssertionSuccess();
  }
  const int64_t width = static_cast<int64_t>(result.output.size()) / count;
  ref::LayerRefOptions options;
  options.tokens = tokens;
  if (!result.ids.empty()) {
    options.forced_ids =
        TensorView::Contiguous(result.ids.data(), DType::kInt32, {count, spec.slots_per_token()});
  }
  const ref::LayerRefPair pair = ref::LayerRefBoth(spec, weights, inputs, width, options);
  const std::vector<double> all = FromBf16(result.output);
  Judged judged{{}, pair.exact.output, pair.plain.output, width};
  for (const int64_t token : pair.exact.tokens) {
    judged.out.insert(judged.out.end(), all.begin() + token * width,
                      all.begin() + (token + 1) * width);
  }
  return Accurate(judged, ToleranceOf(spec.activations));
}

std::vector<uint16_t> FinalizeByHand(const MoeSpec& spec, const RunResult& result, int64_t tokens) {
  const int64_t slots = spec.slots_per_token();
  const int64_t hidden = spec.hidden_size;
  std::vector<uint16_t> output(Index(tokens * hidden));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < hidden; ++c) {
      float sum = 0.0F;
      for (int64_t slot = t * slots; slot < (t + 1) * slots; ++slot) {
        const int64_t row = result.slot_to_row[Index(slot)];
        if (row >= 0) {
          const float weight = spec.router_weight_on_input ? 1.0F : result.weights[Index(slot)];
          sum += weight * formats::DecodeBf16(result.rows[Index(row * hidden + c)]);
        }
      }
      output[Index(t * hidden + c)] = formats::EncodeBf16(sum);
    }
  }
  return output;
}

std::vector<std::string> RunnableKernels(const MoeSpec& spec) {
  PlanOptions options;
  options.max_tokens = 1;
  std::vector<std::string> names;
  for (const Candidate& candidate : Explain(spec, Device{}, options).candidates) {
    PlanOptions one = options;
    one.tactic = candidate.kernel;
    if (Explain(spec, Device{}, one).supported) {
      names.push_back(candidate.kernel);
    }
  }
  return names;
}

Caught CatchError(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return {error.kind(), error.message()};
  }
  ADD_FAILURE() << "no error was thrown";
  return {};
}

}  // namespace hopyard::test
