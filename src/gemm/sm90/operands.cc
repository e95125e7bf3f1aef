// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/operands.h"

#include "formats/format_rules.h"

namespace hopyard::gemm::sm90 {
namespace {

bool IsFp8(WeightFormat format) {
  return format == WeightFormat::kFp8Block128 || format == WeightFormat::kFp8PerTensor ||
         format == WeightFormat::kFp8PerChannel;
}

bool IsE4m3Plain(Format format) {
  return format == Format::kFp8PerTensor || format == Format::kFp8PerRow ||
         format == Format::kFp8Block1x128;
}

// Rows of `format` as a GEMM with these weights reads them.
RowFormat RowsFor(WeightFormat weights, Format format) {
  if (weights == WeightFormat::kBf16) {
    return {format, DType::kBf16, KOrder::kNatural};
  }
  if (IsE4m3Plain(format) && IsFp8(weights)) {
    return {format, DType::kE4m3, KOrder::kNatural};
  }
  if (IsE4m3Plain(format) && weights == WeightFormat::kMxFp4) {
    return {format, DType::kE4m3, KOrder::kFp8Decoded};
  }
  return {format, DType::kBf16, KOrder::kBf16Decoded};
}

}  // namespace

LayerOperands OperandsOf(WeightFormat weights, ActivationFormat activations) {
  return {RowsFor(weights, formats::InputFormat(activations)),
          RowsFor(weights, formats::IntermediateFormat(activations)),
          activations != ActivationFormat::kNvFp4PerToken};
}

std::optional<LayerOperands> RoundedOperandsOf(WeightFormat weights, ActivationFormat activations) {
  if (weights == WeightFormat::kMxFp4 && activations == ActivationFormat::kMxFp8) {
    // The rows of FP8 block activations: scales along K stand apart, as products in FP8 need them.
    return OperandsOf(weights, ActivationFormat::kFp8Block128);
  }
  if (weights == WeightFormat::kNvFp4 && activations == ActivationFormat::kFp8PerToken) {
    // The same codes as bytes; the weights are rounded on their way.
    return OperandsOf(WeightFormat::kMxFp4, activations);
  }
  return std::nullopt;
}

bool IsPromoted(WeightFormat weights, const RowFormat& x) {
  return weights == WeightFormat::kFp8Block128 || x.format == Format::kFp8Block1x128;
}

}  // namespace hopyard::gemm::sm90
