// SPDX-License-Identifier: Apache-2.0
// Forward on a GPU in every pair of formats: against the oracle, against the CPU where results are
// exact, and against itself where only the way of calling differs.
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/mixed_tactics.h"
#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {
namespace {

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

// Sizes of whole scale blocks that end inside the groups of 64 and 128 in which kernels think.
MoeSpec OddSpec(const FormatPair& pair) {
  MoeSpec spec = SmallSpec(pair.weights, pair.activations);
  spec.hidden_size = 416;
  spec.intermediate_size = 160;
  spec.activation.alpha.all = 1.25F;
  spec.activation.limit.all = 2.0F;
  return spec;
}

// Calls run(options) with every kernel that computes the layer as its formats say: those that round
// more than these ask have tests of their own.
template <class Run>
void ForEveryKernel(const MoeSpec& spec, int64_t tokens, Run&& run) {
  RunOptions options;
  options.plan.max_tokens = tokens;
  int ran = 0;
  for (const Candidate& candidate : Explain(spec, kGpu, options.plan).candidates) {
    options.plan.tactic = candidate.kernel;
    const bool exact = candidate.reason.find("by name only") == std::string::npos;
    if (exact && Explain(spec, kGpu, options.plan).supported) {
      SCOPED_TRACE(candidate.kernel);
      run(options);
      ++ran;
    }
  }
  EXPECT_GT(ran, 0);
}

class GpuForward : public ::testing::TestWithParam<FormatPair> {
 protected:
  [[nodiscard]] MoeSpec Spec() const {
    return SmallSpec(GetParam().weights, GetParam().activations);
  }
};

TEST_P(GpuForward, MatchesOracle) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  for (const int64_t tokens : {1, 7, 33}) {
    LayerInputs inputs(layer.spec(), tokens);
    layer.RunAndJudge(inputs.Logits());
  }
  LayerInputs many(layer.spec(), 700);
  layer.RunAndJudge(many.Logits(DType::kBf16), {}, {0, 1, 350, 698, 699});
}

TEST_P(GpuForward, OddSizesMatchOracle) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(OddSpec(GetParam())));
  for (const int64_t tokens : {3, 65}) {
    LayerInputs inputs(layer.spec(), tokens);
    layer.RunAndJudge(inputs.Logits(), {}, {0, tokens / 2, tokens - 1});
  }
}

// Widths of published models and of their shards, in rows that begin on 16 bytes.
TEST_P(GpuForward, ModelSizesMatchOracle) {
  HOPYARD_NEEDS_GPU();
  for (const ActivationKind kind : {ActivationKind::kSwiGlu, ActivationKind::kRelu2}) {
    for (const int64_t hidden : {2688, 2880}) {
      for (const int64_t intermediate : {40, 80, 96, 192, 704, 1856}) {
        WeightSource source = SourceOf(Spec());
        source.spec.num_experts = 1;
        source.spec.top_k = 1;
        source.spec.hidden_size = hidden;
        source.spec.intermediate_size = intermediate;
        source.spec.activation.kind = kind;
        source.gain = 0.5F;  // as for every activation below
        source.layout.row_alignment = 16;
        TwinLayer layer(source);
        LayerInputs inputs(layer.spec(), 3);
        SCOPED_TRACE(ToString(layer.spec()));
        layer.RunAndJudge(inputs.Logits(), {}, {0, 2});
      }
    }
  }
}

TEST_P(GpuForward, EveryActivationMatchesOracle) {
  HOPYARD_NEEDS_GPU();
  using K = ActivationKind;
  for (const K kind :
       {K::kGeGlu, K::kGeGluTanh, K::kSiTu, K::kRelu2, K::kSilu, K::kGelu, K::kIdentity}) {
    MoeSpec spec = Spec();
    spec.activation.kind = kind;
    if (kind == K::kSiTu) {
      spec.activation.alpha.all = 4.0F;
      spec.activation.beta.all = 25.0F;
    }
    WeightSource source = SourceOf(spec);
    source.gain = 0.5F;  // squares stay below the largest code of a static scale
    TwinLayer layer(source);
    LayerInputs inputs(spec, 19);
    SCOPED_TRACE(std::string(ToString(kind)));
    layer.RunAndJudge(inputs.Logits());
  }
}

