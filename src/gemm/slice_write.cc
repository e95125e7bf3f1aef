// SPDX-License-Identifier: Apache-2.0
#include "gemm/slice_write.h"

#include <cstring>

namespace hopyard::gemm {

void WriteSliceCpu(const SliceWrite& write) {
  for (int64_t r = 0; r < write.rows; ++r) {
    for (int64_t c = 0; c < write.cols; ++c) {
      std::memcpy(Destination(write, r, c),
                  write.source + r * write.row_stride + c * write.col_stride,
                  static_cast<size_t>(write.size));
    }
  }
}

void PackCpu(const PackArgs& args) {
  for (int64_t row = 0; row < args.from.rows; ++row) {
    for (int64_t group = 0; group < args.to.groups; ++group) {
      PackRow(args, row, group);
    }
  }
}

}  // namespace hopyard::gemm
