// SPDX-License-Identifier: Apache-2.0
// Plans whose table has other kernels for few, for more and for many tokens, on a GPU: which of
// them a call takes eagerly, captured, and cut into chunks (docs/tuning.md), and with which bits.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/tune.h"

#include "gemm/sm90/rows.h"
#include "plan/backend_sm90.h"
#include "plan/plan_impl.h"
#include "plan/sm90/layer_plan.h"
#include "tests/gpu/captured_call.h"

namespace hopyard::test {
namespace {

constexpr int64_t kFew = 16;    // the most of the first range
constexpr int64_t kMore = 130;  // of the second
constexpr int64_t kCapacity = 512;
// What a workspace cap leaves room for: a chunk is of the second range.
constexpr int64_t kChunk = 100;

const gemm::sm90::GemmConfig& ConfigOf(const std::string& kernel) {
  return std::find_if(gemm::sm90::kKernelRows.begin(), gemm::sm90::kKernelRows.end(),
                      [&](const gemm::sm90::KernelRow& row) { return row.name == kernel; })
      ->config;
}

// Small tiles first, among them those whose K is split, which sums in another order.
std::vector<std::string> BySize(const std::vector<sm90::RankedTactics::Entry>& ranked) {
  std::vector<std::string> kernels;
  for (const sm90::RankedTactics::Entry& entry : ranked) {
    kernels.push_back(entry.kernel);
  }
  std::sort(kernels.begin(), kernels.end(), [](const std::string& one, const std::string& other) {
    const auto key = [](const std::string& name) {
      const gemm::sm90::GemmConfig& config = ConfigOf(name);
      return std::tuple(config.tokens, -config.k_parts, config.cluster, name);
    };
    return key(one) < key(other);
  });
  return kernels;
}

// GEMM1+GEMM2 of the three ranges; where one GEMM has small tiles the other has large ones.
std::vector<std::string> TacticsOf(const MoeSpec& spec) {
  PlanOptions options;
  options.max_tokens = kCapacity;
  const sm90::RankedTactics ranked = sm90::NeedBackend().Rank(spec, options, kCapacity);
  const std::vector<std::string> first = BySize(ranked.gemm1);
  const std::vector<std::string> second = BySize(ranked.gemm2);
  return {first.front() + '+' + second.back(),
          first[first.size() / 2] + '+' + second[second.size() / 2],
          first.back() + '+' + second.front()};
}

// What a pass over so many tokens runs.
std::string TacticAt(const Plan& plan, int64_t tokens) {
  const sm90::GroupKernels& kernels = ChoiceFor(plan.impl().sm90->tiles, tokens).routed;
  return std::string(gemm::sm90::KernelAt(kernels.gemm1).name) + '+' +
         std::string(gemm::sm90::KernelAt(kernels.gemm2).name);
}

class GpuRanges : public ::testing::TestWithParam<FormatPair> {
 protected:
  GpuRanges() {
    source_.spec = SmallSpec(GetParam().weights, GetParam().activations);
    source_.bias = true;
    tactics_ = TacticsOf(source_.spec);
  }

  [[nodiscard]] bool HasRanges() const { return tactics_.front() != tactics_.back(); }
  [[nodiscard]] const std::string& TacticFor(int64_t tokens) const {
    return tactics_[tokens <= kFew ? 0 : tokens <= kMore ? 1 : 2];
  }
  [[nodiscard]] PlanOptions Tuned(int64_t max_tokens) const {
    PlanOptions options;
    options.max_tokens = max_tokens;
    TunedLayer layer;
    layer.key = KeyOf(source_.spec, MakePlan(source_.spec, kGpu, options).options());
    for (const int64_t last : {kFew, kMore, int64_t{1} << 20}) {
      layer.ranges.push_back({last, last, TacticFor(last), 1.0, "slower", 2.0, 0.0});
    }
    auto table = std::make_shared<TuningTable>(MachineOf(kGpu));
    table->Put(layer);
    options.tuning = table;
    return options;
  }
  [[nodiscard]] PlanOptions Named(int64_t max_tokens, const std::string& tactic) const {
    PlanOptions options;
    options.max_tokens = max_tokens;
    options.tactic = tactic;
    return options;
  }
  // As Tuned, with a workspace for chunks of kChunk tokens, or a few more.
  [[nodiscard]] PlanOptions Capped(int64_t max_tokens) const {
    PlanOptions options = Tuned(max_tokens);
    options.workspace_cap = MakePlan(source_.spec, kGpu, Tuned(kChunk)).workspace_bytes();
    return options;
  }

