// SPDX-License-Identifier: Apache-2.0
// Every row of configs.def with every pair of formats that it runs, against sums in double: edge
// segments, odd sizes, both GEMMs' ways to find their tokens; everything unused is NaN. And that a
// call always gives the same bits.
#include "gemm/sm90/grouped_gemm_sm90.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/parallel.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "gemm/slice_write.h"
#include "gemm/sm90/operands.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/gemm_weights.h"
#include "tests/inputs.h"

namespace hopyard::gemm::sm90 {
namespace {

using test::DeviceArray;
using test::GemmProblem;
using test::GemmWeights;

// Inputs of one call on the host, and the tile list.
class Call {
 public:
  Call(int index, const GemmProblem& problem, std::vector<int64_t> counts)
      : index_(index),
        kernel_(KernelAt(index)),
        problem_(problem),
        counts_(std::move(counts)),
        random_(17),
        experts_(static_cast<int64_t>(counts_.size())),
        // Kernels of single blocks read lists with empty tiles too: the other GEMM may want them.
        cluster_(problem.gather ? std::max(2, kernel_.cluster) : kernel_.cluster),
        rows_(problem.features * (kernel_.gated ? 2 : 1)),
        weights_(problem, experts_, rows_, random_) {
    for (int64_t i = 0; i < experts_ * rows_; ++i) {
      bias_.push_back(static_cast<float>(random_() % 9) - 4.0F);
    }
    MakeTiles();
    MakeTokens();
  }

  // Judges one launch, and holds the others to its bits.
  void Run(int launches) {
    const auto place = [&](int64_t row) { return PlaceOf(row); };
    const DeviceArray<uint8_t> codes(kernel_.mn_major ? weights_.MnMajorCodes(place)
                                                      : weights_.codes());
    const DeviceArray<uint8_t> scales(weights_.scales());
    const DeviceArray<float> global(weights_.global());
    const DeviceArray<uint8_t> x(x_);
    const DeviceArray<float> bias(StoredBias());
    const DeviceArray<float> block_scales(block_scales_);
    const DeviceArray<float> token_scales(token_scales_);
    const DeviceArray<int32_t> sources(sources_);
    const DeviceArray<int32_t> tile_expert(tile_expert_);
    const DeviceArray<int32_t> tile_begin(tile_begin_);
    const DeviceArray<int32_t> tile_end(tile_end_);
    const DeviceArray<int32_t> num_tiles(
        std::vector<int32_t>{static_cast<int32_t>(tile_expert_.size()) - 2});
    const int64_t width =
        problem_.ordered ? RoundUp(problem_.features, kKGroup) : problem_.features;
    const int64_t out_pitch = width + (problem_.features % 8 == 0 ? 24 : 3);
    const DeviceArray<uint16_t> out(std::max<int64_t>(1, num_rows_ * out_pitch));
    std::vector<const void*> values;
    std::vector<ExpertPointers> pointers;
    for (int64_t e = 0; e < experts_; ++e) {
      values.push_back(codes.get() + e * rows_ * weights_.value_stride());
      ExpertPointers one;
      one.scales = scales.get() + e * weights_.scale_bytes();
      one.bias = problem_.bias ? bias.get() + e * rows_ : nullptr;
      one.global_scale = weights_.has_global() ? global.get() + e : nullptr;
      pointers.push_back(one);
    }
    const DeviceArray<const void*> values_on_device(values);
    const DeviceArray<uint8_t> exponents(2 * experts_ * problem_.features);
    GroupedGemmArgs args;
    args.weights = problem_.weights;
    args.k = problem_.k;
    args.features = problem_.features;
    args.segment_end = static_cast<int32_t>(experts_);
    args.activation = problem_.activation;
    const DeviceArray<uint8_t> packed(
        std::vector<uint8_t>(static_cast<size_t>(experts_ * PackedStride()), 0));
    const Tables tables = FillMatrices({codes.get(), scales.get(), packed.get(), exponents.get(),
                                        values_on_device.get(), pointers},
                                       &args);
    args.x = x.get();
    args.x_pitch = x_pitch_;
    args.row_to_source = problem_.gather ? sources.get() : nullptr;
    args.x_block_scales =
        problem_.x.format == Format::kFp8Block1x128 ? block_scales.get() : nullptr;
    args.x_token_scales = problem_.x.format == Format::kFp8PerRow ? token_scales.get() : nullptr;
    args.tile_expert = tile_expert.get();
    args.tile_row_begin = tile_begin.get();
    args.tile_row_end = tile_end.get();
    args.num_tiles = num_tiles.get();
    args.max_tiles = static_cast<int64_t>(tile_expert_.size());
    args.out = out.get();
    args.out_pitch = out_pitch;
    args.out_format.order = problem_.ordered ? KOrder::kBf16Decoded : KOrder::kNatural;
    RunGroupedGemm(index_, args, nullptr);
    Check(out.Download(), out_pitch);
    ExpectSameBits(args, out, launches);
    ExpectGeneralKernelAgrees(args, out);
    ASSERT_TRUE(out.GuardsIntact());
  }

