// SPDX-License-Identifier: Apache-2.0
#include "hopyard/quantize.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/quantize_check.h"
#include "formats/row_kernels.h"
#include "formats/rows.h"
#include "formats/scales.h"

namespace hopyard::formats {
namespace {

// Elements that make a second thread worth its wake-up, and a task worth handing out.
constexpr int64_t kParallelElements = 1 << 15;
constexpr int64_t kTaskElements = 1 << 14;

int ThreadsFor(int64_t elements) {
  return elements < kParallelElements ? 1 : MaxThreads();
}

int64_t RowsPerTask(int64_t cols) {
  return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(cols, 1));
}

char* ElementAt(const TensorView& matrix, int64_t row, int64_t col) {
  return matrix.as<char>() + (row * matrix.strides[0] + col) * SizeOf(matrix.dtype);
}

// One thread's buffers.
struct Scratch {
  std::vector<float> values;
  std::vector<uint8_t> scales;
};

// Part of a source row as floats: in place where it holds floats, else converted into `buffer`.
const float* ReadRow(const RowKernels& kernels, const TensorView& source, int64_t row, int64_t col,
                     int64_t count, float* buffer) {
  const char* data = ElementAt(source, row, col);
  if (source.dtype == DType::kFloat32) {
    return reinterpret_cast<const float*>(data);
  }
  const auto* words = reinterpret_cast<const uint16_t*>(data);
  if (source.dtype == DType::kBf16) {
    kernels.bf16_to_float(words, buffer, count);
  } else {
    kernels.fp16_to_float(words, buffer, count);
  }
  return buffer;
}

// Where the scales of a matrix lie.
class ScaleMatrix {
 public:
  ScaleMatrix(const QuantizedView& view, const FormatShape& shape)
      : data_(view.scales.as<char>()),
        cols_(shape.scale_cols),
        rows_(shape.scale_rows),
        element_(SizeOf(shape.scale_dtype)),
        swizzled_(view.scale_layout == ScaleLayout::kSwizzled128x4) {}

  [[nodiscard]] int64_t row_bytes() const { return cols_ * element_; }

  // Padding entries are zero.
  void ClearPadding() const {
    if (swizzled_ && rows_ > 0 && cols_ > 0) {
      std::memset(data_, 0, static_cast<size_t>(SwizzledSize(rows_, cols_) * element_));
    }
  }

  // A row of scales to write: in place if linear; else `buffer`, to be given to StoreRow.
  void* RowToWrite(int64_t row, uint8_t* buffer) const {
    return swizzled_ ? static_cast<void*>(buffer) : data_ + row * row_bytes();
  }
  void StoreRow(int64_t row, const uint8_t* buffer) const {
    for (int64_t col = 0; swizzled_ && col < cols_; ++col) {
      std::memcpy(At(row, col), buffer + col * element_, static_cast<size_t>(element_));
    }
  }
  void Store(int64_t row, int64_t col, float scale) const {
    std::memcpy(At(row, col), &scale, sizeof(scale));
  }
  // A row of scales in linear order: in place if linear, else gathered into `buffer`.
  const void* LoadRow(int64_t row, uint8_t* buffer) const {
    if (!swizzled_) {
      return data_ + row * row_bytes();
    }
    for (int64_t col = 0; col < cols_; ++col) {
      std::memcpy(buffer + col * element_, At(row, col), static_cast<size_t>(element_));
    }
    return buffer;
  }

 private:
  [[nodiscard]] char* At(int64_t row, int64_t col) const {
    const int64_t index = swizzled_ ? SwizzledOffset(row, col, cols_) : row * cols_ + col;
    return data_ + index * element_;
  }

