// SPDX-License-Identifier: Apache-2.0
// Shapes, scale layouts, strides, source and destination types, and every argument error of
// Quantize and Dequantize.
#include <algorithm>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <omp.h>

#include "hopyard/error.h"
#include "hopyard/quantize.h"

#include "formats/codes.h"
#include "formats/rows.h"

namespace hopyard::formats {
namespace {

using testing::HasSubstr;

constexpr Format kAllFormats[] = {Format::kBf16,      Format::kFp16,          Format::kFp8PerTensor,
                                  Format::kFp8PerRow, Format::kFp8Block1x128, Format::kFp8Block128,
                                  Format::kMxFp8,     Format::kMxFp4,         Format::kNvFp4,
                                  Format::kMxInt4};

std::vector<float> RandomMatrix(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  std::generate(x.begin(), x.end(), [&] { return normal(random); });
  return x;
}

struct Stored {
  Stored(Format format, int64_t rows, int64_t cols, ScaleLayout layout = ScaleLayout::kLinear)
      : shape(ShapeOf(format, rows, cols, layout)),
        codes(static_cast<size_t>(rows * shape.code_cols * SizeOf(shape.code_dtype)), 0xEE),
        scales(static_cast<size_t>(shape.scale_numel * SizeOf(shape.scale_dtype)), 0xEE) {
    view.format = format;
    view.scale_layout = layout;
    view.global_scale = 0.0F;
    view.codes = TensorView::Contiguous(codes.data(), shape.code_dtype, {rows, shape.code_cols});
    if (shape.scale_numel > 0) {
      view.scales = TensorView::Contiguous(scales.data(), shape.scale_dtype, {shape.scale_numel});
    }
  }
  void From(const TensorView& source) { view.global_scale = Quantize(source, view); }

  FormatShape shape;
  std::vector<uint8_t> codes;
  std::vector<uint8_t> scales;
  QuantizedView view;
};

TensorView Floats(const std::vector<float>& x, int64_t rows, int64_t cols) {
  return TensorView::Contiguous(x.data(), DType::kFloat32, {rows, cols});
}

TEST(ShapeOf, EveryFormat) {
  struct Case {
    Format format;
    DType code;
    int64_t code_cols;
    DType scale;
    int64_t scale_rows, scale_cols, swizzled;
  };
  // [130, 160]
  const std::vector<Case> cases = {
      {Format::kBf16, DType::kBf16, 160, DType::kFloat32, 0, 0, 0},
      {Format::kFp16, DType::kFp16, 160, DType::kFloat32, 0, 0, 0},
      {Format::kFp8PerTensor, DType::kE4m3, 160, DType::kFloat32, 0, 0, 0},
      {Format::kFp8PerRow, DType::kE4m3, 160, DType::kFloat32, 130, 1, int64_t{256} * 4},
      {Format::kFp8Block1x128, DType::kE4m3, 160, DType::kFloat32, 130, 2, int64_t{256} * 4},
      {Format::kFp8Block128, DType::kE4m3, 160, DType::kFloat32, 2, 2, int64_t{128} * 4},
      {Format::kMxFp8, DType::kE4m3, 160, DType::kE8m0, 130, 5, int64_t{256} * 8},
      {Format::kMxFp4, DType::kUint8, 80, DType::kE8m0, 130, 5, int64_t{256} * 8},
      {Format::kNvFp4, DType::kUint8, 80, DType::kE4m3, 130, 10, int64_t{256} * 12},
      {Format::kMxInt4, DType::kUint8, 80, DType::kBf16, 130, 5, int64_t{256} * 8}};
  for (const Case& c : cases) {
    const FormatShape shape = ShapeOf(c.format, 130, 160);
    EXPECT_EQ(shape.code_dtype, c.code) << ToString(c.format);
    EXPECT_EQ(shape.code_cols, c.code_cols) << ToString(c.format);
    EXPECT_EQ(shape.scale_dtype, c.scale) << ToString(c.format);
    EXPECT_EQ(shape.scale_rows, c.scale_rows) << ToString(c.format);
    EXPECT_EQ(shape.scale_cols, c.scale_cols) << ToString(c.format);
    EXPECT_EQ(shape.scale_numel, c.scale_rows * c.scale_cols) << ToString(c.format);
    EXPECT_EQ(ShapeOf(c.format, 130, 160, ScaleLayout::kSwizzled128x4).scale_numel, c.swizzled)
        << ToString(c.format);
  }
}

// The layout told differently: tiles of 128 x 4, tiles of a row of tiles after one another; in a
// tile 32 groups of 16 bytes, a group holding rows r, r + 32, r + 64, r + 96, four columns each.
TEST(Swizzle, EqualsTheWalkThroughMemory) {
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {128, 4}, {129, 5}, {300, 13}}) {
    const int64_t tile_rows = (rows + 127) / 128;
    const int64_t tile_cols = (cols + 3) / 4;
    const int64_t size = tile_rows * tile_cols * 512;
    int64_t seen = 0;
    for (int64_t offset = 0; offset < size; ++offset) {
      const int64_t tile = offset / 512;
      const int64_t group = offset % 512 / 16;
      const int64_t entry = offset % 16;
      const int64_t m = tile / tile_cols * 128 + entry / 4 * 32 + group;
      const int64_t k = tile % tile_cols * 4 + entry % 4;
      if (m < rows && k < cols) {
        ASSERT_EQ(SwizzledOffset(m, k, cols), offset) << m << ' ' << k;
        ++seen;
      }
    }
    EXPECT_EQ(SwizzledSize(rows, cols), size);
    EXPECT_EQ(seen, rows * cols);
  }
}

