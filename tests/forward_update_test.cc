// SPDX-License-Identifier: Apache-2.0
// Weights::Update: random partial slices in random order equal a fresh load, in every layout.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "formats/codes.h"
#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

// A slice of a canonical matrix, with views into it.
WeightSlice SliceOf(const CanonicalMatrix& matrix, const Window& window) {
  WeightSlice slice;
  slice.row_begin = window.row_begin;
  slice.col_begin = window.col_begin;
  const int64_t unit = SizeOf(CodeType(matrix.format));
  const int64_t per_byte = CodesPerByte(matrix.format);
  const int64_t first = window.row_begin * matrix.row_bytes + window.col_begin * unit / per_byte;
  slice.values = TensorView::Contiguous(matrix.codes.data() + first, CodeType(matrix.format),
                                        {window.rows, window.cols / per_byte});
  slice.values.strides[0] = matrix.row_bytes / unit;
  if (matrix.scale_rows == 0) {
    return slice;
  }
  const bool blocked = matrix.format == WeightFormat::kFp8Block128;
  const int64_t block = ScaleBlockCols(matrix.format);
  const int64_t row = blocked ? window.row_begin / 128 : window.row_begin;
  const int64_t rows = blocked ? (window.row_begin + window.rows + 127) / 128 - row : window.rows;
  const int64_t col = block > 0 ? window.col_begin / block : 0;
  const auto* scales = matrix.scales.data() + (row * matrix.scale_cols + col) * matrix.scale_bytes;
  if (block == 0) {
    slice.scales = TensorView::Contiguous(scales, ScaleType(matrix.format), {rows});
    return slice;
  }
  const int64_t cols = (window.col_begin + window.cols + block - 1) / block - col;
  slice.scales = TensorView::Contiguous(scales, ScaleType(matrix.format), {rows, cols});
  slice.scales.strides[0] = matrix.scale_cols;
  return slice;
}

// Cuts a matrix into windows whose edges lie on scale blocks.
std::vector<Window> CutUp(const CanonicalMatrix& matrix, uint64_t seed) {
  const int64_t row_step = matrix.format == WeightFormat::kFp8Block128
                               ? 128
                               : 1 + static_cast<int64_t>(Hash(seed, 1) % 40);
  const int64_t block = std::max<int64_t>(ScaleBlockCols(matrix.format), 2);
  int64_t col_step = block * (1 + static_cast<int64_t>(Hash(seed, 2) % 3));
  if (matrix.format == WeightFormat::kFp8PerChannel) {
    col_step = matrix.cols;  // a channel's scale is of its whole row
  }
  std::vector<Window> windows;
  for (int64_t row = 0; row < matrix.rows; row += row_step) {
    for (int64_t col = 0; col < matrix.cols; col += col_step) {
      windows.push_back(
          {row, std::min(row_step, matrix.rows - row), col, std::min(col_step, matrix.cols - col)});
    }
  }
  return windows;
}

struct PendingUpdate {
  WeightSlice slice;
  std::vector<float> bias;
  float global = 1.0F;
};

class Refit {
 public:
  explicit Refit(uint64_t seed) : seed_(seed) {}

  // Adds the slices of one part; `bias` may be empty.
  void Add(int64_t expert, WeightPart part, const CanonicalMatrix& matrix,
           const std::vector<float>& bias) {
    for (const Window& window : CutUp(matrix, Hash(seed_, updates_.size()))) {
      PendingUpdate update;
      update.slice = SliceOf(matrix, window);
      update.slice.expert = expert;
      update.slice.part = part;
      update.global = matrix.global;
      if (window.col_begin == 0 && !bias.empty()) {
        update.bias.assign(bias.begin() + window.row_begin,
                           bias.begin() + window.row_begin + window.rows);
      }
      updates_.push_back(std::move(update));
    }
  }

  // The expert's global scale, set before its slices, which then repeat it.
  void AddGlobal(int64_t expert, WeightPart part, float global) {
    PendingUpdate update;
    update.slice.expert = expert;
    update.slice.part = part;
    update.global = global;
    globals_.push_back(std::move(update));
  }

