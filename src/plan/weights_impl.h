// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "hopyard/weights.h"

#include "gemm/cpu/weight_rows.h"

namespace hopyard {

// Local experts first, then the shared ones: the index is the segment of the permutation.
struct Weights::Impl {
  MoeSpec spec;
  WeightsDesc desc;
  std::vector<gemm::cpu::ExpertRef> experts;
  float* gemm1_input_scale = nullptr;
};

}  // namespace hopyard
