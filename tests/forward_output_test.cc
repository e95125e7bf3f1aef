// SPDX-License-Identifier: Apache-2.0
// Optional outputs, workspace, chunking and repeatability.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "formats/codes.h"
#include "stages/layer_ref.h"
#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

class ForwardOutput : public ::testing::TestWithParam<FormatPair> {
 protected:
  void Prepare(int64_t tokens) {
    source_.spec = SmallSpec(GetParam().weights, GetParam().activations);
    source_.spec.intermediate_size = 96;
    source_.bias = true;
    storage_ = std::make_unique<LayerWeights>(source_);
    weights_ = storage_->Make();
    inputs_ = std::make_unique<LayerInputs>(source_.spec, tokens);
    inputs_->Logits();
  }
  RunResult Go(const RunOptions& options = {}) const {
    return RunLayer(source_.spec, weights_, inputs_->get(), options);
  }
  [[nodiscard]] const MoeSpec& spec() const { return source_.spec; }

  WeightSource source_;
  std::unique_ptr<LayerWeights> storage_;
  Weights weights_;
  std::unique_ptr<LayerInputs> inputs_;
};

TEST_P(ForwardOutput, OptionalOutputsChangeNoBit) {
  Prepare(10);
  RunOptions bare;
  bare.extras = false;
  EXPECT_TRUE(SameBits(Go(bare).output, Go().output));
}

TEST_P(ForwardOutput, UnfinalisedRowsSumToTheOutput) {
  Prepare(10);
  const RunResult whole = Go();
  EXPECT_TRUE(SameBits(FinalizeByHand(spec(), whole, 10), whole.output));
  RunOptions rows_only;
  rows_only.no_output = true;
  const RunResult rows = Go(rows_only);
  EXPECT_TRUE(rows.output.empty());
  EXPECT_TRUE(SameBits(FinalizeByHand(spec(), rows, 10), whole.output));
}

TEST_P(ForwardOutput, NarrowOutputDropsColumns) {
  Prepare(5);
  const RunResult whole = Go();
  for (const int64_t width : {1, 37, 255}) {
    RunOptions options;
    options.width = width;
    const RunResult narrow = Go(options);
    for (int64_t t = 0; t < 5; ++t) {
      const auto begin = whole.output.begin() + t * spec().hidden_size;
      EXPECT_TRUE(SameBits(std::vector<uint16_t>(narrow.output.begin() + t * width,
                                                 narrow.output.begin() + (t + 1) * width),
                           std::vector<uint16_t>(begin, begin + width)));
    }
  }
}

TEST_P(ForwardOutput, AccumulateAddsToTheOutput) {
  Prepare(4);
  RunOptions options;
  options.accumulate = true;
  const RunResult plain = Go();
  for (size_t i = 0; i < plain.output.size(); ++i) {
    options.initial.push_back(formats::EncodeBf16(Normal(Hash(1, i))));
  }
  const RunResult added = Go(options);
  const std::vector<double> result = FromBf16(plain.output);
  const std::vector<double> before = FromBf16(options.initial);
  const std::vector<double> after = FromBf16(added.output);
  for (size_t i = 0; i < after.size(); ++i) {
    const double sum = before[i] + result[i];
    // Half a unit in the last place of the sum and of the unrounded result.
    ASSERT_NEAR(after[i], sum, (std::fabs(sum) + std::fabs(result[i])) / 250.0) << i;
  }
}

// One value of GEMM1 for a token, in double.
double FirstGemm(const MoeSpec& spec, const WeightsDesc& desc, const WeightSlice& at,
                 const uint16_t* x) {
  double sum = ref::BiasValue(spec, desc, at.expert, at.part, at.row_begin);
  for (int64_t k = 0; k < spec.hidden_size; ++k) {
    sum += ref::WeightValue(spec, desc, at.expert, at.part, at.row_begin, k) *
           formats::DecodeBf16(x[k]);
  }
  return sum;
}

