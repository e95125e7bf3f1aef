// SPDX-License-Identifier: Apache-2.0
// Captured layers on a GPU, of one pair of formats for every kind of kernel: any number of tokens
// up to capacity, new routings and weights written in place after the capture; and that the same
// call always gives the same bits.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/mixed_tactics.h"
#include "tests/gpu/runner_sm90.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

constexpr int64_t kCapacity = 512;

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

class GpuGraph : public ::testing::TestWithParam<FormatPair> {
 protected:
  GpuGraph() {
    source_.spec = SmallSpec(GetParam().weights, GetParam().activations);
    source_.bias = true;
  }

  [[nodiscard]] PlanOptions Capacity(int64_t tokens) const {
    PlanOptions options;
    options.max_tokens = tokens;
    return options;
  }

  WeightSource source_;
};

// Writes the tokens and logits of `from` where `to` has its own.
void ReplaceInputs(const LayerInputs& from, const MoeInputs& to, int32_t count) {
  for (const auto& [host, device] : {std::pair{from.get().hidden_states, to.hidden_states},
                                     std::pair{from.get().logits, to.logits}}) {
    HOPYARD_CUDA(cudaMemcpy(device.data, host.data,
                            static_cast<size_t>(host.numel() * SizeOf(host.dtype)),
                            cudaMemcpyHostToDevice));
  }
  HOPYARD_CUDA(cudaMemcpy(to.num_tokens.data, &count, sizeof(count), cudaMemcpyHostToDevice));
}

// Everything of `fresh` into `live`.
void UpdateAll(const WeightSource& source, const LayerWeights& fresh, cudaStream_t stream,
               Weights* live) {
  Refit refit(5);
  refit.AddParts(fresh, source.spec.num_experts, source.layout.separate);
  refit.Apply(HasGlobalScale(source.spec.weights),
              [&](const WeightSlice& slice) { live->Update(slice, {stream}); });
}

// The capture is the first call of all: nothing has been loaded or prepared before it.
TEST_P(GpuGraph, TakesNewTokensRoutingsAndWeights) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs shape(source_.spec, kCapacity);
  const MoeInputs inputs = mirror.Copy(shape.Logits().NumTokens(0).get());
  const Plan plan = MakePlan(source_.spec, kGpu, Capacity(kCapacity));
  const RepeatedCall replayed(plan, layer.gpu(), inputs);
  const RepeatedCall eager(plan, layer.gpu(), inputs);
  const CapturedCall graph(replayed);
  source_.seed = 99;
  source_.gain = 2.0F;
  const LayerWeights fresh(source_);
  std::vector<uint16_t> before;  // all tokens with the first weights
  for (const bool updated : {false, true}) {
    if (updated) {
      UpdateAll(source_, fresh, graph.stream(), &layer.gpu());
      HOPYARD_CUDA(cudaStreamSynchronize(graph.stream()));
    }
    uint64_t seed = 11;
    for (const int32_t count : {0, 1, 17, 511, 512}) {
      LayerInputs tokens(source_.spec, kCapacity, seed++);
      ReplaceInputs(tokens.Logits(), inputs, count);
      replayed.Poison(0xFF, graph.stream());
      eager.Poison(0x00, graph.stream());
      graph.Launch();
      eager.Run(graph.stream());
      const std::vector<uint16_t> output = replayed.Output();
      ASSERT_TRUE(SameBits(output, eager.Output())) << count << " tokens, updated " << updated;
      ASSERT_TRUE(SameBits(replayed.Replay(), eager.Replay())) << count << " tokens";
      const auto live = static_cast<int64_t>(count) * source_.spec.hidden_size;
      ASSERT_TRUE(std::all_of(output.begin() + live, output.end(),
                              [](uint16_t bits) { return bits == 0xFFFF; }))
          << count << " tokens";
      ASSERT_TRUE(std::none_of(output.begin(), output.begin() + live,
                               [](uint16_t bits) { return bits == 0xFFFF; }))
          << count << " tokens";
      if (count == kCapacity) {
        EXPECT_FALSE(updated && SameBits(output, before)) << "the new weights had no effect";
        before = output;
      }
    }
  }
  EXPECT_TRUE(replayed.Intact() && eager.Intact());
}