  WeightSource source_;
  std::vector<std::string> tactics_;
};

RunOptions With(const PlanOptions& plan) {
  RunOptions options;
  options.plan = plan;
  return options;
}

constexpr int64_t kAtBorders[] = {1, kFew, kFew + 1, kMore, kMore + 1, kCapacity};

// Without a GPU: what the tests below run.
TEST_P(GpuRanges, PlansHaveTheKernelsOfEveryRange) {
  for (const PlanOptions& options : {Tuned(kCapacity), Capped(kCapacity)}) {
    const Plan plan = MakePlan(source_.spec, kGpu, options);
    for (const int64_t tokens : kAtBorders) {
      EXPECT_EQ(TacticAt(plan, tokens), TacticFor(tokens)) << tokens << " tokens";
    }
  }
  const int64_t chunk = MakePlan(source_.spec, kGpu, Capped(kCapacity)).tokens_per_chunk();
  EXPECT_GE(chunk, kChunk);
  EXPECT_LE(chunk, kMore);
}

TEST_P(GpuRanges, EagerCallsTakeTheKernelsOfTheirRange) {
  HOPYARD_NEEDS_GPU();
  if (!HasRanges()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  TwinLayer layer(source_);
  for (const int64_t tokens : kAtBorders) {
    SCOPED_TRACE(std::to_string(tokens) + " tokens");
    LayerInputs inputs(source_.spec, tokens);
    inputs.Logits();
    const RunResult got = layer.Run(inputs, With(Tuned(kCapacity)));
    const RunResult named = layer.Run(inputs, With(Named(kCapacity, TacticFor(tokens))));
    EXPECT_TRUE(SameBits(got.output, named.output));
    EXPECT_TRUE(SameBits(got.rows, named.rows));
    EXPECT_TRUE(SameBits(got.activation, named.activation));
    layer.Judge(inputs, got, {}, {0, tokens / 2, tokens - 1});
  }
}

// Equal bits say little where all kernels have the same. Split sums have others.
TEST_P(GpuRanges, TheirKernelsAreTold) {
  HOPYARD_NEEDS_GPU();
  if (!HasRanges() || GetParam().weights != WeightFormat::kBf16) {
    GTEST_SKIP() << "BF16 has kernels that split K";
  }
  TwinLayer layer(source_);
  LayerInputs inputs(source_.spec, kCapacity);
  inputs.Logits();
  EXPECT_FALSE(SameBits(layer.Run(inputs, With(Named(kCapacity, tactics_.front()))).output,
                        layer.Run(inputs, With(Named(kCapacity, tactics_.back()))).output));
}

// The host does not read a count on the device: the rows of hidden_states choose, whatever is live.
TEST_P(GpuRanges, ACapturedCallKeepsTheKernelsOfItsRows) {
  HOPYARD_NEEDS_GPU();
  if (!HasRanges()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs shape(source_.spec, kCapacity);
  const MoeInputs inputs = mirror.Copy(shape.Logits().NumTokens(0).get());
  for (const bool capped : {false, true}) {
    SCOPED_TRACE(capped ? "in chunks" : "whole");
    const Plan plan = MakePlan(source_.spec, kGpu, capped ? Capped(kCapacity) : Tuned(kCapacity));
    const CapturedBesideEager calls(plan, layer.gpu(), inputs);
    const RepeatedCall named(MakePlan(source_.spec, kGpu, Named(kCapacity, TacticFor(kCapacity))),
                             layer.gpu(), inputs);
    uint64_t seed = 51;
    for (const int32_t count : {512, 1, 16, 17, 130, 131, 0, 511}) {
      LayerInputs tokens(source_.spec, kCapacity, seed++);
      ASSERT_TRUE(calls.Agree(tokens.Logits(), count));
      named.Poison(0xFF, calls.stream());
      named.Run(calls.stream());
      ASSERT_TRUE(capped || SameBits(calls.Output(), named.Output())) << count << " tokens";
    }
    EXPECT_TRUE(calls.Intact());
  }
}

// Rows [begin, begin + count) of an output.
std::vector<uint16_t> Part(const std::vector<uint16_t>& output, int64_t begin, int64_t count,
                           int64_t hidden) {
  return {output.begin() + begin * hidden, output.begin() + (begin + count) * hidden};
}

// A chunk has the bits of a call of its tokens alone.
TEST_P(GpuRanges, ChunksTakeTheKernelsOfTheirOwnRange) {
  HOPYARD_NEEDS_GPU();
  if (!HasRanges()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  TwinLayer layer(source_);
  const int64_t chunk = MakePlan(source_.spec, kGpu, Capped(kCapacity)).tokens_per_chunk();
  ASSERT_GE(chunk, kChunk);
  ASSERT_LE(chunk, kMore);
  const int64_t tokens =
      3 * chunk + 7;  // the last chunk is of the first range, all are of the last
  ASSERT_GT(tokens, kMore);
  LayerInputs inputs(source_.spec, tokens);
  inputs.Logits();
  const RunResult chunked = layer.Run(inputs, With(Capped(tokens)));
  EXPECT_TRUE(
      MatchesOracle(source_.spec, layer.cpu(), inputs.get(), chunked, {0, chunk, tokens - 1}));
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t count = std::min(chunk, tokens - begin);
    LayerInputs part(source_.spec, count);
    part.Logits();
    for (int64_t t = 0; t < count; ++t) {
      part.CopyToken(inputs, begin + t, t);
    }
    const RunResult alone = layer.Run(part, With(Tuned(count)));
    EXPECT_TRUE(
        SameBits(Part(chunked.output, begin, count, source_.spec.hidden_size), alone.output))
        << "the chunk from token " << begin << " on";
  }
}

// One kernel for every pass: chunks change nothing.
TEST_P(GpuRanges, BatchInvariantChunksHaveTheBitsOfTheWhole) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(source_);
  LayerInputs inputs(source_.spec, kCapacity);
  inputs.Logits();
  PlanOptions invariant = Capped(kCapacity);
  invariant.batch_invariant = true;
  ASSERT_LT(MakePlan(source_.spec, kGpu, invariant).tokens_per_chunk(), kCapacity);
  const RunResult whole = layer.Run(inputs, With(Tuned(kCapacity)));
  EXPECT_TRUE(SameBits(layer.Run(inputs, With(invariant)).output, whole.output));
  layer.Judge(inputs, whole, {}, {0, kCapacity / 2, kCapacity - 1});
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuRanges, ::testing::ValuesIn(FamilyPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
