// SPDX-License-Identifier: Apache-2.0
// Weights::Update with scales: a scale governs a whole block, so a slice may replace it only
// together with everything that the block holds. Refused slices leave every byte as it was.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/bad_input.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using P = WeightPart;

// Hidden 256, intermediate 192: half of the 128-row blocks of a fused GEMM1 lie in both halves.
WeightSource SourceFor(W format, uint64_t seed, RowOrder order = RowOrder::kGateUp) {
  WeightSource source;
  source.spec = SmallSpec(format, ActivationFormat::kBf16);
  source.spec.hidden_size = 256;
  source.spec.intermediate_size = 192;
  source.spec.num_experts = 2;
  source.seed = seed;
  source.bias = true;
  source.layout.order = order;
  return source;
}

// Every byte of an expert family's codes, scales and global scales.
std::vector<uint8_t> BytesOf(const MatrixSet& set) {
  std::vector<uint8_t> bytes;
  for (const TensorView* view : {&set.values, &set.scales, &set.global_scales, &set.bias}) {
    if (view->defined()) {
      const auto* data = view->as<const uint8_t>();
      bytes.insert(bytes.end(), data, data + view->numel() * SizeOf(view->dtype));
    }
  }
  return bytes;
}

class Live {
 public:
  explicit Live(const WeightSource& source) : stored_(source), weights_(stored_.Make()) {}

  void Update(const WeightSlice& slice) { weights_.Update(slice); }
  void Refuses(const WeightSlice& slice, const WantedError& wanted) {
    const std::vector<uint8_t> before = Contents();
    ExpectError([&] { Update(slice); }, wanted);
    EXPECT_EQ(Contents(), before) << "a refused update has written";
  }
  [[nodiscard]] std::vector<uint8_t> Contents() const {
    const ExpertMatrices& routed = stored_.desc().routed;
    std::vector<uint8_t> bytes = BytesOf(routed.gemm1);
    for (const MatrixSet* set : {&routed.gate, &routed.up, &routed.gemm2}) {
      const std::vector<uint8_t> more = BytesOf(*set);
      bytes.insert(bytes.end(), more.begin(), more.end());
    }
    return bytes;
  }
  [[nodiscard]] const Weights& weights() const { return weights_; }

 private:
  LayerWeights stored_;
  Weights weights_;
};

WeightSlice SliceOf(const CanonicalMatrix& matrix, P part, const Window& window) {
  WeightSlice slice = SliceOf(matrix, window);
  slice.part = part;
  return slice;
}

const WantedError kShared = {
    ErrorKind::kUnsupported,
    {"slice.scales of fp8_block128", "that gate and up share", "update kGemm1 whole"}};

WantedError Invalid(const std::vector<std::string>& parts) {
  return {ErrorKind::kInvalidArgument, parts};
}

class SharedBlock : public ::testing::TestWithParam<RowOrder> {
 protected:
  SharedBlock()
      : live_(SourceFor(W::kFp8Block128, 1, GetParam())),
        fresh_(SourceFor(W::kFp8Block128, 99, GetParam())) {}
  // Part rows from fused rows: the codes and scales of a fresh load.
  [[nodiscard]] WeightSlice Part(P part, int64_t begin, int64_t rows) const {
    const bool second = (part == P::kUp) == (GetParam() == RowOrder::kGateUp);
    const int64_t offset = second ? 192 : 0;
    WeightSlice slice = SliceOf(fresh_.expert(0).gemm1, part, {offset + begin, rows, 0, 256});
    slice.row_begin = begin;
    return slice;
  }
  [[nodiscard]] P First() const { return GetParam() == RowOrder::kGateUp ? P::kGate : P::kUp; }
  [[nodiscard]] P Second() const { return GetParam() == RowOrder::kGateUp ? P::kUp : P::kGate; }

  Live live_;
  LayerWeights fresh_;
};