TEST(Swizzle, HoldsTheLinearScalesAndZeros) {
  for (const Format format : kAllFormats) {
    const int64_t rows = 133;
    const int64_t cols = 5 * 128 + 6;
    const auto x = RandomMatrix(rows * cols, 3);
    Stored linear(format, rows, cols);
    Stored swizzled(format, rows, cols, ScaleLayout::kSwizzled128x4);
    linear.From(Floats(x, rows, cols));
    swizzled.From(Floats(x, rows, cols));
    EXPECT_EQ(linear.codes, swizzled.codes);
    const auto element = static_cast<size_t>(SizeOf(linear.shape.scale_dtype));
    std::vector<uint8_t> expected(swizzled.scales.size(), 0);
    for (int64_t m = 0; m < linear.shape.scale_rows; ++m) {
      for (int64_t k = 0; k < linear.shape.scale_cols; ++k) {
        const int64_t to = SwizzledOffset(m, k, linear.shape.scale_cols);
        const int64_t from = m * linear.shape.scale_cols + k;
        std::memcpy(expected.data() + static_cast<size_t>(to) * element,
                    linear.scales.data() + static_cast<size_t>(from) * element, element);
      }
    }
    EXPECT_EQ(swizzled.scales, expected) << ToString(format);
    std::vector<float> a(x.size());
    std::vector<float> b(x.size());
    Dequantize(linear.view, Floats(a, rows, cols));
    Dequantize(swizzled.view, Floats(b, rows, cols));
    EXPECT_EQ(a, b) << ToString(format);
  }
}

