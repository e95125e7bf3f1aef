// SPDX-License-Identifier: Apache-2.0
// Every row of configs.def against sums in double: edge segments, odd sizes, both GEMMs' ways to
// find their tokens; everything unused is NaN.
#include "gemm/sm90/grouped_gemm_sm90.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/shape.h"
#include "formats/codes.h"
#include "tests/gpu/device_array.h"

namespace hopyard::gemm::sm90 {
namespace {

using test::DeviceArray;

constexpr uint16_t kNan = 0x7FC0;

struct Problem {
  int64_t k = 64;
  int64_t features = 64;
  bool gather = true;
  bool integers = false;  // small integers: sums are exact
  bool bias = false;
  ActivationKind activation = ActivationKind::kIdentity;
};

// Inputs of one call on the host, and the tile list.
class Call {
 public:
  Call(const KernelInfo& kernel, const Problem& problem, std::vector<int64_t> counts)
      : kernel_(kernel), problem_(problem), counts_(std::move(counts)), random_(17) {
    experts_ = static_cast<int64_t>(counts_.size());
    rows_ = problem.features * (kernel.gated ? 2 : 1);
    k_pitch_ = RoundUp(problem.k, 8) + 8;
    weights_.assign(static_cast<size_t>(experts_ * rows_ * k_pitch_), kNan);
    for (int64_t r = 0; r < experts_ * rows_; ++r) {
      FillRow(weights_, r * k_pitch_, problem.k);
    }
    for (int64_t i = 0; i < experts_ * rows_; ++i) {
      bias_.push_back(Draw());
    }
    MakeTiles();
    MakeTokens();
  }

  void Run(int index) {
    const DeviceArray<uint16_t> weights(weights_);
    const DeviceArray<uint16_t> x(x_);
    const DeviceArray<float> bias(bias_);
    const DeviceArray<int32_t> sources(sources_);
    const DeviceArray<int32_t> tile_expert(tile_expert_);
    const DeviceArray<int32_t> tile_begin(tile_begin_);
    const DeviceArray<int32_t> tile_end(tile_end_);
    const DeviceArray<int32_t> num_tiles(
        std::vector<int32_t>{static_cast<int32_t>(tile_expert_.size()) - 2});
    const int64_t out_pitch = problem_.features + 3 * (problem_.features % 8 == 0 ? 8 : 1);
    const DeviceArray<uint16_t> out(std::max<int64_t>(1, num_rows_ * out_pitch));
    GroupedGemmArgs args;
    args.weights = weights.get();
    args.experts = experts_;
    args.rows = rows_;
    args.k = problem_.k;
    args.row_stride = k_pitch_;
    args.expert_stride = rows_ * k_pitch_;
    args.gate_begin = 0;
    args.up_begin = problem_.features;
    args.features = problem_.features;
    args.bias = problem_.bias ? bias.get() : nullptr;
    args.activation = problem_.activation;
    args.x = x.get();
    args.x_pitch = k_pitch_;
    args.row_to_source = problem_.gather ? sources.get() : nullptr;
    args.tile_expert = tile_expert.get();
    args.tile_row_begin = tile_begin.get();
    args.tile_row_end = tile_end.get();
    args.num_tiles = num_tiles.get();
    args.max_tiles = static_cast<int64_t>(tile_expert_.size());
    args.out = out.get();
    args.out_pitch = out_pitch;
    RunGroupedGemm(index, args, nullptr);
    Check(out.Download(), out_pitch);
    ASSERT_TRUE(out.GuardsIntact());
  }

 private:
  float Draw() {
    return problem_.integers ? static_cast<float>(static_cast<int>(random_() % 5) - 2)
                             : formats::RoundToBf16(normal_(random_));
  }
  void FillRow(std::vector<uint16_t>& values, int64_t begin, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      values[static_cast<size_t>(begin + i)] = formats::EncodeBf16(Draw());
    }
  }
  // Two entries behind the live ones are poison that no kernel may read.
  void MakeTiles() {
    for (int64_t e = 0; e < experts_; ++e) {
      const int64_t count = counts_[static_cast<size_t>(e)];
      for (int64_t begin = 0; begin < count; begin += kernel_.tokens) {
        tile_expert_.push_back(static_cast<int32_t>(e));
        tile_begin_.push_back(static_cast<int32_t>(num_rows_ + begin));
        tile_end_.push_back(
            static_cast<int32_t>(num_rows_ + std::min<int64_t>(begin + kernel_.tokens, count)));
      }
      for (int64_t i = 0; i < count; ++i) {
        row_expert_.push_back(e);
      }
      num_rows_ += count;
    }
    for (std::vector<int32_t>* list : {&tile_expert_, &tile_begin_, &tile_end_}) {
      list->insert(list->end(), 2, INT32_MAX);
    }
  }
  void MakeTokens() {
    const int64_t tokens = problem_.gather ? num_rows_ / 2 + 1 : num_rows_;
    // One more token, which nobody names.
    x_.assign(static_cast<size_t>((tokens + 1) * k_pitch_), kNan);
    for (int64_t t = 0; t < tokens; ++t) {
      FillRow(x_, t * k_pitch_, problem_.k);
    }
    for (int64_t r = 0; r < num_rows_; ++r) {
      sources_.push_back(static_cast<int32_t>(problem_.gather ? (r * 7) % tokens : r));
    }
    sources_.push_back(-1);
  }

