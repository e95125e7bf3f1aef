// SPDX-License-Identifier: Apache-2.0
// Rows rounded and laid out on the GPU: the codes and scales of formats::Quantize, the values of
// formats::RoundRow, at PositionOf every column.
#include "stages/3_gemm1/rows_sm90.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/quantize.h"

#include "core/shape.h"
#include "formats/codes.h"
#include "formats/rows.h"
#include "formats/scales.h"
#include "tests/gpu/device_array.h"

namespace hopyard::gemm1 {
namespace {

using formats::DecodeBf16;
using formats::DecodeE4m3;
using formats::EncodeBf16;
using gemm::sm90::KOrder;
using test::DeviceArray;

struct Target {
  Format format;
  DType dtype;
  bool row_global;
};

const std::vector<Target>& Targets() {
  static const std::vector<Target> targets = {
      {Format::kBf16, DType::kBf16, false},          {Format::kFp8PerTensor, DType::kBf16, false},
      {Format::kFp8PerTensor, DType::kE4m3, false},  {Format::kFp8PerRow, DType::kBf16, false},
      {Format::kFp8PerRow, DType::kE4m3, false},     {Format::kFp8Block1x128, DType::kBf16, false},
      {Format::kFp8Block1x128, DType::kE4m3, false}, {Format::kMxFp8, DType::kBf16, false},
      {Format::kNvFp4, DType::kBf16, false},         {Format::kNvFp4, DType::kBf16, true}};
  return targets;
}

struct Shape {
  int64_t rows;
  int64_t cols;
  int64_t in_pitch;   // elements; of packed codes: values
  int64_t out_pitch;  // elements
};

struct Case {
  Target target;
  KOrder order;
  Shape shape;
  float static_scale = 1.0F;