TEST_P(ForwardOutput, Gemm1ActivationIsTheValueBeforeItsQuantisation) {
  Prepare(4);
  const RunResult result = Go();
  const int64_t inter = spec().intermediate_size;
  Judged judged{{}, {}, {}, inter};
  for (int64_t slot = 0; slot < 4 * spec().top_k; ++slot) {
    const auto* x = inputs_->get().hidden_states.as<const uint16_t>() +
                    slot / spec().top_k * spec().hidden_size;
    const int64_t row = result.slot_to_row[static_cast<size_t>(slot)];
    for (int64_t i = 0; i < inter; ++i) {
      WeightSlice at;
      at.expert = result.ids[static_cast<size_t>(slot)];
      at.row_begin = i;
      at.part = WeightPart::kUp;
      const double up = FirstGemm(spec(), storage_->desc(), at, x);
      at.part = WeightPart::kGate;
      const double gate = FirstGemm(spec(), storage_->desc(), at, x);
      judged.oracle.push_back(up * gate / (1.0 + std::exp(-gate)));
      judged.out.push_back(
          formats::DecodeBf16(result.activation[static_cast<size_t>(row * inter + i)]));
    }
  }
  // There is no plain activation to compare with: so eight row tolerances bound an element.
  Tolerance tolerance = ToleranceOf(GetParam().activations);
  judged.plain = judged.oracle;
  judged.plain[0] += tolerance.worst_row * Rms(judged.oracle) * 4.0;
  EXPECT_TRUE(Accurate(judged, tolerance));
}

TEST_P(ForwardOutput, ChunksUnderAWorkspaceCapGiveTheSameBits) {
  Prepare(29);
  const RunResult whole = Go();
  PlanOptions options;
  options.max_tokens = 4;
  const int64_t four = MakePlan(spec(), Device{}, options).workspace_bytes();
  RunOptions capped;
  capped.plan.max_tokens = 29;
  capped.plan.workspace_cap = four;
  const Plan plan = MakePlan(spec(), Device{}, capped.plan);
  EXPECT_LE(plan.workspace_bytes(), four);
  EXPECT_LT(plan.tokens_per_chunk(), 29);
  const RunResult chunked = Go(capped);
  EXPECT_TRUE(SameBits(chunked.output, whole.output));
  EXPECT_TRUE(SameBits(chunked.replay, whole.replay));
  EXPECT_TRUE(SameBits(chunked.load, whole.load));
  EXPECT_TRUE(SameBits(chunked.weights, whole.weights));
  EXPECT_TRUE(SameBits(FinalizeByHand(spec(), chunked, 29), whole.output));
}

TEST_P(ForwardOutput, ThreadsDoNotChangeTheBits) {
  Prepare(21);
  const RunResult whole = Go();
  for (const int threads : {1, 2, 3, 7}) {
    RunOptions options;
    options.plan.num_threads = threads;
    EXPECT_TRUE(SameBits(Go(options).output, whole.output)) << threads << " threads";
  }
}

// One token at any place of any batch: the same bytes.
TEST_P(ForwardOutput, ATokenDoesNotDependOnItsBatch) {
  Prepare(1);
  const std::unique_ptr<LayerInputs> needle = std::move(inputs_);
  const RunResult alone = RunLayer(spec(), weights_, needle->get());
  for (const int64_t tokens : {2, 9, 33}) {
    for (const int64_t place : {int64_t{0}, tokens / 2, tokens - 1}) {
      LayerInputs batch(spec(), tokens, 50 + static_cast<uint64_t>(tokens));
      batch.Logits();
      batch.CopyToken(*needle, 0, place);
      RunOptions options;
      options.plan.batch_invariant = place == 0;
      const RunResult result = RunLayer(spec(), weights_, batch.get(), options);
      const auto begin = result.output.begin() + place * spec().hidden_size;
      EXPECT_TRUE(SameBits(std::vector<uint16_t>(begin, begin + spec().hidden_size), alone.output))
          << "token " << place << " of " << tokens;
    }
  }
}

