// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "core/error.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "stages/layer_ref_parts.h"

namespace hopyard::ref {
namespace {

// One element of quantised hidden states without any static scale.
double HiddenCode(const MoeSpec& spec, const MoeInputs& inputs, int64_t token, int64_t col) {
  const bool nvfp4 = spec.activations == ActivationFormat::kNvFp4 ||
                     spec.activations == ActivationFormat::kNvFp4PerToken;
  const auto* codes = inputs.hidden_states.as<const uint8_t>();
  if (!nvfp4) {
    return formats::DecodeE4m3(codes[token * spec.hidden_size + col]);
  }
  const uint8_t byte = codes[token * (spec.hidden_size / 2) + col / 2];
  return formats::DecodeE2m1(static_cast<uint8_t>((byte >> ((col & 1) * 4)) & 0xF));
}

double HiddenScale(const MoeSpec& spec, const MoeInputs& inputs, int64_t token, int64_t col) {
  const TensorView& scales = inputs.hidden_scales;
  const int64_t hidden = spec.hidden_size;
  switch (spec.activations) {
    case ActivationFormat::kBf16:
    case ActivationFormat::kFp8PerTensor:
      return 1.0;
    case ActivationFormat::kFp8Block128:
      return scales.as<const float>()[token * CeilDiv(hidden, 128) + col / 128];
    case ActivationFormat::kFp8PerToken:
      return scales.as<const float>()[token];
    case ActivationFormat::kMxFp8:
      return formats::DecodeE8m0(
          scales.as<const uint8_t>()[token * CeilDiv(hidden, 32) + col / 32]);
    case ActivationFormat::kNvFp4:
    case ActivationFormat::kNvFp4PerToken:
      return formats::DecodeE4m3(
          scales.as<const uint8_t>()[token * CeilDiv(hidden, 16) + col / 16]);
  }
  return 1.0;
}

}  // namespace

double ReadNumber(const TensorView& view, int64_t index) {
  switch (view.dtype) {
    case DType::kFloat32:
      return view.as<const float>()[index];
    case DType::kBf16:
      return formats::DecodeBf16(view.as<const uint16_t>()[index]);
    case DType::kInt16:
      return view.as<const int16_t>()[index];
    case DType::kInt32:
      return view.as<const int32_t>()[index];
    case DType::kInt64:
      return static_cast<double>(view.as<const int64_t>()[index]);
    default:
      HOPYARD_INTERNAL(false) << "the oracle does not read " << ToString(view.dtype);
  }
  return 0.0;
}

HiddenRow ReadHidden(const MoeSpec& spec, const MoeInputs& inputs, int64_t token) {
  HiddenRow row;
  row.values.resize(static_cast<size_t>(spec.hidden_size));
  row.quantised = inputs.hidden_states.dtype != DType::kBf16;
  row.needs_static = row.quantised && (spec.activations == ActivationFormat::kFp8PerTensor ||
                                       spec.activations == ActivationFormat::kNvFp4);
  const bool per_token = spec.activations == ActivationFormat::kNvFp4PerToken;
  for (int64_t col = 0; col < spec.hidden_size; ++col) {
    double& value = row.values[static_cast<size_t>(col)];
    if (!row.quantised) {
      value = ReadNumber(inputs.hidden_states, token * spec.hidden_size + col);
      continue;
    }
    value = HiddenCode(spec, inputs, token, col) * HiddenScale(spec, inputs, token, col);
    if (per_token && inputs.token_scales.defined()) {
      value *= ReadNumber(inputs.token_scales, token);
    }
  }
  return row;
}

}  // namespace hopyard::ref
