// SPDX-License-Identifier: Apache-2.0
// Each row of configs.def is compiled twice: with everything that a layer can ask for, and plain,
// as nearly all layers are. What is seldom used costs time where it does not run, too: a block
// that has few work items waits for the instructions on its way, and they lie apart.
#pragma once

#include "core/host_device.h"
#include "gemm/sm90/config.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

// Whether natural rows 128 * i .. + 127 lie in one block of scales.
[[nodiscard]] HOPYARD_HOST_DEVICE bool KeepsToBlocks(const MatrixArgs& matrix) {
  return matrix.position_step == 1 && (matrix.scale_row_origin + matrix.position_begin) % 128 == 0;
}

// Plain kernels with four blocks a multiprocessor have no registers for a tensor's scale: ptxas
// spills a word (CUDA 13.0).
[[nodiscard]] constexpr bool PlainKnowsTensorScale(const GemmConfig& config) {
  return config.blocks != 4;
}

// Whether the plain kernel of the row computes these arguments, and the general one is not asked
// for. It knows SwiGLU where gated, else no activation; weights in natural rows, their blocks of K
// not apart; linear scales, those of 128x128 blocks on whole blocks; output rows in pieces of 16
// bytes; and neither a LoRA delta, factors of tokens, scales of channels, nor a copy of the
// activation. Where weights are not decoded, no bias.
[[nodiscard]] bool IsPlain(const GemmConfig& config, const GroupedGemmArgs& args);

}  // namespace hopyard::gemm::sm90
