// SPDX-License-Identifier: Apache-2.0
// One valid call of the layer with every optional argument, to be spoilt one argument at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "tests/forward_runner.h"
#include "tests/inputs.h"
#include "tests/weights.h"

namespace hopyard::test {

// What an error must say: every part of the message that a caller needs.
struct WantedError {
  ErrorKind kind = ErrorKind::kInvalidArgument;
  std::vector<std::string> parts;
};

inline void ExpectError(const std::function<void()>& action, const WantedError& wanted) {
  const Caught caught = CatchError(action);
  EXPECT_EQ(ToString(caught.kind), ToString(wanted.kind)) << caught.message;
  for (const std::string& part : wanted.parts) {
    EXPECT_THAT(caught.message, ::testing::HasSubstr(part));
  }
}

inline void ExpectInvalid(const std::function<void()>& action,
                          const std::vector<std::string>& parts) {
  ExpectError(action, {ErrorKind::kInvalidArgument, parts});
}

inline void ExpectUnsupported(const std::function<void()>& action,
                              const std::vector<std::string>& parts) {
  ExpectError(action, {ErrorKind::kUnsupported, parts});
}

[[nodiscard]] inline PlanOptions OptionsFor(int64_t max_tokens) {
  PlanOptions options;
  options.max_tokens = max_tokens;
  options.num_threads = 2;
  return options;
}

[[nodiscard]] inline WeightSource SourceOf(const MoeSpec& spec) {
  WeightSource source;
  source.spec = spec;
  return source;
}

// Arguments of one Forward; a copy is cheap and shares the memory.
struct ForwardArguments {
  MoeInputs inputs;
  MoeOutputs outputs;
  Workspace workspace;
};

// A layer, its weights, and a valid call that asks for every output.
class ValidCall {
 public:
  static constexpr int64_t kTokens = 5;
  static constexpr int64_t kMaxTokens = 6;

  explicit ValidCall(const MoeSpec& spec)
      : spec_(spec),
        stored_(SourceOf(spec)),
        weights_(stored_.Make()),
        inputs_(spec, kTokens),
        plan_(MakePlan(spec, Device{}, OptionsFor(kMaxTokens))),
        workspace_(plan_.workspace_bytes()) {
    const int64_t slots = spec.slots_per_token();
    outputs_.output = Output(DType::kBf16, {kTokens, spec.hidden_size});
    outputs_.replay = Output(DType::kInt16, {kTokens, spec.top_k});
    outputs_.expert_load = Output(DType::kInt32, {spec.num_experts});
    outputs_.routing_weights = Output(DType::kFloat32, {kTokens, slots});
    outputs_.routing_ids = Output(DType::kInt32, {kTokens, slots});
    outputs_.rows = Output(DType::kBf16, {kTokens * slots, spec.hidden_size});
    outputs_.slot_to_row = Output(DType::kInt32, {kTokens, slots});
    outputs_.gemm1_activation = Output(DType::kBf16, {kTokens * slots, spec.intermediate_size});
  }

  [[nodiscard]] LayerInputs& inputs() { return inputs_; }
  [[nodiscard]] const MoeSpec& spec() const { return spec_; }
  [[nodiscard]] const Plan& plan() const { return plan_; }
  [[nodiscard]] const Weights& weights() const { return weights_; }
  [[nodiscard]] LayerWeights& stored() { return stored_; }
  [[nodiscard]] ForwardArguments Arguments() const {
    return {inputs_.get(), outputs_,
            Workspace{workspace_.data(), static_cast<size_t>(workspace_.bytes())}};
  }

  // Runs with these arguments.
  void Run(const ForwardArguments& arguments) const {
    Forward(plan_, weights_, arguments.inputs, arguments.outputs, arguments.workspace);
  }

  // The call fails as wanted, and no byte of any output or of the workspace has changed.
  void ExpectRefused(const ForwardArguments& arguments, const WantedError& wanted) const {
    ExpectError([&] { Run(arguments); }, wanted);
    EXPECT_TRUE(Untouched()) << "a refused call has written";
  }

  // Whether all outputs and the workspace still hold their poison, between whole canaries.
  [[nodiscard]] bool Untouched() const {
    if (!memory_.Intact() || !workspace_.Intact()) {
      return false;
    }
    for (const GuardedBuffer* buffer : written_) {
      if (!AllPoison(*buffer)) {
        return false;
      }
    }
    return AllPoison(workspace_);
  }

 private:
  static bool AllPoison(const GuardedBuffer& buffer) {
    // Every byte equals the first one, which is poison.
    return buffer.bytes() == 0 || (buffer.data()[0] == kPoison &&
                                   std::memcmp(buffer.data(), buffer.data() + 1,
                                               static_cast<size_t>(buffer.bytes() - 1)) == 0);
  }

  TensorView Output(DType dtype, std::initializer_list<int64_t> shape) {
    TensorView view = TensorView::Contiguous(static_cast<void*>(nullptr), dtype, shape);
    const GuardedBuffer& buffer = memory_.Bytes(view.numel() * SizeOf(dtype));
    written_.push_back(&buffer);
    view.data = buffer.data();
    return view;
  }

  MoeSpec spec_;
  LayerWeights stored_;
  Weights weights_;
  LayerInputs inputs_;
  Plan plan_;
  GuardedBuffer workspace_;
  Arena memory_;
  std::vector<const GuardedBuffer*> written_;
  MoeOutputs outputs_;
};

// 4 experts, top 2, hidden 64, intermediate 32: the smallest layer with whole MX and NVFP4 blocks.
[[nodiscard]] inline MoeSpec TinySpec(WeightFormat weights = WeightFormat::kBf16,
                                      ActivationFormat activations = ActivationFormat::kBf16) {
  MoeSpec spec = SmallSpec(weights, activations);
  spec.hidden_size = 64;
  spec.intermediate_size = 32;
  spec.num_experts = 4;
  return spec;
}

// The contiguous view of the same memory with another shape.
[[nodiscard]] inline TensorView Reshaped(const TensorView& view,
                                         const std::vector<int64_t>& shape) {
  TensorView out = view;
  out.ndim = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    out.shape.at(d) = shape[d];
    out.strides.at(d) = stride;
    stride *= shape[d] > 0 && shape[d] < (int64_t{1} << 20) ? shape[d] : 1;
  }
  return out;
}

[[nodiscard]] inline TensorView WithDType(const TensorView& view, DType dtype) {
  TensorView out = view;
  out.dtype = dtype;
  return out;
}

}  // namespace hopyard::test
