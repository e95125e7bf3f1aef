// SPDX-License-Identifier: Apache-2.0
#include "formats/quantize_check.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/shape.h"
#include "formats/rows.h"
#include "formats/scales.h"

namespace hopyard {
namespace {

// Far above any memory, and small enough that padded products of two sizes can be checked.
constexpr int64_t kMaxExtent = int64_t{1} << 48;
constexpr int64_t kMaxElements = int64_t{1} << 60;

DType ScaleDType(Format format) {
  switch (format) {
    case Format::kMxFp8:
    case Format::kMxFp4:
      return DType::kE8m0;
    case Format::kNvFp4:
      return DType::kE4m3;
    case Format::kMxInt4:
      return DType::kBf16;
    default:
      return DType::kFloat32;
  }
}

DType CodeDType(Format format) {
  if (formats::IsPacked4Bit(format)) {
    return DType::kUint8;
  }
  switch (format) {
    case Format::kBf16:
      return DType::kBf16;
    case Format::kFp16:
      return DType::kFp16;
    default:
      return DType::kE4m3;
  }
}

bool HasRank(const TensorView& view) {
  return view.ndim >= 0 && view.ndim <= TensorView::kMaxDims;
}

std::string ShapeText(const TensorView& view) {
  if (!HasRank(view)) {
    return "of " + std::to_string(view.ndim) + " dimensions";
  }
  std::string text = "[";
  for (int d = 0; d < view.ndim; ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(view.shape.at(static_cast<size_t>(d)));
  }
  return text + "]";
}

// A tensor argument and how errors call it.
struct Argument {
  const TensorView& view;
  std::string name;  // "Quantize: source"
};

void CheckMemory(const Argument& argument) {
  const TensorView& view = argument.view;
  HOPYARD_CHECK(view.device.kind == DeviceKind::kCpu, kUnsupported)
      << argument.name << " is on cuda:" << view.device.index
      << "; wanted cpu: formats are converted on the CPU; copy the tensor to the host";
  HOPYARD_CHECK(view.data != nullptr || view.numel() == 0, kInvalidArgument)
      << argument.name << " of shape " << ShapeText(view)
      << " has a null data pointer; wanted allocated memory";
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  HOPYARD_CHECK(address % static_cast<uintptr_t>(SizeOf(view.dtype)) == 0, kInvalidArgument)
      << argument.name << " (" << ToString(view.dtype) << ") is not aligned to "
      << SizeOf(view.dtype) << " bytes; copy it to aligned memory";
}

void CheckDType(const Argument& argument, std::initializer_list<DType> allowed) {
  std::string wanted;
  for (const DType dtype : allowed) {
    if (argument.view.dtype == dtype) {
      return;
    }
    wanted += (wanted.empty() ? "" : ", ") + std::string(ToString(dtype));
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << argument.name << " has dtype " << ToString(argument.view.dtype) << "; wanted " << wanted;
}

// Codes and scales of one byte may travel as u8: NumPy and older frameworks have no FP8 types.
void CheckStoredDType(const Argument& argument, DType dtype) {
  if (SizeOf(dtype) == 1) {
    dtype == DType::kUint8 ? CheckDType(argument, {dtype})
                           : CheckDType(argument, {dtype, DType::kUint8});
  } else {
    CheckDType(argument, {dtype});
  }
}

// A matrix whose columns are contiguous; written ones must not overlap themselves.
void CheckMatrix(const Argument& argument, bool written) {
  const TensorView& view = argument.view;
  HOPYARD_CHECK(view.ndim == 2, kInvalidArgument)
      << argument.name << " has shape " << ShapeText(view)
      << "; wanted two dimensions [rows, cols]; flatten leading dimensions";
  HOPYARD_CHECK(view.shape[0] >= 0 && view.shape[1] >= 0, kInvalidArgument)
      << argument.name << " has shape " << ShapeText(view) << "; wanted sizes of at least 0";
  HOPYARD_CHECK(view.shape[1] <= 1 || view.strides[1] == 1, kInvalidArgument)
      << argument.name << " has column stride " << view.strides[1]
      << "; wanted 1 (contiguous columns); copy it to row-major memory";
  HOPYARD_CHECK(!written || view.shape[0] <= 1 || view.strides[0] >= view.shape[1],
                kInvalidArgument)
      << argument.name << " has row stride " << view.strides[0] << "; wanted at least its "
      << view.shape[1] << " columns: it is written, and its rows would overlap";
}

// The number of elements; -1 where extents are negative or their product is beyond kMaxElements.
int64_t CountOf(const TensorView& view) {
  int64_t count = 1;
  for (int d = 0; d < view.ndim; ++d) {
    const int64_t extent = view.shape.at(static_cast<size_t>(d));
    if (extent < 0 || (extent > 0 && count > kMaxElements / extent)) {
      return -1;
    }
    count *= extent;
  }
  return count;
}

void CheckScales(const Argument& argument, const FormatShape& shape, Format format) {
  const TensorView& view = argument.view;
  HOPYARD_CHECK(HasRank(view) && CountOf(view) >= 0, kInvalidArgument)
      << argument.name << " has shape " << ShapeText(view) << "; wanted at most "
      << TensorView::kMaxDims << " dimensions, none negative, and at most 2^60 elements";
  const int64_t count = view.defined() ? CountOf(view) : 0;
  HOPYARD_CHECK(count == shape.scale_numel, kInvalidArgument)
      << argument.name << " has " << count << " elements; wanted " << shape.scale_numel << " for "
      << ToString(format) << (shape.scale_numel == 0 ? " (leave it absent)" : "")
      << "; ShapeOf(format, rows, cols, layout).scale_numel gives the count";
  if (shape.scale_numel == 0) {
    return;
  }
  CheckStoredDType(argument, shape.scale_dtype);
  HOPYARD_CHECK(view.is_contiguous(), kInvalidArgument)
      << argument.name << " of shape " << ShapeText(view)
      << " is not contiguous; wanted row-major memory without gaps";
  CheckMemory(argument);
}

// `wide` is the [rows, cols] matrix of numbers, `stored` the quantised side of the call.
void CheckPair(const Argument& wide, const QuantizedView& stored, const std::string& name,
               bool stored_is_written) {
  CheckMatrix(wide, !stored_is_written);
  CheckMemory(wide);
  const int64_t rows = wide.view.shape[0];
  const int64_t cols = wide.view.shape[1];
  const FormatShape shape = ShapeOf(stored.format, rows, cols, stored.scale_layout);
  const Argument codes{stored.codes, name + ".codes"};
  CheckStoredDType(codes, shape.code_dtype);
  CheckMatrix(codes, stored_is_written);
  HOPYARD_CHECK(codes.view.shape[0] == rows && codes.view.shape[1] == shape.code_cols,
                kInvalidArgument)
      << codes.name << " has shape " << ShapeText(codes.view) << "; wanted [" << rows << ", "
      << shape.code_cols << "] for " << ToString(stored.format) << " of a [" << rows << ", " << cols
      << "] matrix; ShapeOf(format, rows, cols).code_cols gives the columns";
  CheckMemory(codes);
  CheckScales({stored.scales, name + ".scales"}, shape, stored.format);
}

}  // namespace

std::string_view ToString(Format format) {
  switch (format) {
    case Format::kBf16:
      return "bf16";
    case Format::kFp16:
      return "fp16";
    case Format::kFp8PerTensor:
      return "fp8_per_tensor";
    case Format::kFp8PerRow:
      return "fp8_per_row";
    case Format::kFp8Block1x128:
      return "fp8_block1x128";
    case Format::kFp8Block128:
      return "fp8_block128";
    case Format::kMxFp8:
      return "mxfp8";
    case Format::kMxFp4:
      return "mxfp4";
    case Format::kNvFp4:
      return "nvfp4";
    case Format::kMxInt4:
      return "mxint4";
  }
  return "?";
}

FormatShape ShapeOf(Format format, int64_t rows, int64_t cols, ScaleLayout layout) {
  HOPYARD_CHECK(format <= Format::kMxInt4, kInvalidArgument)
      << "ShapeOf: format=" << static_cast<int>(format) << " is not a Format; wanted 0 .. "
      << static_cast<int>(Format::kMxInt4);
  HOPYARD_CHECK(layout <= ScaleLayout::kSwizzled128x4, kInvalidArgument)
      << "ShapeOf: layout=" << static_cast<int>(layout) << " is not a ScaleLayout; wanted 0 .. "
      << static_cast<int>(ScaleLayout::kSwizzled128x4);
  HOPYARD_CHECK(rows >= 0 && cols >= 0, kInvalidArgument)
      << "ShapeOf: rows, cols = " << rows << ", " << cols << "; wanted at least 0";
  HOPYARD_CHECK(rows <= kMaxExtent && cols <= kMaxExtent, kInvalidArgument)
      << "ShapeOf: rows, cols = " << rows << ", " << cols << "; wanted at most 2^48 each";
  const bool packed = formats::IsPacked4Bit(format);
  HOPYARD_CHECK(!packed || cols % 2 == 0, kInvalidArgument)
      << "ShapeOf: cols = " << cols << " is odd; " << ToString(format)
      << " packs two values a byte and wants an even number; pad each row with a zero";
  FormatShape shape;
  shape.code_dtype = CodeDType(format);
  shape.code_cols = packed ? cols / 2 : cols;
  shape.scale_dtype = ScaleDType(format);
  if (format == Format::kFp8PerRow) {
    shape.scale_rows = rows;
    shape.scale_cols = 1;
  } else if (const int64_t block = formats::BlockColumns(format); block > 0) {
    shape.scale_rows = format == Format::kFp8Block128 ? CeilDiv(rows, formats::kFp8Block) : rows;
    shape.scale_cols = CeilDiv(cols, block);
  }
  int64_t elements = 0;
  const bool overflow = __builtin_mul_overflow(RoundUp(rows, 128), RoundUp(cols, 4), &elements);
  HOPYARD_CHECK(!overflow && elements <= kMaxElements, kInvalidArgument)
      << "ShapeOf: rows x cols = " << rows << " x " << cols << "; wanted at most 2^60 elements";
  shape.scale_numel = layout == ScaleLayout::kLinear
                          ? shape.scale_rows * shape.scale_cols
                          : formats::SwizzledSize(shape.scale_rows, shape.scale_cols);
  return shape;
}

namespace formats {

int64_t BlockColumns(Format format) {
  switch (format) {
    case Format::kFp8Block1x128:
    case Format::kFp8Block128:
      return kFp8Block;
    case Format::kMxFp8:
    case Format::kMxFp4:
    case Format::kMxInt4:
      return kMxBlock;
    case Format::kNvFp4:
      return kNvFp4Block;
    default:
      return 0;
  }
}

bool IsPacked4Bit(Format format) {
  return format == Format::kMxFp4 || format == Format::kNvFp4 || format == Format::kMxInt4;
}

bool HasGlobalScale(Format format) {
  return format == Format::kFp8PerTensor || format == Format::kNvFp4;
}

void CheckQuantize(const TensorView& source, const QuantizedView& destination) {
  const Argument argument{source, "Quantize: source"};
  CheckDType(argument, {DType::kFloat32, DType::kBf16, DType::kFp16});
  CheckPair(argument, destination, "Quantize: destination", true);
  const float scale = destination.global_scale;
  if (HasGlobalScale(destination.format)) {
    HOPYARD_CHECK(std::isfinite(scale), kInvalidArgument)
        << "Quantize: destination.global_scale is " << scale
        << "; wanted a positive finite static scale, or 0 for a scale computed from the data";
  } else {
    HOPYARD_CHECK(scale <= 0.0F || scale == 1.0F, kInvalidArgument)
        << "Quantize: destination.global_scale is " << scale << ", but "
        << ToString(destination.format) << " has no global scale; leave it at 1";
  }
}

void CheckDequantize(const QuantizedView& source, const TensorView& destination) {
  const Argument argument{destination, "Dequantize: destination"};
  CheckDType(argument, {DType::kFloat32, DType::kBf16});
  CheckPair(argument, source, "Dequantize: source", false);
  const float scale = source.global_scale;
  if (HasGlobalScale(source.format)) {
    HOPYARD_CHECK(!(scale <= 0.0F), kInvalidArgument)
        << "Dequantize: source.global_scale is " << scale
        << "; wanted the positive multiplier that Quantize returned";
  } else {
    HOPYARD_CHECK(scale == 0.0F || scale == 1.0F, kInvalidArgument)
        << "Dequantize: source.global_scale is " << scale << ", but " << ToString(source.format)
        << " has no global scale; leave it at 1";
  }
}

}  // namespace formats
}  // namespace hopyard
