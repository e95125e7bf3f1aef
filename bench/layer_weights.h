// SPDX-License-Identifier: Apache-2.0
// Random weights of a whole layer on the GPU, in any format, for the benchmarks of layers and
// GEMMs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "hopyard/weights.h"

#include "bench/gpu.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"

namespace hopyard::bench {

inline constexpr Device kGpu{DeviceKind::kCuda, 0};
// Weights smaller than this are repeated, so that calls do not find each other's in the L2 cache.
inline constexpr int64_t kColdBytes = int64_t{3} * 50 << 20;

// Bytes that decode to finite numbers, repeated from a block.
inline void FillBytes(uint8_t* device, int64_t bytes, uint8_t (*make)(uint32_t)) {
  constexpr int64_t kBlock = 1 << 23;
  std::mt19937 random(3);
  std::vector<uint8_t> values(static_cast<size_t>(std::min(bytes, kBlock)));
  for (uint8_t& value : values) {
    value = make(static_cast<uint32_t>(random()));
  }
  for (int64_t begin = 0; begin < bytes; begin += kBlock) {
    const int64_t part = std::min(kBlock, bytes - begin);
    HOPYARD_CUDA(cudaMemcpy(device + begin, values.data(), static_cast<size_t>(part),
                            cudaMemcpyHostToDevice));
  }
}

// An e4m3 code of either sign between 1/2 and 2, from random bits.
inline uint8_t E4m3Byte(uint32_t draw) {
  return static_cast<uint8_t>((draw & 0x8FU) | 0x30U);
}

// Matrices of one GEMM for all experts, with scales of about 2^-6.
class RandomMatrices {
 public:
  RandomMatrices(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) {
    const formats::WeightFormatRule rule = formats::RuleOf(format);
    const int64_t code_cols = cols / rule.codes_per_byte;
    bytes_ = experts * rows * code_cols * SizeOf(rule.code_dtype);
    codes_ = std::make_unique<DeviceBuffer<uint8_t>>(bytes_);
    set_.values =
        TensorView::Contiguous(codes_->get(), rule.code_dtype, {experts, rows, code_cols}, kGpu);
    if (format == WeightFormat::kBf16) {
      FillRandom(set_.values.as<uint16_t>(), experts * rows * cols);
      return;
    }
    FillBytes(
        codes_->get(), bytes_, rule.code_dtype == DType::kE4m3 ? E4m3Byte : [](uint32_t draw) {
          return static_cast<uint8_t>(draw);
        });
    MakeScales(rule, experts, rows, cols);
  }
  [[nodiscard]] const MatrixSet& set() const { return set_; }
  [[nodiscard]] int64_t bytes() const { return bytes_; }  // with scales

 private:
  void MakeScales(const formats::WeightFormatRule& rule, int64_t experts, int64_t rows,
                  int64_t cols) {
    if (rule.scale_block > 0 || rule.per_row_scale) {
      const int64_t scale_rows = CeilDiv(rows, rule.scale_block_rows);
      const int64_t scale_cols = rule.per_row_scale ? 1 : CeilDiv(cols, rule.scale_block);
      const int64_t count = experts * scale_rows * scale_cols;
      const int64_t size = SizeOf(rule.scale_dtype);
      scales_ = std::make_unique<DeviceBuffer<uint8_t>>(count * size);
      std::vector<uint8_t> host(static_cast<size_t>(count * size));
      const float value = 0x1p-6F;
      const uint16_t bf16 = formats::EncodeBf16(value);
      for (int64_t i = 0; i < count; ++i) {
        uint8_t* const at = host.data() + i * size;
        if (rule.scale_dtype == DType::kE8m0) {
          *at = static_cast<uint8_t>(118 + i % 5);
        } else if (rule.scale_dtype == DType::kE4m3) {
          *at = formats::EncodeE4m3(value);
        } else {
          std::memcpy(at, size == 2 ? static_cast<const void*>(&bf16) : &value,
                      static_cast<size_t>(size));
        }
      }
      HOPYARD_CUDA(cudaMemcpy(scales_->get(), host.data(), host.size(), cudaMemcpyHostToDevice));
      set_.scales = rule.per_row_scale
                        ? TensorView::Contiguous(scales_->get(), rule.scale_dtype,
                                                 {experts, scale_rows}, kGpu)
                        : TensorView::Contiguous(scales_->get(), rule.scale_dtype,
                                                 {experts, scale_rows, scale_cols}, kGpu);
      bytes_ += count * size;
    }
    if (rule.global_scale) {
      global_ = std::make_unique<DeviceBuffer<float>>(
          std::vector<float>(static_cast<size_t>(experts), 0x1p-6F));
      set_.global_scales = TensorView::Contiguous(global_->get(), DType::kFloat32, {experts}, kGpu);
    }
  }

  MatrixSet set_;
  int64_t bytes_ = 0;
  std::unique_ptr<DeviceBuffer<uint8_t>> codes_;
  std::unique_ptr<DeviceBuffer<uint8_t>> scales_;
  std::unique_ptr<DeviceBuffer<float>> global_;
};

// GEMM1 and GEMM2 of a group of experts.
struct GroupMatrices {
  RandomMatrices gemm1;
  RandomMatrices gemm2;

  GroupMatrices(const MoeSpec& spec, WeightFormat format, int64_t experts)
      : gemm1(format, experts, spec.gemm1_rows(), spec.hidden_size),
        gemm2(format, experts, spec.hidden_size, spec.intermediate_size) {}
  [[nodiscard]] int64_t bytes() const { return gemm1.bytes() + gemm2.bytes(); }
};

struct LayerWeights {
  GroupMatrices routed;
  std::optional<GroupMatrices> shared;
  DeviceBuffer<float> input_scales;
  Weights weights;

  LayerWeights(const MoeSpec& spec, bool packed)
      : routed(spec, spec.weights, spec.num_experts),
        input_scales(std::vector<float>{0x1p-5F, 0x1p-5F}) {
    WeightsDesc desc;
    desc.packed = packed;
    desc.routed.gemm1 = routed.gemm1.set();
    desc.routed.gemm2 = routed.gemm2.set();
    if (spec.shared.count > 0) {
      shared.emplace(spec, spec.shared.weights, spec.shared.count);
      desc.shared.gemm1 = shared->gemm1.set();
      desc.shared.gemm2 = shared->gemm2.set();
    }
    if (spec.activations == ActivationFormat::kFp8PerTensor ||
        spec.activations == ActivationFormat::kNvFp4) {
      desc.routed.gemm1_input_scale =
          TensorView::Contiguous(input_scales.get(), DType::kFloat32, {1}, kGpu);
      desc.routed.gemm2_input_scale =
          TensorView::Contiguous(input_scales.get() + 1, DType::kFloat32, {1}, kGpu);
    }
    weights = Weights(spec, desc);
  }
  [[nodiscard]] int64_t bytes() const { return routed.bytes(); }  // of the routed experts
  [[nodiscard]] int64_t shared_bytes() const { return shared ? shared->bytes() : 0; }
};
using Layers = std::vector<std::unique_ptr<LayerWeights>>;

}  // namespace hopyard::bench
