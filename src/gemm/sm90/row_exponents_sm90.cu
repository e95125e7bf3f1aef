// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "device/cuda_check.h"
#include "device/sm90/warp.cuh"
#include "formats/row_map.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {
namespace {

constexpr int kWarps = 8;  // of a block of threads
constexpr int kKBlockBytes = 128;
constexpr int kNanScale = 255;
constexpr int kNanRow = 255;  // no other row has it: 254 less the headroom is the largest

struct MxFp4 {
  static constexpr int kBlock = 32;  // codes of a scale

  // Grows with the scale; 0 for the least.
  __device__ static int Rank(uint8_t scale) { return scale; }
  __device__ static bool IsNan(uint8_t scale) { return scale == kNanScale; }
  __device__ static int RowExponent(int largest) {
    // 6 x 2^6 = 384 is the largest e4m3 number that a code may become.
    constexpr int kHeadroom = 6;
    return largest == kNanScale ? kNanRow : max(largest - kHeadroom, 0);
  }
};

// NaN scales make NaN codes: no row is marked for them.
struct NvFp4 {
  static constexpr int kBlock = 16;

  __device__ static int Rank(uint8_t scale) { return min(scale & 0x7F, 0x7E); }
  __device__ static bool IsNan(uint8_t /*scale*/) { return false; }
  __device__ static int RowExponent(int largest) {
    constexpr int kHeadroom = 5;
    if (largest == 0) {
      return 127;
    }
    // Of e4m3: 2^(c / 8 - 7), or, below 8, c x 2^-9.
    const int exponent = largest >= 8 ? largest / 8 - 7 : 31 - __clz(largest) - 9;
    return 127 + exponent - kHeadroom;
  }
};

// A row of one expert's matrix.
struct RowOfCodes {
  const RowExponentArgs& args;
  PackedOrder packed;
  const uint8_t* values;  // not packed
  const uint8_t* scales;
  int64_t row;     // natural
  int64_t stored;  // not packed

  __device__ RowOfCodes(const RowExponentArgs& all, int64_t expert, int64_t natural)
      : args(all), packed(all.packed), row(natural) {
    if (packed.base != nullptr) {
      packed.base += expert * args.matrix.packed_stride;
      return;
    }
    values = static_cast<const uint8_t*>(args.values[expert]);
    scales = static_cast<const uint8_t*>(args.matrix.pointers[expert].scales);
    stored = formats::StoredPosition(args.matrix.row_map,
                                     args.matrix.position_begin + row * args.matrix.position_step);
  }
  [[nodiscard]] __device__ uint8_t Scale(int64_t block) const {
    if (packed.base != nullptr) {
      return *PackedScale(packed, row, block);
    }
    const MatrixArgs& matrix = args.matrix;
    return scales[matrix.scale_layout == ScaleLayout::kLinear
                      ? stored * matrix.scale_stride + block
                      : (stored / 128 * ((matrix.scale_stride + 3) / 4) + block / 4) * 512 +
                            stored % 32 * 16 + stored % 128 / 32 * 4 + block % 4];
  }
  // The codes of a block of scales lie together.
  [[nodiscard]] const __device__ uint8_t* Codes(int64_t byte) const {
    if (packed.base != nullptr) {
      return PackedCode(packed, row, byte);
    }
    return values + (args.shape.major == MajorOrder::kBlockKMajor
                         ? byte / kKBlockBytes * args.shape.value_stride + stored * kKBlockBytes +
                               byte % kKBlockBytes
                         : stored * args.shape.value_stride + byte);
  }
};

// The block `block` of `codes` codes holds a magnitude that is not zero.
__device__ bool HasValues(const RowOfCodes& row, int64_t block, int codes) {
  const int64_t byte = block * (codes / 2);
  const int64_t row_bytes = row.args.shape.cols / 2;
  const uint8_t* const at = row.Codes(byte);
  const int64_t left = row_bytes - byte;
  const int count = left < codes / 2 ? static_cast<int>(left) : codes / 2;
  bool any = false;
  for (int i = 0; i < count; ++i) {
    any = any || (at[i] & 0x77U) != 0;
  }
  return any;
}

template <class Rule>
__global__ void RowExponentsKernel(const RowExponentArgs args, int64_t experts) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t rows = args.matrix.rows;
  if (warp >= experts * rows) {
    return;
  }
  const int64_t expert = warp / rows;
  const RowOfCodes row(args, expert, warp % rows);
  const int64_t blocks = (args.shape.cols + Rule::kBlock - 1) / Rule::kBlock;
  int largest = 0;
  for (int64_t block = threadIdx.x % 32; block < blocks; block += 32) {
    const uint8_t scale = row.Scale(block);
    if (Rule::IsNan(scale) || HasValues(row, block, Rule::kBlock)) {
      largest = max(largest, Rule::Rank(scale));
    }
  }
  largest = hopyard::sm90::Max(largest);
  if (threadIdx.x % 32 == 0) {
    args.out[warp] = static_cast<uint8_t>(Rule::RowExponent(largest));
  }
}

}  // namespace

void ComputeRowExponents(const RowExponentArgs& args, void* stream) {
  const int64_t rows = args.shape.experts * args.matrix.rows;
  if (rows == 0) {
    return;
  }
  const auto blocks = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  const auto kernel = args.shape.format == WeightFormat::kNvFp4 ? RowExponentsKernel<NvFp4>
                                                                : RowExponentsKernel<MxFp4>;
  kernel<<<blocks, 32 * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(args, args.shape.experts);
  HOPYARD_CUDA(cudaGetLastError());
}

}  // namespace hopyard::gemm::sm90
