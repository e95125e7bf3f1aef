// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/rows.h"

#include "gemm/sm90/operands.h"

namespace hopyard::gemm::sm90 {

int NumKernels() {
  return static_cast<int>(std::size(kKernelRows));
}

KernelInfo KernelAt(int index) {
  const KernelRow& row = kKernelRows[static_cast<size_t>(index)];
  KernelInfo info;
  info.name = row.name;
  info.x_dtype = IsFp8Math(row.config.family) ? DType::kE4m3 : DType::kBf16;
  info.x_order = OrderOf(row.config.family);
  info.promoted = row.config.promoted;
  info.tokens = row.config.tokens;
  info.features = FeaturesPerBlock(row.config);
  info.gated = row.config.gated;
  info.mn_major = row.config.mn_major;
  info.interleaved = row.config.interleaved;
  info.cluster = row.config.cluster;
  info.packed = row.config.packed;
  info.rounds = RoundsRows(row.config);
  return info;
}

int MnMajorTwin(int index, bool interleaved) {
  if (KernelAt(index).mn_major) {
    return -1;
  }
  for (int i = 0; i < NumKernels(); ++i) {
    if (IsMnMajorTwin(kKernelRows[static_cast<size_t>(index)].config,
                      kKernelRows[static_cast<size_t>(i)].config, interleaved)) {
      return i;
    }
  }
  return -1;
}

// Asked for at every launch: looked up at compile time.
constexpr auto kPackedTwins = [] {
  std::array<int, kKernelRows.size()> twins{};
  for (size_t i = 0; i < kKernelRows.size(); ++i) {
    twins[i] = -1;
    for (size_t other = kKernelRows.size(); other-- > 0;) {
      if (IsPackedTwin(kKernelRows[i].config, kKernelRows[other].config)) {
        twins[i] = static_cast<int>(other);  // the first in the end
      }
    }
  }
  return twins;
}();

int PackedTwin(int index) {
  return kPackedTwins[static_cast<size_t>(index)];
}

bool Runs(int index, WeightFormat weights, const RowFormat& x, bool gated) {
  const GemmConfig& config = kKernelRows[static_cast<size_t>(index)].config;
  const KernelInfo info = KernelAt(index);
  // NVFP4 has rows of both kinds; elsewhere a promoting row runs what need not be promoted.
  const bool promotion = config.family == Family::kNvFp4AsBf16
                             ? info.promoted == IsPromoted(weights, x)
                             : info.promoted || !IsPromoted(weights, x);
  return ReadsWeights(config.family, weights) && info.x_dtype == x.dtype &&
         info.x_order == x.order && info.gated == gated && promotion;
}

}  // namespace hopyard::gemm::sm90
