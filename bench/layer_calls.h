// SPDX-License-Identifier: Apache-2.0
// Calls of a whole layer on the GPU, logits in and output out, for the benchmarks: as many routings
// as calls, over weights that do not fit into the L2 cache together.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hopyard/forward.h"

#include "bench/gpu.h"
#include "bench/layer_weights.h"
#include "bench/routings.h"

namespace hopyard::bench {

inline constexpr int kLayerCalls = 8;

// Weights of one layer, repeated until they are cold when a call comes back to them.
inline Layers ColdLayers(const MoeSpec& spec, bool packed) {
  Layers layers;
  int64_t bytes = 0;
  while (layers.empty() || (bytes < kColdBytes && layers.size() < kLayerCalls)) {
    layers.push_back(std::make_unique<LayerWeights>(spec, packed));
    bytes += layers.back()->bytes();
  }
  return layers;
}

class LayerCalls {
 public:
  LayerCalls(const MoeSpec& spec, const Layers& layers, int64_t tokens, const std::string& routing)
      : spec_(spec),
        layers_(layers),
        tokens_(tokens),
        x_(tokens * spec.hidden_size),
        output_(tokens * spec.hidden_size),
        bias_(std::vector<float>(static_cast<size_t>(spec.num_experts), 0.0F)) {
    for (unsigned i = 0; i < kLayerCalls; ++i) {
      const Logits drawn(spec, tokens, routing, 100 + i);
      touched_ += static_cast<double>(drawn.touched) / kLayerCalls;
      logits_.emplace_back(drawn.values);
    }
    FillRandom(x_.get(), tokens * spec.hidden_size);
  }

  // Experts that a call touches, on average.
  [[nodiscard]] double touched() const { return touched_; }

  void Enqueue(const Plan& plan, Workspace workspace, int i, cudaStream_t stream) const {
    const auto at = static_cast<size_t>(i);
    MoeInputs inputs;
    inputs.hidden_states =
        TensorView::Contiguous(x_.get(), DType::kBf16, {tokens_, spec_.hidden_size}, kGpu);
    if (spec_.routing.use_bias) {
      inputs.routing_bias =
          TensorView::Contiguous(bias_.get(), DType::kFloat32, {spec_.num_experts}, kGpu);
    }
    inputs.logits = TensorView::Contiguous(logits_[at].get(), DType::kFloat32,
                                           {tokens_, spec_.num_experts}, kGpu);
    MoeOutputs outputs;
    outputs.output =
        TensorView::Contiguous(output_.get(), DType::kBf16, {tokens_, spec_.hidden_size}, kGpu);
    Forward(plan, layers_[at % layers_.size()]->weights, inputs, outputs, workspace, {stream});
  }

 private:
  const MoeSpec& spec_;
  const Layers& layers_;
  int64_t tokens_;
  double touched_ = 0.0;
  std::vector<DeviceBuffer<float>> logits_;
  DeviceBuffer<uint16_t> x_;
  DeviceBuffer<uint16_t> output_;
  DeviceBuffer<float> bias_;
};

// The plan for this number of tokens alone: what it names is what runs.
inline Plan PlanFor(const MoeSpec& spec, int64_t tokens, PlanOptions options = {}) {
  options.max_tokens = tokens;
  options.batch_invariant = true;
  return MakePlan(spec, kGpu, options);
}

}  // namespace hopyard::bench
