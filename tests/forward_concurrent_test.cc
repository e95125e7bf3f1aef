// SPDX-License-Identifier: Apache-2.0
// Calls that run at the same time on one plan and one set of weights, with counters in common.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

constexpr int kCallers = 4;
constexpr int kCallsEach = 20;
constexpr int64_t kTokens = 4096;

// Every slot is skipped or remote but counted: the calls spend their time in the counters.
MoeSpec CountingSpec() {
  MoeSpec spec = TinySpec();
  spec.num_experts = 64;
  spec.local = {ExpertMap::Kind::kRange, 63, 1};
  return spec;
}

class SharedCounters : public ::testing::TestWithParam<RoutingInput> {};

TEST_P(SharedCounters, LoseNoSlot) {
  const MoeSpec spec = CountingSpec();
  const LayerWeights stored(SourceOf(spec));
  const Weights weights = stored.Make();
  PlanOptions options;
  options.max_tokens = kTokens;
  options.num_threads = 1;
  const Plan plan = MakePlan(spec, Device{}, options);
  LayerInputs inputs(spec, kTokens);
  // Two experts only: the callers meet at the same counters.
  std::vector<int32_t> ids(kTokens * spec.top_k);
  for (size_t slot = 0; slot < ids.size(); ++slot) {
    ids[slot] = static_cast<int32_t>(slot % 2);
  }
  if (GetParam() == RoutingInput::kPacked) {
    inputs.Packed(ids, MakeWeights(spec, kTokens));
  } else {
    inputs.Unpacked(ids, MakeWeights(spec, kTokens));
  }
  for (const DType dtype : {DType::kInt32, DType::kInt64}) {
    Arena arena;
    const TensorView load = arena.Array(dtype, {spec.num_experts});
    std::memset(load.data, 0, static_cast<size_t>(load.numel() * SizeOf(dtype)));
    std::atomic<int> ready{0};
    const auto call = [&] {
      GuardedBuffer workspace(plan.workspace_bytes());
      Arena outputs_memory;
      MoeOutputs outputs;
      outputs.output = outputs_memory.Array(DType::kBf16, {kTokens, spec.hidden_size});
      outputs.expert_load = load;
      ++ready;
      while (ready < kCallers) {
      }
      for (int i = 0; i < kCallsEach; ++i) {
        Forward(plan, weights, inputs.get(), outputs,
                {workspace.data(), static_cast<size_t>(workspace.bytes())});
      }
    };
    std::vector<std::thread> threads;
    for (int caller = 0; caller < kCallers; ++caller) {
      threads.emplace_back(call);
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (int64_t e = 0; e < spec.num_experts; ++e) {
      const int64_t got = dtype == DType::kInt32 ? load.as<int32_t>()[e] : load.as<int64_t>()[e];
      EXPECT_EQ(got, e < 2 ? kCallers * kCallsEach * kTokens * spec.top_k / 2 : 0) << e;
    }
    EXPECT_TRUE(arena.Intact());
  }
}

INSTANTIATE_TEST_SUITE_P(GivenIds, SharedCounters,
                         ::testing::Values(RoutingInput::kPacked, RoutingInput::kUnpacked),
                         [](const ::testing::TestParamInfo<RoutingInput>& mode) {
                           return mode.param == RoutingInput::kPacked ? "Packed" : "Unpacked";
                         });

}  // namespace
}  // namespace hopyard::test