TEST(Quantize, StridedRowsOnBothSides) {
  const int64_t rows = 5;
  const int64_t cols = 70;
  const auto x = RandomMatrix(rows * cols, 11);
  for (const Format format : kAllFormats) {
    Stored plain(format, rows, cols);
    plain.From(Floats(x, rows, cols));
    std::vector<float> decoded(x.size());
    Dequantize(plain.view, Floats(decoded, rows, cols));

    std::vector<float> wide(static_cast<size_t>(rows * 90), -7.0F);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(x.begin() + row * cols, cols, wide.begin() + row * 90);
    }
    TensorView source = Floats(wide, rows, cols);
    source.strides = {90, 1};
    Stored strided(format, rows, cols);
    const int64_t stride = strided.shape.code_cols + 6;
    const int64_t code_size = SizeOf(strided.shape.code_dtype);
    std::vector<uint8_t> codes(static_cast<size_t>(rows * stride * code_size), 0x5C);
    strided.view.codes.data = codes.data();
    strided.view.codes.strides = {stride, 1};
    strided.From(source);
    EXPECT_EQ(strided.scales, plain.scales) << ToString(format);
    const int64_t row_bytes = strided.shape.code_cols * code_size;
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t* got = codes.data() + row * stride * code_size;
      EXPECT_EQ(
          std::memcmp(got, plain.codes.data() + row * row_bytes, static_cast<size_t>(row_bytes)),
          0);
      for (int64_t i = row_bytes; i < stride * code_size; ++i) {
        ASSERT_EQ(got[i], 0x5C) << "gap written, " << ToString(format);
      }
    }
    std::vector<float> out(static_cast<size_t>(rows * 90), -7.0F);
    TensorView destination = Floats(out, rows, cols);
    destination.strides = {90, 1};
    Dequantize(strided.view, destination);
    for (int64_t i = 0; i < rows * 90; ++i) {
      const float wanted =
          i % 90 < cols ? decoded[static_cast<size_t>(i / 90 * cols + i % 90)] : -7.0F;
      ASSERT_EQ(out[static_cast<size_t>(i)], wanted) << ToString(format);
    }
  }
}

TEST(Quantize, HalfAndBf16SourcesEqualTheirFloats) {
  const int64_t rows = 3;
  const int64_t cols = 150;
  const auto x = RandomMatrix(rows * cols, 5);
  for (const DType dtype : {DType::kBf16, DType::kFp16}) {
    std::vector<uint16_t> narrow(x.size());
    std::vector<float> widened(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const bool bf16 = dtype == DType::kBf16;
      narrow[i] = bf16 ? EncodeBf16(x[i]) : EncodeFp16(x[i]);
      widened[i] = bf16 ? DecodeBf16(narrow[i]) : DecodeFp16(narrow[i]);
    }
    for (const Format format : kAllFormats) {
      Stored a(format, rows, cols);
      Stored b(format, rows, cols);
      a.From(TensorView::Contiguous(narrow.data(), dtype, {rows, cols}));
      b.From(Floats(widened, rows, cols));
      EXPECT_EQ(a.codes, b.codes) << ToString(format);
      EXPECT_EQ(a.scales, b.scales) << ToString(format);
      EXPECT_EQ(a.view.global_scale, b.view.global_scale);
      std::vector<float> wide(x.size());
      std::vector<uint16_t> out(x.size());
      Dequantize(a.view, Floats(wide, rows, cols));
      Dequantize(a.view, TensorView::Contiguous(out.data(), DType::kBf16, {rows, cols}));
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(out[i], EncodeBf16(wide[i])) << ToString(format);
      }
    }
  }
}

// Large enough for all threads: one thread and five give the same bits.
TEST(Quantize, DeterministicAcrossThreads) {
  const int64_t rows = 700;
  const int64_t cols = 384;
  const auto x = RandomMatrix(rows * cols, 17);
  const int threads = omp_get_max_threads();
  for (const Format format : kAllFormats) {
    Stored one(format, rows, cols);
    Stored many(format, rows, cols);
    std::vector<float> from_one(x.size());
    std::vector<float> from_many(x.size());
    omp_set_num_threads(1);
    one.From(Floats(x, rows, cols));
    Dequantize(one.view, Floats(from_one, rows, cols));
    omp_set_num_threads(5);
    many.From(Floats(x, rows, cols));
    Dequantize(many.view, Floats(from_many, rows, cols));
    EXPECT_EQ(one.codes, many.codes) << ToString(format);
    EXPECT_EQ(one.scales, many.scales) << ToString(format);
    EXPECT_EQ(one.view.global_scale, many.view.global_scale);
    EXPECT_EQ(from_one, from_many) << ToString(format);
  }
  omp_set_num_threads(threads);
}

