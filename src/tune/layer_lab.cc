// SPDX-License-Identifier: Apache-2.0
#include "tune/layer_lab.h"

#include <chrono>

#include "core/error.h"
#include "core/host_memory.h"
#include "plan/backend_sm90.h"
#include "tune/candidates.h"

namespace hopyard::tune {
namespace {

// Calls of a round. On a GPU a launch of eight as short as 30 us is worth its time; a CPU spends
// most of the time on emptying its caches between them.
constexpr int kGpuSets = 8;
constexpr int kCpuSets = 1;

void CheckNumbers(const TuneOptions& options) {
  HOPYARD_CHECK(options.struct_size == sizeof(TuneOptions), kInvalidArgument)
      << "TuneOptions.struct_size=" << options.struct_size << "; this library knows "
      << sizeof(TuneOptions) << ": compile against its headers";
  HOPYARD_CHECK(options.max_seconds > 0.0, kInvalidArgument)
      << "max_seconds=" << options.max_seconds << "; wanted more than 0";
  HOPYARD_CHECK(options.margin >= 0.0 && options.margin < 1.0, kInvalidArgument)
      << "margin=" << options.margin << "; wanted 0 .. 1, 0.01 is 1 %";
  HOPYARD_CHECK(options.max_bytes >= 0, kInvalidArgument)
      << "max_bytes=" << options.max_bytes << "; wanted 0 (half of the free memory) or more";
  int64_t before = 0;
  for (const int64_t tokens : options.tokens) {
    HOPYARD_CHECK(tokens > before, kInvalidArgument)
        << "tokens has " << tokens << " behind " << before
        << "; wanted numbers from 1 on in ascending order, each once";
    before = tokens;
  }
}

int64_t FreeBytes(Device device) {
  return device.kind == DeviceKind::kCpu ? AvailableMemory() : GpuInfoOf(device.index).free_bytes;
}

}  // namespace

Kernels LayerLab::KernelsAt(int64_t tokens) const {
  return KernelsOf(task_.spec, task_.device, task_.options, tokens);
}

bool LayerLab::Fits(const std::string& tactic) const {
  return FitsLayer(task_.spec, task_.device, task_.options, tactic);
}

std::unique_ptr<Bench> LayerLab::Open(int64_t tokens) {
  return std::make_unique<MeasuredLayer>(task_, KernelsAt(tokens).untuned, tokens);
}

bool LayerLab::Recover() {
  return task_.device.kind == DeviceKind::kCpu || sm90::NeedBackend().Recover(task_.device.index);
}

double LayerLab::Seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

LayerTask MakeTask(const Plan& plan, const Weights& weights, const TuneOptions& options,
                   Stream stream) {
  CheckNumbers(options);
  const Device device = plan.device();
  HOPYARD_CHECK(weights.spec() == plan.spec(), kInvalidArgument)
      << "weights were made for another layer: got {" << ToString(weights.spec()) << "}; wanted {"
      << ToString(plan.spec()) << "}";
  const bool on_cpu = device.kind == DeviceKind::kCpu;
  HOPYARD_CHECK(on_cpu ? weights.device().kind == DeviceKind::kCpu : weights.device() == device,
                kInvalidArgument)
      << "weights are on another device than the plan; copy them there (CopyWeights), or make a "
         "plan for theirs";
  HOPYARD_CHECK(on_cpu || !sm90::NeedBackend().IsCapturing(device.index, stream.handle),
                kInvalidArgument)
      << "the stream is being captured, and tuning waits for what it enqueues; tune before the "
         "capture, or on another stream";
  const int64_t max_bytes = options.max_bytes > 0 ? options.max_bytes : FreeBytes(device) / 2;
  LayerTask task{plan.options(),
                 plan.spec(),
                 device,
                 weights,
                 Workload(plan.spec(), plan.options().path, options),
                 stream,
                 max_bytes};
  task.options.weight_orders = OrdersOf(weights.spec(), weights.desc());
  task.sets = on_cpu ? kCpuSets : kGpuSets;
  return task;
}

}  // namespace hopyard::tune
