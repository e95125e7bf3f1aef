// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/launch.cuh"

namespace hopyard::gemm::sm90 {

LaunchRow LaunchOfMxInt4AsBf16(int index) {
  return FindLaunch<Family::kMxInt4AsBf16, 0>(index);
}

}  // namespace hopyard::gemm::sm90