TEST(Quantize, EmptyMatrices) {
  for (const Format format : kAllFormats) {
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{0, 64}, {4, 0}, {0, 0}}) {
      for (const ScaleLayout layout : {ScaleLayout::kLinear, ScaleLayout::kSwizzled128x4}) {
        Stored stored(format, rows, cols, layout);
        std::vector<float> none;
        EXPECT_NO_THROW(stored.From(Floats(none, rows, cols))) << ToString(format);
        EXPECT_NO_THROW(Dequantize(stored.view, Floats(none, rows, cols))) << ToString(format);
      }
    }
  }
}

TEST(Quantize, OddColumnsOfByteFormats) {
  const int64_t cols = 45;
  const auto x = RandomMatrix(2 * cols, 23);
  for (const Format format : {Format::kBf16, Format::kFp8PerRow, Format::kFp8Block1x128,
                              Format::kMxFp8, Format::kFp8Block128}) {
    Stored stored(format, 2, cols);
    stored.From(Floats(x, 2, cols));
    std::vector<float> out(x.size());
    Dequantize(stored.view, Floats(out, 2, cols));
    for (size_t i = 0; i < x.size(); ++i) {
      ASSERT_NEAR(out[i], x[i], 0.07 * std::max(std::abs(x[i]), 0.1F)) << ToString(format);
    }
  }
}

TEST(Quantize, ByteTensorsMayTravelAsU8) {
  const auto x = RandomMatrix(int64_t{2} * 64, 29);
  for (const Format format : {Format::kFp8PerRow, Format::kMxFp8, Format::kMxFp4, Format::kNvFp4}) {
    Stored typed(format, 2, 64);
    Stored bytes(format, 2, 64);
    bytes.view.codes.dtype = DType::kUint8;
    if (SizeOf(bytes.view.scales.dtype) == 1) {
      bytes.view.scales.dtype = DType::kUint8;
    }
    typed.From(Floats(x, 2, 64));
    bytes.From(Floats(x, 2, 64));
    EXPECT_EQ(typed.codes, bytes.codes);
    EXPECT_EQ(typed.scales, bytes.scales);
  }
}

void ExpectError(const std::function<void()>& call, ErrorKind kind,
                 const std::vector<std::string>& parts) {
  try {
    call();
    ADD_FAILURE() << "no error; wanted one with: " << parts.front();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.message();
    for (const std::string& part : parts) {
      EXPECT_THAT(error.message(), HasSubstr(part));
    }
  }
}

constexpr ErrorKind kBad = ErrorKind::kInvalidArgument;

TEST(QuantizeErrors, Shapes) {
  ExpectError([] { (void)ShapeOf(Format::kMxFp4, 2, 33); }, kBad,
              {"cols = 33 is odd", "mxfp4", "pad each row"});
  ExpectError([] { (void)ShapeOf(Format::kNvFp4, 2, 33); }, kBad, {"odd", "nvfp4"});
  ExpectError([] { (void)ShapeOf(Format::kMxInt4, 2, 33); }, kBad, {"odd", "mxint4"});
  ExpectError([] { (void)ShapeOf(Format::kBf16, -1, 4); }, kBad,
              {"rows, cols = -1, 4", "at least 0"});
  ExpectError([] { (void)ShapeOf(Format::kBf16, 4, -2); }, kBad, {"rows, cols = 4, -2"});
  ExpectError([] { (void)ShapeOf(Format::kBf16, INT64_MAX, 1); }, kBad, {"at most 2^48"});
  ExpectError([] { (void)ShapeOf(Format::kMxFp8, int64_t{1} << 40, int64_t{1} << 40); }, kBad,
              {"at most 2^60"});
}

