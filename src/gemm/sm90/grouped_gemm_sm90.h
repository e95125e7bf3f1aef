// SPDX-License-Identifier: Apache-2.0
// The grouped GEMM that stages 3 and 4 share on Hopper: for every row r of an expert's segment,
// out[r] = act(scales * (W[expert] x[source of r]) + bias), FP32 sums. docs/hopper.md tells how.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"
#include "hopyard/weights.h"

#include "device/queue.h"
#include "gemm/packed_order.h"
#include "gemm/sm90/k_order.h"

namespace hopyard::gemm::sm90 {

// A CUtensorMap, whose header .h files do not include: 128 bytes that the copy engine reads.
struct alignas(64) TensorMap {
  uint64_t words[16] = {};
};

// What of one expert's matrix the kernels read through pointers; device memory, null = absent.
struct ExpertPointers {
  const void* scales = nullptr;            // block scales; kFp8PerChannel: f32 [stored rows]
  const void* bias = nullptr;              // by stored row
  const float* global_scale = nullptr;     // f32 [1]
  const uint8_t* row_exponents = nullptr;  // by natural row: ComputeRowExponents
};

// One matrix of natural rows [experts][rows][k]: gate, up, or a GEMM's only one. Natural row j is
// position begin + j * step of the stored order, which the row map may shuffle.
struct MatrixArgs {
  TensorMap map;                             // of all experts, or
  const TensorMap* expert_maps = nullptr;    // device [experts]: one map per expert
  const ExpertPointers* pointers = nullptr;  // device [experts]
  int64_t rows = 0;
  int64_t position_begin = 0;
  int64_t position_step = 1;
  RowMap row_map = RowMap::kNatural;
  ScaleLayout scale_layout = ScaleLayout::kLinear;
  // Elements from one stored scale row to the next (linear), columns of a scale row (128x4).
  int64_t scale_stride = 0;
  int64_t scale_row_origin = 0;  // kFp8Block128: natural row 0's place in its block of 128
  DType bias_dtype = DType::kFloat32;
  // What of `pointers` is not null; the kernels look for nothing else there.
  bool has_bias = false;
  bool has_global_scale = false;
  int32_t k_blocks_last = 0;  // 1: the map's slowest dimension is the K block (kBlockKMajor)
  int32_t row_unit = 1;       // rows per step of the map's row coordinate where it is not 1
  // Each row begins with a cache line. Else lines belong to two rows, and are wanted again.
  bool whole_lines = false;
  // Codes and block scales in units of gemm/packed_order.h, of gate and up together; null: not
  // packed. Kernels for packed weights read neither the maps nor ExpertPointers::scales.
  const uint8_t* packed = nullptr;
  int64_t packed_stride = 0;  // bytes from expert to expert
};

// Format and order of the rows that a GEMM reads or GEMM1 writes.
struct RowFormat {
  Format format = Format::kBf16;  // what values are rounded to
  // Type in memory: kBf16 (every format's rounded values are BF16 numbers, times block scales
  // included) or kE4m3 codes, whose scales stand apart.
  DType dtype = DType::kBf16;
  KOrder order = KOrder::kNatural;  // others: whole groups of 128, zero beyond K

  // Rows are written, and may be read, to the end of their last group of 128.
  [[nodiscard]] constexpr bool fills_groups() const { return order != KOrder::kNatural; }
  friend bool operator==(const RowFormat&, const RowFormat&) = default;
};

// Pointers are device memory.
struct GroupedGemmArgs {
  MatrixArgs first;   // gate, or the only matrix
  MatrixArgs second;  // up, where the GEMM is gated
  int64_t k = 0;
  int64_t features = 0;
  // Segments of this launch; tiles of others are passed over. Matrices are indexed from 0.
  int32_t segment_begin = 0;
  int32_t segment_end = 0;
  WeightFormat weights = WeightFormat::kBf16;
  ActivationKind activation = ActivationKind::kIdentity;
  RowFormat out_format;
  const float* alpha = nullptr;  // [experts of this launch]; null: the kind's neutral value
  const float* beta = nullptr;
  const float* limit = nullptr;

  // Rows of x: BF16, or e4m3 codes; 16-byte aligned, x_pitch elements apart.
  const void* x = nullptr;
  int64_t x_pitch = 0;
  const int32_t* row_to_source = nullptr;  // null: row r reads x[r]
  const float* x_block_scales = nullptr;   // [sources][ceil(k / 128)] f32; promoted kernels only
  const float* x_token_scales = nullptr;   // [sources]: multiplies the sums
  const float* x_scale = nullptr;          // [1], or one per matrix with x_scale_stride 1
  int64_t x_scale_stride = 0;
  // Router weight on the input: row r's sums are multiplied by slot_weights[row_to_slot[r]].
  const float* slot_weights = nullptr;
  const int32_t* row_to_slot = nullptr;
  // LoRA: bf16 [tokens, delta_slots, f * features], up then gate in gated kernels, added after the
  // bias; slot s of slots_per_token, those from delta_slots on have none. Needs row_to_slot.
  const uint16_t* delta = nullptr;
  int32_t slots_per_token = 1;
  int32_t delta_slots = 0;

