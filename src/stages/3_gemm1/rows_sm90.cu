// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "device/launch.cuh"
#include "device/sm90/dependent.cuh"
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

template <size_t kCase>
__global__ void __launch_bounds__(kRowCases[kCase].whole_rows ? kMaxRowThreads : kTileThreads,
                                  kRowCases[kCase].whole_rows ? 1 : 0)
    RoundRowsKernel(const __grid_constant__ RoundRowsLaunch launch) {
  sm90::TakeTurn();
  RoundCaseByBlock<kCase>(launch, blockIdx.x, gridDim.x);
}

template <size_t kCase>
void LaunchCase(const RoundRowsLaunch& launch, const device::Queue& queue) {
  const RoundRowsArgs& args = launch.args;
  const int64_t tiles = CeilDiv(args.out_pitch, kTileCols);
  int64_t blocks = CeilDiv(args.max_rows * tiles, kTileThreads / sm90::kWarpSize);
  int64_t threads = kTileThreads;
  if (kRowCases[kCase].whole_rows) {
    // Few rows want a thread for every 8 columns, many rows several blocks on an SM.
    threads =
        std::min<int64_t>(sm90::kWarpSize * tiles, args.max_rows <= 2 * 132 ? kMaxRowThreads : 256);
    blocks = args.max_rows;
  }
  device::Launch(
      queue, {static_cast<unsigned>(std::min(kMaxBlocks, blocks)), static_cast<unsigned>(threads)},
      RoundRowsKernel<kCase>, launch);
}

template <size_t... kCases>
void LaunchAny(const RoundRowsLaunch& launch, const device::Queue& queue,
               std::index_sequence<kCases...> /*all*/) {
  ((launch.row_case == static_cast<int>(kCases) ? LaunchCase<kCases>(launch, queue) : void()), ...);
}

int RowCaseOf(const RoundRowsArgs& args) {
  const DType out = args.to.dtype == DType::kE4m3 ? DType::kE4m3 : DType::kBf16;
  const bool whole_rows =
      args.to.format == Format::kFp8PerRow || (args.to.format == Format::kNvFp4 && args.row_global);
  for (size_t i = 0; i < kNumRowCases; ++i) {
    const RowCase& c = kRowCases[i];
    if (c.format == args.to.format && c.out == out && c.whole_rows == whole_rows) {
      return static_cast<int>(i);
    }
  }
  HOPYARD_INTERNAL(false) << ToString(args.to.format) << " as " << ToString(out)
                          << " is no row format";
  return 0;
}

}  // namespace

RoundRowsLaunch PrepareRoundRows(const RoundRowsArgs& args) {
  const int64_t out_bytes = SizeOf(args.to.dtype);
  const bool natural = args.to.order == KOrder::kNatural;
  RoundRowsLaunch launch{args};
  launch.row_case = RowCaseOf(args);
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
  return launch;
}

void RoundRowsSm90(const RoundRowsArgs& args, const device::Queue& queue) {
  if (args.max_rows > 0 && args.out_pitch > 0) {
    LaunchAny(PrepareRoundRows(args), queue, std::make_index_sequence<kNumRowCases>());
  }
}

}  // namespace hopyard::gemm1
