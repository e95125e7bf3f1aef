// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <string>
#include <utility>

#include "core/error.h"
#include "device/memory.h"
#include "device/range.h"
#include "device/timed_calls.h"
#include "plan/backend_sm90.h"
#include "plan/sm90/device_weights.h"
#include "plan/sm90/layer_plan.h"
#include "plan/sm90/pass.h"
#include "stages/1_route/route_sm90.h"

namespace hopyard::sm90 {
namespace {

route::RouteSm90Args RouteArgsOf(const RouteCall& call) {
  const RouteInputs& in = *call.inputs;
  const RouteOutputs& out = *call.outputs;
  route::RouteSm90Args args;
  args.rule = *call.rule;
  args.num_experts = static_cast<int>(in.logits.shape[1]);
  args.top_k = call.top_k;
  args.max_tokens = in.logits.shape[0];
  args.num_tokens = in.num_tokens.as<const int32_t>();
  args.logits = in.logits.data;
  args.logits_dtype = in.logits.dtype;
  args.bias = in.bias.data;
  args.bias_dtype = in.bias.dtype;
  if (in.forced_ids.defined()) {
    args.source = route::IdSource::kForced;
    args.forced_ids = in.forced_ids.data;
    args.forced_dtype = in.forced_ids.dtype;
  } else if (in.token_ids.defined()) {
    args.source = route::IdSource::kTable;
    args.token_ids = in.token_ids.data;
    args.token_dtype = in.token_ids.dtype;
    args.table = in.token_to_experts.as<const int32_t>();
    args.table_rows = in.token_to_experts.shape[0];
  }
  args.ids = out.expert_ids.as<int32_t>();
  args.weights = out.weights.data;
  args.weights_dtype = out.weights.dtype;
  args.replay = out.replay.as<int16_t>();
  args.load = out.expert_load.data;
  args.load_dtype = out.expert_load.dtype;
  return args;
}

class HopperBackend : public Backend {
 public:
  [[nodiscard]] Explanation Choose(const MoeSpec& spec, const PlanOptions& options,
                                   const std::vector<TunedRange>& tuned) const override {
    return ChooseKernels(spec, options, tuned).explanation;
  }

  [[nodiscard]] bool HasTactic(const MoeSpec& spec, const std::string& tactic) const override {
    return sm90::HasTactic(spec, tactic);
  }

  [[nodiscard]] RankedTactics Rank(const MoeSpec& spec, const PlanOptions& options,
                                   int64_t tokens) const override {
    return RankTactics(spec, options, tokens);
  }

  [[nodiscard]] std::shared_ptr<const LayerPlan> MakePlan(const MoeSpec& spec,
                                                          const PlanOptions& options,
                                                          const std::vector<TunedRange>& tuned,
                                                          int64_t tokens) const override {
    device::PrepareRanges();
    auto plan = std::make_shared<LayerPlan>();
    KernelChoice choice = ChooseKernels(spec, options, tuned);
    plan->routed = FormatsOf(spec, spec.weights, choice.rounded);
    plan->shared =
        spec.shared.count > 0 ? FormatsOf(spec, spec.shared.weights, choice.rounded) : plan->routed;
    plan->layout = MakeLayout(spec, choice.rounded, tokens);
    plan->tiles = std::move(choice.tiles);
    return plan;
  }

  [[nodiscard]] int64_t WorkspaceBytes(const LayerPlan& plan) const override {
    return plan.layout.bytes;
  }

  [[nodiscard]] std::shared_ptr<const DeviceWeights> MakeWeights(
      const Weights::Impl& weights) const override {
    const device::CurrentDevice current(weights.device.index);
    const std::string reason = WhyUnsupported(device::InfoOf(weights.device.index));
    HOPYARD_CHECK(reason.empty(), kUnsupported) << "weights: " << reason;
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

  void Route(const RouteCall& call) const override {
    const device::CurrentDevice current(call.device.index);
    route::RouteSm90(RouteArgsOf(call), call.stream);
  }

  [[nodiscard]] int CountGpus() const override { return device::Count(); }

  [[nodiscard]] GpuInfo GpuInfoOf(int index) const override { return device::InfoOf(index); }

  [[nodiscard]] GpuInfo ModelOf(int index) const override { return device::ModelOf(index); }

  [[nodiscard]] std::shared_ptr<void> Allocate(int index, int64_t bytes) const override {
    const device::CurrentDevice current(index);
    auto buffer = std::make_shared<device::Buffer>(bytes);
    void* const data = buffer->as<void>();
    device::Zero(data, bytes);
    return {std::move(buffer), data};
  }

  void Copy(int index, void* to, const void* from, int64_t bytes) const override {
    const device::CurrentDevice current(index);
    device::Copy(to, from, bytes);
  }

  void Synchronize(int index, void* stream) const override {
    const device::CurrentDevice current(index);
    device::Synchronize(stream);
  }

  [[nodiscard]] std::unique_ptr<device::TimedCalls> Capture(
      int index, void* stream, const std::vector<device::Call>& calls,
      const device::Flush& flush) const override {
    const device::CurrentDevice current(index);
    return device::CaptureCalls(stream, calls, flush);
  }

  [[nodiscard]] bool IsCapturing(int index, void* stream) const override {
    const device::CurrentDevice current(index);
    return device::IsCapturing(stream);
  }

  [[nodiscard]] bool Recover(int index) const override {
    const device::CurrentDevice current(index);
    return device::Recover();
  }
};

}  // namespace

const Backend* FindBackend() {
  static const HopperBackend backend;
  return &backend;
}

const Backend& NeedBackend() {
  return *FindBackend();
}

}  // namespace hopyard::sm90
