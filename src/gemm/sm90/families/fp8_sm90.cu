// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/launch.cuh"

namespace hopyard::gemm::sm90 {

LaunchRow LaunchOfFp8(int index) {
  return FindLaunch<Family::kFp8, 0>(index);
}

}  // namespace hopyard::gemm::sm90
