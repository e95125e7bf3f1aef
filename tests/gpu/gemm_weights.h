// SPDX-License-Identifier: Apache-2.0
// Random weights of a grouped GEMM in every format, as a checkpoint stores them and as the numbers
// that its kernels multiply with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "hopyard/spec.h"

#include "core/parallel.h"
#include "core/random_bits.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::test {

struct GemmProblem {
  WeightFormat weights = WeightFormat::kBf16;
  gemm::sm90::RowFormat x;
  int64_t k = 64;
  int64_t features = 64;
  bool gather = true;
  bool integers = false;  // small integers: sums are exact
  bool bias = false;
  bool second_bias = false;  // of that, up's alone where there is a gate
  bool nans = false;         // among codes and scales: GemmWeights::MakeNans
  bool ordered = false;      // output in KOrder::kBf16Decoded
  ActivationKind activation = ActivationKind::kIdentity;
};

// Weights of all experts in a checkpoint's layout, rows padded with poison, and their values.
class GemmWeights {
 public:
  GemmWeights(const GemmProblem& problem, int64_t experts, int64_t rows, std::mt19937& random)
      : format_(problem.weights),
        rule_(formats::RuleOf(problem.weights)),
        experts_(experts),
        rows_(rows),
        k_(problem.k) {
    const int64_t bytes = k_ * SizeOf(rule_.code_dtype) / rule_.codes_per_byte;
    value_stride_ = RoundUp(bytes, 16) + 16;
    codes_.assign(static_cast<size_t>(experts * rows * value_stride_), 0xFF);
    const uint64_t seed = random();
    ParallelFor(0, experts * rows, 16, MaxThreads(), [&](int64_t row, int) {
      const uint64_t row_seed = StreamSeed(seed, 0, static_cast<uint64_t>(row));
      for (int64_t i = 0; i < bytes; ++i) {
        codes_[static_cast<size_t>(row * value_stride_ + i)] =
            CodeByte(problem.integers, i, RandomBits(row_seed, static_cast<uint64_t>(i)));
      }
    });
    MakeScales(problem.integers, random);
    if (problem.nans) {
      MakeNans();
    }
    if (problem.weights == WeightFormat::kNvFp4 && problem.x.dtype == DType::kE4m3) {
      MakeRowPowers();
    }
    values_ = std::make_unique<RowValues[]>(static_cast<size_t>(experts * rows));
  }

  // Of an expert's row. Decoded when a thread first asks for it: tests judge a part of all rows,
  // and decoding them all took most of their time.
  [[nodiscard]] const double* Row(int64_t expert, int64_t row) const {
    RowValues& values = values_[static_cast<size_t>(expert * rows_ + row)];
    std::call_once(values.once, [&] {
      values.of.resize(static_cast<size_t>(k_));
      for (int64_t k = 0; k < k_; ++k) {
        values.of[static_cast<size_t>(k)] = Decode(expert, row, k);
      }
    });
    return values.of.data();
  }

  [[nodiscard]] int64_t value_stride() const { return value_stride_; }
  // Whole pieces of 16 bytes, and poison behind the rows.
  [[nodiscard]] int64_t mn_stride() const { return RoundUp(rows_ * 2, 16) + 16; }
  // BF16 [experts][k][rows], of which `order` says where row r goes.
  template <class Order>
  [[nodiscard]] std::vector<uint8_t> MnMajorCodes(Order&& order) const {
    std::vector<uint8_t> codes(static_cast<size_t>(experts_ * k_ * mn_stride()), 0xFF);
    for (int64_t row = 0; row < experts_ * rows_; ++row) {
      for (int64_t k = 0; k < k_; ++k) {
        std::memcpy(codes.data() + (row / rows_ * k_ + k) * mn_stride() + order(row % rows_) * 2,
                    codes_.data() + row * value_stride_ + 2 * k, 2);
      }
    }
    return codes;
  }
  [[nodiscard]] int64_t scale_stride() const { return scale_stride_; }
  [[nodiscard]] int64_t scale_bytes() const { return scale_bytes_; }  // of one expert
  [[nodiscard]] const std::vector<uint8_t>& codes() const { return codes_; }
  [[nodiscard]] const std::vector<uint8_t>& scales() const { return scales_; }
  [[nodiscard]] const std::vector<float>& global() const { return global_; }
  [[nodiscard]] bool has_global() const {
    return rule_.global_scale || format_ == WeightFormat::kFp8PerTensor;
  }