TEST_P(ForwardOutput, NumTokensLeavesTheTailUntouched) {
  Prepare(9);
  const RunResult whole = Go();
  for (const int32_t count : {0, 1, 6, 9}) {
    inputs_->NumTokens(count);
    const RunResult part = Go();
    const auto end = static_cast<size_t>(count * spec().hidden_size);
    for (size_t i = 0; i < part.output.size(); ++i) {
      ASSERT_EQ(part.output[i], i < end ? whole.output[i] : 0xFFFF) << "element " << i;
    }
    const auto slots = static_cast<size_t>(count) * static_cast<size_t>(spec().top_k);
    for (size_t i = 0; i < part.ids.size(); ++i) {
      ASSERT_EQ(part.ids[i], i < slots ? whole.ids[i] : -1);
      ASSERT_EQ(part.replay[i], i < slots ? whole.replay[i] : -1);
      ASSERT_EQ(std::isnan(part.weights[i]), i >= slots);
      ASSERT_EQ(part.slot_to_row[i] >= 0, i < slots);
    }
    EXPECT_EQ(
        std::count(part.rows.begin(), part.rows.end(), 0xFFFF),
        static_cast<int64_t>(part.rows.size()) - static_cast<int64_t>(slots) * spec().hidden_size);
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, ForwardOutput, ::testing::ValuesIn(SupportedPairs()),
                         [](const auto& test) { return ToString(test.param); });

TEST(ForwardDelta, LoraDeltaMatchesOracle) {
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  source.spec.activation.limit.all = 1.0F;
  source.spec.shared.count = 1;
  const LayerWeights storage(source);
  LayerInputs inputs(source.spec, 7);
  inputs.Logits().Delta();
  const RunResult result = RunLayer(source.spec, storage.Make(), inputs.get());
  EXPECT_TRUE(MatchesOracle(source.spec, storage.Make(), inputs.get(), result));
  RunOptions capped;
  PlanOptions small;
  small.max_tokens = 2;
  capped.plan.workspace_cap = MakePlan(source.spec, Device{}, small).workspace_bytes();
  EXPECT_TRUE(
      SameBits(RunLayer(source.spec, storage.Make(), inputs.get(), capped).output, result.output));
  MoeInputs without = inputs.get();
  without.gemm1_delta = {};
  EXPECT_FALSE(MatchesOracle(source.spec, storage.Make(), without, result));
}

TEST(ForwardWorkspace, SizeIsMonotoneAndKnownForHugeBatches) {
  const MoeSpec spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kMxFp8);
  int64_t previous = 0;
  for (const int64_t tokens : {1, 2, 64, 4096, 400000, 100000000}) {
    PlanOptions options;
    options.max_tokens = tokens;
    const int64_t bytes = MakePlan(spec, Device{}, options).workspace_bytes();
    EXPECT_GT(bytes, previous);
    EXPECT_EQ(bytes % 256, 0);
    previous = bytes;
    options.workspace_cap = 64 << 20;
    EXPECT_LE(MakePlan(spec, Device{}, options).workspace_bytes(), 64 << 20);
  }
  EXPECT_GT(previous, int64_t{1} << 36) << "64-bit sizes";
}

// More rows than the largest tile of permutation metadata.
TEST(ForwardWorkspace, OnePassTakesMoreThan65536Rows) {
  constexpr int64_t kTokens = 40000;
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  source.spec.hidden_size = 32;
  source.spec.intermediate_size = 32;
  const LayerWeights storage(source);
  const Weights weights = storage.Make();
  LayerInputs inputs(source.spec, kTokens);
  inputs.Logits();
  const RunResult result = RunLayer(source.spec, weights, inputs.get());
  EXPECT_GT(static_cast<int64_t>(result.slot_to_row.size()), 65536);
  EXPECT_TRUE(MatchesOracle(source.spec, weights, inputs.get(), result,
                            {0, 1, kTokens / 2, kTokens - 2, kTokens - 1}));
}

TEST(ForwardWorkspace, ConcurrentCallsOnOnePlanAgree) {
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  const LayerWeights storage(source);
  const Weights weights = storage.Make();
  LayerInputs inputs(source.spec, 12);
  inputs.Logits();
  const RunResult wanted = RunLayer(source.spec, weights, inputs.get());
  std::vector<RunResult> results(4);
  std::vector<std::thread> threads;
  for (RunResult& result : results) {
    threads.emplace_back([&] { result = RunLayer(source.spec, weights, inputs.get()); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const RunResult& result : results) {
    EXPECT_TRUE(SameBits(result.output, wanted.output));
  }
}

}  // namespace
}  // namespace hopyard::test
