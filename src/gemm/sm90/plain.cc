// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/plain.h"

#include <cstdint>

namespace hopyard::gemm::sm90 {
namespace {

bool IsPlainMatrix(const GemmConfig& config, WeightFormat weights, const MatrixArgs& matrix) {
  const bool order =
      matrix.row_map == RowMap::kNatural && matrix.row_unit == 1 && matrix.k_blocks_last == 0;
  const bool scales = matrix.scale_layout == ScaleLayout::kLinear &&
                      (weights != WeightFormat::kFp8Block128 || KeepsToBlocks(matrix));
  return order && scales && (IsDecoded(config.family) || !matrix.has_bias);
}

}  // namespace

bool IsPlain(const GemmConfig& config, const GroupedGemmArgs& args) {
  const ActivationKind usual = config.gated ? ActivationKind::kSwiGlu : ActivationKind::kIdentity;
  const bool sums = args.activation == usual && args.delta == nullptr &&
                    args.x_token_scales == nullptr && args.slot_weights == nullptr &&
                    (args.x_scale == nullptr || PlainKnowsTensorScale(config)) &&
                    args.weights != WeightFormat::kFp8PerChannel;
  const bool output = args.activation_out == nullptr && args.features % 8 == 0 &&
                      args.out_pitch % 8 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  return !args.general && sums && output && IsPlainMatrix(config, args.weights, args.first) &&
         (!config.gated || IsPlainMatrix(config, args.weights, args.second));
}

}  // namespace hopyard::gemm::sm90
