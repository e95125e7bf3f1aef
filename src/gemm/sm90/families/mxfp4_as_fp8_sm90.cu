// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/launch.cuh"

namespace hopyard::gemm::sm90 {

LaunchRow LaunchOfMxFp4AsFp8(int index) {
  return FindLaunch<Family::kMxFp4AsFp8, 0>(index);
}

}  // namespace hopyard::gemm::sm90
