// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <vector>

#include "hopyard/weights.h"

#include "gemm/weight_layout.h"

namespace hopyard {

namespace sm90 {
struct DeviceWeights;
}  // namespace sm90

// Local experts first, then the shared ones: the index is the segment of the permutation.
struct Weights::Impl {
  MoeSpec spec;
  WeightsDesc desc;
  Device device;
  std::vector<gemm::ExpertRef> experts;
  float* gemm1_input_scale = nullptr;
  std::shared_ptr<const sm90::DeviceWeights> sm90;  // of weights on a GPU
};

}  // namespace hopyard