// A good call, spoilt by `spoil`, must fail before anything is written.
void ExpectQuantizeError(const std::function<void(TensorView*, QuantizedView*)>& spoil,
                         ErrorKind kind, const std::vector<std::string>& parts,
                         Format format = Format::kMxFp4) {
  const auto x = RandomMatrix(int64_t{4} * 64, 31);
  Stored stored(format, 4, 64);
  TensorView source = Floats(x, 4, 64);
  spoil(&source, &stored.view);
  ExpectError([&] { Quantize(source, stored.view); }, kind, parts);
  EXPECT_THAT(stored.codes, testing::Each(0xEE));
  EXPECT_THAT(stored.scales, testing::Each(0xEE));
}

TEST(QuantizeErrors, Source) {
  ExpectQuantizeError([](auto* s, auto*) { s->dtype = DType::kInt32; }, kBad,
                      {"Quantize: source has dtype i32", "wanted f32, bf16, f16"});
  ExpectQuantizeError([](auto* s, auto*) { s->ndim = 3; }, kBad,
                      {"Quantize: source has shape [4, 64, 0]", "two dimensions"});
  ExpectQuantizeError([](auto* s, auto*) { s->shape[0] = -4; }, kBad, {"source", "[-4, 64]"});
  ExpectQuantizeError(
      [](auto* s, auto*) {
        s->strides = {1, 4};
      },
      kBad, {"source has column stride 4", "contiguous columns"});
  ExpectQuantizeError([](auto* s, auto*) { s->data = nullptr; }, kBad, {"source", "null data"});
  ExpectQuantizeError([](auto* s, auto*) { s->data = s->template as<char>() + 1; }, kBad,
                      {"source (f32) is not aligned to 4 bytes"});
  ExpectQuantizeError(
      [](auto* s, auto*) {
        s->device = {DeviceKind::kCuda, 3};
      },
      ErrorKind::kUnsupported, {"source is on cuda:3", "copy the tensor to the host"});
}

TEST(QuantizeErrors, Destination) {
  ExpectQuantizeError([](auto*, auto* d) { d->codes.dtype = DType::kE4m3; }, kBad,
                      {"destination.codes has dtype e4m3", "wanted u8"});
  ExpectQuantizeError(
      [](auto*, auto* d) {
        d->codes.shape[1] = 64;
        d->codes.strides[0] = 64;
      },
      kBad, {"destination.codes has shape [4, 64]", "wanted [4, 32] for mxfp4", "ShapeOf"});
  ExpectQuantizeError([](auto*, auto* d) { d->codes.strides[0] = 31; }, kBad,
                      {"destination.codes has row stride 31", "overlap"});
  ExpectQuantizeError([](auto*, auto* d) { d->codes = {}; }, kBad, {"destination.codes"});
  ExpectQuantizeError([](auto*, auto* d) { d->codes.device.kind = DeviceKind::kCuda; },
                      ErrorKind::kUnsupported, {"destination.codes is on cuda:0"});
  ExpectQuantizeError([](auto*, auto* d) { d->scales = {}; }, kBad,
                      {"destination.scales has 0 elements", "wanted 8 for mxfp4"});
  ExpectQuantizeError([](auto*, auto* d) { d->scales.shape[0] = 9; }, kBad,
                      {"destination.scales has 9 elements"});
  ExpectQuantizeError([](auto*, auto* d) { d->scales.dtype = DType::kFloat32; }, kBad,
                      {"destination.scales has dtype f32", "wanted e8m0, u8"});
  ExpectQuantizeError([](auto*, auto* d) { d->scales.strides[0] = 2; }, kBad,
                      {"destination.scales", "not contiguous"});
  ExpectQuantizeError([](auto*, auto* d) { d->scale_layout = ScaleLayout::kSwizzled128x4; }, kBad,
                      {"destination.scales has 8 elements", "wanted 512"});
  ExpectQuantizeError([](auto*, auto* d) { d->scales = d->codes; }, kBad,
                      {"destination.scales has 256 elements", "wanted 0", "leave it absent"},
                      Format::kFp8PerTensor);
}

