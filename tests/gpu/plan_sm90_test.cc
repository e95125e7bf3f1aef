// SPDX-License-Identifier: Apache-2.0
// Plans for a GPU, made without one: which kernels for which tokens, and how much workspace. Errors
// about devices.
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {
namespace {

PlanOptions OptionsFor(int64_t max_tokens) {
  PlanOptions options;
  options.max_tokens = max_tokens;
  return options;
}

std::vector<Candidate> Chosen(const Explanation& explanation) {
  std::vector<Candidate> chosen;
  for (const Candidate& candidate : explanation.candidates) {
    if (candidate.chosen) {
      chosen.push_back(candidate);
    }
  }
  return chosen;
}

TEST(GpuPlan, EveryPairHasKernelsAndSaysWhen) {
  for (const FormatPair& pair : SupportedPairs()) {
    for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
      MoeSpec spec = SmallSpec(pair.weights, pair.activations);
      spec.activation.kind = kind;
      const Explanation explanation = Explain(spec, kGpu, OptionsFor(100000));
      ASSERT_TRUE(explanation.supported) << ToString(pair) << ": " << explanation.reason;
      EXPECT_GE(Chosen(explanation).size(), 1U) << ToString(pair);
      for (const Candidate& candidate : explanation.candidates) {
        EXPECT_NE(candidate.reason.find("GEMM"), std::string::npos) << candidate.kernel;
      }
    }
  }
}

TEST(GpuPlan, SmallPlansTakeSmallTiles) {
  const MoeSpec spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  const Explanation one = Explain(spec, kGpu, OptionsFor(1));
  for (const Candidate& candidate : Chosen(one)) {
    EXPECT_NE(candidate.reason.find("tokens 1..1"), std::string::npos) << candidate.reason;
  }
  EXPECT_GT(Chosen(Explain(spec, kGpu, OptionsFor(100000))).size(), Chosen(one).size());
  PlanOptions invariant = OptionsFor(100000);
  invariant.batch_invariant = true;
  EXPECT_EQ(Chosen(Explain(spec, kGpu, invariant)).size(), Chosen(one).size());
}

TEST(GpuPlan, ATacticNamesAKernelOrAPair) {
  const MoeSpec spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  const std::vector<Candidate> chosen = Chosen(Explain(spec, kGpu, OptionsFor(1)));
  ASSERT_EQ(chosen.size(), 2U);
  PlanOptions options = OptionsFor(1000);
  for (const std::string& tactic :
       {chosen[0].kernel, chosen[1].kernel, chosen[0].kernel + '+' + chosen[1].kernel,
        chosen[1].kernel + '+' + chosen[0].kernel}) {
    options.tactic = tactic;
    const Explanation explanation = Explain(spec, kGpu, options);
    if (explanation.supported) {
      EXPECT_EQ(Chosen(explanation).size(), 2U) << tactic;
    } else {
      EXPECT_NE(explanation.reason.find("known:"), std::string::npos) << explanation.reason;
    }
  }
  options.tactic = "no_such_kernel";
  const Caught caught = CatchError([&] { std::ignore = MakePlan(spec, kGpu, options); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_NE(caught.message.find("no_such_kernel"), std::string::npos);
  EXPECT_NE(caught.message.find(chosen[0].kernel), std::string::npos) << caught.message;
}

// A plan takes weights of either order: kernels for MN-major ones are named beside those that they
// stand in for, and their names mean the same tactic.
TEST(GpuPlan, KernelsOfMnMajorWeightsFollowTheOthers) {
  const MoeSpec spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  PlanOptions options = OptionsFor(1000);
  const std::vector<Candidate> all = Explain(spec, kGpu, options).candidates;
  std::string before;
  int twins = 0;
  for (const Candidate& candidate : all) {
    if (candidate.kernel.rfind("bf16_mn", 0) != 0) {
      before = candidate.kernel;
      continue;
    }
    EXPECT_FALSE(candidate.chosen);
    EXPECT_EQ(
        candidate.reason.rfind("takes the place of " + before + " in a GEMM whose weights", 0), 0U)
        << candidate.kernel << ": " << candidate.reason;
    ++twins;
  }
  EXPECT_GT(twins, 0);
  options.tactic = all[0].kernel;
  const std::vector<Candidate> forced = Chosen(Explain(spec, kGpu, options));
  options.tactic = all[1].kernel;
  for (const Candidate& candidate : Chosen(Explain(spec, kGpu, options))) {
    EXPECT_EQ(candidate.kernel.find("_mn_"), std::string::npos);
  }
  EXPECT_EQ(Chosen(Explain(spec, kGpu, options)).size(), forced.size());
}

TEST(GpuPlan, LimitsAreReasons) {
  MoeSpec spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  spec.hidden_size = 252;
  const Explanation explanation = Explain(spec, kGpu, OptionsFor(4));
  EXPECT_FALSE(explanation.supported);
  EXPECT_EQ(
      explanation.reason,
      "hidden_size=252; the GPU moves BF16 rows in pieces of 16 bytes and wants a multiple of "
      "8: zero-pad hidden states and weights, or plan for the CPU");
  EXPECT_TRUE(Explain(spec, Device{}, OptionsFor(4)).supported);
  const Caught caught = CatchError([&] {
    std::ignore = MakePlan(spec, Device{DeviceKind::kCuda, -1}, OptionsFor(4));
  });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(caught.message, "device.index=-1; wanted 0 or more, CUDA's number of the GPU");
}

TEST(GpuPlan, WorkspaceIsMonotoneAndCapped) {
  for (const FormatPair& pair : SupportedPairs()) {
    const MoeSpec spec = SmallSpec(pair.weights, pair.activations);
    int64_t previous = 0;
    for (const int64_t tokens : {1, 2, 9, 17, 33, 64, 65, 4096, 400000, 100000000}) {
      const int64_t bytes = MakePlan(spec, kGpu, OptionsFor(tokens)).workspace_bytes();
      EXPECT_GE(bytes, previous) << ToString(pair) << ", " << tokens << " tokens";
      previous = bytes;
    }
    PlanOptions capped = OptionsFor(1000);
    capped.workspace_cap = MakePlan(spec, kGpu, OptionsFor(300)).workspace_bytes();
    const Plan plan = MakePlan(spec, kGpu, capped);
    EXPECT_LE(plan.workspace_bytes(), capped.workspace_cap);
    EXPECT_GE(plan.tokens_per_chunk(), 300);
    capped.workspace_cap = 256;
    EXPECT_EQ(CatchError([&] { std::ignore = MakePlan(spec, kGpu, capped); }).kind,
              ErrorKind::kInvalidArgument);
  }
}

// Widths of published models and of their shards; one that did not run would have a reason.
TEST(GpuPlan, ModelSizesRun) {
  for (const FormatPair& pair : SupportedPairs()) {
    for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
      for (const int64_t hidden : {2688, 2880, 3584}) {
        for (const int64_t intermediate :
             {40, 80, 96, 160, 176, 192, 320, 352, 704, 928, 1856, 2880}) {
          MoeSpec spec = SmallSpec(pair.weights, pair.activations);
          spec.activation.kind = kind;
          spec.hidden_size = hidden;
          spec.intermediate_size = intermediate;
          const Explanation explanation = Explain(spec, kGpu, OptionsFor(512));
          EXPECT_TRUE(explanation.supported) << ToString(spec) << ": " << explanation.reason;
          EXPECT_GE(Chosen(explanation).size(), 1U) << ToString(spec);
        }
      }
    }
  }
}

// Ranks that tuned differently share one size, and a table may change without a new workspace.
TEST(GpuPlan, WorkspaceDoesNotDependOnTheTactic) {
  int tactics = 0;
  for (const FormatPair& pair : SupportedPairs()) {
    for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
      MoeSpec spec = SmallSpec(pair.weights, pair.activations);
      spec.activation.kind = kind;
      spec.shared = {1, false, 0.5F, spec.weights};
      // Either may need the more memory: what is rounded apart, or y.
      spec.intermediate_size = kind == ActivationKind::kSwiGlu ? 2 * spec.hidden_size : 128;
      for (const int64_t tokens : {1, 17, 5000}) {
        PlanOptions options = OptionsFor(tokens);
        const Plan untuned = MakePlan(spec, kGpu, options);
        for (const Candidate& candidate : untuned.Explain().candidates) {
          options.tactic = candidate.kernel;
          if (Explain(spec, kGpu, options).supported) {
            EXPECT_EQ(MakePlan(spec, kGpu, options).workspace_bytes(), untuned.workspace_bytes())
                << ToString(pair) << ", " << tokens << " tokens, " << candidate.kernel;
            ++tactics;
          }
        }
      }
    }
  }
  EXPECT_GT(tactics, 100);
}

TEST(GpuDevices, WeightsAndPlansAreOfOneDevice) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  TwinLayer layer(source);
  LayerInputs inputs(source.spec, 3);
  inputs.Logits();
  Caught caught = CatchError([&] { std::ignore = RunOnGpu(layer.cpu(), inputs.get()); });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(caught.message,
            "weights are on the CPU; wanted cuda:0, the plan's device: copy them there, or make a "
            "plan for their device");
  caught = CatchError([&] { std::ignore = RunLayer(source.spec, layer.gpu(), inputs.get()); });
  EXPECT_NE(caught.message.find("weights are on cuda:0; wanted the CPU"), std::string::npos)
      << caught.message;
  EXPECT_EQ(layer.gpu().device(), kGpu);
}

}  // namespace
}  // namespace hopyard::test
