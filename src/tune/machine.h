// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "hopyard/tune.h"

namespace hopyard::tune {

// 0 also where the driver is not in order: a plan is made without GPUs as well.
[[nodiscard]] int GpusInOrder();

// "NVIDIA H200 of 132 multiprocessors, Hopyard 0.1.0", for messages.
[[nodiscard]] std::string Describe(const TuningMachine& machine);

// Whether tables of `machine` are meant for GPUs.
[[nodiscard]] inline bool IsGpu(const TuningMachine& machine) {
  return machine.isa.empty();
}

}  // namespace hopyard::tune
