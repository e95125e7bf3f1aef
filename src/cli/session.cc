// SPDX-License-Identifier: Apache-2.0
#include "cli/session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "cli/machine.h"
#include "core/error.h"
#include "core/parallel.h"

namespace hopyard::cli {
namespace {

constexpr float kE4m3Max = 448.0F;
constexpr float kE2m1Max = 6.0F;
// Tokens that the intermediate's range is taken from, and the head-room for the others.
constexpr int64_t kCalibrationTokens = 64;
constexpr float kCalibrationMargin = 1.25F;

float Amax(const TensorView& values) {
  float amax = 0.0F;
  for (const float value : ToFloats(values)) {
    amax = std::isfinite(value) ? std::max(amax, std::abs(value)) : amax;
  }
  return amax;
}

float StaticScale(ActivationFormat format, float amax) {
  const float range = format == ActivationFormat::kNvFp4 ? kE4m3Max * kE2m1Max : kE4m3Max;
  const float scale = amax / range;
  return scale > 0.0F ? scale : 1.0F;  // nothing but zeros, or so little that the step underflows
}

TensorView FirstRows(TensorView view, int64_t rows) {
  if (view.defined()) {
    view.shape[0] = std::min(view.shape[0], rows);
  }
  return view;
}

}  // namespace

void LimitThreads(int threads) {
#if defined(_OPENMP)
  if (threads > 0) {
    omp_set_num_threads(threads);
  }
#else
  (void)threads;
#endif
}

bool NeedsStaticScales(ActivationFormat format) {
  return format == ActivationFormat::kFp8PerTensor || format == ActivationFormat::kNvFp4;
}

namespace {

// What a plan for the device asks the description of the layer's weights for: those of a copy on a
// GPU are K-major, whatever the host's are, or packed.
WeightsDesc OnDevice(const LoadedLayer& layer, bool on_host) {
  WeightsDesc desc = layer.weights;
  if (!on_host) {
    for (ExpertMatrices* group : {&desc.routed, &desc.shared}) {
      for (MatrixSet* set : {&group->gemm1, &group->gate, &group->up, &group->gemm2}) {
        set->major = MajorOrder::kKMajor;
      }
    }
    desc.packed = layer.packed;
  }
  return desc;
}

}  // namespace

Session::Session(LoadedLayer layer, const PlanOptions& options, Device device)
    : layer_(std::move(layer)) {
  const bool on_host = device.kind == DeviceKind::kCpu;
  const int64_t max_tokens = options.max_tokens;
  PlanOptions of_layer = options;
  of_layer.weight_orders = OrdersOf(layer_.spec, OnDevice(layer_, on_host));
  plan_ = MakePlan(layer_.spec, device, of_layer);
  if (NeedsStaticScales(layer_.spec.activations)) {
    scales_ = std::make_shared<StaticScales>();
    device_scales_ = DeviceMemory(device, sizeof(StaticScales));
  }
  placed_ = Place(layer_.weights);
  RefreshWeights();
  const MoeSpec& spec = layer_.spec;
  const int64_t slots = max_tokens * spec.slots_per_token();
  const int64_t output_bytes = max_tokens * spec.hidden_size * SizeOf(DType::kBf16);
  const int64_t host_bytes = on_host ? plan_.workspace_bytes() : 0;
  CheckMemory("workspace and output", host_bytes + output_bytes, "use fewer --tokens");
  workspace_ = Buffer(host_bytes);
  if (!on_host) {
    device_workspace_ = DeviceMemory(device, plan_.workspace_bytes());
  }
  output_ = Buffer(output_bytes);
  replay_ = Buffer(max_tokens * spec.top_k * SizeOf(DType::kInt16));
  routing_ids_ = Buffer(slots * SizeOf(DType::kInt32));
  routing_weights_ = Buffer(slots * SizeOf(DType::kFloat32));
  expert_load_.assign(static_cast<size_t>(spec.num_experts), 0);
}

int Session::threads() const {
  const int threads = plan_.options().num_threads;
  return threads > 0 ? threads : MaxThreads();
}

WeightsDesc Session::WithScales(WeightsDesc desc, const void* scales, Device device) const {
  if (scales_ == nullptr) {
    return desc;
  }
  const auto* const pair = static_cast<const StaticScales*>(scales);
  const auto fill = [&](TensorView& view, const float* value) {
    if (!view.defined()) {
      view = TensorView::Contiguous(value, DType::kFloat32, {1}, device);
    }
  };
  fill(desc.routed.gemm1_input_scale, &pair->gemm1);
  fill(desc.routed.gemm2_input_scale, &pair->gemm2);
  if (layer_.spec.shared.count > 0) {
    fill(desc.shared.gemm1_input_scale, &pair->gemm1);
    fill(desc.shared.gemm2_input_scale, &pair->gemm2);
  }
  return desc;
}

// After the static scales have changed.
void Session::RefreshWeights() {
  if (scales_ != nullptr) {
    CopyBytes(device_scales_.data(), scales_.get(), sizeof(StaticScales), plan_.device());
  }
  host_weights_ = {layer_.spec, WithScales(layer_.weights, scales_.get(), Device{})};
  weights_ = MakeWeights(placed_);
}

float Session::IntermediateAmax(MoeInputs inputs) {
  const int64_t tokens = std::min(inputs.hidden_states.shape[0], kCalibrationTokens);
  for (TensorView* view : {&inputs.hidden_states, &inputs.logits, &inputs.expert_ids}) {
    *view = FirstRows(*view, tokens);
  }
  const int64_t rows = tokens * spec().slots_per_token();
  Buffer activation(rows * spec().intermediate_size * SizeOf(DType::kBf16));
  // Rows that no local slot fills stay zero.
  std::memset(activation.data(), 0, static_cast<size_t>(activation.bytes()));
  MoeOutputs outputs;
  outputs.output = output(tokens);
  outputs.gemm1_activation =
      TensorView::Contiguous(activation.data(), DType::kBf16, {rows, spec().intermediate_size});
  Forward(inputs, outputs);
  return Amax(outputs.gemm1_activation) * kCalibrationMargin;
}

void Session::Calibrate(const MoeInputs& inputs) {
  if (scales_ == nullptr || inputs.hidden_states.shape[0] == 0) {
    return;
  }
  const ActivationFormat format = spec().activations;
  scales_->gemm1 = StaticScale(format, Amax(inputs.hidden_states));
  RefreshWeights();
  // The activation output precedes its quantisation: the still unset GEMM2 scale has no part in it.
  scales_->gemm2 = StaticScale(format, IntermediateAmax(inputs));
  RefreshWeights();
}

void Session::Poison() {
  for (const Buffer* buffer : {&workspace_, &output_, &replay_, &routing_ids_, &routing_weights_}) {
    if (buffer->bytes() > 0) {
      std::memset(buffer->data(), 0xFF, static_cast<size_t>(buffer->bytes()));
    }
  }
  cli::Poison(device_workspace_);
}

WeightsDesc Session::Place(const WeightsDesc& desc) const {
  if (plan_.device().kind == DeviceKind::kCpu) {
    return desc;
  }
  WeightsDesc copy = CopyWeights(desc, plan_.device());
  copy.packed = layer_.packed;
  return copy;
}

Weights Session::MakeWeights(const WeightsDesc& placed) const {
  return {layer_.spec, WithScales(placed, device_scales_.data(), plan_.device())};
}

StagedCall Session::Stage(const MoeInputs& inputs, const MoeOutputs& outputs) const {
  return Stage(plan_, inputs, outputs);
}

StagedCall Session::Stage(const Plan& plan, const MoeInputs& inputs, const MoeOutputs& outputs) {
  return {plan, inputs, outputs};
}

void Session::Run(const StagedCall& call) {
  Run(call, weights_);
}

void Session::Run(const StagedCall& call, const Weights& weights) {
  const bool on_host = plan_.device().kind == DeviceKind::kCpu;
  call.Run(weights, {on_host ? workspace_.data() : device_workspace_.data(),
                     static_cast<size_t>(plan_.workspace_bytes())});
}

void Session::Forward(const MoeInputs& inputs, const MoeOutputs& outputs) {
  const StagedCall call = Stage(inputs, outputs);
  Run(call);
  call.Fetch();
}

TensorView Session::output(int64_t tokens) const {
  return TensorView::Contiguous(output_.data(), DType::kBf16, {tokens, layer_.spec.hidden_size});
}

TensorView Session::replay(int64_t tokens) const {
  return TensorView::Contiguous(replay_.data(), DType::kInt16, {tokens, layer_.spec.top_k});
}

TensorView Session::routing_ids(int64_t tokens) const {
  return TensorView::Contiguous(routing_ids_.data(), DType::kInt32,
                                {tokens, layer_.spec.slots_per_token()});
}

TensorView Session::routing_weights(int64_t tokens) const {
  return TensorView::Contiguous(routing_weights_.data(), DType::kFloat32,
                                {tokens, layer_.spec.slots_per_token()});
}

TensorView Session::expert_load() const {
  return TensorView::Contiguous(expert_load_.data(), DType::kInt64,
                                {static_cast<int64_t>(expert_load_.size())});
}

MoeOutputs Session::AllOutputs(int64_t tokens) {
  std::fill(expert_load_.begin(), expert_load_.end(), 0);
  MoeOutputs outputs;
  outputs.output = output(tokens);
  outputs.replay = replay(tokens);
  outputs.routing_ids = routing_ids(tokens);
  outputs.routing_weights = routing_weights(tokens);
  outputs.expert_load = expert_load();
  return outputs;
}

MoeInputs MakeInputs(const LoadedLayer& layer, const Tokens& tokens,
                     const std::vector<float>& logits, const std::vector<int32_t>& replay) {
  MoeInputs inputs;
  inputs.hidden_states = tokens.View();
  inputs.logits = TensorView::Contiguous(logits.data(), DType::kFloat32,
                                         {tokens.count, layer.spec.num_experts});
  if (!layer.routing_bias.empty()) {
    inputs.routing_bias = TensorView::Contiguous(layer.routing_bias.data(), DType::kFloat32,
                                                 {layer.spec.num_experts});
  }
  if (!replay.empty()) {
    inputs.routing = RoutingInput::kReplay;
    inputs.expert_ids =
        TensorView::Contiguous(replay.data(), DType::kInt32, {tokens.count, layer.spec.top_k});
  }
  return inputs;
}

double LayerFlops(const MoeSpec& spec, int64_t tokens) {
  const auto slots = static_cast<double>(tokens) * spec.slots_per_token();
  const auto hidden = static_cast<double>(spec.hidden_size);
  const auto gemm1 = static_cast<double>(spec.gemm1_rows()) * hidden;
  const auto gemm2 = static_cast<double>(spec.intermediate_size) * hidden;
  return 2.0 * slots * (gemm1 + gemm2);
}

int64_t TouchedExperts(const TensorView& routing_ids) {
  const auto* ids = routing_ids.as<const int32_t>();
  std::set<int32_t> distinct(ids, ids + routing_ids.numel());
  distinct.erase(-1);
  return static_cast<int64_t>(distinct.size());
}

}  // namespace hopyard::cli