// Each GEMM has its own tiles, which every replay lists anew.
TEST_P(GpuGraph, TakesNewRoutingsInMixedTiles) {
  HOPYARD_NEEDS_GPU();
  const std::vector<std::string> tactics = MixedTactics(source_.spec);
  if (tactics.empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs shape(source_.spec, kCapacity);
  const MoeInputs inputs = mirror.Copy(shape.Logits().NumTokens(0).get());
  for (const std::string& tactic : {tactics.front(), tactics.back()}) {
    PlanOptions options = Capacity(kCapacity);
    options.tactic = tactic;
    const Plan plan = MakePlan(source_.spec, kGpu, options);
    const RepeatedCall replayed(plan, layer.gpu(), inputs);
    const RepeatedCall eager(plan, layer.gpu(), inputs);
    const CapturedCall graph(replayed);
    uint64_t seed = 31;
    for (const int32_t count : {512, 0, 17, 511}) {
      LayerInputs tokens(source_.spec, kCapacity, seed++);
      ReplaceInputs(tokens.Logits(), inputs, count);
      replayed.Poison(0xFF, graph.stream());
      eager.Poison(0x00, graph.stream());
      graph.Launch();
      eager.Run(graph.stream());
      const std::vector<uint16_t> output = replayed.Output();
      ASSERT_TRUE(SameBits(output, eager.Output())) << tactic << ", " << count << " tokens";
      const auto live = static_cast<int64_t>(count) * source_.spec.hidden_size;
      ASSERT_TRUE(std::none_of(output.begin(), output.begin() + live,
                               [](uint16_t bits) { return bits == 0xFFFF; }))
          << tactic << ", " << count << " tokens";
    }
    EXPECT_TRUE(replayed.Intact() && eager.Intact());
  }
}

// The updated layer is the freshly loaded one.
TEST_P(GpuGraph, UpdatedWeightsAreThoseOfAFreshLayer) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 33;
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs tokens(source_.spec, kTokens);
  const MoeInputs inputs = mirror.Copy(tokens.Logits().get());
  const RepeatedCall call(MakePlan(source_.spec, kGpu, Capacity(kTokens)), layer.gpu(), inputs);
  const CapturedCall graph(call);
  source_.seed = 99;
  TwinLayer fresh(source_);
  UpdateAll(source_, fresh.storage(), graph.stream(), &layer.gpu());
  graph.Launch();
  EXPECT_TRUE(SameBits(call.Output(), fresh.Run(tokens).output));
}

// Ten thousand times, whatever the workspace holds before.
TEST_P(GpuGraph, EveryLaunchGivesTheSameBits) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 130;
  const int launches = SmallTests() ? 3 : 10000;
  TwinLayer layer(source_);
  DeviceMirror mirror;
  LayerInputs tokens(source_.spec, kTokens);
  const MoeInputs inputs = mirror.Copy(tokens.Logits().get());
  const RepeatedCall call(MakePlan(source_.spec, kGpu, Capacity(kTokens)), layer.gpu(), inputs);
  const CapturedCall graph(call);
  call.Run(graph.stream());
  const std::vector<uint16_t> wanted = call.Output();
  for (int i = 0; i < launches; ++i) {
    call.Poison(i % 256, graph.stream());
    if (i % 2 == 0) {
      call.Run(graph.stream());
    } else {
      graph.Launch();
    }
    ASSERT_TRUE(SameBits(call.Output(), wanted)) << "launch " << i;
  }
}

// One pair for every family of kernels (config.h), and both kinds of NVFP4 rows.
std::vector<FormatPair> FamilyPairs() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {{W::kBf16, A::kBf16},        {W::kFp8Block128, A::kFp8Block128},
          {W::kFp8Block128, A::kBf16}, {W::kMxFp8, A::kMxFp8},
          {W::kMxFp4, A::kBf16},       {W::kMxFp4, A::kFp8PerToken},
          {W::kNvFp4, A::kNvFp4},      {W::kNvFp4, A::kFp8PerToken},
          {W::kMxInt4, A::kBf16}};
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuGraph, ::testing::ValuesIn(FamilyPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
