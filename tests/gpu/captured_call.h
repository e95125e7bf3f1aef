// SPDX-License-Identifier: Apache-2.0
// A layer captured in a CUDA graph, and the same call made eagerly beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {

// A call with outputs and a workspace of its own, repeated over inputs that change in place.
class RepeatedCall {
 public:
  RepeatedCall(const Plan& plan, const Weights& weights, const MoeInputs& inputs)
      : plan_(plan),
        weights_(weights),
        inputs_(inputs),
        tokens_(inputs.hidden_states.shape[0]),
        output_(tokens_ * plan.spec().hidden_size),
        replay_(tokens_ * plan.spec().top_k),
        workspace_(plan.workspace_bytes()) {
    const MoeSpec& spec = plan.spec();
    outputs_.output =
        TensorView::Contiguous(output_.get(), DType::kBf16, {tokens_, spec.hidden_size}, kGpu);
    outputs_.replay =
        TensorView::Contiguous(replay_.get(), DType::kInt16, {tokens_, spec.top_k}, kGpu);
  }

  void Run(cudaStream_t stream) const {
    Forward(plan_, weights_, inputs_, outputs_,
            {workspace_.get(), static_cast<size_t>(plan_.workspace_bytes())}, {stream});
  }
  // What a call may find: its outputs never written, its workspace full of anything.
  void Poison(int workspace_byte, cudaStream_t stream) const {
    const MoeSpec& spec = plan_.spec();
    HOPYARD_CUDA(cudaMemsetAsync(output_.get(), 0xFF, Bytes(tokens_ * spec.hidden_size), stream));
    HOPYARD_CUDA(cudaMemsetAsync(replay_.get(), 0xFF, Bytes(tokens_ * spec.top_k), stream));
    HOPYARD_CUDA(cudaMemsetAsync(workspace_.get(), workspace_byte,
                                 static_cast<size_t>(plan_.workspace_bytes()), stream));
  }
  [[nodiscard]] std::vector<uint16_t> Output() const { return output_.Download(); }
  [[nodiscard]] std::vector<int16_t> Replay() const { return replay_.Download(); }
  [[nodiscard]] bool Intact() const {
    return output_.GuardsIntact() && replay_.GuardsIntact() && workspace_.GuardsIntact();
  }

 private:
  static size_t Bytes(int64_t elements) { return static_cast<size_t>(elements) * 2; }

  Plan plan_;
  const Weights& weights_;
  MoeInputs inputs_;
  int64_t tokens_;
  DeviceArray<uint16_t> output_;
  DeviceArray<int16_t> replay_;
  DeviceArray<uint8_t> workspace_;
  MoeOutputs outputs_;
};

// A stream that orders itself with no other, and what is captured on it.
class CapturedCall {
 public:
  explicit CapturedCall(const RepeatedCall& call) {
    HOPYARD_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    HOPYARD_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    call.Run(stream_);
    HOPYARD_CUDA(cudaStreamEndCapture(stream_, &graph_));
    HOPYARD_CUDA(cudaGraphInstantiate(&exec_, graph_, 0));
  }
  CapturedCall(const CapturedCall&) = delete;
  CapturedCall& operator=(const CapturedCall&) = delete;
  ~CapturedCall() {
    cudaGraphExecDestroy(exec_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }

  void Launch() const { HOPYARD_CUDA(cudaGraphLaunch(exec_, stream_)); }
  [[nodiscard]] cudaStream_t stream() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// Writes the tokens and logits of `from` where `to` has its own.
inline void ReplaceInputs(const LayerInputs& from, const MoeInputs& to, int32_t count) {
  for (const auto& [host, device] : {std::pair{from.get().hidden_states, to.hidden_states},
                                     std::pair{from.get().logits, to.logits}}) {
    HOPYARD_CUDA(cudaMemcpy(device.data, host.data,
                            static_cast<size_t>(host.numel() * SizeOf(host.dtype)),
                            cudaMemcpyHostToDevice));
  }
  HOPYARD_CUDA(cudaMemcpy(to.num_tokens.data, &count, sizeof(count), cudaMemcpyHostToDevice));
}

// A captured call and an eager one of the same plan, on the same inputs on the device, which have a
// count of live tokens.
class CapturedBesideEager {
 public:
  CapturedBesideEager(const Plan& plan, const Weights& weights, const MoeInputs& inputs)
      : inputs_(inputs),
        hidden_(plan.spec().hidden_size),
        replayed_(plan, weights, inputs),
        eager_(plan, weights, inputs),
        graph_(replayed_) {}

  // Whether both give the first `count` of `tokens` the same bits, whatever memory held before, and
  // leave the rows behind them alone.
  [[nodiscard]] ::testing::AssertionResult Agree(const LayerInputs& tokens, int32_t count) const {
    ReplaceInputs(tokens, inputs_, count);
    replayed_.Poison(0xFF, graph_.stream());
    eager_.Poison(0x00, graph_.stream());
    graph_.Launch();
    eager_.Run(graph_.stream());
    const std::vector<uint16_t> output = replayed_.Output();
    const auto untouched = [](uint16_t bits) { return bits == 0xFFFF; };
    const auto live = output.begin() + static_cast<int64_t>(count) * hidden_;
    if (!SameBits(output, eager_.Output()) || !SameBits(replayed_.Replay(), eager_.Replay())) {
      return ::testing::AssertionFailure() << count << " tokens differ from an eager call's";
    }
    if (std::any_of(output.begin(), live, untouched)) {
      return ::testing::AssertionFailure() << count << " tokens are not all written";
    }
    if (!std::all_of(live, output.end(), untouched)) {
      return ::testing::AssertionFailure() << "something is written behind " << count << " tokens";
    }
    return ::testing::AssertionSuccess();
  }
  [[nodiscard]] std::vector<uint16_t> Output() const { return replayed_.Output(); }
  [[nodiscard]] cudaStream_t stream() const { return graph_.stream(); }
  [[nodiscard]] bool Intact() const { return replayed_.Intact() && eager_.Intact(); }

 private:
  MoeInputs inputs_;
  int64_t hidden_;
  RepeatedCall replayed_;
  RepeatedCall eager_;
  CapturedCall graph_;  // of replayed_
};

// One pair for every family of kernels (config.h), and both kinds of NVFP4 rows.
[[nodiscard]] inline std::vector<FormatPair> FamilyPairs() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {{W::kBf16, A::kBf16},        {W::kFp8Block128, A::kFp8Block128},
          {W::kFp8Block128, A::kBf16}, {W::kMxFp8, A::kMxFp8},
          {W::kMxFp4, A::kBf16},       {W::kMxFp4, A::kFp8PerToken},
          {W::kNvFp4, A::kNvFp4},      {W::kNvFp4, A::kFp8PerToken},
          {W::kMxInt4, A::kBf16}};
}

}  // namespace hopyard::test
