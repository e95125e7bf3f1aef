// SPDX-License-Identifier: Apache-2.0
// In which formats and orders the token operands of both GEMMs stand, for each pair of weight and
// activation formats: what stages before a GEMM write and its kernel row reads.
#pragma once

#include <optional>

#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

struct LayerOperands {
  RowFormat x;  // of GEMM1
  RowFormat h;  // of GEMM2
  // Kernels that can round (KernelInfo::rounds) write h; otherwise, where h's scale needs the
  // maximum of a whole row, GEMM1 writes bf16 rows that a pass of its own rounds.
  bool fused_h = true;
};

// Precondition: formats::IsSupportedPair.
[[nodiscard]] LayerOperands OperandsOf(WeightFormat weights, ActivationFormat activations);

// Those with which FP8 products take the place of exact ones in BF16, at the price of a rounding
// that the formats do not ask for (docs/numerics.md); for plans that name such a kernel. None for
// most pairs.
[[nodiscard]] std::optional<LayerOperands> RoundedOperandsOf(WeightFormat weights,
                                                             ActivationFormat activations);

// Whether a kernel must apply scales every 128 of K: e4m3 1x128 rows or 128x128 weights.
[[nodiscard]] bool IsPromoted(WeightFormat weights, const RowFormat& x);

}  // namespace hopyard::gemm::sm90
