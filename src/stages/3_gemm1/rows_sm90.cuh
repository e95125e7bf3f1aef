// SPDX-License-Identifier: Apache-2.0
// A lane takes 8 consecutive columns, so that a warp covers 256, half a warp a group of 128, 4
// lanes a block of 32 and 2 lanes a block of 16. Values become codes of the format (two words of
// e4m3, one of nibbles), codes become the elements of the output, and lanes of a group exchange
// words where the order along K scatters a lane's columns.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/sm90/numbers.cuh"
#include "device/sm90/warp.cuh"
#include "formats/codes.h"
#include "formats/scale_rules.h"
#include "stages/3_gemm1/rows_sm90.h"

namespace hopyard::gemm1 {

using gemm::sm90::KOrder;

inline constexpr int kLaneCols = 8;
inline constexpr int kTileCols = kLaneCols * sm90::kWarpSize;
inline constexpr int kTileThreads = 128;
inline constexpr int kMaxRowThreads = 1024;

struct RoundRowsLaunch {
  RoundRowsArgs args;
  bool wide_in = false;   // 8 columns of `in` are one aligned access
  bool wide_out = false;  // 8 columns of `out` in natural order too
};

// 8 columns: BF16 pairs, or e4m3 codes in the first two words, or nibbles in the first.
struct LaneWords {
  uint32_t w[4] = {};
};

// This lane's place.
struct Place {
  int64_t row;
  int64_t k;  // first column
};

// x / divisor for many x of 8 significant bits. The reciprocal is rounded once; one step with the
// remainder then gives the rounded quotient, or its neighbour where the true one lies within 2^-22
// last places of their midpoint, and there no e4m3 code changes (tried on the host: every BF16 x
// with every block scale, and with random divisors). Divisors near the ends of the exponent range
// take the division.
struct Divider {
  float divisor = 1.0F;
  float reciprocal = 1.0F;
  bool stepwise = false;

  __device__ __forceinline__ static Divider Of(float divisor) {
    return {divisor, __frcp_rn(divisor), divisor >= 0x1p-90F && divisor <= 0x1p100F};
  }
  // Precondition: stepwise.
  __device__ __forceinline__ float Step(float x) const {
    const float quotient = __fmul_rn(x, reciprocal);
    // Signed so that a zero quotient keeps its sign.
    const float excess = __fmaf_rn(divisor, quotient, -x);
    const float better = __fmaf_rn(-reciprocal, excess, quotient);
    // Infinity and NaN have no remainder.
    return fabsf(quotient) < 0x1p20F ? better : quotient;
  }
};

// What all blocks of a row share.
struct RowScale {
  float g = 1.0F;        // kNvFp4
  float divisor = 1.0F;  // kFp8PerTensor, kFp8PerRow
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

__device__ __forceinline__ float ValueAt(const LaneWords& values, int i) {
  const uint32_t word = values.w[i / 2];
  return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xFFFF0000U);
}

// Largest magnitude of this lane's values as FP32 bits: BF16 patterns order like the numbers.
__device__ __forceinline__ uint32_t LaneMaxAbsBits(const LaneWords& values) {
  constexpr uint32_t kMagnitudes = 0x7FFF7FFFU;
  const uint32_t pair = __vmaxu2(__vmaxu2(values.w[0] & kMagnitudes, values.w[1] & kMagnitudes),
                                 __vmaxu2(values.w[2] & kMagnitudes, values.w[3] & kMagnitudes));
  return max(pair & 0xFFFF0000U, pair << 16);
}

// Largest over groups of kLanes lanes; every lane takes part.
template <int kLanes>
__device__ __forceinline__ uint32_t GroupMax(uint32_t value) {
#pragma unroll
  for (int width = 1; width < kLanes; width *= 2) {
    value = max(value, __shfl_xor_sync(sm90::kAllLanes, value, width));
  }
  return value;
}

// ---- values to codes

// e4m3 codes of scaled(value).
template <class Scaled>
__device__ __forceinline__ LaneWords EncodeColumns(const LaneWords& values, Scaled scaled) {
  LaneWords codes;
#pragma unroll
  for (int i = 0; i < kLaneCols; i += 2) {
    const uint32_t pair =
        sm90::EncodeE4m3Pair(scaled(ValueAt(values, i)), scaled(ValueAt(values, i + 1)));
    codes.w[i / 4] |= pair << (8 * (i % 4));
  }
  return codes;
}

__device__ __forceinline__ LaneWords DivideToCodes(const LaneWords& values,
                                                   const Divider& divider) {
  if (divider.stepwise) {
    return EncodeColumns(values, [&](float x) { return divider.Step(x); });
  }
  return EncodeColumns(values, [&](float x) { return __fdiv_rn(x, divider.divisor); });
}

__device__ __forceinline__ LaneWords MultiplyToNibbles(const LaneWords& values, float factor) {
  LaneWords codes;
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    const uint32_t code = formats::EncodeE2m1(__fmul_rn(ValueAt(values, i), factor));
    codes.w[0] |= code << (4 * i);
  }
  return codes;
}