 private:
  // Weights in device memory.
  struct Stored {
    uint8_t* codes;
    uint8_t* scales;
    uint8_t* packed;     // room for it, zero
    uint8_t* exponents;  // likewise
    const void* const* values;
    std::vector<ExpertPointers> pointers;
  };
  using Tables = std::vector<std::unique_ptr<DeviceArray<ExpertPointers>>>;
  // Describes gate and up, or the only matrix, by tables that must live as long as `args`.
  [[nodiscard]] Tables FillMatrices(const Stored& stored, GroupedGemmArgs* args) const {
    Tables tables;
    for (int64_t part = 0; part < (kernel_.gated ? 2 : 1); ++part) {
      MatrixArgs& matrix = part == 0 ? args->first : args->second;
      std::vector<ExpertPointers> mine = stored.pointers;
      for (int64_t e = 0; e < experts_; ++e) {
        mine[static_cast<size_t>(e)].row_exponents =
            stored.exponents + (part * experts_ + e) * problem_.features;
      }
      tables.push_back(std::make_unique<DeviceArray<ExpertPointers>>(mine));
      matrix.pointers = tables.back()->get();
      FillMatrix(stored.codes, part, matrix);
      PackedOrder order;
      if (kernel_.packed) {
        order = Pack(part, stored.codes, stored.scales, stored.packed);
        matrix.packed = order.base;
        matrix.packed_stride = PackedStride();
      }
      if (formats::RuleOf(problem_.weights).codes_per_byte == 2 &&
          problem_.x.dtype == DType::kE4m3) {
        ComputeRowExponents({matrix, ShapeOfPart(stored.codes, part), stored.values, order,
                             stored.exponents + part * experts_ * problem_.features},
                            nullptr);
      }
    }
    return tables;
  }
  // From all launches after the first, too, whose output this is: many in a row without a wait,
  // each into memory of its own, with nothing written between.
  void ExpectSameBits(GroupedGemmArgs args, const DeviceArray<uint16_t>& out, int launches) const {
    constexpr int kInARow = 100;
    const std::vector<uint16_t> first = out.Download();
    const auto size = static_cast<int64_t>(first.size());
    const int64_t stride = RoundUp(size, int64_t{64}) + 64;
    const DeviceArray<uint16_t> many(
        std::max(int64_t{1}, std::min(kInARow, launches - 1) * stride));
    for (int done = 1; done < launches; done += kInARow) {
      const int count = std::min(kInARow, launches - done);
      many.Poison();
      for (int i = 0; i < count; ++i) {
        args.out = many.get() + i * stride;
        RunGroupedGemm(index_, args, nullptr);
      }
      const std::vector<uint16_t> outputs = many.Download();
      for (int i = 0; i < count; ++i) {
        const auto begin = outputs.begin() + i * stride;
        ASSERT_TRUE(std::equal(first.begin(), first.end(), begin))
            << "launch " << done + i << " gives other bits";
        ASSERT_EQ(std::count(begin + size, begin + stride, uint16_t{0xFFFF}), stride - size)
            << "launch " << done + i << " writes behind its output";
      }
    }
    ASSERT_TRUE(many.GuardsIntact());
  }
  // Where the plain kernel ran (plain.h), the general one gives its bits.
  void ExpectGeneralKernelAgrees(GroupedGemmArgs args, const DeviceArray<uint16_t>& out) const {
    const std::vector<uint16_t> first = out.Download();
    const DeviceArray<uint16_t> again(static_cast<int64_t>(first.size()));
    args.general = true;
    args.out = again.get();
    RunGroupedGemm(index_, args, nullptr);
    ASSERT_TRUE(again.Download() == first) << "the general kernel gives other bits";
    ASSERT_TRUE(again.GuardsIntact());
  }
  [[nodiscard]] PackedOrder OrderOfPart(int64_t part, uint8_t* base) const {
    PackedOrder order;
    order.base = base;
    order.groups = CeilDiv(problem_.k, kKGroup);
    order.scale_bytes =
        static_cast<int32_t>(kKGroup / formats::RuleOf(problem_.weights).scale_block);
    order.paired = kernel_.gated;
    order.second = part == 1;
    return order;
  }
  [[nodiscard]] int64_t PackedStride() const {
    return kernel_.packed ? PackedExpertBytes(OrderOfPart(0, nullptr), problem_.features) : 0;
  }
  // Every expert's matrix into `to`, which is zero.
  [[nodiscard]] PackedOrder Pack(int64_t part, uint8_t* codes, uint8_t* scales, uint8_t* to) const {
    for (int64_t e = 0; e < experts_; ++e) {
      PackArgs args;
      args.rule = formats::RuleOf(problem_.weights);
      args.from.format = problem_.weights;
      args.from.values = codes + e * rows_ * weights_.value_stride();
      args.from.value_stride = weights_.value_stride();
      args.from.scales = scales + e * weights_.scale_bytes();
      args.from.scale_stride = weights_.scale_stride();
      args.from.rows = problem_.features;
      args.from.cols = problem_.k;
      args.from.position_begin = part * problem_.features;
      args.to = OrderOfPart(part, to + e * PackedStride());
      PackSm90(args, nullptr);
    }
    return OrderOfPart(part, to);
  }
  // Of natural row `row` among gate's and up's, in the order in which an expert's are stored.
  [[nodiscard]] int64_t PlaceOf(int64_t row) const {
    return kernel_.interleaved ? row % problem_.features * 2 + row / problem_.features : row;
  }
  [[nodiscard]] std::vector<float> StoredBias() const {
    std::vector<float> stored(bias_.size());
    for (size_t i = 0; i < bias_.size(); ++i) {
      const auto row = static_cast<int64_t>(i);
      stored[static_cast<size_t>(row / rows_ * rows_ + PlaceOf(row % rows_))] = bias_[i];
    }
    return stored;
  }
  [[nodiscard]] MapShape ShapeOfPart(const uint8_t* codes, int64_t part) const {
    MapShape shape;
    shape.format = problem_.weights;
    shape.values = codes;
    shape.experts = experts_;
    shape.expert_stride = rows_ * weights_.value_stride();
    shape.rows = problem_.features;
    shape.cols = problem_.k;
    shape.value_stride = weights_.value_stride();
    shape.position_begin = part * problem_.features;
    shape.swizzled = IsSwizzled(problem_.weights, problem_.x);
    if (kernel_.interleaved) {
      shape.position_begin = part;
      shape.position_step = 2;
    }
    if (kernel_.mn_major) {
      shape.major = MajorOrder::kMnMajor;
      shape.value_stride = weights_.mn_stride();
      shape.expert_stride = problem_.k * weights_.mn_stride();
    }
    return shape;
  }
  void FillMatrix(const uint8_t* codes, int64_t part, MatrixArgs& matrix) const {
    const MapShape shape = ShapeOfPart(codes, part);
    ASSERT_EQ(MapProblem(shape), "");
    matrix.map = MakeTensorMap(shape);
    matrix.rows = problem_.features;
    matrix.position_begin = shape.position_begin;
    matrix.position_step = shape.position_step;
    matrix.scale_stride = weights_.scale_stride();
    matrix.has_bias = HasBias(part * problem_.features);
    matrix.has_global_scale = weights_.has_global();
    matrix.whole_lines = HasWholeLines(shape);
  }
  // Two entries behind the live ones are poison that no kernel may read.
  void MakeTiles() {
    for (int64_t e = 0; e < experts_; ++e) {
      const int64_t count = counts_[static_cast<size_t>(e)];
      const int64_t room = RoundUp(count, int64_t{kernel_.tokens} * cluster_);
      for (int64_t begin = 0; begin < room; begin += kernel_.tokens) {
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
    const bool natural = problem_.x.order == KOrder::kNatural;
    const int64_t size = SizeOf(problem_.x.dtype);
    const int64_t width = natural ? problem_.k : RoundUp(problem_.k, kKGroup);
    x_pitch_ = RoundUp(width, 16) + 16;
    // One more token, which nobody names.
    x_.assign(static_cast<size_t>((tokens + 1) * x_pitch_ * size), 0xFF);
    for (int64_t t = 0; t < tokens; ++t) {
      std::memset(x_.data() + t * x_pitch_ * size, 0, static_cast<size_t>(width * size));
      for (int64_t k = 0; k < problem_.k; ++k) {
        const float drawn = problem_.integers
                                ? static_cast<float>(static_cast<int>(random_() % 5) - 2)
                                : normal_(random_);
        const bool coded = problem_.x.format != Format::kBf16;
        const uint8_t code = formats::EncodeE4m3(drawn);
        const float value = coded ? formats::DecodeE4m3(code) : formats::RoundToBf16(drawn);
        x_values_.push_back(value);
        const uint16_t bits = formats::EncodeBf16(value);
        std::memcpy(x_.data() + (t * x_pitch_ + PositionOf(problem_.x.order, k)) * size,
                    size == 1 ? static_cast<const void*>(&code) : &bits, static_cast<size_t>(size));
      }
      for (int64_t b = 0; b < CeilDiv(problem_.k, 128); ++b) {
        block_scales_.push_back(0.5F + static_cast<float>(random_() % 64) / 32.0F);
      }
      token_scales_.push_back(0.5F + static_cast<float>(random_() % 64) / 32.0F);
    }
    for (int64_t r = 0; r < num_rows_; ++r) {
      sources_.push_back(static_cast<int32_t>(problem_.gather ? (r * 7) % tokens : r));
    }
    sources_.push_back(-1);
    block_scales_.push_back(NAN);
    token_scales_.push_back(NAN);
  }

  // The matrix of this row, gate's ahead of up's.
  [[nodiscard]] bool HasBias(int64_t row) const {
    return problem_.bias && !(problem_.second_bias && kernel_.gated && row < problem_.features);
  }
  struct Sum {
    double value = 0.0;
    double magnitude = 0.0;
  };
  // What a row's 128 values of block `block` are multiplied by.
  [[nodiscard]] double XScale(int64_t source, int64_t block, int64_t blocks) const {
    if (problem_.x.format == Format::kFp8Block1x128) {
      return block_scales_[static_cast<size_t>(source * blocks + block)];
    }
    return problem_.x.format == Format::kFp8PerRow ? token_scales_[static_cast<size_t>(source)]
                                                   : 1.0;
  }
  [[nodiscard]] Sum Dot(int64_t row, int64_t weight_row) const {
    const int64_t source = sources_[static_cast<size_t>(row)];
    const int64_t expert = row_expert_[static_cast<size_t>(row)];
    const int64_t blocks = CeilDiv(problem_.k, 128);
    const double* const w = weights_.Row(expert, weight_row);
    const float* const x = x_values_.data() + static_cast<size_t>(source * problem_.k);
    Sum sum;
    for (int64_t begin = 0; begin < problem_.k; begin += 128) {
      const double scale = XScale(source, begin / 128, blocks);
      for (int64_t i = begin; i < std::min(begin + 128, problem_.k); ++i) {
        const double product = w[i] * x[i] * scale;
        sum.value += product;
        sum.magnitude += std::abs(product);
      }
    }
    if (HasBias(weight_row)) {
      sum.value += bias_[static_cast<size_t>(expert * rows_ + weight_row)];
    }
    return sum;
  }
  // On all threads: sums of 2880 products in double are most of a test's time.
  void Check(const std::vector<uint16_t>& out, int64_t pitch) const {
    std::mutex mutex;
    std::string failure;
    ParallelFor(0, num_rows_, 8, MaxThreads(), [&](int64_t row, int) {
      const std::string problem = CheckRow(out, pitch, row);
      if (!problem.empty()) {
        const std::lock_guard<std::mutex> lock(mutex);
        failure = problem;
      }
    });
    ASSERT_EQ(failure, "");
  }
  // Empty, or what is wrong with the row.
  [[nodiscard]] std::string CheckRow(const std::vector<uint16_t>& out, int64_t pitch,
                                     int64_t row) const {
    const int64_t width =
        problem_.ordered ? RoundUp(problem_.features, kKGroup) : problem_.features;
    // All features of a few rows, a few features of the others.
    const int64_t step = row % 61 == 0 ? 1 : std::max<int64_t>(1, problem_.features / 4 - 1);
    for (int64_t f = 0; f < pitch; f += f < problem_.features ? step : 1) {
      const KOrder order = problem_.ordered && f < width ? KOrder::kBf16Decoded : KOrder::kNatural;
      const uint16_t bits = out[static_cast<size_t>(row * pitch + PositionOf(order, f))];
      const bool right = f < problem_.features ? IsRight(formats::DecodeBf16(bits), row, f)
                         : f < width           ? (bits & 0x7FFF) == 0
                                               : bits == 0xFFFF;
      if (!right) {
        return "row " + std::to_string(row) + " feature " + std::to_string(f) + ": bits " +
               std::to_string(bits);
      }
    }
    return {};
  }
  [[nodiscard]] bool IsRight(float got, int64_t row, int64_t f) const {
    // FP32 sums; Hopper's FP8 products keep fewer bits: 2.1e-4 of the sum of magnitudes was seen
    // over 128 of K (hopper-kernels 10).
    const double loss = kernel_.x_dtype == DType::kE4m3 ? 4e-4 : 2e-6;
    const Sum first = Dot(row, f);
    double want = first.value;
    double slack = loss * first.magnitude;
    if (kernel_.gated) {
      const Sum up = Dot(row, problem_.features + f);
      const double silu = first.value / (1.0 + std::exp(-first.value));
      want = silu * up.value;
      slack = loss * (first.magnitude * (1.0 + std::abs(up.value)) +
                      up.magnitude * (1.0 + std::abs(silu)));
    } else if (problem_.integers) {
      return got == formats::RoundToBf16(static_cast<float>(want));
    }
    if (std::isnan(want)) {
      return std::isnan(got);
    }
    // Half a BF16 step of rounding, and what FP32 sums lose. NaN is never near.
    return std::abs(got - want) <= 0x1p-8 * std::abs(want) + slack;
  }

  int index_;
  KernelInfo kernel_;
  GemmProblem problem_;
  std::vector<int64_t> counts_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_{0.0F, 0.5F};
  int64_t experts_ = 0;
  int64_t cluster_ = 1;
  int64_t rows_ = 0;
  GemmWeights weights_;
  int64_t x_pitch_ = 0;
  int64_t num_rows_ = 0;
  std::vector<uint8_t> x_;
  std::vector<float> x_values_;
  std::vector<float> block_scales_;
  std::vector<float> token_scales_;
  std::vector<float> bias_;
  std::vector<int32_t> sources_;
  std::vector<int64_t> row_expert_;
  std::vector<int32_t> tile_expert_;
  std::vector<int32_t> tile_begin_;
  std::vector<int32_t> tile_end_;
};

class GroupedGemm : public ::testing::TestWithParam<int> {
 protected:
  // With every pair of formats that the kernel runs.
  void RunCase(GemmProblem problem, const std::vector<int64_t>& counts, int launches = 1) const {
    const KernelInfo kernel = KernelAt(GetParam());
    if (kernel.gated) {
      problem.activation = ActivationKind::kSwiGlu;
    }
    Tried tried;
    for (const auto& [weights, activations] : test::SupportedPairs()) {
      problem.weights = weights;
      const LayerOperands operands = OperandsOf(weights, activations);
      const LayerOperands rounded = RoundedOperandsOf(weights, activations).value_or(operands);
      for (const RowFormat& x : {operands.x, operands.h, rounded.x, rounded.h}) {
        problem.x = x;
        if (!Runs(GetParam(), weights, x, kernel.gated) || Seen(weights, x, &tried)) {
          continue;
        }
        Call call(GetParam(), problem, counts);
        call.Run(launches);
        if (HasFatalFailure()) {
          FAIL() << kernel.name << " k " << problem.k << " features " << problem.features << ' '
                 << ToString(weights) << " x " << ToString(activations);
        }
      }
    }
    ASSERT_FALSE(tried.empty()) << kernel.name << " runs no pair of formats";
  }

 private:
  using Tried = std::vector<std::pair<WeightFormat, RowFormat>>;

  static bool Seen(WeightFormat weights, const RowFormat& x, Tried* tried) {
    const auto pair = std::make_pair(weights, x);
    const bool seen = std::find(tried->begin(), tried->end(), pair) != tried->end();
    tried->push_back(pair);
    return seen;
  }
};

TEST_P(GroupedGemm, ExactOnIntegers) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  GemmProblem problem;
  problem.integers = true;
  for (const int64_t k : {32, 64, 224, 1024}) {
    problem.k = k;
    problem.features = k == 32 || k == 224 ? 128 : 64;  // whole blocks of scales, and others
    RunCase(problem, {1, 0, n, 2 * n + 1});
    ASSERT_FALSE(HasFatalFailure());
  }
}

// No multiple of a tile or of 8; MN-major, up follows gate in a row and begins on 16 bytes.
int64_t OddFeatures(const KernelInfo& kernel) {
  return kernel.mn_major && kernel.gated && !kernel.interleaved ? 296 : 300;
}

TEST_P(GroupedGemm, EdgeSegmentsAndOddSizes) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  const int64_t odd = OddFeatures(KernelAt(GetParam()));
  for (const int64_t k : {40, 704, 2880}) {
    for (const int64_t features : {int64_t{40}, int64_t{96}, odd, int64_t{704}}) {
      for (const bool gather : {false, true}) {
        GemmProblem problem;
        problem.k = k;
        problem.features = features;
        problem.gather = gather;
        problem.bias = gather;
        problem.second_bias = features == 96;
        // No weights of alternate columns feed a GEMM that wants another order.
        problem.ordered = features != odd && !gather && !KernelAt(GetParam()).interleaved;
        RunCase(problem, {0, 1, n - 1, 0, n, n + 1, 3 * n - 2, 0});
        ASSERT_FALSE(HasFatalFailure());
      }
    }
  }
}

// Widths of published models and of their shards, once as K and once as features.
TEST_P(GroupedGemm, ModelSizes) {
  HOPYARD_NEEDS_GPU();
  struct Size {
    int64_t k;
    int64_t features;
  };
  const int64_t n = KernelAt(GetParam()).tokens;
  for (const Size& size : {Size{2880, 80}, Size{80, 2880}, Size{2688, 192}, Size{192, 2688},
                           Size{96, 2880}, Size{2688, 1856}, Size{1856, 2688}}) {
    GemmProblem problem;
    problem.k = size.k;
    problem.features = size.features;
    // GEMM1 gathers tokens, and writes rows as GEMM2 reads them.
    problem.gather = size.k > size.features;
    problem.ordered = problem.gather && !KernelAt(GetParam()).interleaved;
    problem.bias = true;
    RunCase(problem, {1, n + 1});
    ASSERT_FALSE(HasFatalFailure());
  }
}

// Ten thousand times: whole tiles and others, an expert without rows.
TEST_P(GroupedGemm, RepeatedLaunchesGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  GemmProblem problem;
  problem.k = 704;
  // Of the general kernel and of the plain one.
  for (const bool plain : {false, true}) {
    problem.features = plain ? 384 : OddFeatures(KernelAt(GetParam()));
    problem.bias = !plain;
    RunCase(problem, {1, 0, n, n + 3}, test::SmallTests() ? 3 : 10000);
    ASSERT_FALSE(HasFatalFailure());
  }
}

// Of codes and of scales, wherever they stand; other rows are what they were.
TEST_P(GroupedGemm, NanWeightsSpoilTheirRowsOnly) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  GemmProblem problem;
  problem.nans = true;
  for (const int64_t k :
       test::SmallTests() ? std::vector<int64_t>{40} : std::vector<int64_t>{40, 704, 1024}) {
    problem.k = k;
    problem.features = k == 1024 ? 384 : OddFeatures(KernelAt(GetParam()));
    RunCase(problem, {1, n, 2});
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST_P(GroupedGemm, NoRowsAtAll) {
  HOPYARD_NEEDS_GPU();
  RunCase(GemmProblem{}, {0, 0, 0});
}

// Also with so few blocks of K that a consumer can be several work items ahead of the other.
TEST_P(GroupedGemm, ManyTilesPerBlock) {
  HOPYARD_NEEDS_GPU();
  const int64_t n = KernelAt(GetParam()).tokens;
  GemmProblem problem;
  problem.features = 1024;
  for (const int64_t k : {128, 384, 1024}) {
    problem.k = k;
    RunCase(problem, std::vector<int64_t>(48, 2 * n + 3), test::SmallTests() ? 2 : 10);
    ASSERT_FALSE(HasFatalFailure());
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, GroupedGemm, ::testing::Range(0, NumKernels()),
                         [](const auto& row) { return std::string(KernelAt(row.param).name); });

}  // namespace
}  // namespace hopyard::gemm::sm90