  // Tiles of at most `tokens` rows (KernelInfo), as the permutation lists them: whole clusters, in
  // which the last ones may be empty.
  const int32_t* tile_expert = nullptr;
  const int32_t* tile_row_begin = nullptr;
  const int32_t* tile_row_end = nullptr;
  const int32_t* num_tiles = nullptr;
  int64_t max_tiles = 0;

  // For tests: the kernel with everything runs also where the plain one would do (plain.h).
  bool general = false;

  void* out = nullptr;    // [rows of all segments, out_pitch]
  int64_t out_pitch = 0;  // elements
  // kFp8Block128 output: [rows][ceil(features / 128)] f32. kNvFp4PerToken: see out_scale.
  float* out_block_scales = nullptr;
  // Static scale of the output's format (kE4m3 per tensor, NVFP4 global): [1] or one per segment.
  const float* out_scale = nullptr;
  int64_t out_scale_stride = 0;
  uint16_t* activation_out = nullptr;  // optional [rows][features] bf16, before out_format
};

// A row of configs.def.
struct KernelInfo {
  std::string_view name;
  DType x_dtype = DType::kBf16;  // of the token rows it reads
  KOrder x_order = KOrder::kNatural;
  bool promoted = false;  // applies scales of tokens and of 128x128 blocks every 128 of K
  int tokens = 0;         // rows of a tile
  int features = 0;       // of a block
  bool gated = false;
  bool mn_major = false;     // reads MN-major weights only; others do not
  bool interleaved = false;  // of those, gate and up in alternate columns only
  int cluster = 1;           // tiles come in groups of so many of one expert
  bool packed = false;       // reads packed weights only; others do not
  bool rounds = false;       // can write GEMM1's output in the formats that GEMM2 then reads
};
[[nodiscard]] int NumKernels();
[[nodiscard]] KernelInfo KernelAt(int index);
// Whether kernel `index` multiplies these weights, in its order, with rows in this format.
[[nodiscard]] bool Runs(int index, WeightFormat weights, const RowFormat& x, bool gated);
// The kernel that takes the place of `index` where weights are MN-major, or -1.
[[nodiscard]] int MnMajorTwin(int index, bool interleaved);
// The kernel that takes the place of `index` where weights are packed, or -1.
[[nodiscard]] int PackedTwin(int index);

// Describes natural rows of a checkpoint matrix to the copy engine.
struct MapShape {
  WeightFormat format = WeightFormat::kBf16;
  const void* values = nullptr;  // of the first expert
  int64_t experts = 1;
  int64_t expert_stride = 0;  // bytes
  int64_t rows = 0;           // natural rows of this part
  int64_t cols = 0;           // K
  // Bytes from stored row to stored row; kMnMajor: k to k; kBlockKMajor: block to block.
  int64_t value_stride = 0;
  int64_t position_begin = 0;
  int64_t position_step = 1;
  MajorOrder major = MajorOrder::kKMajor;
  RowMap row_map = RowMap::kNatural;
  bool swizzled = true;  // IsSwizzled
};
// Whether tiles of these weights go to the tensor cores as they are (else they are decoded).
[[nodiscard]] bool IsSwizzled(WeightFormat weights, const RowFormat& x);
// MatrixArgs::row_unit for this layout.
[[nodiscard]] int RowUnitOf(const MapShape& shape);
// MatrixArgs::whole_lines for this layout.
[[nodiscard]] bool HasWholeLines(const MapShape& shape);
// Empty, or why the copy engine cannot read this layout (alignment, order), with the remedy.
[[nodiscard]] std::string MapProblem(const MapShape& shape);
// Precondition: MapProblem is empty. Throws Error{kCuda} when the driver refuses.
[[nodiscard]] TensorMap MakeTensorMap(const MapShape& shape);

// MXFP4 and NVFP4 weights with FP8 products: the byte of 2^E by which all of a row's blocks are
// divided (hopper-kernels 3). MXFP4: the largest block scale of the row less 6, 0 where there is
// none, and 255 where a block's is NaN. NVFP4: the exponent of that scale less 5, so that 6 x 1.875
// x 2^5 is an e4m3 number. Blocks without values do not count. Fills out[experts][matrix.rows], on
// `stream`, from the codes and scales that are in memory then.
struct RowExponentArgs {
  MatrixArgs matrix;
  MapShape shape;  // where the codes are; of expert e: values[e], a device table
  const void* const* values = nullptr;
  PackedOrder packed;  // of the first expert, where the matrix is packed: read instead
  uint8_t* out = nullptr;
};
void ComputeRowExponents(const RowExponentArgs& args, void* stream);

// Enqueues kernel `index`. Throws Error{kCuda} when the launch fails.
void RunGroupedGemm(int index, const GroupedGemmArgs& args, const device::Queue& queue);

}  // namespace hopyard::gemm::sm90
