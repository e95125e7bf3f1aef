// SPDX-License-Identifier: Apache-2.0
#include "formats/format_rules.h"

namespace hopyard::formats {

WeightFormatRule RuleOf(WeightFormat format) {
  WeightFormatRule rule;
  switch (format) {
    case WeightFormat::kBf16:
      return rule;
    case WeightFormat::kFp8Block128:
      rule = {DType::kE4m3, 1, 128, 128, DType::kFloat32, false, false, Format::kFp8Block128};
      return rule;
    case WeightFormat::kFp8PerTensor:
      rule = {DType::kE4m3, 1, 0, 1, DType::kFloat32, false, true, Format::kFp8PerTensor};
      return rule;
    case WeightFormat::kFp8PerChannel:
      rule = {DType::kE4m3, 1, 0, 1, DType::kFloat32, true, false, Format::kFp8PerRow};
      return rule;
    case WeightFormat::kMxFp8:
      rule = {DType::kE4m3, 1, 32, 1, DType::kE8m0, false, false, Format::kMxFp8};
      return rule;
    case WeightFormat::kNvFp4:
      rule = {DType::kUint8, 2, 16, 1, DType::kE4m3, false, true, Format::kNvFp4};
      return rule;
    case WeightFormat::kMxFp4:
      rule = {DType::kUint8, 2, 32, 1, DType::kE8m0, false, false, Format::kMxFp4};
      return rule;
    case WeightFormat::kMxInt4:
      rule = {DType::kUint8, 2, 32, 1, DType::kBf16, false, false, Format::kMxInt4};
      return rule;
  }
  return rule;
}

Format InputFormat(ActivationFormat format) {
  switch (format) {
    case ActivationFormat::kBf16:
      return Format::kBf16;
    case ActivationFormat::kFp8Block128:
      return Format::kFp8Block1x128;
    case ActivationFormat::kFp8PerTensor:
      return Format::kFp8PerTensor;
    case ActivationFormat::kFp8PerToken:
      return Format::kFp8PerRow;
    case ActivationFormat::kMxFp8:
      return Format::kMxFp8;
    case ActivationFormat::kNvFp4:
    case ActivationFormat::kNvFp4PerToken:
      return Format::kNvFp4;
  }
  return Format::kBf16;
}

Format IntermediateFormat(ActivationFormat format) {
  // A per-token scale of the intermediate would need a maximum across the tiles of a row, so the
  // per-token mode uses 1x128 there.
  return format == ActivationFormat::kFp8PerToken ? Format::kFp8Block1x128 : InputFormat(format);
}

bool IsSupportedPair(WeightFormat weights, ActivationFormat activations) {
  using A = ActivationFormat;
  if (activations == A::kBf16) {
    return true;
  }
  switch (weights) {
    case WeightFormat::kBf16:
    case WeightFormat::kMxInt4:
      return false;
    case WeightFormat::kFp8Block128:
      return activations == A::kFp8Block128;
    case WeightFormat::kFp8PerTensor:
    case WeightFormat::kFp8PerChannel:
      return activations == A::kFp8PerTensor || activations == A::kFp8PerToken;
    case WeightFormat::kMxFp8:
      return activations == A::kMxFp8;
    case WeightFormat::kMxFp4:
      return activations != A::kNvFp4 && activations != A::kNvFp4PerToken;
    case WeightFormat::kNvFp4:
      return activations == A::kNvFp4 || activations == A::kNvFp4PerToken ||
             activations == A::kFp8PerToken;
  }
  return false;
}

}  // namespace hopyard::formats