// Scales from 2^-40 to 2^20 neither vanish nor overflow: powers of two leave every other bit alone.
TEST_P(GpuForward, ScaledWeightsScaleTheOutput) {
  HOPYARD_NEEDS_GPU();
  if (GetParam().activations == ActivationFormat::kFp8PerTensor ||
      GetParam().activations == ActivationFormat::kNvFp4) {
    return;  // GEMM2's rows have a static scale
  }
  WeightSource source;
  source.spec = Spec();
  source.spec.activation.kind = ActivationKind::kIdentity;
  LayerInputs inputs(source.spec, 4);
  inputs.Logits();
  const RunResult usual = TwinLayer(source).Run(inputs);
  for (const float gain : {0x1p-20F, 0x1p10F}) {
    source.gain = gain;
    std::vector<double> scaled = FromBf16(TwinLayer(source).Run(inputs).output);
    for (double& value : scaled) {
      value /= static_cast<double>(gain) * gain;
    }
    EXPECT_TRUE(SameBits(scaled, FromBf16(usual.output))) << "gain " << gain;
  }
}

// The expert named by a slot acts with its own parameters; shared experts take the common ones.
TEST_P(GpuForward, ParametersOfExpertsMatchOracle) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = Spec();
  spec.shared = {1, false, 0.5F, spec.weights};
  for (int e = 0; e < spec.num_experts; ++e) {
    spec.activation.alpha.each.push_back(1.0F + 0.1F * static_cast<float>(e));
    spec.activation.beta.each.push_back(0.2F * static_cast<float>(e));
    spec.activation.limit.each.push_back(0.5F + 0.25F * static_cast<float>(e));
  }
  spec.activation.limit.all = 0.75F;
  TwinLayer layer(SourceOf(spec));
  LayerInputs inputs(spec, 23);
  layer.RunAndJudge(inputs.Logits());
}

TEST_P(GpuForward, EveryKernelMatchesOracle) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 41);
  inputs.Logits();
  ForEveryKernel(layer.spec(), 41,
                 [&](const RunOptions& run) { layer.Judge(inputs, layer.Run(inputs, run)); });
}

// Without biases, and without outputs that only general kernels have, plain kernels run
// (gemm/sm90/plain.h): the oracle's output, and the bits of the call that asks for everything.
TEST_P(GpuForward, PlainKernelsMatchOracle) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = Spec();
  source.spec.intermediate_size = 256;
  TwinLayer layer(source);
  const auto judge = [&](const LayerInputs& inputs, RunOptions run, int64_t tokens) {
    RunResult all = layer.Run(inputs, run);
    run.extras = false;
    const RunResult plain = layer.Run(inputs, run);
    EXPECT_TRUE(SameBits(plain.output, all.output));
    all.output = plain.output;
    EXPECT_TRUE(
        MatchesOracle(layer.spec(), layer.cpu(), inputs.get(), all, {0, tokens / 2, tokens - 1}));
  };
  for (const int64_t tokens : {1, 33, 700}) {
    LayerInputs inputs(layer.spec(), tokens);
    SCOPED_TRACE(tokens);
    judge(inputs.Logits(), {}, tokens);
  }
  LayerInputs inputs(layer.spec(), 130);
  inputs.Logits();
  ForEveryKernel(layer.spec(), 130, [&](const RunOptions& run) { judge(inputs, run, 130); });
}

// GEMM1 and GEMM2 in tiles of their own: from one launch ahead of them to four, several tiles an
// expert. What GEMM1 writes does not depend on how GEMM2 takes it.
TEST_P(GpuForward, EveryKernelBesideOtherTilesMatchesOracle) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  const std::vector<std::string> tactics = MixedTactics(layer.spec());
  if (tactics.empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  for (const int64_t tokens : {3, 200, 1300}) {
    LayerInputs inputs(layer.spec(), tokens);
    inputs.Logits();
    for (const std::string& tactic : tactics) {
      SCOPED_TRACE(tactic + " for " + std::to_string(tokens) + " tokens");
      RunOptions mixed;
      mixed.plan.tactic = tactic;
      const RunResult got = layer.Run(inputs, mixed);
      EXPECT_TRUE(
          MatchesOracle(layer.spec(), layer.cpu(), inputs.get(), got, {0, tokens / 2, tokens - 1}));
      RunOptions gemm1;
      gemm1.plan.tactic = tactic.substr(0, tactic.find('+'));
      const RunResult plain = layer.Run(inputs, gemm1);
      EXPECT_TRUE(SameBits(got.slot_to_row, plain.slot_to_row));
      EXPECT_TRUE(SameBits(got.activation, plain.activation));
    }
  }
}