  char* data_;
  int64_t cols_;
  int64_t rows_;
  int64_t element_;
  bool swizzled_;
};

std::vector<Scratch> MakeScratch(int threads, int64_t values, int64_t scale_bytes) {
  std::vector<Scratch> scratch(static_cast<size_t>(threads));
  for (Scratch& s : scratch) {
    s.values.resize(static_cast<size_t>(values));
    s.scales.resize(static_cast<size_t>(scale_bytes));
  }
  return scratch;
}

uint32_t TensorMaxAbsBits(const RowKernels& kernels, const TensorView& source) {
  const int64_t cols = source.shape[1];
  const int threads = ThreadsFor(source.numel());
  std::vector<Scratch> scratch = MakeScratch(threads, cols, 0);
  std::vector<uint32_t> largest(static_cast<size_t>(threads), 0);
  ParallelFor(0, source.shape[0], RowsPerTask(cols), threads, [&](int64_t row, int thread) {
    const auto t = static_cast<size_t>(thread);
    const float* in = ReadRow(kernels, source, row, 0, cols, scratch[t].values.data());
    largest[t] = std::max(largest[t], kernels.max_abs_bits(in, cols));
  });
  return *std::max_element(largest.begin(), largest.end());
}

// How a per-tensor FP8 or NVFP4 matrix is scaled.
struct TensorScale {
  float multiplier = 1.0F;  // g
  float returned = 1.0F;    // what values are multiplied with when decoded
  bool divide = false;      // static FP8: codes are those of x / returned
};

TensorScale TensorScaleOf(const RowKernels& kernels, const TensorView& source,
                          const QuantizedView& destination) {
  if (!HasGlobalScale(destination.format)) {
    return {};
  }
  const bool nvfp4 = destination.format == Format::kNvFp4;
  const float given = destination.global_scale;
  if (given > 0.0F) {
    return {nvfp4 ? NvFp4MultiplierOf(given) : 1.0F, given, !nvfp4};
  }
  const uint32_t largest = TensorMaxAbsBits(kernels, source);
  const float g = nvfp4 ? NvFp4Multiplier(largest) : Fp8TensorMultiplier(largest);
  return {g, 1.0F / g, false};
}

// FP8 with one dynamic scale for this stretch; returns the scale.
float EncodeFp8Dynamic(const RowKernels& kernels, const float* in, uint8_t* codes, int64_t count) {
  const float divisor = Fp8BlockDivisor(kernels.max_abs_bits(in, count));
  if (std::isnan(divisor)) {
    std::fill_n(codes, count, uint8_t{0});
  } else {
    kernels.encode_fp8_divide(in, codes, count, divisor);
  }
  return divisor;
}

void EncodeFp8Tensor(const RowKernels& kernels, const float* in, uint8_t* codes, int64_t cols,
                     const TensorScale& scale) {
  if (std::isnan(scale.multiplier)) {
    std::fill_n(codes, cols, uint8_t{0});
  } else if (scale.divide) {
    kernels.encode_fp8_divide(in, codes, cols, scale.returned);
  } else {
    kernels.encode_fp8_multiply(in, codes, cols, scale.multiplier);
  }
}

struct RowTarget {
  Format format;
  void* codes;
  void* scales;
};

void EncodeRow(const RowKernels& kernels, const float* in, int64_t cols, const TensorScale& scale,
               const RowTarget& target) {
  auto* bytes = static_cast<uint8_t*>(target.codes);
  auto* byte_scales = static_cast<uint8_t*>(target.scales);
  switch (target.format) {
    case Format::kBf16:
      kernels.float_to_bf16(in, static_cast<uint16_t*>(target.codes), cols);
      return;
    case Format::kFp16:
      kernels.float_to_fp16(in, static_cast<uint16_t*>(target.codes), cols);
      return;
    case Format::kFp8PerTensor:
      EncodeFp8Tensor(kernels, in, bytes, cols, scale);
      return;
    case Format::kFp8PerRow:
      *static_cast<float*>(target.scales) = EncodeFp8Dynamic(kernels, in, bytes, cols);
      return;
    case Format::kFp8Block1x128:
      for (int64_t begin = 0; begin < cols; begin += kFp8Block) {
        const int64_t count = std::min(kFp8Block, cols - begin);
        static_cast<float*>(target.scales)[begin / kFp8Block] =
            EncodeFp8Dynamic(kernels, in + begin, bytes + begin, count);
      }
      return;
    case Format::kMxFp8:
      kernels.encode_mxfp8(in, bytes, byte_scales, cols);
      return;
    case Format::kMxFp4:
      kernels.encode_mxfp4(in, bytes, byte_scales, cols);
      return;
    case Format::kNvFp4:
      kernels.encode_nvfp4(in, bytes, byte_scales, cols, scale.multiplier);
      return;
    case Format::kMxInt4:
      kernels.encode_mxint4(in, bytes, static_cast<uint16_t*>(target.scales), cols);
      return;
    case Format::kFp8Block128:
      return;  // QuantizeTiles
  }
}

void QuantizeRows(const RowKernels& kernels, const TensorView& source,
                  const QuantizedView& destination, const ScaleMatrix& scales,
                  const TensorScale& scale) {
  const int64_t cols = source.shape[1];
  const int threads = ThreadsFor(source.numel());
  std::vector<Scratch> scratch = MakeScratch(threads, cols, scales.row_bytes());
  ParallelFor(0, source.shape[0], RowsPerTask(cols), threads, [&](int64_t row, int thread) {
    Scratch& mine = scratch[static_cast<size_t>(thread)];
    const float* in = ReadRow(kernels, source, row, 0, cols, mine.values.data());
    const RowTarget target{destination.format, ElementAt(destination.codes, row, 0),
                           scales.RowToWrite(row, mine.scales.data())};
    EncodeRow(kernels, in, cols, scale, target);
    scales.StoreRow(row, mine.scales.data());
  });
}

// kFp8Block128: one task per 128 x 128 tile.
void QuantizeTiles(const RowKernels& kernels, const TensorView& source,
                   const QuantizedView& destination, const ScaleMatrix& scales) {
  const int64_t rows = source.shape[0];
  const int64_t cols = source.shape[1];
  const int64_t tile_cols = CeilDiv(cols, kFp8Block);
  const int64_t tiles = CeilDiv(rows, kFp8Block) * tile_cols;
  ParallelFor(0, tiles, 1, ThreadsFor(source.numel()), [&](int64_t tile, int /*thread*/) {
    std::array<float, kFp8Block> buffer;
    const int64_t row_begin = tile / tile_cols * kFp8Block;
    const int64_t row_end = std::min(row_begin + kFp8Block, rows);
    const int64_t col = tile % tile_cols * kFp8Block;
    const int64_t count = std::min(kFp8Block, cols - col);
    uint32_t largest = 0;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const float* in = ReadRow(kernels, source, row, col, count, buffer.data());
      largest = std::max(largest, kernels.max_abs_bits(in, count));
    }
    const float divisor = Fp8BlockDivisor(largest);
    const TensorScale scale{divisor, divisor, true};
    for (int64_t row = row_begin; row < row_end; ++row) {
      const float* in = ReadRow(kernels, source, row, col, count, buffer.data());
      auto* codes = reinterpret_cast<uint8_t*>(ElementAt(destination.codes, row, col));
      EncodeFp8Tensor(kernels, in, codes, count, scale);
    }
    scales.Store(tile / tile_cols, tile % tile_cols, divisor);
  });
}

}  // namespace