// Codes of the lane's values and, in `scale`, what its block's values are multiplied with in the
// output.
template <Format kFormat>
__device__ __forceinline__ LaneWords RoundColumns(const RoundRowsArgs& args, const Place& at,
                                                  const LaneWords& values, const RowScale& row,
                                                  float& scale) {
  const uint32_t lane_max = LaneMaxAbsBits(values);
  formats::BlockScale block;
  LaneWords codes;
  if constexpr (kFormat == Format::kFp8PerTensor) {
    codes = DivideToCodes(values, Divider::Of(row.divisor));
  } else if constexpr (kFormat == Format::kFp8PerRow || kFormat == Format::kFp8Block1x128) {
    float divisor = row.divisor;
    if constexpr (kFormat == Format::kFp8Block1x128) {
      divisor = formats::rules::Fp8BlockDivisor(GroupMax<16>(lane_max));
      if (at.k < args.cols && at.k % formats::kFp8Block == 0) {
        const int64_t blocks = (args.cols + formats::kFp8Block - 1) / formats::kFp8Block;
        args.out_block_scales[at.row * blocks + at.k / formats::kFp8Block] = divisor;
      }
    }
    if (divisor == divisor) {
      codes = DivideToCodes(values, Divider::Of(divisor));
    }
  } else if constexpr (kFormat == Format::kMxFp8) {
    block = formats::rules::MxBlockScale(GroupMax<4>(lane_max), formats::kE4m3Max);
    if (block.factor != 0.0F) {
      codes = EncodeColumns(values, [&](float x) { return __fmul_rn(x, block.factor); });
    }
    scale = block.value;
  } else if constexpr (kFormat == Format::kNvFp4) {
    block = formats::rules::NvFp4BlockScale(GroupMax<2>(lane_max), row.g);
    if (block.factor != 0.0F) {
      codes = MultiplyToNibbles(values, block.factor);
    }
    scale = block.value;
  } else {
    codes = values;
  }
  return codes;
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

// ---- codes to elements of the output

template <Format kFormat>
__device__ __forceinline__ LaneWords CodesToBf16(const LaneWords& codes, float scale) {
  LaneWords values;
#pragma unroll
  for (int i = 0; i < kLaneCols; i += 2) {
    float2 pair;
    if constexpr (kFormat == Format::kNvFp4) {
      const uint32_t nibbles = codes.w[0] >> (4 * i);
      pair.x = formats::DecodeE2m1(static_cast<uint8_t>(nibbles & 0xFU));
      pair.y = formats::DecodeE2m1(static_cast<uint8_t>((nibbles >> 4) & 0xFU));
    } else {
      pair = sm90::DecodeE4m3Pair(codes.w[i / 4] >> (8 * (i % 4)));
    }
    if constexpr (kFormat == Format::kNvFp4 || kFormat == Format::kMxFp8) {
      pair.x = __fmul_rn(pair.x, scale);
      pair.y = __fmul_rn(pair.y, scale);
    }
    values.w[i / 2] = sm90::NarrowBf16Pair(pair.x, pair.y);
  }
  return values;
}

// Zeroes the columns at and beyond cols: a block's NaN scale must not reach them.
template <int kBytes>
__device__ __forceinline__ void ClearTail(const RoundRowsArgs& args, const Place& at,
                                          LaneWords& words) {
  if (at.k + kLaneCols <= args.cols) {
    return;
  }
  constexpr int kPerWord = 4 / kBytes;
#pragma unroll
  for (int i = 0; i < kLaneCols; ++i) {
    const uint32_t element = (kBytes == 2 ? 0xFFFFU : 0xFFU) << (8 * kBytes * (i % kPerWord));
    words.w[i / kPerWord] &= at.k + i < args.cols ? ~0U : ~element;
  }
}

// ---- writing

template <class T>
__device__ __forceinline__ void StoreWords(uint8_t* to, const T& words) {
  *static_cast<T*>(static_cast<void*>(to)) = words;
}

// Lanes 4 apart hold the quarters q of a group: element t of lane q becomes element q of lane t.
__device__ __forceinline__ void TransposeQuarters(uint32_t (&u)[4]) {
  const int q = sm90::LaneId() / 4 % 4;
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (q & bit) != 0;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int low = bit == 1 ? 2 * pair : pair;
      const int high = low + bit;
      const uint32_t got = __shfl_xor_sync(sm90::kAllLanes, upper ? u[low] : u[high], 4 * bit);
      u[low] = upper ? got : u[low];
      u[high] = upper ? u[high] : got;
    }
  }
}

