// SPDX-License-Identifier: Apache-2.0
// The pass that rounds rows; gemm/sm90/round_columns.cuh says how.
#pragma once

#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "formats/codes.h"
#include "formats/scale_rules.h"
#include "gemm/sm90/round_columns.cuh"
#include "stages/3_gemm1/rows_sm90.h"

namespace hopyard::gemm1 {

using gemm::sm90::kLaneCols;
using gemm::sm90::KOrder;
using gemm::sm90::LaneMaxAbsBits;
using gemm::sm90::LaneWords;
using gemm::sm90::RowScale;

inline constexpr int kTileCols = kLaneCols * sm90::kWarpSize;
inline constexpr int kTileThreads = 128;
inline constexpr int kMaxRowThreads = 1024;

struct RoundRowsLaunch {
  RoundRowsArgs args;
  int row_case = 0;       // of kRowCases
  bool wide_in = false;   // 8 columns of `in` are one aligned access
  bool wide_out = false;  // 8 columns of `out` in natural order too
};

// What a kernel is compiled for.
struct RowCase {
  Format format;
  DType out;
  bool whole_rows;  // a block per row: the scale needs the maximum of a row
};
inline constexpr RowCase kRowCases[] = {
    {Format::kBf16, DType::kBf16, false},          {Format::kMxFp8, DType::kBf16, false},
    {Format::kNvFp4, DType::kBf16, false},         {Format::kNvFp4, DType::kBf16, true},
    {Format::kFp8PerTensor, DType::kBf16, false},  {Format::kFp8PerTensor, DType::kE4m3, false},
    {Format::kFp8Block1x128, DType::kBf16, false}, {Format::kFp8Block1x128, DType::kE4m3, false},
    {Format::kFp8PerRow, DType::kBf16, true},      {Format::kFp8PerRow, DType::kE4m3, true}};
inline constexpr size_t kNumRowCases = std::size(kRowCases);

// Checks a call and looks at its alignment; for host code that enqueues.
[[nodiscard]] RoundRowsLaunch PrepareRoundRows(const RoundRowsArgs& args);

// This lane's place.
struct Place {
  int64_t row;
  int64_t k;  // first column
};

// ---- reading

// 8 elements of kBits bits each; those at and beyond cols are zero.
template <int kBits>
__device__ inline LaneWords LoadColumns(const RoundRowsLaunch& launch, const Place& at) {
  const RoundRowsArgs& args = launch.args;
  LaneWords words;
  if (at.k >= args.cols) {
    return words;
  }
  const int64_t pitch = kBits == 16 ? 2 * args.in_pitch : args.in_pitch;
  const auto* bytes = static_cast<const uint8_t*>(args.in) + at.row * pitch + at.k * kBits / 8;
  if (launch.wide_in && at.k + kLaneCols <= args.cols) {
    if constexpr (kBits == 16) {
      const uint4 v = *static_cast<const uint4*>(static_cast<const void*>(bytes));
      words.w[0] = v.x;
      words.w[1] = v.y;
      words.w[2] = v.z;
      words.w[3] = v.w;
    } else if constexpr (kBits == 8) {
      const uint2 v = *static_cast<const uint2*>(static_cast<const void*>(bytes));
      words.w[0] = v.x;
      words.w[1] = v.y;
    } else {
      words.w[0] = *static_cast<const uint32_t*>(static_cast<const void*>(bytes));
    }
    return words;
  }
  // Element by element, packed ones a byte at a time.
  using Piece = std::conditional_t<kBits == 16, uint16_t, uint8_t>;
  constexpr int kPieceBits = 8 * static_cast<int>(sizeof(Piece));
  const auto* pieces = static_cast<const Piece*>(static_cast<const void*>(bytes));
  const int64_t left = (args.cols - at.k) * kBits / kPieceBits;
#pragma unroll
  for (int i = 0; i < kLaneCols * kBits / kPieceBits; ++i) {
    const uint32_t piece = i < left ? pieces[i] : Piece{0};
    words.w[i * kPieceBits / 32] |= piece << (i * kPieceBits % 32);
  }
  return words;
}

// The same from codes that the caller stores.
template <Format kFormat>
__device__ __forceinline__ LaneWords TakeCodes(const RoundRowsLaunch& launch, const Place& at,
                                               float& scale) {
  const RoundRowsArgs& args = launch.args;
  if (at.k < args.cols) {
    if constexpr (kFormat == Format::kFp8Block1x128) {
      if (at.k % formats::kFp8Block == 0) {
        const int64_t blocks = (args.cols + formats::kFp8Block - 1) / formats::kFp8Block;
        const int64_t index = at.row * blocks + at.k / formats::kFp8Block;
        args.out_block_scales[index] = static_cast<const float*>(args.in_scales)[index];
      }
    } else if constexpr (kFormat == Format::kMxFp8) {
      const int64_t blocks = (args.cols + formats::kMxBlock - 1) / formats::kMxBlock;
      const auto* scales = static_cast<const uint8_t*>(args.in_scales);
      scale = formats::DecodeE8m0(scales[at.row * blocks + at.k / formats::kMxBlock]);
    } else if constexpr (kFormat == Format::kNvFp4) {
      const int64_t blocks = (args.cols + formats::kNvFp4Block - 1) / formats::kNvFp4Block;
      const auto* scales = static_cast<const uint8_t*>(args.in_scales);
      scale = formats::DecodeE4m3(scales[at.row * blocks + at.k / formats::kNvFp4Block]);
    }
  }
  return LoadColumns < kFormat == Format::kNvFp4 ? 4 : 8 > (launch, at);
}

// MXFP8 as BF16 values, zero beyond cols.
__device__ inline LaneWords LoadMxFp8Values(const RoundRowsLaunch& launch, const Place& at) {
  float scale = 1.0F;
  const LaneWords codes = TakeCodes<Format::kMxFp8>(launch, at, scale);
  LaneWords values = gemm::sm90::CodesToBf16<Format::kMxFp8>(codes, scale);
  gemm::sm90::ClearColumns<2>(launch.args.cols - at.k, values);
  return values;
}

// ---- codes to elements of the output

template <int kBytes>
__device__ inline void StoreNatural(const RoundRowsLaunch& launch, const Place& at,
                                    const LaneWords& v) {
  const int64_t pitch = launch.args.out_pitch;
  auto* out = static_cast<uint8_t*>(launch.args.out) + (at.row * pitch + at.k) * kBytes;
  if (launch.wide_out) {
    if (at.k < pitch) {
      if constexpr (kBytes == 2) {
        gemm::sm90::StoreWords(out, make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
      } else {
        gemm::sm90::StoreWords(out, make_uint2(v.w[0], v.w[1]));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneCols * kBytes; i += kBytes) {
    const uint32_t element = v.w[i / 4] >> (8 * (i % 4));
    if (at.k + i / kBytes < pitch) {
      if constexpr (kBytes == 2) {
        gemm::sm90::StoreWords(out + i, static_cast<uint16_t>(element));
      } else {
        out[i] = static_cast<uint8_t>(element);
      }
    }
  }
}

template <int kBytes>
__device__ __forceinline__ void Store(const RoundRowsLaunch& launch, const Place& at,
                                      const LaneWords& v) {
  const RoundRowsArgs& args = launch.args;
  if (args.to.order == KOrder::kNatural) {
    StoreNatural<kBytes>(launch, at, v);
    return;
  }
  const int64_t group = at.row * args.out_pitch + at.k / gemm::sm90::kKGroup * gemm::sm90::kKGroup;
  auto* const bytes = static_cast<uint8_t*>(args.out) + group * kBytes;
  const bool live = at.k < args.out_pitch;
  if constexpr (kBytes == 2) {
    gemm::sm90::StoreBf16Group(bytes, args.to.order, v, live);
  } else {
    gemm::sm90::StoreE4m3Group(bytes, args.to.order, v, live);
  }
}

// ---- rounding

// The 8 columns of this lane; all lanes of a warp call, with the same row.
template <Format kFormat, DType kOut>
__device__ __forceinline__ void RoundPlace(const RoundRowsLaunch& launch, const Place& at,
                                           const RowScale& row) {
  const RoundRowsArgs& args = launch.args;
  float scale = 1.0F;
  LaneWords words;
  constexpr bool kMayBeMxFp8 = kFormat == Format::kFp8Block1x128 && kOut == DType::kE4m3;
  const bool anew = kMayBeMxFp8 && args.from_mxfp8;
  if (kFormat == Format::kBf16 || args.in_dtype == DType::kBf16 || anew) {
    float divisor = 1.0F;
    words = anew ? LoadMxFp8Values(launch, at) : LoadColumns<16>(launch, at);
    words = gemm::sm90::RoundColumns<kFormat>(words, row, scale, divisor);
    if constexpr (kFormat == Format::kFp8Block1x128) {
      if (at.k < args.cols && at.k % formats::kFp8Block == 0) {
        const int64_t blocks = (args.cols + formats::kFp8Block - 1) / formats::kFp8Block;
        args.out_block_scales[at.row * blocks + at.k / formats::kFp8Block] = divisor;
      }
    }
  } else {
    words = TakeCodes<kFormat>(launch, at, scale);
  }
  if constexpr (kFormat != Format::kBf16 && kOut == DType::kBf16) {
    words = gemm::sm90::CodesToBf16<kFormat>(words, scale);
  }
  constexpr int kBytes = kOut == DType::kBf16 ? 2 : 1;
  gemm::sm90::ClearColumns<kBytes>(args.cols - at.k, words);
  Store<kBytes>(launch, at, words);
}

// Rows of this call, half-open.
struct RowRange {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ RowRange LiveRows(const RoundRowsArgs& args) {
  if (args.segment_offsets == nullptr) {
    return {0, sm90::LiveTokens(args.num_rows, args.max_rows)};
  }
  return {args.segment_offsets[args.segment_begin],
          sm90::LiveTokens(args.segment_offsets + args.segment_end, args.max_rows)};
}

// The segment that owns a row of LiveRows.
struct Segment {
  int32_t index;
  int32_t row_end;
};

__device__ inline Segment FindSegment(const RoundRowsArgs& args, int64_t row) {
  // offsets[low] <= row < offsets[high]: of empty segments that begin at the row, none is taken.
  int32_t low = args.segment_begin;
  int32_t high = args.segment_end;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const bool above = args.segment_offsets[middle] > row;
    high = above ? middle : high;
    low = above ? low : middle;
  }
  return {low, args.segment_offsets[low + 1]};
}

// `index` counts static scales.
template <Format kFormat>
__device__ __forceinline__ RowScale StaticScale(const RoundRowsArgs& args, int32_t index) {
  const bool has = kFormat == Format::kFp8PerTensor || kFormat == Format::kNvFp4;
  return has && args.in_dtype == DType::kBf16
             ? gemm::sm90::StaticRowScale<kFormat>(args.static_scale[index])
             : RowScale{};
}

// The warps that share a call's tiles, and which of them this one is.
struct WarpShare {
  uint32_t first;
  uint32_t step;
};

// A warp per tile of 256 columns, for scales that need no more than a tile.
template <Format kFormat, DType kOut>
__device__ __forceinline__ void RoundTiles(const RoundRowsLaunch& launch, const WarpShare& share) {
  const RoundRowsArgs& args = launch.args;
  const RowRange rows = LiveRows(args);
  const auto tiles = static_cast<uint32_t>((args.out_pitch + kTileCols - 1) / kTileCols);
  constexpr bool kHasStatic = kFormat == Format::kFp8PerTensor || kFormat == Format::kNvFp4;
  const bool per_segment = kHasStatic && args.static_scale_stride != 0;
  // A warp's rows ascend, so that it looks for a segment only where it leaves one.
  Segment segment{0, per_segment ? 0 : INT32_MAX};
  RowScale scale = StaticScale<kFormat>(args, 0);
  // Row and tile advance without a division in the loop.
  int64_t row = rows.begin + share.first / tiles;
  uint32_t tile = share.first % tiles;
  const uint32_t row_step = share.step / tiles;
  const uint32_t tile_step = share.step % tiles;
  while (row < rows.end) {
    if (row >= segment.row_end) {
      segment = FindSegment(args, row);
      scale = StaticScale<kFormat>(args, segment.index - args.segment_begin);
    }
    const int64_t k = int64_t{tile} * kTileCols + sm90::LaneId() * kLaneCols;
    RoundPlace<kFormat, kOut>(launch, {row, k}, scale);
    const bool wraps = tile + tile_step >= tiles;
    tile += wraps ? tile_step - tiles : tile_step;
    row += row_step + (wraps ? 1U : 0U);
  }
}

// Largest magnitude of a row, for every thread of the block.
__device__ inline uint32_t RowMaxAbsBits(const RoundRowsLaunch& launch, int64_t row) {
  __shared__ uint32_t of_warp[kMaxRowThreads / sm90::kWarpSize];
  uint32_t largest = 0;
  for (int64_t k = int64_t{threadIdx.x} * kLaneCols; k < launch.args.cols;
       k += int64_t{blockDim.x} * kLaneCols) {
    largest = max(largest, LaneMaxAbsBits(LoadColumns<16>(launch, {row, k})));
  }
  largest = __reduce_max_sync(sm90::kAllLanes, largest);
  const int warp = static_cast<int>(threadIdx.x) / sm90::kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / sm90::kWarpSize;
  __syncthreads();  // the last row's values have been read
  if (sm90::LaneId() == 0) {
    of_warp[warp] = largest;
  }
  __syncthreads();
  const int lane = sm90::LaneId();
  return __reduce_max_sync(sm90::kAllLanes, lane < warps ? of_warp[lane] : 0U);
}

// The row's scale, from its values or from the caller, also written out.
template <Format kFormat>
__device__ __forceinline__ RowScale TakeRowScale(const RoundRowsLaunch& launch, int64_t row) {
  const RoundRowsArgs& args = launch.args;
  RowScale scale;
  float written = 1.0F;
  if (args.in_dtype == DType::kBf16) {
    const uint32_t largest = RowMaxAbsBits(launch, row);
    if constexpr (kFormat == Format::kNvFp4) {
      scale.g = formats::rules::NvFp4Multiplier(largest);
      written = scale.g == scale.g ? __fdiv_rn(1.0F, scale.g) : scale.g;
    } else {
      scale.divisor = formats::rules::Fp8BlockDivisor(largest);
      written = scale.divisor;
    }
  } else if constexpr (kFormat == Format::kNvFp4) {
    written = args.in_row_scales[row];
  } else {
    written = static_cast<const float*>(args.in_scales)[row];
  }
  if (threadIdx.x == 0) {
    args.out_row_scales[row] = written;
  }
  return scale;
}

// A block per row, for scales that need the maximum of a row: it is read twice, the second time
// from a cache. This one has every `step`-th row from the `first` on.
template <Format kFormat, DType kOut>
__device__ __forceinline__ void RoundWholeRows(const RoundRowsLaunch& launch, int64_t first,
                                               int64_t step) {
  const RoundRowsArgs& args = launch.args;
  const RowRange rows = LiveRows(args);
  for (int64_t row = rows.begin + first; row < rows.end; row += step) {
    const RowScale scale = TakeRowScale<kFormat>(launch, row);
    const int64_t warp_begin = threadIdx.x / sm90::kWarpSize * kTileCols;
    for (int64_t k = warp_begin; k < args.out_pitch; k += int64_t{blockDim.x} * kLaneCols) {
      RoundPlace<kFormat, kOut>(launch, {row, k + sm90::LaneId() * kLaneCols}, scale);
    }
  }
}

// The share of block `block` of `blocks`, of any number of whole warps.
template <size_t kCase>
__device__ __forceinline__ void RoundCaseByBlock(const RoundRowsLaunch& launch, unsigned block,
                                                 unsigned blocks) {
  constexpr RowCase kOf = kRowCases[kCase];
  if constexpr (kOf.whole_rows) {
    RoundWholeRows<kOf.format, kOf.out>(launch, block, blocks);
  } else {
    const uint32_t warps = blockDim.x / sm90::kWarpSize;
    RoundTiles<kOf.format, kOf.out>(
        launch, {block * warps + threadIdx.x / sm90::kWarpSize, blocks * warps});
  }
}

// The same for a case that is known at run time.
template <size_t... kCases>
__device__ __forceinline__ void RoundAnyByBlock(const RoundRowsLaunch& launch, unsigned block,
                                                unsigned blocks,
                                                std::index_sequence<kCases...> /*all*/) {
  ((launch.row_case == static_cast<int>(kCases) ? RoundCaseByBlock<kCases>(launch, block, blocks)
                                                : void()),
   ...);
}
__device__ __forceinline__ void RoundByBlock(const RoundRowsLaunch& launch, unsigned block,
                                             unsigned blocks) {
  RoundAnyByBlock(launch, block, blocks, std::make_index_sequence<kNumRowCases>());
}

}  // namespace hopyard::gemm1
