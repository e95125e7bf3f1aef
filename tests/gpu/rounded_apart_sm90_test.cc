// SPDX-License-Identifier: Apache-2.0
// GEMM1's output that a pass of its own rounds lies where GEMM2 writes afterwards: layers with
// kernels that round themselves and with those that do not, of what is asked for everything and
// nothing, whole and in chunks. Every call finds a workspace of 0xFF.
#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "plan/backend_sm90.h"
#include "plan/plan_impl.h"
#include "plan/sm90/layer_plan.h"
#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {
namespace {

constexpr int64_t kTokens = 100;
constexpr int64_t kChunk = 40;

// Shared experts beside the routed ones.
enum class Shared { kNone, kSameFormat, kOtherFormat };

// False where the layer has none of another format.
bool AddShared(Shared shared, MoeSpec* spec) {
  if (shared == Shared::kNone) {
    return true;
  }
  spec->shared = {1, false, 0.5F, spec->weights};
  if (shared == Shared::kSameFormat) {
    return true;
  }
  for (const FormatPair& pair : SupportedPairs()) {
    if (pair.activations == spec->activations && pair.weights != spec->weights) {
      spec->shared.weights = pair.weights;
      return true;
    }
  }
  return false;
}

PlanOptions Named(const std::string& tactic) {
  PlanOptions options;
  options.max_tokens = kTokens;
  options.tactic = tactic;
  return options;
}

// Kernels of GEMM1 that have tiles for this layer, by whether a pass of its own rounds their rows.
std::map<bool, std::vector<std::string>> KernelsByKind(const MoeSpec& spec) {
  std::map<bool, std::vector<std::string>> kinds;
  for (const auto& entry : sm90::NeedBackend().Rank(spec, Named({}), kTokens).gemm1) {
    if (Explain(spec, kGpu, Named(entry.kernel)).supported) {
      const Plan plan = MakePlan(spec, kGpu, Named(entry.kernel));
      kinds[plan.impl().sm90->tiles.front().routed.rounds_apart].push_back(entry.kernel);
    }
  }
  return kinds;
}

// The rows of `values`, in the order of the slots.
std::vector<uint16_t> BySlot(const std::vector<uint16_t>& values, const RunResult& result,
                             int64_t cols) {
  std::vector<uint16_t> ordered;
  for (const int32_t row : result.slot_to_row) {
    const auto begin = values.begin() + row * cols;
    ordered.insert(ordered.end(), begin, begin + cols);
  }
  return ordered;
}

class GpuRoundedApart : public ::testing::TestWithParam<FormatPair> {
 protected:
  // Every call with the kernel gives the bits of the first one, which the oracle judges.
  static void RunEveryWay(const std::string& kernel, TwinLayer* layer) {
    const MoeSpec& spec = layer->spec();
    LayerInputs inputs(spec, kTokens);
    inputs.Logits();
    RunOptions run;
    run.plan = Named(kernel);
    const RunResult whole = layer->Run(inputs, run);
    layer->Judge(inputs, whole, {}, {0, kTokens / 2, kTokens - 1});
    PlanOptions small = run.plan;
    small.max_tokens = kChunk;
    const int64_t cap = MakePlan(spec, kGpu, small).workspace_bytes();
    for (const bool chunked : {false, true}) {
      run.plan.workspace_cap = chunked ? cap : 0;
      ASSERT_EQ(MakePlan(spec, kGpu, run.plan).tokens_per_chunk() < kTokens, chunked);
      for (const bool rows : {false, true}) {
        for (const bool activation : {false, true}) {
          SCOPED_TRACE(kernel + (chunked ? ", chunks" : "") + (rows ? ", rows" : "") +
                       (activation ? ", activation" : ""));
          run.rows = rows;
          run.activation = activation;
          const RunResult got = layer->Run(inputs, run);
          EXPECT_TRUE(SameBits(got.output, whole.output));
          EXPECT_EQ(got.rows.empty(), !rows);
          EXPECT_EQ(got.activation.empty(), !activation);
          EXPECT_TRUE(!rows || SameBits(BySlot(got.rows, got, spec.hidden_size),
                                        BySlot(whole.rows, whole, spec.hidden_size)));
          EXPECT_TRUE(!activation ||
                      SameBits(BySlot(got.activation, got, spec.intermediate_size),
                               BySlot(whole.activation, whole, spec.intermediate_size)));
        }
      }
    }
  }
};

TEST_P(GpuRoundedApart, EveryOutputHasTheBitsOfAllOfThem) {
  HOPYARD_NEEDS_GPU();
  for (const Shared shared : {Shared::kNone, Shared::kSameFormat, Shared::kOtherFormat}) {
    WeightSource source;
    source.spec = SmallSpec(GetParam().weights, GetParam().activations);
    // Rows of the activation are wider than those of y, and neither is a whole number of tiles.
    source.spec.hidden_size = 160;
    source.spec.intermediate_size = 416;
    source.bias = true;
    if (!AddShared(shared, &source.spec)) {
      continue;
    }
    SCOPED_TRACE("shared experts: " + std::to_string(static_cast<int>(shared)));
    TwinLayer layer(source);
    for (const auto& [apart, kernels] : KernelsByKind(source.spec)) {
      RunEveryWay(kernels.front(), &layer);
      if (kernels.size() > 1 && !SmallTests()) {
        RunEveryWay(kernels.back(), &layer);
      }
    }
  }
}

// Pairs of formats whose intermediate is rounded.
std::vector<FormatPair> RoundedPairs() {
  std::vector<FormatPair> pairs = SupportedPairs();
  std::erase_if(pairs, [](const FormatPair& pair) {
    const MoeSpec spec = SmallSpec(pair.weights, pair.activations);
    return sm90::FormatsOf(spec, spec.weights, false).operands.h.format == Format::kBf16;
  });
  return pairs;
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuRoundedApart, ::testing::ValuesIn(RoundedPairs()),
                         [](const auto& test) { return ToString(test.param); });

// Without a GPU: what the tests above run.
TEST(GpuRoundedApartKinds, ThereAreBoth) {
  int apart = 0;
  int fused = 0;
  for (const FormatPair& pair : RoundedPairs()) {
    const auto kinds = KernelsByKind(SmallSpec(pair.weights, pair.activations));
    apart += static_cast<int>(kinds.count(true));
    fused += static_cast<int>(kinds.count(false));
    // The scale of a whole row is nobody's to know within a tile.
    EXPECT_TRUE(pair.activations != ActivationFormat::kNvFp4PerToken || kinds.count(false) == 0)
        << ToString(pair);
  }
  EXPECT_GT(apart, 3);
  EXPECT_GT(fused, 3);
}

}  // namespace
}  // namespace hopyard::test
