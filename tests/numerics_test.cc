// SPDX-License-Identifier: Apache-2.0
// The test of the test: every harness must reject planted faults and accept the plain result.
#include "tests/numerics.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "formats/codes.h"
#include "stages/layer_ref.h"
#include "tests/inputs.h"
#include "tests/weights.h"

namespace hopyard::test {
namespace {

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

// One layer per pair of formats, large enough for a 128 x 128 tile to be one of several.
class Harness : public ::testing::TestWithParam<FormatPair> {
 protected:
  static constexpr int64_t kTokens = 130;

  void SetUp() override {
    source_.spec = SmallSpec(GetParam().weights, GetParam().activations);
    source_.spec.hidden_size = 384;
    source_.spec.intermediate_size = 64;
    source_.spec.num_experts = 4;
    inputs_ = std::make_unique<LayerInputs>(source_.spec, kTokens);
    inputs_->Unpacked(MakeIds(IdPattern::kRandom, source_.spec, kTokens),
                      MakeWeights(source_.spec, kTokens));
    weights_ = std::make_unique<LayerWeights>(source_);
    static std::map<std::string, ref::LayerRefPair> cache;  // the slow part, once per pair
    auto [entry, is_new] = cache.try_emplace(ToString(GetParam()));
    if (is_new) {
      entry->second = ref::LayerRefBoth(source_.spec, weights_->Make(), inputs_->get(), 0,
                                        ref::LayerRefOptions{});
    }
    judged_.oracle = entry->second.exact.output;
    judged_.plain = entry->second.plain.output;
    judged_.out = judged_.plain;
    judged_.cols = source_.spec.hidden_size;
  }

  double& At(int64_t row, int64_t col) { return judged_.out[Index(row * judged_.cols + col)]; }

  ::testing::AssertionResult Verdict() const {
    return Accurate(judged_, ToleranceOf(GetParam().activations));
  }

  // The plain result of the same layer on other inputs or weights.
  std::vector<double> Plain(const Weights& weights, const MoeInputs& inputs) const {
    ref::LayerRefOptions options;
    options.plain = true;
    return ref::LayerRef(source_.spec, weights, inputs, 0, options).output;
  }

  WeightSource source_;
  std::unique_ptr<LayerInputs> inputs_;
  std::unique_ptr<LayerWeights> weights_;
  Judged judged_;
};

TEST_P(Harness, AcceptsThePlainResult) {
  EXPECT_TRUE(Verdict());
}

TEST_P(Harness, AcceptsTheOracleRoundedToBf16) {
  std::transform(judged_.oracle.begin(), judged_.oracle.end(), judged_.out.begin(), [](double x) {
    return static_cast<double>(formats::RoundToBf16(static_cast<float>(x)));
  });
  EXPECT_TRUE(Verdict());
}

TEST_P(Harness, RejectsZeros) {
  std::fill(judged_.out.begin(), judged_.out.end(), 0.0);
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsADroppedTile) {
  for (int64_t row = 0; row < 128; ++row) {
    for (int64_t col = 128; col < 256; ++col) {
      At(row, col) = 0.0;
    }
  }
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsOneRowOfItsNeighbour) {
  for (int64_t col = 0; col < judged_.cols; ++col) {
    At(77, col) = At(78, col);
  }
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsTwoExpertsSwapped) {
  WeightSource swapped = source_;
  swapped.experts = {0, 2, 1, 3};
  const LayerWeights weights(swapped);
  judged_.out = Plain(weights.Make(), inputs_->get());
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsANan) {
  At(129, 383) = std::numeric_limits<double>::quiet_NaN();
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsAnInfinity) {
  At(0, 0) = std::numeric_limits<double>::infinity();
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsASignFlipOnNegatives) {
  for (double& value : judged_.out) {
    value = std::fabs(value);
  }
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsUnscaledRoutingWeights) {
  LayerInputs unscaled(source_.spec, kTokens);
  unscaled.Unpacked(MakeIds(IdPattern::kRandom, source_.spec, kTokens),
                    std::vector<float>(Index(kTokens * source_.spec.top_k), 1.0F));
  judged_.out = Plain(weights_->Make(), unscaled.get());
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsTheWrongRowOrder) {
  WeightsDesc desc = weights_->desc();
  desc.routed.row_order = RowOrder::kUpGate;
  judged_.out = Plain(Weights(source_.spec, desc), inputs_->get());
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsAMeaninglessScale) {
  for (std::vector<double>* values : {&judged_.out, &judged_.oracle, &judged_.plain}) {
    for (double& value : *values) {
      value *= 1e-3;
    }
  }
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsMissingElements) {
  judged_.out.pop_back();
  EXPECT_FALSE(Verdict());
}

TEST_P(Harness, RejectsAnythingButZeroWhereTheOracleIsZero) {
  for (int64_t col = 0; col < judged_.cols; ++col) {
    judged_.oracle[Index(col)] = 0.0;
    judged_.plain[Index(col)] = 0.0;
    At(0, col) = 0.0;
  }
  EXPECT_TRUE(Verdict());
  At(0, 5) = 1e-6;
  EXPECT_FALSE(Verdict());
}

INSTANTIATE_TEST_SUITE_P(Pairs, Harness, ::testing::ValuesIn(SupportedPairs()),
                         [](const auto& test) { return ToString(test.param); });

TEST(SameBits, NamesTheFirstDifference) {
  const std::vector<uint16_t> a = {1, 2, 3};
  EXPECT_TRUE(SameBits(a, a));
  const ::testing::AssertionResult verdict = SameBits(std::vector<uint16_t>{1, 7, 9}, a);
  EXPECT_FALSE(verdict);
  EXPECT_STREQ(verdict.message(), "2 of 3 elements differ, the first at 1: got 7, wanted 2");
  EXPECT_FALSE(SameBits(std::vector<uint16_t>{1, 2}, a));
}

TEST(GuardedBuffer, SeesAWriteOnEitherSide) {
#if !defined(__SANITIZE_ADDRESS__)  // which stops the write itself
  const GuardedBuffer after(10);
  after.data()[10] = 0;
  EXPECT_FALSE(after.Intact());
  const GuardedBuffer before(10, 2);
  before.data()[-1] = 0;
  EXPECT_FALSE(before.Intact());
#endif
  const GuardedBuffer clean(10, 2);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(clean.data()) % 256, 2U);
  clean.data()[9] = 0;
  EXPECT_TRUE(clean.Intact());
}

}  // namespace
}  // namespace hopyard::test