  [[nodiscard]] int64_t element() const { return SizeOf(target.dtype); }
  [[nodiscard]] int64_t blocks() const { return CeilDiv(shape.cols, formats::kFp8Block); }
};

std::string Describe(const Case& c) {
  return std::string(ToString(c.target.format)) + " in " + std::string(ToString(c.target.dtype)) +
         " order " + std::to_string(static_cast<int>(c.order)) + " global per row " +
         std::to_string(c.target.row_global) + " rows " + std::to_string(c.shape.rows) + " cols " +
         std::to_string(c.shape.cols) + " pitches " + std::to_string(c.shape.in_pitch) + ' ' +
         std::to_string(c.shape.out_pitch) + " static scale " + std::to_string(c.static_scale);
}

// A row as the CPU stores it.
struct StoredRow {
  std::vector<uint8_t> codes;
  std::vector<uint8_t> scales;
  float global = 1.0F;
};

StoredRow MakeStoredRow(Format format, int64_t cols) {
  const FormatShape shape = ShapeOf(format, 1, cols);
  StoredRow row;
  row.codes.resize(static_cast<size_t>(shape.code_cols * SizeOf(shape.code_dtype)));
  row.scales.resize(static_cast<size_t>(shape.scale_numel * SizeOf(shape.scale_dtype)));
  return row;
}

StoredRow QuantizeRow(const Case& c, const uint16_t* x) {
  const int64_t cols = c.shape.cols;
  const FormatShape shape = ShapeOf(c.target.format, 1, cols);
  StoredRow row = MakeStoredRow(c.target.format, cols);
  QuantizedView view;
  view.format = c.target.format;
  view.codes = TensorView::Contiguous(row.codes.data(), shape.code_dtype, {1, shape.code_cols});
  if (shape.scale_numel > 0) {
    view.scales = TensorView::Contiguous(row.scales.data(), shape.scale_dtype, {shape.scale_numel});
  }
  const bool scaled = c.target.format == Format::kFp8PerTensor || c.target.format == Format::kNvFp4;
  view.global_scale = !scaled ? 1.0F : c.target.row_global ? 0.0F : c.static_scale;
  row.global = Quantize(TensorView::Contiguous(x, DType::kBf16, {1, cols}), view);
  return row;
}

float ScaleAt(const StoredRow& row, int64_t index) {
  float scale = 0.0F;
  std::memcpy(&scale, row.scales.data() + 4 * index, sizeof(scale));
  return scale;
}

bool IsFp8(Format format) {
  return format == Format::kFp8PerTensor || format == Format::kFp8PerRow ||
         format == Format::kFp8Block1x128;
}

// The elements that the GEMM wants, in natural order: bf16 bits or e4m3 codes.
std::vector<uint16_t> ElementsOf(const Case& c, const StoredRow& row) {
  const auto cols = static_cast<size_t>(c.shape.cols);
  std::vector<uint16_t> elements(cols);
  if (c.target.format == Format::kBf16) {
    std::memcpy(elements.data(), row.codes.data(), 2 * cols);
  } else if (IsFp8(c.target.format)) {
    for (size_t i = 0; i < cols; ++i) {
      elements[i] =
          c.target.dtype == DType::kE4m3 ? row.codes[i] : EncodeBf16(DecodeE4m3(row.codes[i]));
    }
  } else {
    std::vector<float> values(cols);
    formats::DecodeRow(c.target.format, row.codes.data(), row.scales.data(), 1.0F, values.data(),
                       c.shape.cols);
    std::transform(values.begin(), values.end(), elements.begin(), EncodeBf16);
  }
  return elements;
}

// Every NaN as one: a format does not say which NaN a decoded one is.
uint16_t OneNan(uint16_t bf16) {
  return (bf16 & 0x7FFF) > 0x7F80 ? uint16_t{0x7FC0} : bf16;
}

// That elements and scales mean what the CPU layer computes with.
void ExpectRoundRowValues(const Case& c, const uint16_t* x, const StoredRow& row,
                          const std::vector<uint16_t>& elements) {
  const Format format = c.target.format;
  std::vector<float> want(elements.size());
  formats::Bf16ToFloat(x, want.data(), c.shape.cols);
  const float given = format == Format::kFp8PerTensor || !c.target.row_global ? c.static_scale : 0;
  formats::RoundRow(format, want.data(), want.data(), c.shape.cols, given);
  for (size_t i = 0; i < elements.size(); ++i) {
    float scale = row.global;
    if (format == Format::kFp8PerRow) {
      scale = ScaleAt(row, 0);
    } else if (format == Format::kFp8Block1x128) {
      scale = ScaleAt(row, static_cast<int64_t>(i) / formats::kFp8Block);
    }
    const float value = c.target.dtype == DType::kE4m3
                            ? DecodeE4m3(static_cast<uint8_t>(elements[i]))
                            : DecodeBf16(elements[i]);
    const float got = value * scale;
    const float wanted = format == Format::kMxFp8 ? formats::RoundToBf16(want[i]) : want[i];
    ASSERT_TRUE(got == wanted || (std::isnan(got) && std::isnan(wanted)))
        << Describe(c) << " column " << i << ": " << got << " is not " << wanted;
  }
}

// Stretches of 16 columns of one kind each: ordinary, all bits, zeros, tiny, subnormal, huge; with
// `wild` also NaN and infinities.
void FillRow(std::mt19937& random, bool wild, uint16_t* x, int64_t cols) {
  std::normal_distribution<float> normal;
  for (int64_t begin = 0; begin < cols; begin += 16) {
    const auto kind = random() % (wild ? 8 : 6);
    for (int64_t i = begin; i < std::min(begin + 16, cols); ++i) {
      const float draw = normal(random);
      switch (kind) {
        case 2:
          x[i] = random() % 2 == 0 ? 0x0000 : 0x8000;
          break;
        case 3:
          x[i] = EncodeBf16(1e-8F * draw);
          break;
        case 4:
          x[i] = static_cast<uint16_t>(random() & 0x80FFU);
          break;
        case 5:
          x[i] = EncodeBf16(std::clamp(1e38F * draw, -3e38F, 3e38F));
          break;
        case 6:
          x[i] = random() % 8 == 0 ? uint16_t{0x7FC0} : EncodeBf16(draw);
          break;
        case 7:
          x[i] = random() % 8 == 0 ? uint16_t{0xFF80} : EncodeBf16(draw);
          break;
        default:
          x[i] = EncodeBf16(draw);
      }
    }
  }
}

std::vector<uint16_t> MakeInput(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> x(static_cast<size_t>(c.shape.rows * c.shape.in_pitch), 0x7FC0);
  for (int64_t row = 0; row < c.shape.rows; ++row) {
    uint16_t* const values = x.data() + row * c.shape.in_pitch;
    if (row % 4 == 3) {
      std::fill_n(values, c.shape.cols, uint16_t{0});
    } else {
      FillRow(random, row % 4 == 2, values, c.shape.cols);
    }
    if (row % 4 == 0) {
      // Without huge values in the row: otherwise all else rounds to zero where the row has one
      // scale.
      std::transform(values, values + c.shape.cols, values, [](uint16_t bits) {
        return (bits & 0x7FFF) > 0x4400 ? uint16_t{0x3F81} : bits;
      });
    }
  }
  return x;
}

// Outputs on the device.
struct Outputs {
  DeviceArray<uint8_t> out;
  DeviceArray<float> block_scales;
  DeviceArray<float> row_scales;