TEST_P(SharedBlock, IsNotRescaledByOneOfItsOwners) {
  const struct {
    P part;
    int64_t begin, rows;
  } windows[] = {{First(), 0, 192}, {First(), 128, 64}, {Second(), 0, 192}, {Second(), 0, 64}};
  for (const auto& window : windows) {
    SCOPED_TRACE(std::to_string(window.begin) + " + " + std::to_string(window.rows));
    WeightSlice slice = Part(window.part, window.begin, window.rows);
    live_.Refuses(slice, kShared);
    slice.values = {};  // the scales alone
    live_.Refuses(slice, kShared);
  }
  // What quantising a part by itself gives: the blocks begin with the part.
  WeightSlice own = Part(P::kGate, 0, 192);
  own.scales = TensorView::Contiguous(own.scales.as<float>(), DType::kFloat32, {2, 2});
  live_.Refuses(own, {ErrorKind::kUnsupported, {"slice.scales"}});
}

TEST_P(SharedBlock, TheOthersBelongToOnePart) {
  live_.Update(Part(First(), 0, 128));
  live_.Update(Part(Second(), 64, 128));
  WeightSlice middle = SliceOf(fresh_.expert(0).gemm1, P::kGemm1, {128, 128, 0, 256});
  live_.Update(middle);
  const Live wanted(SourceFor(W::kFp8Block128, 1, GetParam()));
  Weights whole = wanted.weights();
  whole.Update(SliceOf(fresh_.expert(0).gemm1, P::kGemm1, {0, 384, 0, 256}));
  EXPECT_EQ(live_.Contents(), wanted.Contents());
}

INSTANTIATE_TEST_SUITE_P(Halves, SharedBlock,
                         ::testing::Values(RowOrder::kGateUp, RowOrder::kUpGate),
                         [](const ::testing::TestParamInfo<RowOrder>& order) {
                           return order.param == RowOrder::kGateUp ? "GateUp" : "UpGate";
                         });

// A shard whose second half begins on a block: its 64 rows before the block belong to the first.
TEST(UpdateScales, BlocksAreCountedFromTheShardsOrigin) {
  WeightSource source = SourceFor(W::kFp8Block128, 1);
  source.layout.separate = true;
  source.spec.intermediate_size = 128;
  source.shard_begin = 64;
  source.shard_of = 256;
  Live live(source);
  source.seed = 2;
  const LayerWeights fresh(source);
  const CanonicalMatrix& gate = fresh.expert(0).gate;
  WeightSlice slice = SliceOf(gate, P::kGate, {0, 128, 0, 256});
  slice.scales = TensorView::Contiguous(gate.scales.data(), DType::kFloat32, {2, 2});
  EXPECT_NO_THROW(live.Update(slice));
  slice.values.shape[0] = 100;
  live.Refuses(slice, Invalid({"slice ends at row 100, inside a scale block of 128",
                               "at the matrix's end, 128"}));
  slice.values.shape[0] = 64;  // ends on the block boundary: one row of blocks
  live.Refuses(slice, Invalid({"slice.scales has shape [2, 2]; wanted [1, 2]"}));
  slice.scales.shape[0] = 1;
  EXPECT_NO_THROW(live.Update(slice));
}

TEST(UpdateScales, ASliceEndsOnABlockOrWithTheMatrix) {
  for (const W format : {W::kFp8Block128, W::kMxFp8, W::kMxFp4, W::kNvFp4, W::kMxInt4}) {
    SCOPED_TRACE(ToString(format));
    Live live(SourceFor(format, 1));
    const LayerWeights fresh(SourceFor(format, 2));
    const CanonicalMatrix& matrix = fresh.expert(0).gemm2;  // [256, 192]
    const int64_t block = ScaleBlockCols(format);
    const int64_t inside = block / 2;
    live.Refuses(SliceOf(matrix, P::kGemm2, {0, 256, 0, inside}),
                 Invalid({"slice ends at column " + std::to_string(inside),
                          "inside a scale block of " + std::to_string(block), "192"}));
    live.Refuses(SliceOf(matrix, P::kGemm2, {0, 256, inside, 192 - inside}),
                 Invalid({"slice begins at row 0, column " + std::to_string(inside)}));
    EXPECT_NO_THROW(live.Update(SliceOf(matrix, P::kGemm2, {0, 256, 0, block})));
    // The last block of 128 columns is half a block.
    EXPECT_NO_THROW(live.Update(SliceOf(matrix, P::kGemm2, {0, 256, 128, 64})));
    if (format == W::kFp8Block128) {
      live.Refuses(SliceOf(matrix, P::kGemm2, {0, 200, 0, 192}),
                   Invalid({"slice ends at row 200, inside a scale block of 128"}));
    }
  }
}

