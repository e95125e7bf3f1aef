// SPDX-License-Identifier: Apache-2.0
// Updates that must not happen: the whole message, and not one byte of the weights changed, also
// where only the last part of the slice is wrong.
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using A = ActivationFormat;

constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
constexpr int64_t kMinInt64 = std::numeric_limits<int64_t>::min();

// MXFP8 weights with biases; gemm2 is [64, 32] with one scale per row.
class RefusedUpdate : public ::testing::Test {
 protected:
  RefusedUpdate() : stored_(WithBias(W::kMxFp8)), weights_(stored_.Make()), memory_(1 << 14, 0) {
    slice_.part = WeightPart::kGemm2;
    slice_.values = Tensor(DType::kE4m3, {64, 32});
    slice_.scales = Tensor(DType::kE8m0, {64, 1});
    slice_.bias = Tensor(DType::kFloat32, {64});
  }

  static WeightSource WithBias(W format) {
    WeightSource source = SourceOf(TinySpec(format, A::kBf16));
    source.bias = true;
    return source;
  }
  TensorView Tensor(DType dtype, std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(memory_.data(), dtype, shape);
  }
  static void Append(const TensorView& view, std::vector<uint8_t>* bytes) {
    const auto* data = view.as<const uint8_t>();
    bytes->insert(bytes->end(), data, data + view.numel() * SizeOf(view.dtype));
  }
  [[nodiscard]] std::vector<uint8_t> Contents() const {
    const MatrixSet& gemm2 = stored_.desc().routed.gemm2;
    std::vector<uint8_t> bytes;
    Append(gemm2.values, &bytes);
    Append(gemm2.scales, &bytes);
    Append(gemm2.bias, &bytes);
    return bytes;
  }
  void Says(const WeightSlice& slice, const std::string& message,
            ErrorKind kind = ErrorKind::kInvalidArgument) {
    const std::vector<uint8_t> before = Contents();
    const Caught caught = CatchError([&] { weights_.Update(slice); });
    EXPECT_EQ(ToString(caught.kind), ToString(kind));
    EXPECT_EQ(caught.message, message);
    EXPECT_EQ(Contents(), before) << "a refused update has written";
    EXPECT_TRUE(stored_.Intact());
  }

  LayerWeights stored_;
  Weights weights_;
  std::vector<uint8_t> memory_;
  WeightSlice slice_;
};

TEST_F(RefusedUpdate, Targets) {
  slice_.expert = 4;
  Says(slice_, "slice.expert=4; wanted 0 .. 3 (local slots, then shared experts)");
  slice_.expert = 0;
  slice_.part = static_cast<WeightPart>(4);
  Says(slice_, "slice.part=4 is not a WeightPart; wanted 0 .. 3");
}

TEST_F(RefusedUpdate, ValuesBeyondTheMatrix) {
  for (const int64_t begin : {kMinInt64, int64_t{-1}, int64_t{1}, kMaxInt64 - 63, kMaxInt64}) {
    WeightSlice bad = slice_;
    bad.row_begin = begin;
    const int64_t end = begin > kMaxInt64 - 64 ? kMaxInt64 : begin + 64;
    Says(bad, "slice rows [" + std::to_string(begin) + ", " + std::to_string(end) +
                  ") x columns [0, 32) are not within [64, 32]");
  }
  WeightSlice bad = slice_;
  bad.col_begin = kMaxInt64;
  Says(bad,
       "slice rows [0, 64) x columns [9223372036854775807, 9223372036854775807) are not within "
       "[64, 32]");
  bad = slice_;
  bad.values = Reshaped(slice_.values, {-64, 32});
  Says(bad,
       "slice.values has shape [-64, 32]; wanted at most 4 dimensions, none negative, and fewer "
       "than 2^60 elements");
}