  explicit Outputs(const Case& c)
      : out(c.shape.rows * c.shape.out_pitch * c.element()),
        block_scales(c.shape.rows * c.blocks()),
        row_scales(c.shape.rows) {}
};

RoundRowsArgs ArgsOf(const Case& c, const Outputs& outputs) {
  RoundRowsArgs args;
  args.to = {c.target.format, c.target.dtype, c.order};
  args.row_global = c.target.row_global;
  args.in_pitch = c.shape.in_pitch;
  args.max_rows = c.shape.rows;
  args.cols = c.shape.cols;
  args.out = outputs.out.get();
  args.out_pitch = c.shape.out_pitch;
  args.out_block_scales = outputs.block_scales.get();
  args.out_row_scales = outputs.row_scales.get();
  return args;
}

struct RowRange {
  int64_t begin;
  int64_t end;
};

// Rows of `live` as the CPU has them, everything else untouched.
void ExpectOutputs(const Case& c, const Outputs& outputs, const std::vector<StoredRow>& rows,
                   const RowRange& live) {
  ASSERT_TRUE(outputs.out.GuardsIntact() && outputs.block_scales.GuardsIntact() &&
              outputs.row_scales.GuardsIntact())
      << Describe(c);
  const std::vector<uint8_t> out = outputs.out.Download();
  const std::vector<float> block_scales = outputs.block_scales.Download();
  const std::vector<float> row_scales = outputs.row_scales.Download();
  const auto bits = [](float value) { return std::bit_cast<uint32_t>(value); };
  for (int64_t row = live.begin; row < live.end; ++row) {
    const StoredRow& stored = rows[static_cast<size_t>(row)];
    const std::vector<uint16_t> elements = ElementsOf(c, stored);
    std::vector<uint16_t> want(static_cast<size_t>(c.shape.out_pitch));
    for (int64_t k = 0; k < c.shape.cols; ++k) {
      want[static_cast<size_t>(PositionOf(c.order, k))] = elements[static_cast<size_t>(k)];
    }
    for (int64_t i = 0; i < c.shape.out_pitch; ++i) {
      uint16_t got = 0;
      std::memcpy(&got, out.data() + (row * c.shape.out_pitch + i) * c.element(),
                  static_cast<size_t>(c.element()));
      const uint16_t wanted = want[static_cast<size_t>(i)];
      const bool bf16 = c.target.dtype == DType::kBf16;
      ASSERT_EQ(bf16 ? OneNan(got) : got, bf16 ? OneNan(wanted) : wanted)
          << Describe(c) << " row " << row << " position " << i;
    }
    for (int64_t b = 0; c.target.format == Format::kFp8Block1x128 && b < c.blocks(); ++b) {
      ASSERT_EQ(bits(block_scales[static_cast<size_t>(row * c.blocks() + b)]),
                bits(ScaleAt(stored, b)))
          << Describe(c) << " row " << row << " block " << b;
    }
    const float got = row_scales[static_cast<size_t>(row)];
    if (c.target.format == Format::kFp8PerRow) {
      ASSERT_EQ(bits(got), bits(ScaleAt(stored, 0))) << Describe(c) << " row " << row;
    } else if (c.target.row_global) {
      ASSERT_TRUE(got == stored.global || (std::isnan(got) && std::isnan(stored.global)))
          << Describe(c) << " row " << row << ": " << got << " is not " << stored.global;
    }
  }
  const auto poison = [](uint8_t byte) { return byte == 0xFF; };
  const int64_t row_bytes = c.shape.out_pitch * c.element();
  ASSERT_TRUE(std::all_of(out.begin() + live.end * row_bytes, out.end(), poison)) << Describe(c);
  ASSERT_TRUE(std::all_of(out.begin(), out.begin() + live.begin * row_bytes, poison))
      << Describe(c);
}

// Values rounded on the GPU. `live` rows are given to it as a count on the device, unless negative.
void ExpectRounded(const Case& c, const std::vector<uint16_t>& x, int64_t live = -1) {
  const DeviceArray<uint16_t> in(x);
  const DeviceArray<float> scale(std::vector<float>{c.static_scale});
  const DeviceArray<int32_t> count(std::vector<int32_t>{static_cast<int32_t>(live)});
  const Outputs outputs(c);
  RoundRowsArgs args = ArgsOf(c, outputs);
  args.in = in.get();
  args.static_scale = scale.get();
  args.num_rows = live < 0 ? nullptr : count.get();
  RoundRowsSm90(args, nullptr);
  std::vector<StoredRow> rows;
  for (int64_t row = 0; row < c.shape.rows; ++row) {
    const uint16_t* const values = x.data() + row * c.shape.in_pitch;
    rows.push_back(QuantizeRow(c, values));
    ExpectRoundRowValues(c, values, rows.back(), ElementsOf(c, rows.back()));
    ASSERT_FALSE(testing::Test::HasFatalFailure());
  }
  ExpectOutputs(c, outputs, rows, {0, live < 0 ? c.shape.rows : live});
}

// A group of segments among those that `offsets` cuts the rows into.
struct Segments {
  std::vector<int32_t> offsets;
  int32_t begin;
  int32_t end;
};

// Values rounded with a scale for every segment of the group, where the format has given scales.
void ExpectSegmentsRounded(const Case& c, const Segments& segments) {
  const std::vector<uint16_t> x = MakeInput(c, static_cast<unsigned>(c.shape.cols));
  std::vector<float> scales;
  for (int32_t s = segments.begin; s < segments.end; ++s) {
    scales.push_back(c.static_scale * (1.0F + 0.25F * static_cast<float>(s)));
  }
  const DeviceArray<uint16_t> in(x);
  const DeviceArray<float> device_scales(scales);
  const DeviceArray<int32_t> offsets(segments.offsets);
  const Outputs outputs(c);
  RoundRowsArgs args = ArgsOf(c, outputs);
  args.in = in.get();
  args.static_scale = device_scales.get();
  args.static_scale_stride = 1;
  args.segment_offsets = offsets.get();
  args.segment_begin = segments.begin;
  args.segment_end = segments.end;
  RoundRowsSm90(args, nullptr);
  std::vector<StoredRow> rows(static_cast<size_t>(c.shape.rows));
  for (int32_t s = segments.begin; s < segments.end; ++s) {
    Case of_segment = c;
    of_segment.static_scale = scales[static_cast<size_t>(s - segments.begin)];
    for (int64_t row = segments.offsets[static_cast<size_t>(s)];
         row < segments.offsets[static_cast<size_t>(s) + 1]; ++row) {
      rows[static_cast<size_t>(row)] = QuantizeRow(of_segment, x.data() + row * c.shape.in_pitch);
    }
  }
  ExpectOutputs(c, outputs, rows,
                {segments.offsets[static_cast<size_t>(segments.begin)],
                 segments.offsets[static_cast<size_t>(segments.end)]});
}

// Random codes and scales, NaN ones among them, laid out without rounding.
void ExpectCodesTaken(const Case& c, unsigned seed) {
  std::mt19937 random(seed);
  const bool packed = c.target.format == Format::kNvFp4;
  const int64_t pitch = packed ? c.shape.in_pitch / 2 : c.shape.in_pitch;
  std::vector<StoredRow> rows;
  std::vector<uint8_t> codes(static_cast<size_t>(c.shape.rows * pitch), 0x7F);
  std::vector<uint8_t> scales;
  std::vector<float> globals;
  for (int64_t row = 0; row < c.shape.rows; ++row) {
    StoredRow stored = MakeStoredRow(c.target.format, c.shape.cols);
    for (std::vector<uint8_t>* bytes : {&stored.codes, &stored.scales}) {
      std::generate(bytes->begin(), bytes->end(), [&] { return static_cast<uint8_t>(random()); });
    }
    stored.global = static_cast<float>(row) + 0.5F;
    std::copy(stored.codes.begin(), stored.codes.end(), codes.begin() + row * pitch);
    scales.insert(scales.end(), stored.scales.begin(), stored.scales.end());
    globals.push_back(stored.global);
    rows.push_back(std::move(stored));
  }
  const DeviceArray<uint8_t> in(codes);
  const DeviceArray<uint8_t> in_scales(scales);
  const DeviceArray<float> in_row_scales(globals);
  const Outputs outputs(c);
  RoundRowsArgs args = ArgsOf(c, outputs);
  args.in = in.get();
  args.in_dtype = packed ? DType::kUint8 : DType::kE4m3;
  args.in_pitch = pitch;
  args.in_scales = in_scales.get();
  args.in_row_scales = in_row_scales.get();
  RoundRowsSm90(args, nullptr);
  ExpectOutputs(c, outputs, rows, {0, c.shape.rows});
}

constexpr KOrder kOrders[] = {KOrder::kNatural, KOrder::kBf16Decoded, KOrder::kFp8Decoded};

void ExpectEveryTarget(int64_t rows, int64_t cols) {
  for (const Target& target : Targets()) {
    for (const KOrder order : kOrders) {
      const int64_t groups = RoundUp(cols, gemm::sm90::kKGroup);
      const int64_t pitch = order == KOrder::kNatural ? RoundUp(cols, 8) : groups;
      const Case c{target, order, {rows, cols, cols, pitch}, 0.037F};
      ExpectRounded(c, MakeInput(c, static_cast<unsigned>(rows + cols)));
      ASSERT_FALSE(testing::Test::HasFatalFailure());
      if (target.format != Format::kBf16) {
        ExpectCodesTaken(c, static_cast<unsigned>(rows + cols));
        ASSERT_FALSE(testing::Test::HasFatalFailure());
      }
    }
  }
}

TEST(RowsSm90, FewRows) {
  HOPYARD_NEEDS_GPU();
  for (const int64_t rows : {0, 1, 3, 5}) {
    for (const int64_t cols : {8, 40, 96, 128, 136, 2048, 2880, 7168}) {
      ExpectEveryTarget(rows, cols);
      ASSERT_FALSE(HasFatalFailure());
    }
  }
}

TEST(RowsSm90, ManyRows) {
  HOPYARD_NEEDS_GPU();
  for (const int64_t cols : {8, 40, 96, 128, 136, 2048, 2880, 7168}) {
    ExpectEveryTarget(257, cols);
    ASSERT_FALSE(HasFatalFailure());
  }
}

// Tails, pitches and starts that no 16-byte access fits, and groups that hold only padding.
TEST(RowsSm90, OddShapes) {
  HOPYARD_NEEDS_GPU();
  for (const Target& target : Targets()) {
    for (const KOrder order : kOrders) {
      for (const int64_t cols : {2, 14, 130, 250, 258}) {
        const bool natural = order == KOrder::kNatural;
        for (const int64_t extra : {0, 2, 6}) {
          const int64_t groups = RoundUp(cols, gemm::sm90::kKGroup);
          const int64_t pitch = natural ? cols + extra / 2 : groups + 64 * (extra & ~3);
          const Case c{target, order, {7, cols, cols + extra, pitch}, 1.0F};
          ExpectRounded(c, MakeInput(c, static_cast<unsigned>(cols)));
          ASSERT_FALSE(HasFatalFailure());
          if (target.format != Format::kBf16) {
            ExpectCodesTaken(c, static_cast<unsigned>(cols));
            ASSERT_FALSE(HasFatalFailure());
          }
        }
      }
    }
  }
}

TEST(RowsSm90, OnlyLiveRowsAreWritten) {
  HOPYARD_NEEDS_GPU();
  for (const Target& target : Targets()) {
    for (const int64_t live : {0, 1, 5, 9}) {
      const Case c{target, KOrder::kBf16Decoded, {9, 300, 304, 384}, 0.5F};
      ExpectRounded(c, MakeInput(c, 3), live);
      ASSERT_FALSE(HasFatalFailure());
    }
  }
}

// What the values of the codes would be rounded to as BF16.
TEST(RowsSm90, MxFp8CodesAreRoundedAnew) {
  HOPYARD_NEEDS_GPU();
  for (const int64_t cols : {32, 128, 296, 2880}) {
    const Shape shape{9, cols, cols + 8, RoundUp(cols, 128)};
    const Case from{{Format::kMxFp8, DType::kBf16, false}, KOrder::kFp8Decoded, shape};
    const Case to{{Format::kFp8Block1x128, DType::kE4m3, false}, KOrder::kFp8Decoded, shape};
    const std::vector<uint16_t> x = MakeInput(from, static_cast<unsigned>(cols));
    std::vector<uint8_t> codes(static_cast<size_t>(shape.rows * shape.in_pitch), 0xFF);
    std::vector<uint8_t> scales;
    std::vector<StoredRow> wanted;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const StoredRow stored = QuantizeRow(from, x.data() + row * shape.in_pitch);
      std::copy(stored.codes.begin(), stored.codes.end(), codes.begin() + row * shape.in_pitch);
      scales.insert(scales.end(), stored.scales.begin(), stored.scales.end());
      wanted.push_back(QuantizeRow(to, ElementsOf(from, stored).data()));
    }
    const DeviceArray<uint8_t> in(codes);
    const DeviceArray<uint8_t> in_scales(scales);
    const Outputs outputs(to);
    RoundRowsArgs args = ArgsOf(to, outputs);
    args.in = in.get();
    args.in_dtype = DType::kE4m3;
    args.in_scales = in_scales.get();
    args.from_mxfp8 = true;
    RoundRowsSm90(args, nullptr);
    ExpectOutputs(to, outputs, wanted, {0, shape.rows});
    ASSERT_FALSE(HasFatalFailure());
  }
}

// Empty segments at every place, segments of one row, all rows in one, none at all; the whole list,
// its middle and its end.
TEST(RowsSm90, SegmentsHaveTheirOwnScales) {
  HOPYARD_NEEDS_GPU();
  for (const Target& target : Targets()) {
    for (const std::vector<int32_t>& offsets : {std::vector<int32_t>{0, 0, 1, 1, 1, 4, 11, 11},
                                                {0, 11, 11, 11, 11, 11, 11, 11},
                                                {0, 0, 0, 0, 0, 0, 0, 11},
                                                {0, 1, 2, 3, 4, 5, 6, 7},
                                                {0, 0, 0, 0, 0, 0, 0, 0}}) {
      for (const auto& [begin, end] : {std::pair{0, 7}, {2, 6}, {5, 7}, {3, 4}}) {
        for (const int64_t cols : {40, 300}) {
          const Case c{target, KOrder::kBf16Decoded, {13, cols, 304, 384}, 0.5F};
          SCOPED_TRACE("segments " + std::to_string(begin) + " .. " + std::to_string(end));
          ExpectSegmentsRounded(c, {offsets, begin, end});
          ASSERT_FALSE(HasFatalFailure());
        }
      }
    }
  }
}

// More rows than the grid has warps: each warp crosses many segments, and then the rest of a long
// one.
TEST(RowsSm90, ManyRowsInManySegments) {
  HOPYARD_NEEDS_GPU();
  constexpr int32_t kSegments = 300;
  std::vector<int32_t> offsets = {0};
  for (int32_t s = 0; s < kSegments; ++s) {
    offsets.push_back(offsets.back() + (s == kSegments / 2 ? 9000 : s * 7 % 23));
  }
  const int64_t rows = offsets.back();
  for (const Target& target : Targets()) {
    const Case c{target, KOrder::kNatural, {rows, 32, 32, 32}, 0.01F};
    ExpectSegmentsRounded(c, {offsets, 0, kSegments});
    ASSERT_FALSE(HasFatalFailure());
    ExpectSegmentsRounded(c, {offsets, 71, kSegments - 3});
    ASSERT_FALSE(HasFatalFailure());
  }
}

// All 65536 BF16 patterns under scales from where division takes a detour to where it takes none.
TEST(RowsSm90, EveryValueUnderAStaticScale) {
  HOPYARD_NEEDS_GPU();
  std::vector<uint16_t> x(65536);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<uint16_t>(i);
  }
  for (const Target& target : Targets()) {
    if (target.row_global) {
      continue;
    }
    for (const float scale : {1.0F, 0.0123F, 1.7F, 3e-30F, 1e-37F, 1e-41F, 3e30F, 3e38F}) {
      const Case c{target, KOrder::kNatural, {16, 4096, 4096, 4096}, scale};
      ExpectRounded(c, x);
      ASSERT_FALSE(HasFatalFailure());
    }
  }
}

// Every magnitude of a block, and of a row, with every fraction of its largest value.
TEST(RowsSm90, EveryMagnitude) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kRows = 254;
  for (const Target& target : Targets()) {
    const Case c{target, KOrder::kNatural, {kRows, 256, 256, 256}, 1.0F};
    std::vector<uint16_t> x(static_cast<size_t>(kRows) * 256);
    std::mt19937 random(7);
    for (size_t i = 0; i < x.size(); ++i) {
      const uint64_t exponent = i / 256;
      const auto below = std::min<uint64_t>(exponent, random() % 12);
      x[i] = static_cast<uint16_t>((random() & 0x807FU) | ((exponent - below) << 7));
    }
    ExpectRounded(c, x);
    ASSERT_FALSE(HasFatalFailure());
  }
}

}  // namespace
}  // namespace hopyard::gemm1
