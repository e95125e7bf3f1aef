// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM that stages 3 and 4 share on Hopper: for every row r of an expert's segment,
// out[r] = act(W[expert] x[source of r] + bias), BF16 in, FP32 sums, BF16 out.
#pragma once

#include <cstdint>
#include <string_view>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"

namespace hopyard::gemm::sm90 {

// Pointers are device memory.
struct GroupedGemmArgs {
  // Weights [experts, rows, k] bf16, K-major, 16-byte aligned rows: strides are multiples of 8.
  const void* weights = nullptr;
  int64_t experts = 0;
  int64_t rows = 0;  // of one expert: features, twice that where gated
  int64_t k = 0;
  int64_t row_stride = 0;     // elements
  int64_t expert_stride = 0;  // elements
  // Where gated: feature f has its gate in row gate_begin + f and its up in row up_begin + f.
  int64_t gate_begin = 0;
  int64_t up_begin = 0;
  int64_t features = 0;
  const void* bias = nullptr;  // [experts, rows] f32 or bf16, or null
  DType bias_dtype = DType::kFloat32;
  ActivationKind activation = ActivationKind::kIdentity;
  const float* alpha = nullptr;  // [experts]; null: the kind's neutral value
  const float* beta = nullptr;
  const float* limit = nullptr;

  const uint16_t* x = nullptr;             // [sources, x_pitch] bf16, x_pitch a multiple of 8
  int64_t x_pitch = 0;                     // elements
  const int32_t* row_to_source = nullptr;  // null: row r reads x[r]
  // Tiles of at most `tokens` rows (GemmConfig), as the permutation lists them.
  const int32_t* tile_expert = nullptr;
  const int32_t* tile_row_begin = nullptr;
  const int32_t* tile_row_end = nullptr;
  const int32_t* num_tiles = nullptr;
  int64_t max_tiles = 0;

  uint16_t* out = nullptr;  // [rows of all experts, out_pitch] bf16
  int64_t out_pitch = 0;    // elements
};

// Kernel rows of configs.def by name.
struct KernelInfo {
  std::string_view name;
  int tokens;    // rows of a tile
  int features;  // of a block
  bool gated;
};
[[nodiscard]] int NumKernels();
[[nodiscard]] KernelInfo KernelAt(int index);

// Enqueues kernel `index` on `stream` (a cudaStream_t). Throws Error{kInvalidArgument} for a layout
// that the copy engine cannot read, Error{kCuda} when the launch fails.
void RunGroupedGemm(int index, const GroupedGemmArgs& args, void* stream);

}  // namespace hopyard::gemm::sm90