TEST(UpdateScales, AChannelsScaleIsOfItsWholeRow) {
  Live live(SourceFor(W::kFp8PerChannel, 1));
  const LayerWeights fresh(SourceFor(W::kFp8PerChannel, 2));
  const CanonicalMatrix& matrix = fresh.expert(0).gemm2;
  live.Refuses(SliceOf(matrix, P::kGemm2, {0, 256, 0, 64}),
               Invalid({"slice ends at column 64, inside a scale block of 192"}));
  live.Refuses(SliceOf(matrix, P::kGemm2, {0, 256, 64, 128}),
               Invalid({"slice begins at row 0, column 64"}));
  EXPECT_NO_THROW(live.Update(SliceOf(matrix, P::kGemm2, {17, 3, 0, 192})));
}

TEST(UpdateScales, AreThoseOfTheValues) {
  for (const W format : {W::kFp8Block128, W::kFp8PerChannel, W::kMxFp8, W::kMxFp4, W::kNvFp4}) {
    SCOPED_TRACE(ToString(format));
    Live live(SourceFor(format, 1));
    const LayerWeights fresh(SourceFor(format, 2));
    const CanonicalMatrix& matrix = fresh.expert(0).gemm2;
    const WeightSlice right = SliceOf(matrix, P::kGemm2, {0, 256, 0, 192});
    for (int dim = 0; dim < right.scales.ndim; ++dim) {
      WeightSlice few = right;
      const int64_t extent = --few.scales.shape.at(static_cast<size_t>(dim));
      live.Refuses(few, Invalid({"slice.scales has shape [", std::to_string(extent),
                                 "the scale blocks of slice.values"}));
    }
    WeightSlice many = right;
    many.values.shape[0] = 128;
    live.Refuses(many, Invalid({"slice.scales has shape [", "wanted [",
                                "the scale blocks of slice.values [128, "}));
    WeightSlice bias = right;
    const std::vector<float> ones(256, 1.0F);
    bias.bias = TensorView::Contiguous(ones.data(), DType::kFloat32, {200});
    live.Refuses(bias, Invalid({"slice.bias has shape [200]; wanted [256]"}));
    EXPECT_NO_THROW(live.Update(right));
  }
}

TEST(UpdateScales, AGlobalScaleIsOfTheWholeMatrix) {
  for (const W format : {W::kFp8PerTensor, W::kNvFp4}) {
    SCOPED_TRACE(ToString(format));
    Live live(SourceFor(format, 1));
    const LayerWeights fresh(SourceFor(format, 2));
    float scale = 0.125F;
    const TensorView global = TensorView::Contiguous(&scale, DType::kFloat32, {1});
    WeightSlice half = SliceOf(fresh.expert(0).gate, P::kGate, {0, 192, 0, 256});
    half.global_scale = global;
    live.Refuses(half, {ErrorKind::kUnsupported,
                        {"slice.global_scale holds 0.125", "gate and up share", "kGemm1"}});
    WeightSlice part = SliceOf(fresh.expert(0).gemm2, P::kGemm2, {0, 128, 0, 192});
    part.global_scale = global;
    live.Refuses(part, Invalid({"slice.global_scale holds 0.125", "values of the whole matrix"}));
    part.values = {};
    part.scales = {};
    live.Update(part);  // alone
    part = SliceOf(fresh.expert(0).gemm2, P::kGemm2, {0, 128, 0, 192});
    part.global_scale = global;
    EXPECT_NO_THROW(live.Update(part)) << "the stored one may be repeated";
    scale = 0.25F;
    WeightSlice whole = SliceOf(fresh.expert(0).gemm2, P::kGemm2, {0, 256, 0, 192});
    whole.global_scale = global;
    EXPECT_NO_THROW(live.Update(whole));
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF}) {
      scale = bad;
      live.Refuses(whole, Invalid({"slice.global_scale holds ", "wanted a finite number"}));
    }
  }
}

}  // namespace
}  // namespace hopyard::test