// Chunks of the batch list their tiles one after the other in the same workspace.
TEST_P(GpuForward, MixedTilesInChunksGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  const std::vector<std::string> tactics = MixedTactics(layer.spec());
  if (tactics.empty()) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  LayerInputs inputs(layer.spec(), 130);
  inputs.Logits();
  for (const std::string& tactic : {tactics.front(), tactics.back()}) {
    RunOptions options;
    options.plan.tactic = tactic;
    const RunResult whole = layer.Run(inputs, options);
    PlanOptions third;
    third.max_tokens = 44;
    options.plan.workspace_cap = MakePlan(layer.spec(), kGpu, third).workspace_bytes();
    for (const bool overlap : {false, true}) {
      options.plan.overlap_launches = overlap;
      EXPECT_TRUE(SameBits(layer.Run(inputs, options).output, whole.output)) << tactic;
    }
  }
}

// Codes and scales instead of BF16 hidden states.
TEST_P(GpuForward, QuantisedHiddenStatesMatchOracle) {
  HOPYARD_NEEDS_GPU();
  if (GetParam().activations == ActivationFormat::kBf16) {
    return;  // has no codes
  }
  TwinLayer layer(SourceOf(OddSpec(GetParam())));
  LayerInputs inputs(layer.spec(), 21);
  layer.RunAndJudge(inputs.Logits().QuantizeHidden());
}

// No tensor but the values of weights has to begin on more than one element.
TEST_P(GpuForward, TensorsOffSixteenBytesGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  const WeightSource source = SourceOf(OddSpec(GetParam()));
  TwinLayer layer(source);
  DeviceMirror later(Begin::kAnElementLater);
  const Weights weights(source.spec, later.Copy(layer.storage().desc()));
  for (const bool codes : {false, true}) {
    LayerInputs inputs(source.spec, 21);
    inputs.Logits();
    if (codes && GetParam().activations == ActivationFormat::kBf16) {
      continue;  // has none
    }
    if (codes) {
      inputs.QuantizeHidden();
    }
    const RunResult wanted = layer.Run(inputs);
    const RunResult got = RunOnGpu(weights, inputs.get(), {}, Begin::kAnElementLater);
    EXPECT_TRUE(SameBits(got.output, wanted.output)) << "output, codes " << codes;
    EXPECT_TRUE(SameBits(got.rows, wanted.rows)) << "rows, codes " << codes;
    EXPECT_TRUE(SameBits(got.activation, wanted.activation)) << "activation, codes " << codes;
    EXPECT_TRUE(SameBits(got.ids, wanted.ids)) << "routing_ids, codes " << codes;
    EXPECT_TRUE(SameBits(got.replay, wanted.replay)) << "replay, codes " << codes;
    EXPECT_TRUE(SameBits(got.weights, wanted.weights)) << "routing_weights, codes " << codes;
    EXPECT_TRUE(SameBits(got.slot_to_row, wanted.slot_to_row)) << "slot_to_row, codes " << codes;
    EXPECT_TRUE(SameBits(got.load, wanted.load)) << "expert_load, codes " << codes;
  }
  EXPECT_TRUE(later.Intact());
}

TEST_P(GpuForward, RepeatedCallsGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 130);
  inputs.Logits();
  const RunResult first = layer.Run(inputs);
  for (int i = 0; i < 3; ++i) {
    const RunResult again = layer.Run(inputs);
    EXPECT_TRUE(SameBits(again.output, first.output));
    EXPECT_TRUE(SameBits(again.activation, first.activation));
  }
}

// One token at any place of any batch, where a plan has one choice for all: the same bytes.
TEST_P(GpuForward, ATokenDoesNotDependOnItsBatch) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  const int64_t hidden = layer.spec().hidden_size;
  RunOptions options;
  options.plan.batch_invariant = true;
  options.plan.max_tokens = 700;
  LayerInputs needle(layer.spec(), 1);
  needle.Logits();
  const RunResult alone = layer.Run(needle, options);
  for (const int64_t tokens :
       SmallTests() ? std::vector<int64_t>{40} : std::vector<int64_t>{2, 40, 700}) {
    for (const int64_t place : {int64_t{0}, tokens / 2, tokens - 1}) {
      LayerInputs batch(layer.spec(), tokens, 50 + static_cast<uint64_t>(tokens));
      batch.Logits().CopyToken(needle, 0, place);
      const RunResult result = layer.Run(batch, options);
      const auto begin = result.output.begin() + place * hidden;
      EXPECT_TRUE(SameBits(std::vector<uint16_t>(begin, begin + hidden), alone.output))
          << "token " << place << " of " << tokens;
    }
  }
}

