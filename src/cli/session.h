// SPDX-License-Identifier: Apache-2.0
// A loaded layer with a plan, its workspace and its outputs: what `run` and `bench` call.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "hopyard/forward.h"
#include "hopyard/plan.h"

#include "cli/buffer.h"
#include "cli/layer_source.h"
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
  // `max_tokens` >= 1. threads 0: all. Checks memory for workspace and outputs.
  Session(LoadedLayer layer, int64_t max_tokens, int threads);

  [[nodiscard]] const LoadedLayer& layer() const { return layer_; }
  [[nodiscard]] const MoeSpec& spec() const { return layer_.spec; }
  [[nodiscard]] const Plan& plan() const { return plan_; }
  [[nodiscard]] const Weights& weights() const { return weights_; }
  [[nodiscard]] int threads() const;

  // Sets missing static scales from amax of `inputs`' hidden states and of the intermediate they
  // give. A no-op for other activation formats and for checkpoints that hold the scales.
  void Calibrate(const MoeInputs& inputs);

  // Fills output and workspace with 0xFF (NaN in bf16), so that nothing stale passes for a result.
  void Poison();
  // The same layer at other addresses, with this session's static scales.
  [[nodiscard]] Weights MakeWeights(const WeightsDesc& desc) const;
  void Forward(const MoeInputs& inputs, const MoeOutputs& outputs);
  void Forward(const Weights& weights, const MoeInputs& inputs, const MoeOutputs& outputs);

  // [T, H] bf16; [T, K] i16; [T, K + S] i32 and f32; [E] i64.
  [[nodiscard]] TensorView output(int64_t tokens) const;
  [[nodiscard]] TensorView replay(int64_t tokens) const;
  [[nodiscard]] TensorView routing_ids(int64_t tokens) const;
  [[nodiscard]] TensorView routing_weights(int64_t tokens) const;
  [[nodiscard]] TensorView expert_load() const;
  // All of the above as one call's outputs; the load counters start at zero.
  [[nodiscard]] MoeOutputs AllOutputs(int64_t tokens);

 private:
  [[nodiscard]] WeightsDesc WithScales(WeightsDesc desc) const;
  [[nodiscard]] float IntermediateAmax(MoeInputs inputs);

  LoadedLayer layer_;
  Plan plan_;
  Weights weights_;
  std::shared_ptr<StaticScales> scales_;
  Buffer workspace_;
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
