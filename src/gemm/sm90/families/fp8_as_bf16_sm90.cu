// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/launch.cuh"

namespace hopyard::gemm::sm90 {

LaunchRow LaunchOfFp8AsBf16(int index) {
  return FindLaunch<Family::kFp8AsBf16, 0>(index);
}

}  // namespace hopyard::gemm::sm90
