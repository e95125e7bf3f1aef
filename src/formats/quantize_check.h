// SPDX-License-Identifier: Apache-2.0
// Shapes of the formats and every argument rule of Quantize and Dequantize.
#pragma once

#include <cstdint>

#include "hopyard/quantize.h"

namespace hopyard::formats {

// Columns per block scale; 0 for formats without block scales.
[[nodiscard]] int64_t BlockColumns(Format format);
// Two codes a byte.
[[nodiscard]] bool IsPacked4Bit(Format format);
[[nodiscard]] bool HasGlobalScale(Format format);

// Throw Error naming the argument, got, wanted and the remedy; nothing has been written then.
void CheckQuantize(const TensorView& source, const QuantizedView& destination);
void CheckDequantize(const QuantizedView& source, const TensorView& destination);

}  // namespace hopyard::formats