// `group` is the first byte of the row's group of 128; every lane of the warp calls, those with
// `live` write.
__device__ __forceinline__ void StoreBf16Group(uint8_t* group, KOrder order, const LaneWords& v,
                                               bool live) {
  const int q = sm90::LaneId() / 4 % 4;
  const int j = sm90::LaneId() % 4;
  if (order == KOrder::kBf16Decoded) {
    // Elements e and e + 4 side by side; the four quarters' pairs follow each other.
    uint32_t u[4] = {__byte_perm(v.w[0], v.w[2], 0x5410), __byte_perm(v.w[0], v.w[2], 0x7632),
                     __byte_perm(v.w[1], v.w[3], 0x5410), __byte_perm(v.w[1], v.w[3], 0x7632)};
    TransposeQuarters(u);
    if (live) {
      StoreWords(group + 64 * j + 16 * q, make_uint4(u[0], u[1], u[2], u[3]));
    }
  } else if (live) {
    StoreWords(group + 64 * j + 8 * q, make_uint2(v.w[0], v.w[1]));
    StoreWords(group + 64 * j + 32 + 8 * q, make_uint2(v.w[2], v.w[3]));
  }
}

__device__ __forceinline__ void StoreE4m3Group(uint8_t* group, KOrder order, const LaneWords& v,
                                               bool live) {
  const int q = sm90::LaneId() / 4 % 4;
  const int j = sm90::LaneId() % 4;
  if (order == KOrder::kFp8Decoded) {
    // Two quarters' words of the same half side by side: one 8-byte store a lane.
    const bool odd = q % 2 == 1;
    const uint32_t got = __shfl_xor_sync(sm90::kAllLanes, odd ? v.w[0] : v.w[1], 4);
    if (live) {
      StoreWords(group + 32 * j + (odd ? 16 : 0) + 8 * (q / 2),
                 odd ? make_uint2(got, v.w[1]) : make_uint2(v.w[0], got));
    }
  } else if (live) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t pair = __byte_perm(v.w[0], v.w[1], 0x0040 + 0x11 * e);
      StoreWords(group + 32 * j + 8 * e + 2 * q, static_cast<uint16_t>(pair));
    }
  }
}