float QuantizeWith(const RowKernels& kernels, const TensorView& source,
                   const QuantizedView& destination) {
  CheckQuantize(source, destination);
  const FormatShape shape =
      ShapeOf(destination.format, source.shape[0], source.shape[1], destination.scale_layout);
  const ScaleMatrix scales(destination, shape);
  scales.ClearPadding();
  if (destination.format == Format::kFp8Block128) {
    QuantizeTiles(kernels, source, destination, scales);
    return 1.0F;
  }
  const TensorScale scale = TensorScaleOf(kernels, source, destination);
  QuantizeRows(kernels, source, destination, scales, scale);
  return scale.returned;
}

void DequantizeWith(const RowKernels& kernels, const QuantizedView& source,
                    const TensorView& destination) {
  CheckDequantize(source, destination);
  const int64_t rows = destination.shape[0];
  const int64_t cols = destination.shape[1];
  const FormatShape shape = ShapeOf(source.format, rows, cols, source.scale_layout);
  const ScaleMatrix scales(source, shape);
  const int64_t rows_per_scale = source.format == Format::kFp8Block128 ? kFp8Block : 1;
  const bool to_bf16 = destination.dtype == DType::kBf16;
  const int threads = ThreadsFor(destination.numel());
  std::vector<Scratch> scratch = MakeScratch(threads, to_bf16 ? cols : 0, scales.row_bytes());
  ParallelFor(0, rows, RowsPerTask(cols), threads, [&](int64_t row, int thread) {
    Scratch& mine = scratch[static_cast<size_t>(thread)];
    const StoredRow stored{source.format, ElementAt(source.codes, row, 0),
                           scales.LoadRow(row / rows_per_scale, mine.scales.data()),
                           source.global_scale};
    char* target = ElementAt(destination, row, 0);
    float* out = to_bf16 ? mine.values.data() : reinterpret_cast<float*>(target);
    DecodeRowWith(kernels, stored, out, cols);
    if (to_bf16) {
      kernels.float_to_bf16(out, reinterpret_cast<uint16_t*>(target), cols);
    }
  });
}

}  // namespace hopyard::formats

namespace hopyard {

float Quantize(const TensorView& source, const QuantizedView& destination) {
  return formats::QuantizeWith(formats::BestKernels(), source, destination);
}

void Dequantize(const QuantizedView& source, const TensorView& destination) {
  formats::DequantizeWith(formats::BestKernels(), source, destination);
}

}  // namespace hopyard
