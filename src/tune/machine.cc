// SPDX-License-Identifier: Apache-2.0
#include "tune/machine.h"

#include <map>
#include <mutex>

#include <fmt/format.h>

#include "hopyard/device.h"
#include "hopyard/error.h"
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

// Of a GPU that is there. Asking the driver takes longer than the rest of a plan.
GpuInfo ModelOf(int index) {
  static std::mutex mutex;
  static std::map<int, GpuInfo> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end()
             ? found->second
             : known.emplace(index, sm90::NeedBackend().ModelOf(index)).first->second;
}

}  // namespace

TuningMachine MachineOf(Device device, int num_threads) {
  TuningMachine machine;
  machine.library = HOPYARD_VERSION;
  if (device.kind == DeviceKind::kCpu) {
    machine.device = CpuModel();
    machine.units = num_threads > 0 ? num_threads : MaxThreads();
    machine.isa = ToString(BestIsa());
  } else if (device.index < tune::GpusInOrder()) {
    const GpuInfo gpu = ModelOf(device.index);
    machine.device = gpu.name;
    machine.units = gpu.multiprocessors;
  } else {
    machine.device = kAbsentGpu;
    machine.units = kAbsentGpuUnits;
  }
  return machine;
}

namespace tune {

int GpusInOrder() {
  try {
    return CountGpus();
  } catch (const Error&) {
    return 0;
  }
}

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
