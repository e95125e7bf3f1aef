// SPDX-License-Identifier: Apache-2.0
// A layer with its random weights, for tests of many small layers.
#pragma once

#include <memory>
#include <vector>

#include "tests/forward_runner.h"

namespace hopyard::test {

// Hidden 64, intermediate 32, 8 experts, top 2: whole MX and NVFP4 blocks, quickly judged.
[[nodiscard]] inline MoeSpec MiniSpec(const FormatPair& pair = {}) {
  MoeSpec spec = SmallSpec(pair.weights, pair.activations);
  spec.hidden_size = 64;
  spec.intermediate_size = 32;
  return spec;
}

// Layers this small would spend their time waiting for a second thread.
[[nodiscard]] inline RunOptions OneThread() {
  RunOptions options;
  options.plan.num_threads = 1;
  return options;
}

class TestLayer {
 public:
  explicit TestLayer(const MoeSpec& spec, bool bias = false) : TestLayer(SourceFor(spec, bias)) {}
  explicit TestLayer(const WeightSource& source)
      : spec_(source.spec),
        storage_(std::make_unique<LayerWeights>(source)),
        weights_(storage_->Make()) {}

  [[nodiscard]] const MoeSpec& spec() const { return spec_; }
  [[nodiscard]] const Weights& weights() const { return weights_; }
  [[nodiscard]] RunResult Run(const LayerInputs& inputs,
                              const RunOptions& options = OneThread()) const {
    return RunLayer(spec_, weights_, inputs.get(), options);
  }
  [[nodiscard]] ::testing::AssertionResult Judge(const LayerInputs& inputs, const RunResult& result,
                                                 const std::vector<int64_t>& tokens = {}) const {
    return MatchesOracle(spec_, weights_, inputs.get(), result, tokens);
  }
  [[nodiscard]] ::testing::AssertionResult RunAndJudge(const LayerInputs& inputs) const {
    return Judge(inputs, Run(inputs));
  }

 private:
  static WeightSource SourceFor(const MoeSpec& spec, bool bias) {
    WeightSource source;
    source.spec = spec;
    source.bias = bias;
    return source;
  }

  MoeSpec spec_;
  std::unique_ptr<LayerWeights> storage_;
  Weights weights_;
};

}  // namespace hopyard::test