  void Apply(bool has_global, Weights* weights) {
    for (PendingUpdate& update : globals_) {
      if (has_global) {
        update.slice.global_scale = TensorView::Contiguous(&update.global, DType::kFloat32, {1});
        weights->Update(update.slice);
      }
    }
    for (size_t i = updates_.size(); i > 1; --i) {
      std::swap(updates_[i - 1], updates_[Hash(seed_, i, 3) % i]);
    }
    for (PendingUpdate& update : updates_) {
      if (!update.bias.empty()) {
        update.slice.bias = TensorView::Contiguous(update.bias.data(), DType::kFloat32,
                                                   {static_cast<int64_t>(update.bias.size())});
      }
      if (has_global) {
        update.slice.global_scale = TensorView::Contiguous(&update.global, DType::kFloat32, {1});
      }
      weights->Update(update.slice);
    }
  }

 private:
  uint64_t seed_;
  std::vector<PendingUpdate> globals_;
  std::vector<PendingUpdate> updates_;
};

struct UpdateCase {
  WeightFormat format;
  WeightLayout layout;
};

std::vector<UpdateCase> UpdateCases() {
  std::vector<UpdateCase> cases;
  for (const WeightFormat format :
       {WeightFormat::kBf16, WeightFormat::kFp8Block128, WeightFormat::kFp8PerTensor,
        WeightFormat::kFp8PerChannel, WeightFormat::kMxFp8, WeightFormat::kNvFp4,
        WeightFormat::kMxFp4, WeightFormat::kMxInt4}) {
    const bool blocked = format == WeightFormat::kFp8Block128;
    const RowOrder interleaved = blocked ? RowOrder::kUpGate : RowOrder::kInterleavedUpGate;
    WeightLayout layout;
    cases.push_back({format, layout});
    layout.order = interleaved;
    layout.map = RowMap::kShuffled128;
    layout.scales = ScaleLayout::kSwizzled128x4;
    layout.major = MajorOrder::kBlockKMajor;
    cases.push_back({format, layout});
    layout = {};
    layout.separate = true;
    layout.per_expert = true;
    layout.map = RowMap::kShuffled64;
    cases.push_back({format, layout});
    layout = {};
    layout.padding = 16;
    layout.order = blocked ? RowOrder::kGateUp : RowOrder::kInterleavedGateUp;
    cases.push_back({format, layout});
    if (format == WeightFormat::kBf16) {
      layout = {};
      layout.major = MajorOrder::kMnMajor;
      cases.push_back({format, layout});
    }
  }
  return cases;
}

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
  for (int64_t e = 0; e < 3; ++e) {
    const CanonicalExpert& expert = fresh.expert(e);
    if (source_.layout.separate) {
      refit.AddGlobal(e, WeightPart::kGate, expert.gate.global);
      refit.AddGlobal(e, WeightPart::kUp, expert.up.global);
    } else {
      refit.AddGlobal(e, WeightPart::kGemm1, expert.gemm1.global);
    }
    refit.AddGlobal(e, WeightPart::kGemm2, expert.gemm2.global);
    refit.Add(e, WeightPart::kGate, expert.gate, expert.gate_bias);
    refit.Add(e, WeightPart::kUp, expert.up, expert.up_bias);
    refit.Add(e, WeightPart::kGemm2, expert.gemm2, expert.gemm2_bias);
  }
  refit.Apply(HasGlobalScale(GetParam().format), &weights);
  EXPECT_TRUE(live.Intact());
  EXPECT_TRUE(SameBits(Forwarded(weights).output, wanted.output));
}

TEST_P(ForwardUpdate, RandomSlicesOfTheFusedMatrixEqualAFreshLoad) {
  const LayerWeights live(source_);
  Weights weights = live.Make();
  source_.seed = 99;
  const LayerWeights fresh(source_);
  Refit refit(5);
  for (int64_t e = 0; e < 3; ++e) {
    const CanonicalExpert& expert = fresh.expert(e);
    refit.AddGlobal(e, WeightPart::kGemm1, expert.gemm1.global);
    refit.AddGlobal(e, WeightPart::kGemm2, expert.gemm2.global);
    refit.Add(e, WeightPart::kGemm1, expert.gemm1, expert.gemm1_bias);
    refit.Add(e, WeightPart::kGemm2, expert.gemm2, expert.gemm2_bias);
  }
  if (source_.layout.separate) {
    const Caught caught = CatchError([&] { refit.Apply(false, &weights); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    return;
  }
  refit.Apply(HasGlobalScale(GetParam().format), &weights);
  EXPECT_TRUE(SameBits(Forwarded(weights).output, Forwarded(fresh.Make()).output));
}

INSTANTIATE_TEST_SUITE_P(Layouts, ForwardUpdate, ::testing::ValuesIn(UpdateCases()),
                         [](const auto& test) {
                           return std::string(ToString(test.param.format)) + "_" +
                                  ToString(test.param.layout);
                         });

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