// In one chunk and in several, whose workspace each writes again, with one launch before the GEMMs
// and with many.
TEST_P(GpuForward, OverlappingLaunchesGiveTheSameBits) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  for (const int64_t tokens : {3, 130}) {
    LayerInputs inputs(layer.spec(), tokens);
    inputs.Logits();
    PlanOptions third;
    third.max_tokens = (tokens + 2) / 3;
    for (const bool chunks : {false, true}) {
      RunOptions options;
      options.plan.overlap_launches = false;
      options.plan.workspace_cap =
          chunks ? MakePlan(layer.spec(), kGpu, third).workspace_bytes() : 0;
      const RunResult apart = layer.Run(inputs, options);
      options.plan.overlap_launches = true;
      for (int i = 0; i < 5; ++i) {
        const RunResult result = layer.Run(inputs, options);
        EXPECT_TRUE(SameBits(result.output, apart.output)) << tokens << " tokens";
        EXPECT_TRUE(SameBits(result.rows, apart.rows)) << tokens << " tokens";
        EXPECT_TRUE(SameBits(result.slot_to_row, apart.slot_to_row)) << tokens << " tokens";
        EXPECT_TRUE(SameBits(result.load, apart.load)) << tokens << " tokens";
      }
    }
  }
}

TEST_P(GpuForward, UnfinalisedRowsSumToTheOutput) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 17);
  const RunResult full = layer.Run(inputs.Logits());
  EXPECT_TRUE(SameBits(FinalizeByHand(layer.spec(), full, 17), full.output));
  RunOptions rows;
  rows.no_output = true;
  rows.extras = false;
  EXPECT_TRUE(SameBits(layer.Run(inputs, rows).rows, full.rows));
  RunOptions bare;
  bare.extras = false;
  EXPECT_TRUE(SameBits(layer.Run(inputs, bare).output, full.output));
}

TEST_P(GpuForward, NarrowAndAccumulatedOutputs) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 9);
  const RunResult whole = layer.Run(inputs.Logits());
  RunOptions narrow;
  narrow.width = 101;
  const RunResult cut = layer.Run(inputs, narrow);
  for (int64_t i = 0; i < 9 * 101; ++i) {
    ASSERT_EQ(cut.output[Index(i)],
              whole.output[Index(i / 101 * layer.spec().hidden_size + i % 101)]);
  }
  RunOptions twice;
  twice.accumulate = true;
  twice.initial.assign(whole.output.size(), 0);
  EXPECT_TRUE(SameBits(layer.Run(inputs, twice).output, whole.output)) << "added to zeros";
}

// Chunks may take other tiles, whose sums are rounded apart only where they are cut apart.
TEST_P(GpuForward, ChunksUnderAWorkspaceCapMatchOracle) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 61);
  inputs.Logits();
  PlanOptions eleven;
  eleven.max_tokens = 11;
  RunOptions capped;
  capped.plan.max_tokens = 61;
  capped.plan.workspace_cap = MakePlan(layer.spec(), kGpu, eleven).workspace_bytes();
  const Plan plan = MakePlan(layer.spec(), kGpu, capped.plan);
  EXPECT_EQ(plan.tokens_per_chunk(), 11);
  EXPECT_LE(plan.workspace_bytes(), capped.plan.workspace_cap);
  const RunResult result = layer.Run(inputs, capped);
  EXPECT_TRUE(MatchesOracle(layer.spec(), layer.cpu(), inputs.get(), result));
  EXPECT_TRUE(SameBits(FinalizeByHand(layer.spec(), result, 61), result.output));
  const RunResult whole = layer.Run(inputs);
  EXPECT_TRUE(SameBits(result.ids, whole.ids));
  EXPECT_TRUE(SameBits(result.load, whole.load));
}

TEST_P(GpuForward, NumTokensOnTheDeviceLeavesTheTailUntouched) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  constexpr int64_t kTokens = 37;
  LayerInputs inputs(layer.spec(), kTokens);
  const RunResult whole = layer.Run(inputs.Logits());
  RunOptions capped;
  PlanOptions ten;
  ten.max_tokens = 10;
  capped.plan.workspace_cap = MakePlan(layer.spec(), kGpu, ten).workspace_bytes();
  const auto slots = layer.spec().top_k;
  for (const int32_t count : {0, 1, 10, 23, 37}) {
    inputs.NumTokens(count);
    const RunResult part = layer.Run(inputs);
    const auto end = Index(count * layer.spec().hidden_size);
    for (size_t i = 0; i < part.output.size(); ++i) {
      ASSERT_EQ(part.output[i], i < end ? whole.output[i] : 0xFFFF) << count << " tokens, " << i;
    }
    for (const RunResult& result : {part, layer.Run(inputs, capped)}) {
      EXPECT_TRUE(std::all_of(result.output.begin() + static_cast<int64_t>(end),
                              result.output.end(), [](uint16_t bits) { return bits == 0xFFFF; }));
      for (size_t i = 0; i < result.ids.size(); ++i) {
        const bool live = i < Index(int64_t{count} * slots);
        ASSERT_EQ(result.ids[i], live ? whole.ids[i] : -1);
        ASSERT_EQ(result.replay[i], live ? whole.replay[i] : -1);
        ASSERT_EQ(std::isnan(result.weights[i]), !live);
        ASSERT_EQ(result.slot_to_row[i] >= 0, live);
      }
    }
  }
}