TEST_F(RefusedUpdate, ScalesAloneBeyondTheMatrix) {
  slice_.values = {};
  slice_.bias = {};
  WeightSlice bad = slice_;
  bad.row_begin = -64;
  Says(bad, "slice row -64, column 0 are not within [64, 32]");
  bad.row_begin = kMaxInt64;
  Says(bad, "slice row 9223372036854775807, column 0 are not within [64, 32]");
  bad.row_begin = 1;
  Says(bad, "slice.scales [64, 1] reaches beyond the matrix [64, 32]");
  bad.row_begin = 0;
  bad.col_begin = -32;
  Says(bad, "slice row 0, column -32 are not within [64, 32]");
  bad.col_begin = 8;
  Says(bad,
       "slice begins at row 0, column 8, inside a scale block of 1 x 32; begin on a block "
       "boundary");
  bad.col_begin = 0;
  bad.scales = Reshaped(bad.scales, {1, int64_t{1} << 58});
  Says(bad, "slice.scales [1, 288230376151711744] reaches beyond the matrix [64, 32]");
}

// The values are right: they must not be written before the scales and the bias are known to be.
TEST_F(RefusedUpdate, TheLastPartOfARightSlice) {
  WeightSlice bad = slice_;
  bad.scales = Tensor(DType::kE8m0, {64, 2});
  Says(bad, "slice.scales [64, 2] reaches beyond the matrix [64, 32]");
  bad = slice_;
  bad.bias = Tensor(DType::kFloat32, {65});
  Says(bad, "slice.bias [65] at row 0 is not within [64]");
  bad.bias = Tensor(DType::kBf16, {64});
  Says(bad, "slice.bias is bf16 [64]; wanted f32 [rows]");
  bad = slice_;
  bad.global_scale = Tensor(DType::kFloat32, {1});
  Says(bad, "slice.global_scale is given, but these weights have no global scales");
}

TEST_F(RefusedUpdate, MemoryThatCannotBeRead) {
  for (TensorView WeightSlice::*field :
       {&WeightSlice::values, &WeightSlice::scales, &WeightSlice::bias}) {
    const std::string name = field == &WeightSlice::values   ? "slice.values"
                             : field == &WeightSlice::scales ? "slice.scales"
                                                             : "slice.bias";
    WeightSlice bad = slice_;
    (bad.*field).device = {DeviceKind::kCuda, 2};
    Says(bad, name +
                  " is a CUDA tensor (cuda:2); wanted host memory, the plan's device is the "
                  "CPU: copy it to the host");
    bad = slice_;
    (bad.*field).data = nullptr;
    const char* shape = name == "slice.values"   ? "[64, 32]"
                        : name == "slice.scales" ? "[64, 1]"
                                                 : "[64]";
    std::string message = name + " has a null pointer, but shape ";
    message += shape;
    message += "; wanted allocated memory";
    Says(bad, message);
  }
}

TEST_F(RefusedUpdate, HalfACode) {
  const LayerWeights stored(WithBias(W::kMxFp4));
  Weights weights = stored.Make();
  WeightSlice bad;
  bad.part = WeightPart::kGemm2;
  bad.col_begin = 1;
  bad.values = Tensor(DType::kUint8, {64, 8});
  const Caught caught = CatchError([&] { weights.Update(bad); });
  EXPECT_EQ(caught.message, "slice.col_begin=1; wanted an even column, mxfp4 packs 2 codes a byte");
}

// A 128 x 128 block of interleaved rows holds rows of both: neither has scales of its own.
TEST_F(RefusedUpdate, ScalesThatGateAndUpShare) {
  WeightSource source = WithBias(W::kFp8Block128);
  source.layout.order = RowOrder::kInterleavedGateUp;
  const LayerWeights stored(source);
  Weights weights = stored.Make();
  WeightSlice bad;
  bad.part = WeightPart::kUp;
  bad.scales = Tensor(DType::kFloat32, {1, 1});
  const Caught caught = CatchError([&] { weights.Update(bad); });
  EXPECT_EQ(ToString(caught.kind), ToString(ErrorKind::kUnsupported));
  EXPECT_EQ(caught.message,
            "slice.scales of fp8_block128 cover gate and up rows together where the two are "
            "interleaved; update kGemm1");
  bad.part = WeightPart::kGemm1;
  EXPECT_NO_THROW(weights.Update(bad));
}

TEST_F(RefusedUpdate, TheSliceThatTheTestsSpoilIsRight) {
  const std::vector<uint8_t> before = Contents();
  EXPECT_NO_THROW(weights_.Update(slice_));
  EXPECT_NE(Contents(), before);
}

}  // namespace
}  // namespace hopyard::test
