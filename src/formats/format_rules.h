// SPDX-License-Identifier: Apache-2.0
// What each weight and activation format means in terms of the number formats: the one home of
// these facts for validation, weights, backends and docs.
#pragma once

#include <cstdint>

#include "hopyard/quantize.h"
#include "hopyard/spec.h"

namespace hopyard::formats {

struct WeightFormatRule {
  DType code_dtype = DType::kBf16;
  int codes_per_byte = 1;        // 2: packed 4-bit codes
  int64_t scale_block = 0;       // columns per block scale; 0 = none
  int64_t scale_block_rows = 1;  // rows that share one (kFp8Block128: 128)
  DType scale_dtype = DType::kFloat32;
  bool per_row_scale = false;     // kFp8PerChannel: f32 [rows]
  bool global_scale = false;      // f32 per expert
  Format format = Format::kBf16;  // the number format that Quantize knows
};

[[nodiscard]] WeightFormatRule RuleOf(WeightFormat format);

// Whether WeightsDesc::packed has an order for it.
[[nodiscard]] constexpr bool HasPackedOrder(WeightFormat format) {
  return format == WeightFormat::kMxFp4 || format == WeightFormat::kNvFp4;
}

// Number format that hidden states of this activation format have, and the intermediate's
// (spec 4.7).
[[nodiscard]] Format InputFormat(ActivationFormat format);
[[nodiscard]] Format IntermediateFormat(ActivationFormat format);

// The pairs of spec 4.2 (and their BF16-activation counterparts) that the layer computes.
[[nodiscard]] bool IsSupportedPair(WeightFormat weights, ActivationFormat activations);

}  // namespace hopyard::formats
