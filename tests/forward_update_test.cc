// SPDX-License-Identifier: Apache-2.0
// Weights::Update: random partial slices in random order equal a fresh load, in every layout.
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "tests/forward_runner.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

class ForwardUpdate : public ::testing::TestWithParam<UpdateCase> {
 protected:
  ForwardUpdate() {
    source_.spec = SmallSpec(GetParam().format, ActivationFormat::kBf16);
    source_.spec.num_experts = 2;
    source_.spec.intermediate_size = CodesPerByte(GetParam().format) == 2 ? 256 : 128;
    source_.spec.shared = {1, false, 1.0F, GetParam().format};
    source_.bias = true;
    source_.layout = GetParam().layout;
  }
  RunResult Forwarded(const Weights& weights) const {
    LayerInputs inputs(source_.spec, 4);
    inputs.Logits();
    return RunLayer(source_.spec, weights, inputs.get());
  }
  WeightSource source_;
};

TEST_P(ForwardUpdate, RandomSlicesOfPartsEqualAFreshLoad) {
  const LayerWeights live(source_);
  Weights weights = live.Make();
  const RunResult before = Forwarded(weights);
  source_.seed = 99;
  const LayerWeights fresh(source_);
  const RunResult wanted = Forwarded(fresh.Make());
  EXPECT_FALSE(SameBits(before.output, wanted.output));
  Refit refit(4);
  refit.AddParts(fresh, 3, source_.layout.separate);
  refit.Apply(HasGlobalScale(GetParam().format),
              [&](const WeightSlice& slice) { weights.Update(slice); });
  EXPECT_TRUE(live.Intact());
  EXPECT_TRUE(SameBits(Forwarded(weights).output, wanted.output));
}

TEST_P(ForwardUpdate, RandomSlicesOfTheFusedMatrixEqualAFreshLoad) {
  const LayerWeights live(source_);
  Weights weights = live.Make();
  source_.seed = 99;
  const LayerWeights fresh(source_);
  Refit refit(5);
  refit.AddFused(fresh, 3);
  const auto update = [&](const WeightSlice& slice) { weights.Update(slice); };
  if (source_.layout.separate) {
    const Caught caught = CatchError([&] { refit.Apply(false, update); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    return;
  }
  refit.Apply(HasGlobalScale(GetParam().format), update);
  EXPECT_TRUE(SameBits(Forwarded(weights).output, Forwarded(fresh.Make()).output));
}

INSTANTIATE_TEST_SUITE_P(Layouts, ForwardUpdate, ::testing::ValuesIn(UpdateCases()),
                         [](const auto& test) { return ToString(test.param); });

TEST(ForwardUpdateErrors, BadSlicesAreRefusedByName) {
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  const LayerWeights storage(source);
  Weights weights = storage.Make();
  const CanonicalMatrix& matrix = storage.expert(0).gemm2;
  const auto refused = [&](const WeightSlice& slice, const std::string& text) {
    const Caught caught = CatchError([&] { weights.Update(slice); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    EXPECT_NE(caught.message.find(text), std::string::npos) << caught.message;
  };
  WeightSlice slice = SliceOf(matrix, {0, 4, 0, 64});
  slice.part = WeightPart::kGemm2;
  WeightSlice wrong = slice;
  wrong.expert = 8;
  refused(wrong, "slice.expert=8");
  wrong = slice;
  wrong.expert = -1;
  refused(wrong, "slice.expert=-1");
  wrong = slice;
  wrong.row_begin = 253;
  refused(wrong, "not within");
  wrong = slice;
  wrong.row_begin = -1;
  refused(wrong, "slice");
  wrong = slice;
  wrong.col_begin = 16;
  wrong.values = {};
  refused(wrong, "block");
  wrong = slice;
  wrong.bias = TensorView::Contiguous(matrix.codes.data(), DType::kFloat32, {4});
  refused(wrong, "bias");
  wrong = slice;
  wrong.values.dtype = DType::kInt8;
  refused(wrong, "slice.values");
  wrong = slice;
  wrong.scales.shape[1] = 40;
  refused(wrong, "slice.scales");
  WeightsDesc desc = storage.desc();
  desc.read_only = true;
  weights = Weights(source.spec, desc);
  refused(slice, "read-only");
}

}  // namespace
}  // namespace hopyard::test