template <int kBytes>
__device__ inline void StoreNatural(const RoundRowsLaunch& launch, const Place& at,
                                    const LaneWords& v) {
  const int64_t pitch = launch.args.out_pitch;
  auto* out = static_cast<uint8_t*>(launch.args.out) + (at.row * pitch + at.k) * kBytes;
  if (launch.wide_out) {
    if (at.k < pitch) {
      if constexpr (kBytes == 2) {
        StoreWords(out, make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
      } else {
        StoreWords(out, make_uint2(v.w[0], v.w[1]));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneCols * kBytes; i += kBytes) {
    const uint32_t element = v.w[i / 4] >> (8 * (i % 4));
    if (at.k + i / kBytes < pitch) {
      if constexpr (kBytes == 2) {
        StoreWords(out + i, static_cast<uint16_t>(element));
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
    StoreBf16Group(bytes, args.to.order, v, live);
  } else {
    StoreE4m3Group(bytes, args.to.order, v, live);
  }
}

// ---- kernels

// The 8 columns of this lane; all lanes of a warp call, with the same row.
template <Format kFormat, DType kOut>
__device__ __forceinline__ void RoundPlace(const RoundRowsLaunch& launch, const Place& at,
                                           const RowScale& row) {
  const RoundRowsArgs& args = launch.args;
  float scale = 1.0F;
  LaneWords words;
  if (kFormat == Format::kBf16 || args.in_dtype == DType::kBf16) {
    words = RoundColumns<kFormat>(args, at, LoadColumns<16>(launch, at), row, scale);
  } else {
    words = TakeCodes<kFormat>(launch, at, scale);
  }
  if constexpr (kFormat != Format::kBf16 && kOut == DType::kBf16) {
    words = CodesToBf16<kFormat>(words, scale);
  }
  constexpr int kBytes = kOut == DType::kBf16 ? 2 : 1;
  ClearTail<kBytes>(args, at, words);
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
  RowScale row;
  if (args.in_dtype != DType::kBf16) {
    return row;
  }
  if constexpr (kFormat == Format::kFp8PerTensor) {
    row.divisor = args.static_scale[index];
  } else if constexpr (kFormat == Format::kNvFp4) {
    // No positive multiplier, no numbers.
    const float scale = args.static_scale[index];
    row.g = scale > 0.0F ? formats::rules::NvFp4MultiplierOf(scale) : formats::rules::ScaleNan();
  }
  return row;
}

// A warp per tile of 256 columns, for scales that need no more than a tile.
template <Format kFormat, DType kOut>
__global__ void __launch_bounds__(kTileThreads)
    RoundTilesKernel(const __grid_constant__ RoundRowsLaunch launch) {
  const RoundRowsArgs& args = launch.args;
  const RowRange rows = LiveRows(args);
  const auto tiles = static_cast<uint32_t>((args.out_pitch + kTileCols - 1) / kTileCols);
  constexpr uint32_t kWarps = kTileThreads / sm90::kWarpSize;
  const uint32_t first = blockIdx.x * kWarps + threadIdx.x / sm90::kWarpSize;
  const uint32_t step = gridDim.x * kWarps;
  constexpr bool kHasStatic = kFormat == Format::kFp8PerTensor || kFormat == Format::kNvFp4;
  const bool per_segment = kHasStatic && args.static_scale_stride != 0;
  // A warp's rows ascend, so that it looks for a segment only where it leaves one.
  Segment segment{0, per_segment ? 0 : INT32_MAX};
  RowScale scale = StaticScale<kFormat>(args, 0);
  // Row and tile advance without a division in the loop.
  int64_t row = rows.begin + first / tiles;
  uint32_t tile = first % tiles;
  const uint32_t row_step = step / tiles;
  const uint32_t tile_step = step % tiles;
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
// from a cache.
template <Format kFormat, DType kOut>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    RoundWholeRowsKernel(const __grid_constant__ RoundRowsLaunch launch) {
  const RoundRowsArgs& args = launch.args;
  const RowRange rows = LiveRows(args);
  for (int64_t row = rows.begin + blockIdx.x; row < rows.end; row += gridDim.x) {
    const RowScale scale = TakeRowScale<kFormat>(launch, row);
    const int64_t warp_begin = threadIdx.x / sm90::kWarpSize * kTileCols;
    for (int64_t k = warp_begin; k < args.out_pitch; k += int64_t{blockDim.x} * kLaneCols) {
      RoundPlace<kFormat, kOut>(launch, {row, k + sm90::LaneId() * kLaneCols}, scale);
    }
  }
}

}  // namespace hopyard::gemm1
