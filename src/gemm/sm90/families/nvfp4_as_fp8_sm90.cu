// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/launch.cuh"

namespace hopyard::gemm::sm90 {

LaunchRow LaunchOfNvFp4AsFp8(int index) {
  return FindLaunch<Family::kNvFp4AsFp8, 0>(index);
}

}  // namespace hopyard::gemm::sm90
