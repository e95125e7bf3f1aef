// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "device/memory.h"
#include "device/range.h"
#include "plan/backend_sm90.h"
#include "plan/sm90/device_weights.h"
#include "plan/sm90/layer_plan.h"
#include "plan/sm90/pass.h"

namespace hopyard::sm90 {
namespace {

class HopperBackend : public Backend {
 public:
  [[nodiscard]] Explanation Choose(const MoeSpec& spec, const PlanOptions& options) const override {
    return ChooseKernels(spec, options).explanation;
  }

  [[nodiscard]] std::shared_ptr<const LayerPlan> MakePlan(const MoeSpec& spec,
                                                          const PlanOptions& options,
                                                          int64_t tokens) const override {
    device::PrepareRanges();
    auto plan = std::make_shared<LayerPlan>();
    KernelChoice choice = ChooseKernels(spec, options);
    plan->routed = FormatsOf(spec, spec.weights, choice.rounded);
    plan->shared =
        spec.shared.count > 0 ? FormatsOf(spec, spec.shared.weights, choice.rounded) : plan->routed;
    plan->layout = MakeLayout(spec, choice, tokens);
    plan->tiles = std::move(choice.tiles);
    return plan;
  }

  [[nodiscard]] int64_t WorkspaceBytes(const LayerPlan& plan) const override {
    return plan.layout.bytes;
  }

  [[nodiscard]] std::shared_ptr<const DeviceWeights> MakeWeights(
      const Weights::Impl& weights) const override {
    const device::CurrentDevice current(weights.device.index);
    return MakeDeviceWeights(weights);
  }

  void Write(const Weights::Impl& weights, const Update& update, void* stream) const override {
    const device::CurrentDevice current(weights.device.index);
    WriteSlice(weights, update, stream);
  }

  void Forward(const Call& call) const override { RunLayer(call); }

  void Wait(int index) const override {
    const device::CurrentDevice current(index);
    device::SynchronizeDevice();
  }

  void Read(void* to, const void* from, int64_t bytes) const override {
    device::Copy(to, from, bytes);
  }
};

}  // namespace

const Backend* FindBackend() {
  static const HopperBackend backend;
  return &backend;
}

}  // namespace hopyard::sm90
