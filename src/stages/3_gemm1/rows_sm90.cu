// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "stages/3_gemm1/rows_sm90.cuh"

namespace hopyard::gemm1 {
namespace {

// Enough blocks to fill 132 SMs sixteen deep; more rows are taken in strides.
constexpr int64_t kMaxBlocks = 132 * 16;

bool IsAligned(const void* pointer, int64_t pitch_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uint64_t>(bytes) == 0 &&
         pitch_bytes % bytes == 0;
}

// Bytes of 8 columns as they are read.
int64_t BytesIn(const RoundRowsArgs& args) {
  if (args.in_dtype == DType::kBf16) {
    return 16;
  }
  return args.to.format == Format::kNvFp4 ? 4 : 8;
}

template <Format kFormat, DType kOut>
void LaunchTiles(const RoundRowsLaunch& launch, const device::Queue& queue) {
  constexpr int kWarps = kTileThreads / sm90::kWarpSize;
  const int64_t tiles = launch.args.max_rows * CeilDiv(launch.args.out_pitch, kTileCols);
  const auto blocks = static_cast<unsigned>(std::min(kMaxBlocks, CeilDiv(tiles, kWarps)));
  device::Launch(queue, {blocks, kTileThreads}, RoundTilesKernel<kFormat, kOut>, launch);
}

template <Format kFormat, DType kOut>
void LaunchWholeRows(const RoundRowsLaunch& launch, const device::Queue& queue) {
  // Few rows want a thread for every 8 columns, many rows several blocks on an SM.
  const int64_t wanted = sm90::kWarpSize * CeilDiv(launch.args.out_pitch, kTileCols);
  const int64_t most = launch.args.max_rows <= 2 * 132 ? kMaxRowThreads : 256;
  const auto threads = static_cast<unsigned>(std::min(wanted, most));
  const auto blocks = static_cast<unsigned>(std::min(kMaxBlocks, launch.args.max_rows));
  device::Launch(queue, {blocks, threads}, RoundWholeRowsKernel<kFormat, kOut>, launch);
}

template <DType kOut>
void LaunchFp8(const RoundRowsLaunch& launch, const device::Queue& queue) {
  switch (launch.args.to.format) {
    case Format::kFp8PerTensor:
      return LaunchTiles<Format::kFp8PerTensor, kOut>(launch, queue);
    case Format::kFp8Block1x128:
      return LaunchTiles<Format::kFp8Block1x128, kOut>(launch, queue);
    case Format::kFp8PerRow:
      return LaunchWholeRows<Format::kFp8PerRow, kOut>(launch, queue);
    default:
      HOPYARD_INTERNAL(false) << ToString(launch.args.to.format) << " is no FP8 row format";
  }
}

void LaunchBf16(const RoundRowsLaunch& launch, const device::Queue& queue) {
  switch (launch.args.to.format) {
    case Format::kBf16:
      return LaunchTiles<Format::kBf16, DType::kBf16>(launch, queue);
    case Format::kMxFp8:
      return LaunchTiles<Format::kMxFp8, DType::kBf16>(launch, queue);
    case Format::kNvFp4:
      if (launch.args.row_global) {
        return LaunchWholeRows<Format::kNvFp4, DType::kBf16>(launch, queue);
      }
      return LaunchTiles<Format::kNvFp4, DType::kBf16>(launch, queue);
    default:
      return LaunchFp8<DType::kBf16>(launch, queue);
  }
}

}  // namespace

void RoundRowsSm90(const RoundRowsArgs& args, const device::Queue& queue) {
  if (args.max_rows == 0 || args.out_pitch == 0) {
    return;
  }
  const int64_t out_bytes = SizeOf(args.to.dtype);
  const bool natural = args.to.order == KOrder::kNatural;
  RoundRowsLaunch launch{args};
  launch.wide_in = IsAligned(args.in, args.in_pitch * SizeOf(args.in_dtype), BytesIn(args));
  launch.wide_out = IsAligned(args.out, args.out_pitch * out_bytes, kLaneCols * out_bytes);
  HOPYARD_INTERNAL(args.cols <= args.out_pitch)
      << args.cols << " columns, pitch " << args.out_pitch;
  HOPYARD_INTERNAL(natural || (launch.wide_out && args.out_pitch % gemm::sm90::kKGroup == 0))
      << "rows in a GEMM's order want 16-byte alignment and whole groups of 128";
  HOPYARD_INTERNAL(args.in_dtype == DType::kBf16 || args.to.format != Format::kBf16)
      << "BF16 rows have no codes";
  HOPYARD_INTERNAL(!args.from_mxfp8 ||
                   (args.in_dtype == DType::kE4m3 && args.to.format == Format::kFp8Block1x128 &&
                    args.to.dtype == DType::kE4m3))
      << "MXFP8 codes are rounded anew to e4m3 codes in blocks of 128 only";
  HOPYARD_INTERNAL(args.segment_offsets == nullptr
                       ? args.static_scale_stride == 0
                       : args.num_rows == nullptr && args.segment_begin < args.segment_end)
      << "scales per segment want segments, which say themselves how many rows there are";
  if (args.to.dtype == DType::kE4m3) {
    LaunchFp8<DType::kE4m3>(launch, queue);
  } else {
    LaunchBf16(launch, queue);
  }
}

}  // namespace hopyard::gemm1