  struct Sum {
    double value = 0.0;
    double magnitude = 0.0;
  };
  [[nodiscard]] Sum Dot(int64_t row, int64_t weight_row) const {
    const int64_t source = sources_[static_cast<size_t>(row)];
    const int64_t w = (row_expert_[static_cast<size_t>(row)] * rows_ + weight_row) * k_pitch_;
    Sum sum;
    for (int64_t i = 0; i < problem_.k; ++i) {
      const double product = double{formats::DecodeBf16(weights_[static_cast<size_t>(w + i)])} *
                             formats::DecodeBf16(x_[static_cast<size_t>(source * k_pitch_ + i)]);
      sum.value += product;
      sum.magnitude += std::abs(product);
    }
    if (problem_.bias) {
      const int64_t at = row_expert_[static_cast<size_t>(row)] * rows_ + weight_row;
      sum.value += bias_[static_cast<size_t>(at)];
    }
    return sum;
  }
  void Check(const std::vector<uint16_t>& out, int64_t pitch) const {
    for (int64_t row = 0; row < num_rows_; ++row) {
      // All features of a few rows, a few features of the others.
      const int64_t step = row % 37 == 0 ? 1 : std::max<int64_t>(1, problem_.features / 5 - 1);
      for (int64_t f = 0; f < pitch; f += f < problem_.features ? step : 1) {
        const uint16_t bits = out[static_cast<size_t>(row * pitch + f)];
        if (f >= problem_.features) {
          ASSERT_EQ(bits, 0xFFFF) << "row " << row << " beyond its features";
          continue;
        }
        CheckOne(formats::DecodeBf16(bits), row, f);
        if (::testing::Test::HasFatalFailure()) {
          return;
        }
      }
    }
  }
  void CheckOne(float got, int64_t row, int64_t f) const {
    const Sum first = Dot(row, f);
    double want = first.value;
    double slack = 1e-6 * first.magnitude;
    if (kernel_.gated) {
      const Sum up = Dot(row, problem_.features + f);
      const double silu = first.value / (1.0 + std::exp(-first.value));
      want = silu * up.value;
      slack = 1e-6 * (first.magnitude * (1.0 + std::abs(up.value)) +
                      up.magnitude * (1.0 + std::abs(silu)));
    } else if (problem_.integers) {
      ASSERT_EQ(got, formats::RoundToBf16(static_cast<float>(want))) << row << ' ' << f;
      return;
    }
    // Half a BF16 step of rounding, and what FP32 sums lose.
    ASSERT_NEAR(got, want, 0x1p-8 * std::abs(want) + slack) << "row " << row << " feature " << f;
  }

  KernelInfo kernel_;
  Problem problem_;
  std::vector<int64_t> counts_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_{0.0F, 0.5F};
  int64_t experts_ = 0;
  int64_t rows_ = 0;
  int64_t k_pitch_ = 0;
  int64_t num_rows_ = 0;
  std::vector<uint16_t> weights_;
  std::vector<uint16_t> x_;
  std::vector<float> bias_;
  std::vector<int32_t> sources_;
  std::vector<int64_t> row_expert_;
  std::vector<int32_t> tile_expert_;
  std::vector<int32_t> tile_begin_;
  std::vector<int32_t> tile_end_;
};

class GroupedGemm : public ::testing::TestWithParam<int> {
 protected:
  void RunCase(Problem problem, const std::vector<int64_t>& counts) const {
    const KernelInfo kernel = KernelAt(GetParam());
    if (kernel.gated) {
      problem.activation = ActivationKind::kSwiGlu;
    }
    Call call(kernel, problem, counts);
    call.Run(GetParam());
    if (HasFatalFailure()) {
      FAIL() << kernel.name << " k " << problem.k << " features " << problem.features;
    }
  }
};

TEST_P(GroupedGemm, ExactOnIntegers) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  Problem problem;
  problem.integers = true;
  for (const int64_t k : {8, 64, 200, 1024}) {
    problem.k = k;
    RunCase(problem, {1, 0, n, 2 * n + 1});
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST_P(GroupedGemm, EdgeSegmentsAndOddSizes) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  for (const int64_t k : {40, 704, 2048}) {
    for (const int64_t features : {40, 96, 300, 768}) {
      for (const bool gather : {false, true}) {
        Problem problem;
        problem.k = k;
        problem.features = features;
        problem.gather = gather;
        problem.bias = gather;
        RunCase(problem, {0, 1, n - 1, 0, n, n + 1, 3 * n - 2, 0});
        ASSERT_FALSE(HasFatalFailure());
      }
    }
  }
}

TEST_P(GroupedGemm, NoRowsAtAll) {
  HOPYARD_NEEDS_GPU();
  RunCase(Problem{}, {0, 0, 0});
}

TEST_P(GroupedGemm, ManyTilesPerBlock) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  Problem problem;
  problem.k = 512;
  problem.features = 2048;
  RunCase(problem, std::vector<int64_t>(64, 2 * n + 3));
}

INSTANTIATE_TEST_SUITE_P(Rows, GroupedGemm, ::testing::Range(0, NumKernels()),
                         [](const auto& row) { return std::string(KernelAt(row.param).name); });

}  // namespace
}  // namespace hopyard::gemm::sm90