TEST(QuantizeErrors, GlobalScale) {
  ExpectQuantizeError([](auto*, auto* d) { d->global_scale = 2.0F; }, kBad,
                      {"global_scale is 2", "mxfp4 has no global scale"});
  ExpectQuantizeError(
      [](auto*, auto* d) { d->global_scale = std::numeric_limits<float>::infinity(); }, kBad,
      {"global_scale is inf", "positive finite"}, Format::kNvFp4);
  ExpectQuantizeError([](auto*, auto* d) { d->global_scale = std::nanf(""); }, kBad,
                      {"global_scale is nan"}, Format::kFp8PerTensor);
}

TEST(DequantizeErrors, EveryRule) {
  const auto x = RandomMatrix(int64_t{4} * 64, 37);
  Stored stored(Format::kNvFp4, 4, 64);
  stored.From(Floats(x, 4, 64));
  std::vector<float> out(x.size(), 5.0F);
  const auto expect = [&](const std::function<void(QuantizedView*, TensorView*)>& spoil,
                          ErrorKind kind, const std::vector<std::string>& parts) {
    QuantizedView source = stored.view;
    TensorView destination = Floats(out, 4, 64);
    spoil(&source, &destination);
    ExpectError([&] { Dequantize(source, destination); }, kind, parts);
    EXPECT_THAT(out, testing::Each(5.0F));
  };
  expect([](auto*, auto* d) { d->dtype = DType::kFp16; }, kBad,
         {"Dequantize: destination has dtype f16", "wanted f32, bf16"});
  expect([](auto*, auto* d) { d->strides[0] = 0; }, kBad,
         {"destination has row stride 0", "overlap"});
  expect([](auto*, auto* d) { d->strides[1] = 2; }, kBad, {"destination has column stride 2"});
  expect([](auto*, auto* d) { d->device.kind = DeviceKind::kCuda; }, ErrorKind::kUnsupported,
         {"destination is on cuda:0"});
  expect([](auto*, auto* d) { d->shape[1] = 63; }, kBad, {"cols = 63 is odd"});
  expect([](auto*, auto* d) { d->shape[1] = 62; }, kBad,
         {"Dequantize: source.codes has shape [4, 32]", "wanted [4, 31] for nvfp4"});
  expect([](auto* s, auto*) { s->scales.dtype = DType::kE8m0; }, kBad,
         {"Dequantize: source.scales has dtype e8m0", "wanted e4m3, u8"});
  expect([](auto* s, auto*) { s->global_scale = 0.0F; }, kBad,
         {"source.global_scale is 0", "Quantize returned"});
  expect([](auto* s, auto*) { s->format = Format::kMxInt4; }, kBad,
         {"source.scales has 16 elements"});
}

TEST(DequantizeErrors, GlobalScaleOfAFormatWithoutOne) {
  Stored stored(Format::kBf16, 1, 4);
  std::vector<float> x(4, 1.0F);
  stored.From(Floats(x, 1, 4));
  stored.view.global_scale = 3.0F;
  ExpectError([&] { Dequantize(stored.view, Floats(x, 1, 4)); }, kBad,
              {"source.global_scale is 3", "bf16 has no global scale"});
}

TEST(Format, Names) {
  std::set<std::string> names;
  for (const Format format : kAllFormats) {
    names.insert(std::string(ToString(format)));
  }
  EXPECT_EQ(names, (std::set<std::string>{"bf16", "fp16", "fp8_per_tensor", "fp8_per_row",
                                          "fp8_block1x128", "fp8_block128", "mxfp8", "mxfp4",
                                          "nvfp4", "mxint4"}));
}

}  // namespace
}  // namespace hopyard::formats