// Captured at capacity, replayed with other numbers of tokens.
TEST_P(GpuForward, ACapturedCallTakesAnyNumberOfTokens) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  constexpr int64_t kTokens = 29;
  const int64_t hidden = layer.spec().hidden_size;
  LayerInputs inputs(layer.spec(), kTokens);
  const RunResult whole = layer.Run(inputs.Logits());
  inputs.NumTokens(0);
  PlanOptions options;
  options.max_tokens = kTokens;
  const Plan plan = MakePlan(layer.spec(), kGpu, options);
  DeviceMirror mirror;
  const MoeInputs on_gpu = mirror.Copy(inputs.get());
  const DeviceArray<uint16_t> output(kTokens * hidden);
  const DeviceArray<uint8_t> workspace(plan.workspace_bytes());
  MoeOutputs outputs;
  outputs.output = TensorView::Contiguous(output.get(), DType::kBf16, {kTokens, hidden}, kGpu);
  cudaStream_t stream = nullptr;
  HOPYARD_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  HOPYARD_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  Forward(plan, layer.gpu(), on_gpu, outputs,
          {workspace.get(), static_cast<size_t>(plan.workspace_bytes())}, {stream});
  cudaGraph_t graph = nullptr;
  HOPYARD_CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec = nullptr;
  HOPYARD_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (const int32_t count : {29, 0, 5, 29, 1}) {
    HOPYARD_CUDA(cudaMemset(output.get(), 0xFF, Index(kTokens * hidden * 2)));
    HOPYARD_CUDA(cudaMemcpy(on_gpu.num_tokens.data, &count, 4, cudaMemcpyHostToDevice));
    HOPYARD_CUDA(cudaDeviceSynchronize());
    HOPYARD_CUDA(cudaGraphLaunch(exec, stream));
    std::vector<uint16_t> wanted = whole.output;
    std::fill(wanted.begin() + count * hidden, wanted.end(), uint16_t{0xFFFF});
    EXPECT_TRUE(SameBits(output.Download(), wanted)) << count << " tokens";
  }
  HOPYARD_CUDA(cudaGraphExecDestroy(exec));
  HOPYARD_CUDA(cudaGraphDestroy(graph));
  HOPYARD_CUDA(cudaStreamDestroy(stream));
}

TEST_P(GpuForward, NoTokensDoNothing) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 0);
  const RunResult result = layer.Run(inputs.Logits());
  EXPECT_TRUE(result.output.empty());
  for (const int32_t count : result.load) {
    EXPECT_EQ(count, 0);
  }
}

// LoRA deltas and router weights on the input, beside a bias and shared experts.
TEST_P(GpuForward, AdjustedInputsMatchOracle) {
  HOPYARD_NEEDS_GPU();
  MoeSpec spec = Spec();
  spec.shared = {1, false, 0.5F, spec.weights};
  TwinLayer plain(SourceOf(spec));
  LayerInputs inputs(spec, 13);
  plain.RunAndJudge(inputs.Logits().Delta());
  spec.router_weight_on_input = true;
  spec.routing = RoutingRule::Llama4();
  spec.top_k = 1;
  TwinLayer weighted(SourceOf(spec));
  LayerInputs others(spec, 13);
  weighted.RunAndJudge(others.Logits());
}

// The value before its quantisation, which every format rounds from the same BF16 products.
TEST_P(GpuForward, Gemm1ActivationIsThatOfTheCpu) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(Spec()));
  LayerInputs inputs(layer.spec(), 12);
  inputs.Logits();
  const RunResult got = layer.Run(inputs);
  const std::vector<double> wanted = FromBf16(layer.RunOnCpu(inputs).activation);
  Judged judged{FromBf16(got.activation), wanted, wanted, layer.spec().intermediate_size};
  // The CPU's own rounding is all there is to compare with.
  const Tolerance tolerance = ToleranceOf(GetParam().activations);
  judged.plain[0] += tolerance.worst_row * Rms(wanted) * 4.0;
  EXPECT_TRUE(Accurate(judged, tolerance));
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuForward, ::testing::ValuesIn(SupportedPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
