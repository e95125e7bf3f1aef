// SPDX-License-Identifier: Apache-2.0
// A call on a plan's device, whose tensors the command keeps on the host.
#pragma once

#include <vector>

#include "hopyard/device.h"
#include "hopyard/forward.h"
#include "hopyard/plan.h"

namespace hopyard::cli {

// On a GPU inputs and outputs are copied there once, when the call is made, so that running it
// copies nothing. On the CPU it takes the host's tensors, which must outlive it.
class StagedCall {
 public:
  StagedCall(const Plan& plan, const MoeInputs& inputs, const MoeOutputs& outputs);

  // Returns when the device has done the work.
  void Run(const Weights& weights, const Workspace& workspace) const;
  // The outputs into the host's tensors.
  void Fetch() const;

 private:
  [[nodiscard]] TensorView OnDevice(const TensorView& host);

  Plan plan_;
  MoeInputs inputs_;
  MoeOutputs outputs_;
  MoeOutputs host_outputs_;
  std::vector<DeviceMemory> memory_;
};

// 0xFF in every byte: NaN in bf16, so that nothing stale passes for a result.
void Poison(const DeviceMemory& memory);

}  // namespace hopyard::cli
