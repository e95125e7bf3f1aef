// SPDX-License-Identifier: Apache-2.0
#include "tune/machine.h"

#include <fmt/format.h>

#include "hopyard/device.h"
#include "hopyard/hopyard.h"

#include "checkpoint/text.h"
#include "core/cpu_features.h"
#include "core/parallel.h"
#include "plan/backend_sm90.h"

namespace hopyard {
namespace {

// CUDA's name of an H100 SXM and its multiprocessors, which the cost model is made for as well.
constexpr const char* kAbsentGpu = "NVIDIA H100 80GB HBM3";
constexpr int kAbsentGpuUnits = 132;

}  // namespace

TuningMachine MachineOf(Device device, int num_threads) {
  TuningMachine machine;
  machine.library = HOPYARD_VERSION;
  if (device.kind == DeviceKind::kCpu) {
    machine.device = CpuModel();
    machine.units = num_threads > 0 ? num_threads : MaxThreads();
    machine.isa = ToString(BestIsa());
  } else if (device.index < CountGpus()) {
    const GpuInfo gpu = sm90::NeedBackend().ModelOf(device.index);
    machine.device = gpu.name;
    machine.units = gpu.multiprocessors;
  } else {
    machine.device = kAbsentGpu;
    machine.units = kAbsentGpuUnits;
  }
  return machine;
}

namespace tune {

std::string Describe(const TuningMachine& machine) {
  const std::string device = checkpoint::Printable(machine.device);
  const std::string library = checkpoint::Printable(machine.library);
  if (IsGpu(machine)) {
    return fmt::format("{} of {} multiprocessors, Hopyard {}", device, machine.units, library);
  }
  return fmt::format("{}, {} threads, {}, Hopyard {}", device, machine.units,
                     checkpoint::Printable(machine.isa), library);
}

}  // namespace tune
}  // namespace hopyard