 private:
  struct RowValues {
    std::once_flag once;
    std::vector<double> of;
  };
  [[nodiscard]] double Decode(int64_t expert, int64_t row, int64_t k) const {
    const int64_t byte = k * SizeOf(rule_.code_dtype) / rule_.codes_per_byte;
    const uint8_t* at =
        codes_.data() + static_cast<size_t>((expert * rows_ + row) * value_stride_ + byte);
    const auto nibble = static_cast<uint8_t>(k % 2 == 0 ? *at & 0xF : *at >> 4);
    const double scale = ScaleOf(expert, row, k);
    if (!row_powers_.empty()) {
      // The kernel rounds code x scale to e4m3, relative to the row.
      const double power = row_powers_[static_cast<size_t>(expert * rows_ + row)];
      const double global = global_[static_cast<size_t>(expert)];
      const auto relative =
          static_cast<float>(formats::DecodeE2m1(nibble) * (scale / global) / power);
      return formats::DecodeE4m3(formats::EncodeE4m3(relative)) * power * global;
    }
    switch (rule_.code_dtype) {
      case DType::kBf16: {
        uint16_t bits = 0;
        std::memcpy(&bits, at, 2);
        return formats::DecodeBf16(bits);
      }
      case DType::kE4m3:
        return formats::DecodeE4m3(*at) * scale;
      default:
        // The kernel rounds an MXINT4 code x scale to BF16.
        return format_ == WeightFormat::kMxInt4
                   ? double{formats::RoundToBf16(formats::DecodeInt4(nibble) *
                                                 static_cast<float>(scale))}
                   : formats::DecodeE2m1(nibble) * scale;
    }
  }
  static std::vector<uint8_t> NormalCodes() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal(0, 60);
    std::vector<uint8_t> codes(4096);
    for (uint8_t& code : codes) {
      code = formats::EncodeE4m3(normal(random));
    }
    return codes;
  }
  [[nodiscard]] uint8_t CodeByte(bool integers, int64_t index, uint64_t random) const {
    if (rule_.code_dtype == DType::kBf16) {
      // High bytes of both signs around 1 (odd byte), or of small integers.
      constexpr uint8_t kWhole[] = {0x00, 0x3F, 0xBF, 0x40, 0xC0};
      constexpr uint8_t kAny[] = {0x3E, 0xBE, 0x3F, 0xBF, 0x3D};
      const auto draw = static_cast<size_t>(random % 5);
      if (index % 2 == 1) {
        return integers ? kWhole[draw] : kAny[draw];
      }
      return integers ? 0x00 : static_cast<uint8_t>(random);
    }
    if (rule_.code_dtype == DType::kE4m3) {
      // Encoding each of 10^8 draws would take a minute a kernel.
      static const std::vector<uint8_t> kNormal = NormalCodes();
      return integers ? formats::EncodeE4m3(static_cast<float>(static_cast<int>(random % 5) - 2))
                      : kNormal[random % kNormal.size()];
    }
    return static_cast<uint8_t>(random);
  }
  void MakeScales(bool integers, std::mt19937& random) {
    global_.assign(static_cast<size_t>(experts_), integers ? 1.0F : 0.75F);
    if (rule_.per_row_scale) {
      scale_stride_ = 1;
      scale_bytes_ = rows_ * 4;
    } else if (rule_.scale_block > 0) {
      scale_stride_ = CeilDiv(k_, rule_.scale_block);
      scale_bytes_ =
          CeilDiv(rows_, rule_.scale_block_rows) * scale_stride_ * SizeOf(rule_.scale_dtype);
    }
    const int64_t size = SizeOf(rule_.scale_dtype);
    scales_.assign(static_cast<size_t>(experts_ * scale_bytes_ + 4), 0xFF);
    for (int64_t i = 0; i < experts_ * scale_bytes_ / size; ++i) {
      uint8_t* const at = scales_.data() + i * size;
      const float factor = integers ? 1.0F : 0.25F + static_cast<float>(random() % 1024) / 512.0F;
      switch (rule_.scale_dtype) {
        case DType::kE8m0:
          *at = static_cast<uint8_t>(integers ? 127 : 121 + random() % 10);
          break;
        case DType::kE4m3:
          *at = formats::EncodeE4m3(factor);
          break;
        case DType::kBf16: {
          const uint16_t bits = formats::EncodeBf16(factor);
          std::memcpy(at, &bits, 2);
          break;
        }
        default:
          std::memcpy(at, &factor, 4);
      }
    }
  }
  // A NaN code in every 8th row, a NaN scale in every 8th, of which every other has zero codes
  // there; in every 8th zeros under the largest scale, which are zeros. All ones but for the sign
  // are NaN in each of the types; 4-bit codes have none.
  void MakeNans() {
    for (int64_t row = 0; row < experts_ * rows_; ++row) {
      const int64_t k = row * 29 % k_;
      if (row % 8 == 3 && rule_.codes_per_byte == 1) {
        const int64_t size = SizeOf(rule_.code_dtype);
        uint8_t* const at = codes_.data() + row * value_stride_ + k * size;
        std::fill_n(at, size, uint8_t{0xFF});
        at[size - 1] = row % 16 == 3 ? 0x7F : 0xFF;
      }
      const bool huge = row % 8 == 1;
      if ((row % 8 == 6 || huge) && rule_.scale_block > 0 && rule_.scale_block_rows == 1) {
        const int64_t size = SizeOf(rule_.scale_dtype);
        const int64_t block = k / rule_.scale_block;
        uint8_t* const scale = scales_.data() + row / rows_ * scale_bytes_ +
                               (row % rows_ * scale_stride_ + block) * size;
        std::fill_n(scale, size, uint8_t{0xFF});
        if (huge) {
          // The largest number of the type.
          scale[0] = rule_.scale_dtype == DType::kE4m3 ? 0x7E : size == 2 ? 0x7F : 0xFE;
          scale[size - 1] = size == 2 ? 0x7F : scale[0];
        }
        const int64_t bytes = rule_.scale_block / rule_.codes_per_byte;
        const int64_t left = k_ / rule_.codes_per_byte - block * bytes;
        std::fill_n(codes_.data() + row * value_stride_ + block * bytes,
                    huge || row % 16 == 6 ? std::min(bytes, left) : 0, uint8_t{0});
      }
    }
  }
  // Of each row the power of two that takes the largest scale of a block with values to 32 .. 63.
  void MakeRowPowers() {
    row_powers_.resize(static_cast<size_t>(experts_ * rows_));
    ParallelFor(0, experts_ * rows_, 16, MaxThreads(), [&](int64_t row, int) {
      double largest = 0.0;
      for (int64_t k = 0; k < k_; ++k) {
        const uint8_t byte = codes_[static_cast<size_t>(row * value_stride_ + k / 2)];
        const double scale =
            ScaleOf(row / rows_, row % rows_, k) / global_[static_cast<size_t>(row / rows_)];
        if ((k % 2 == 0 ? byte & 0x7 : byte >> 4 & 0x7) != 0 && !std::isnan(scale)) {
          largest = std::max(largest, scale);
        }
      }
      row_powers_[static_cast<size_t>(row)] =
          largest == 0.0 ? 1.0 : std::ldexp(1.0, std::ilogb(largest) - 5);
    });
  }
  [[nodiscard]] double ScaleOf(int64_t expert, int64_t row, int64_t k) const {
    double scale = has_global() ? global_[static_cast<size_t>(expert)] : 1.0;
    if (scale_bytes_ == 0) {
      return scale;
    }
    const int64_t size = SizeOf(rule_.scale_dtype);
    const int64_t index =
        rule_.per_row_scale ? row
                            : row / rule_.scale_block_rows * scale_stride_ + k / rule_.scale_block;
    const uint8_t* at = scales_.data() + expert * scale_bytes_ + index * size;
    switch (rule_.scale_dtype) {
      case DType::kE8m0:
        return scale * formats::DecodeE8m0(*at);
      case DType::kE4m3:
        return scale * formats::DecodeE4m3(*at);
      case DType::kBf16: {
        uint16_t bits = 0;
        std::memcpy(&bits, at, 2);
        return scale * formats::DecodeBf16(bits);
      }
      default: {
        float value = 0;
        std::memcpy(&value, at, 4);
        return scale * value;
      }
    }
  }

  WeightFormat format_;
  formats::WeightFormatRule rule_;
  int64_t experts_;
  int64_t rows_;
  int64_t k_;
  int64_t value_stride_ = 0;
  int64_t scale_stride_ = 0;
  int64_t scale_bytes_ = 0;
  std::vector<uint8_t> codes_;
  std::vector<uint8_t> scales_;
  std::vector<float> global_;
  std::vector<double> row_powers_;  // NVFP4 with FP8 products
  std::unique_ptr<RowValues[]> values_;
};

}  // namespace hopyard::test
