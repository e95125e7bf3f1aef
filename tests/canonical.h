// SPDX-License-Identifier: Apache-2.0
// Quantised matrices in canonical order, and the fixed random numbers they are made of.
#pragma once

#include <cstdint>
#include <vector>

#include "hopyard/quantize.h"
#include "hopyard/spec.h"

namespace hopyard::test {

// A quantised matrix in canonical order: K-major, linear scales.
struct CanonicalMatrix {
  WeightFormat format = WeightFormat::kBf16;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_bytes = 0;
  std::vector<uint8_t> codes;  // [rows, row_bytes]
  int64_t scale_rows = 0;      // 0: the format has no scale tensor
  int64_t scale_cols = 0;
  int64_t scale_bytes = 0;  // of one scale
  std::vector<uint8_t> scales;
  float global = 1.0F;
  int64_t row_origin = 0;
  int64_t col_origin = 0;
};

// A random but fixed number for every key, and a normal one from it (at most 3.5 sigma).
[[nodiscard]] uint64_t Hash(uint64_t a, uint64_t b, uint64_t c = 0, uint64_t d = 0);
// The i-th number of the stream `key`: cheap, for matrices.
[[nodiscard]] uint64_t Sequence(uint64_t key, int64_t i);
[[nodiscard]] float Normal(uint64_t hash);

[[nodiscard]] Format FormatOf(WeightFormat format);
[[nodiscard]] int64_t CodesPerByte(WeightFormat format);

// Quantises values [rows, cols]; `global` > 0 is the scale or multiplier to use where the format
// has one.
[[nodiscard]] CanonicalMatrix QuantizeMatrix(WeightFormat format, const std::vector<float>& values,
                                             int64_t rows, int64_t cols, float global = 0.0F);
// Rows [row_begin, ...) and columns [col_begin, ...): what a shard of the matrix holds.
struct Window {
  int64_t row_begin = 0;
  int64_t rows = 0;
  int64_t col_begin = 0;
  int64_t cols = 0;
};
[[nodiscard]] CanonicalMatrix Crop(const CanonicalMatrix& matrix, const Window& window);

// The number that (row, col) stands for.
[[nodiscard]] double CanonicalValue(const CanonicalMatrix& matrix, int64_t row, int64_t col);

// Facts of the formats: columns per block scale (0: none), types of codes and scales.
[[nodiscard]] int64_t ScaleBlockCols(WeightFormat format);
[[nodiscard]] DType CodeType(WeightFormat format);
[[nodiscard]] DType ScaleType(WeightFormat format);
[[nodiscard]] bool HasGlobalScale(WeightFormat format);

[[nodiscard]] float MaxMagnitude(const std::vector<float>& values);
// Scale (or NVFP4 multiplier) that maps `largest` to the largest code.
[[nodiscard]] float GlobalFor(WeightFormat format, float largest);

}  // namespace hopyard::test
