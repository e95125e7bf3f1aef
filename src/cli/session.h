// SPDX-License-Identifier: Apache-2.0
// A loaded layer with a plan, its workspace and its outputs: what `run` and `bench` call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hopyard/device.h"
#include "hopyard/forward.h"
#include "hopyard/plan.h"

#include "cli/buffer.h"
#include "cli/layer_source.h"
#include "cli/staged_call.h"
#include "cli/tokens.h"

namespace hopyard::cli {

// Threads of everything that follows, 0: as many as OpenMP gives.
void LimitThreads(int threads);

// Static scales of quantised activations, chosen from data when the checkpoint has none.
struct StaticScales {
  float gemm1 = 1.0F;
  float gemm2 = 1.0F;
};

[[nodiscard]] bool NeedsStaticScales(ActivationFormat format);

class Session {
 public:
  // `options.max_tokens` >= 1. Checks memory for workspace and outputs; on a GPU copies the weights
  // there, once.
  Session(LoadedLayer layer, const PlanOptions& options, Device device);

  [[nodiscard]] const LoadedLayer& layer() const { return layer_; }
  [[nodiscard]] const MoeSpec& spec() const { return layer_.spec; }
  [[nodiscard]] const Plan& plan() const { return plan_; }
  // On the plan's device.
  [[nodiscard]] const Weights& placed_weights() const { return weights_; }
  // In host memory, wherever the layer runs.
  [[nodiscard]] const Weights& weights() const { return host_weights_; }
  [[nodiscard]] int threads() const;

  // Sets missing static scales from amax of `inputs`' hidden states and of the intermediate they
  // give. A no-op for other activation formats and for checkpoints that hold the scales.
  void Calibrate(const MoeInputs& inputs);

  // Fills output and workspace with 0xFF (NaN in bf16), so that nothing stale passes for a result.
  void Poison();
  // A description of weights on the host as one on the session's device; a copy on a GPU.
  [[nodiscard]] WeightsDesc Place(const WeightsDesc& desc) const;
  // The same layer at other addresses of the device, with this session's static scales.
  [[nodiscard]] Weights MakeWeights(const WeightsDesc& placed) const;
  // One call with tensors on the host; their outputs are there when it returns.
  void Forward(const MoeInputs& inputs, const MoeOutputs& outputs);
  // The same call for repetition: nothing is copied while it runs, and nothing fetched.
  [[nodiscard]] StagedCall Stage(const MoeInputs& inputs, const MoeOutputs& outputs) const;
  // With another plan of the same layer, whose workspace is no larger.
  [[nodiscard]] static StagedCall Stage(const Plan& plan, const MoeInputs& inputs,
                                        const MoeOutputs& outputs);
  void Run(const StagedCall& call);
  void Run(const StagedCall& call, const Weights& weights);

  // [T, H] bf16; [T, K] i16; [T, K + S] i32 and f32; [E] i64.
  [[nodiscard]] TensorView output(int64_t tokens) const;
  [[nodiscard]] TensorView replay(int64_t tokens) const;
  [[nodiscard]] TensorView routing_ids(int64_t tokens) const;
  [[nodiscard]] TensorView routing_weights(int64_t tokens) const;
  [[nodiscard]] TensorView expert_load() const;
  // All of the above as one call's outputs; the load counters start at zero.
  [[nodiscard]] MoeOutputs AllOutputs(int64_t tokens);

 private:
  [[nodiscard]] WeightsDesc WithScales(WeightsDesc desc, const void* scales, Device device) const;
  void RefreshWeights();
  [[nodiscard]] float IntermediateAmax(MoeInputs inputs);

  LoadedLayer layer_;
  Plan plan_;
  WeightsDesc placed_;  // on the plan's device
  Weights weights_;     // of these
  Weights host_weights_;
  std::shared_ptr<StaticScales> scales_;
  DeviceMemory device_scales_;
  Buffer workspace_;               // CPU
  DeviceMemory device_workspace_;  // GPU
  Buffer output_;
  Buffer replay_;
  Buffer routing_ids_;
  Buffer routing_weights_;
  std::vector<int64_t> expert_load_;
};

// The tagged inputs of one call: logits, and the ids to force when `replay` is not empty.
[[nodiscard]] MoeInputs MakeInputs(const LoadedLayer& layer, const Tokens& tokens,
                                   const std::vector<float>& logits,
                                   const std::vector<int32_t>& replay);

// Floating-point operations of T tokens through both GEMMs (a multiply-add is two).
[[nodiscard]] double LayerFlops(const MoeSpec& spec, int64_t tokens);

// Local experts that the calls' ids [T, K + S] touch, each once.
[[nodiscard]] int64_t TouchedExperts(const TensorView& routing_ids);

}  // namespace hopyard::cli
