// SPDX-License-Identifier: Apache-2.0
// Packed weights on a GPU: the bits of the checkpoint's layout, whatever that was, with every
// kernel, after the given codes are gone, and after updates, also under a captured graph.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "formats/format_rules.h"
#include "gemm/sm90/rows.h"
#include "tests/gpu/all_kernels.h"
#include "tests/gpu/captured_call.h"
#include "tests/gpu/runner_sm90.h"
#include "tests/refit.h"

namespace hopyard::test {
namespace {

#define HOPYARD_NEEDS_PACKED_KERNELS()                          \
  HOPYARD_NEEDS_GPU();                                          \
  if (!HasAllKernels()) {                                       \
    GTEST_SKIP() << "a build of a few kernels, none for packed" \
                    " weights";                                 \
  }

// Every byte that packed weights do without.
void Spoil(const MoeSpec& spec, const WeightsDesc& desc) {
  const auto spoil = [](const TensorView& view) {
    if (view.defined()) {
      HOPYARD_CUDA(
          cudaMemset(view.data, 0xFF, static_cast<size_t>(view.numel() * SizeOf(view.dtype))));
    }
  };
  for (const ExpertMatrices* group : {&desc.routed, &desc.shared}) {
    if (!formats::HasPackedOrder(group == &desc.routed ? spec.weights : spec.shared.weights)) {
      continue;
    }
    for (const MatrixSet* set : {&group->gemm1, &group->gate, &group->up, &group->gemm2}) {
      spoil(set->values);
      spoil(set->scales);
      for (const auto* list : {&set->values_per_expert, &set->scales_per_expert}) {
        for (const TensorView& view : *list) {
          spoil(view);
        }
      }
    }
  }
}

// Packed weights of a source on the GPU. Its codes are NaN once they have been packed.
class PackedLayer {
 public:
  explicit PackedLayer(const WeightSource& source) : storage_(source) {
    WeightsDesc desc = mirror_.Copy(storage_.desc());
    desc.packed = true;
    weights_ = Weights(source.spec, desc);
    // Of dense layouts only: with rows apart, what lies between them is nobody's to write.
    if (source.layout.padding == 0) {
      Spoil(source.spec, desc);
    }
  }
  [[nodiscard]] Weights& weights() { return weights_; }
  [[nodiscard]] const Weights& weights() const { return weights_; }
  [[nodiscard]] const LayerWeights& storage() const { return storage_; }
  [[nodiscard]] RunResult Run(const LayerInputs& inputs, const RunOptions& options = {}) const {
    return RunOnGpu(weights_, inputs.get(), options);
  }

 private:
  LayerWeights storage_;
  DeviceMirror mirror_;
  Weights weights_;
};

std::vector<FormatPair> PackablePairs() {
  std::vector<FormatPair> pairs;
  for (const FormatPair& pair : SupportedPairs()) {
    const bool promotes =
        pair.weights == WeightFormat::kNvFp4 && pair.activations == ActivationFormat::kFp8PerToken;
    if (formats::HasPackedOrder(pair.weights) && !promotes) {
      pairs.push_back(pair);
    }
  }
  return pairs;
}

void ExpectSame(const RunResult& got, const RunResult& wanted) {
  EXPECT_TRUE(SameBits(got.output, wanted.output)) << "output";
  EXPECT_TRUE(SameBits(got.rows, wanted.rows)) << "rows";
  EXPECT_TRUE(SameBits(got.activation, wanted.activation)) << "activation";
}

class GpuPacked : public ::testing::TestWithParam<FormatPair> {
 protected:
  [[nodiscard]] MoeSpec Spec() const {
    return SmallSpec(GetParam().weights, GetParam().activations);
  }
};

TEST_P(GpuPacked, MatchesOracle) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  TwinLayer plain(SourceOf(Spec()));
  const PackedLayer packed(SourceOf(Spec()));
  for (const int64_t tokens : {1, 33, 300}) {
    LayerInputs inputs(plain.spec(), tokens);
    inputs.Logits();
    plain.Judge(inputs, packed.Run(inputs), {}, {0, tokens / 2, tokens - 1});
  }
}

// Kernels that share K add its parts up in another order than the one that takes their place.
TEST_P(GpuPacked, EveryKernelGivesTheSameBits) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  MoeSpec odd = Spec();
  odd.hidden_size = 416;
  odd.intermediate_size = 160;
  for (const MoeSpec& spec : {Spec(), odd}) {
    TwinLayer plain(SourceOf(spec));
    const PackedLayer packed(SourceOf(spec));
    for (const int64_t tokens : {5, 130}) {
      LayerInputs inputs(spec, tokens);
      inputs.Logits();
      PlanOptions options;
      options.max_tokens = tokens;
      int ran = 0;
      for (const Candidate& candidate : Explain(spec, kGpu, options).candidates) {
        RunOptions run;
        run.plan.tactic = candidate.kernel;
        run.plan.max_tokens = tokens;
        const bool apart = candidate.reason.find("takes the place") != std::string::npos ||
                           candidate.reason.find("by name only") != std::string::npos ||
                           candidate.kernel.find("_k4") != std::string::npos;
        if (!apart && Explain(spec, kGpu, run.plan).supported) {
          SCOPED_TRACE(candidate.kernel + " for " + std::to_string(tokens) + " tokens");
          ExpectSame(packed.Run(inputs, run), plain.Run(inputs, run));
          ++ran;
        }
      }
      EXPECT_GT(ran, 0);
    }
  }
}

// Rows and columns that end inside a unit, in both GEMMs; experts without tokens.
TEST_P(GpuPacked, SizesInsideUnitsGiveTheSameBits) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  for (const auto& [hidden, inter] : std::vector<std::pair<int, int>>{
           {128, 64}, {160, 96}, {2688, 192}, {2880, 704}, {320, 1856}, {128, 320}}) {
    MoeSpec spec = Spec();
    spec.hidden_size = hidden;
    spec.intermediate_size = inter;
    TwinLayer plain(SourceOf(spec));
    const PackedLayer packed(SourceOf(spec));
    for (const int64_t tokens : {2, 200}) {
      LayerInputs inputs(spec, tokens);
      inputs.Logits();
      SCOPED_TRACE(std::to_string(hidden) + " x " + std::to_string(inter) + ", " +
                   std::to_string(tokens) + " tokens");
      ExpectSame(packed.Run(inputs), plain.Run(inputs));
    }
  }
}

TEST_P(GpuPacked, EveryActivationGivesTheSameBits) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  using K = ActivationKind;
  for (const K kind : {K::kGeGlu, K::kRelu2, K::kIdentity}) {
    MoeSpec spec = Spec();
    spec.activation.kind = kind;
    WeightSource source = SourceOf(spec);
    source.gain = 0.5F;  // squares stay below the largest code of a static scale
    TwinLayer plain(source);
    const PackedLayer packed(source);
    LayerInputs inputs(spec, 40);
    inputs.Logits();
    SCOPED_TRACE(std::string(ToString(kind)));
    ExpectSame(packed.Run(inputs), plain.Run(inputs));
  }
}

// Shared experts in the same format, and beside them in one that is not packed.
TEST_P(GpuPacked, SharedExpertsGiveTheSameBits) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  for (const WeightFormat format : {GetParam().weights, WeightFormat::kBf16}) {
    if (!formats::IsSupportedPair(format, GetParam().activations)) {
      continue;
    }
    MoeSpec spec = Spec();
    spec.shared = {2, false, 0.5F, format};
    TwinLayer plain(SourceOf(spec));
    const PackedLayer packed(SourceOf(spec));
    const WeightOrders orders = OrdersOf(spec, packed.weights().desc());
    EXPECT_EQ(orders.gemm1, ReadOrder::kPacked);
    EXPECT_EQ(orders.shared_gemm2,
              formats::HasPackedOrder(format) ? ReadOrder::kPacked : ReadOrder::kKMajor);
    LayerInputs inputs(spec, 50);
    inputs.Logits();
    ExpectSame(packed.Run(inputs), plain.Run(inputs));
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuPacked, ::testing::ValuesIn(PackablePairs()),
                         [](const auto& test) { return ToString(test.param); });

class GpuPackedLayout : public ::testing::TestWithParam<WeightFormat> {
 protected:
  GpuPackedLayout() {
    source_.spec = SmallSpec(GetParam(), ActivationFormat::kBf16);
    if (GetParam() == WeightFormat::kMxFp4) {
      source_.spec.activations = ActivationFormat::kFp8PerToken;  // reads row exponents
    }
    source_.spec.num_experts = 3;
    source_.spec.intermediate_size = 256;
    source_.bias = true;
  }
  WeightSource source_;
};

TEST_P(GpuPackedLayout, EveryLayoutGivesTheSameBits) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  LayerInputs inputs(source_.spec, 21);
  inputs.Logits();
  const RunResult wanted = TwinLayer(source_).Run(inputs);
  // Rows may begin anywhere: the copy engine does not read them.
  for (const int64_t padding : {0, 40, 48}) {
    for (const WeightLayout& layout : KMajorLayouts(padding)) {
      SCOPED_TRACE(ToString(layout));
      source_.layout = layout;
      ExpectSame(PackedLayer(source_).Run(inputs), wanted);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, GpuPackedLayout,
                         ::testing::Values(WeightFormat::kMxFp4, WeightFormat::kNvFp4),
                         [](const auto& test) { return std::string(ToString(test.param)); });

std::vector<UpdateCase> PackedUpdateCases() {
  std::vector<UpdateCase> cases = UpdateCases();
  std::erase_if(cases, [](const UpdateCase& one) { return !formats::HasPackedOrder(one.format); });
  return cases;
}

class GpuPackedUpdate : public ::testing::TestWithParam<UpdateCase> {};

// Gate and up one by one, and as one matrix; a graph captured before sees the new weights.
TEST_P(GpuPackedUpdate, SlicesUnderAGraphEqualAFreshLoad) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  const WeightSource source = SourceOf(GetParam(), false);
  LayerInputs inputs(source.spec, 11);
  inputs.Logits();
  for (const bool fused : {false, true}) {
    if (fused && source.layout.separate) {
      continue;
    }
    SCOPED_TRACE(fused ? "fused" : "parts");
    PackedLayer live(source);
    const RunResult before = live.Run(inputs);
    const PackedLayer fresh(SourceOf(GetParam(), true));
    const RunResult wanted = fresh.Run(inputs);
    EXPECT_FALSE(SameBits(before.output, wanted.output));
    PlanOptions options;
    options.max_tokens = 11;
    const Plan plan = MakePlan(source.spec, kGpu, options);
    DeviceMirror mirror;
    const MoeInputs on_gpu = mirror.Copy(inputs.get());
    const RepeatedCall call(plan, live.weights(), on_gpu);
    cudaStream_t stream = nullptr;
    HOPYARD_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaGraph_t graph = nullptr;
    HOPYARD_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    call.Run(stream);
    HOPYARD_CUDA(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t captured = nullptr;
    HOPYARD_CUDA(cudaGraphInstantiate(&captured, graph, 0));
    Refit refit(4);
    if (fused) {
      refit.AddFused(fresh.storage(), 3);
    } else {
      refit.AddParts(fresh.storage(), 3, source.layout.separate);
    }
    refit.Apply(HasGlobalScale(GetParam().format),
                [&](const WeightSlice& slice) { live.weights().Update(slice, {stream}); });
    call.Poison(0xFF, stream);
    HOPYARD_CUDA(cudaGraphLaunch(captured, stream));
    HOPYARD_CUDA(cudaStreamSynchronize(stream));
    EXPECT_TRUE(SameBits(call.Output(), wanted.output));
    EXPECT_TRUE(call.Intact());
    ExpectSame(live.Run(inputs), wanted);
    HOPYARD_CUDA(cudaGraphExecDestroy(captured));
    HOPYARD_CUDA(cudaGraphDestroy(graph));
    HOPYARD_CUDA(cudaStreamDestroy(stream));
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, GpuPackedUpdate, ::testing::ValuesIn(PackedUpdateCases()),
                         [](const auto& test) { return ToString(test.param); });

// The scale of a block is NaN: its row is, with every token, and no other.
TEST(GpuPackedWeights, NanScalesSpoilWhatTheySpoilUnpacked) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  for (const FormatPair& pair : PackablePairs()) {
    SCOPED_TRACE(ToString(pair));
    WeightSource source = SourceOf(SmallSpec(pair.weights, pair.activations));
    LayerInputs inputs(source.spec, 21);
    inputs.Logits();
    LayerWeights storage(source);
    for (const MatrixSet* set : {&storage.desc().routed.gemm1, &storage.desc().routed.gemm2}) {
      set->scales.as<uint8_t>()[2 * set->scales.strides[0] + 9] = 0xFF;
    }
    DeviceMirror mirror;
    WeightsDesc desc = mirror.Copy(storage.desc());
    const RunResult wanted = RunOnGpu(Weights(source.spec, desc), inputs.get());
    desc.packed = true;
    const RunResult got = RunOnGpu(Weights(source.spec, desc), inputs.get());
    ExpectSame(got, wanted);
  }
}

// A caller that hands the codes over has their memory back.
TEST(GpuPackedWeights, LetGoOfTheCodes) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  const WeightSource source = SourceOf(SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16));
  const LayerWeights storage(source);
  WeightsDesc desc = CopyWeights(storage.desc(), kGpu);
  desc.packed = true;
  const std::weak_ptr<const void> codes = desc.codes_owner;
  const std::weak_ptr<const void> others = desc.owner;
  const Weights packed(source.spec, std::move(desc));
  EXPECT_TRUE(codes.expired());
  EXPECT_FALSE(others.expired());
  LayerInputs inputs(source.spec, 9);
  inputs.Logits();
  ExpectSame(RunOnGpu(packed, inputs.get()), TwinLayer(source).Run(inputs));
}

// Shared experts of another format are read where they came from.
TEST(GpuPackedWeights, KeepCodesThatAreNotPacked) {
  HOPYARD_NEEDS_PACKED_KERNELS();
  MoeSpec spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  spec.shared = {2, false, 0.5F, WeightFormat::kFp8Block128};
  const WeightSource source = SourceOf(spec);
  const LayerWeights storage(source);
  WeightsDesc desc = CopyWeights(storage.desc(), kGpu);
  desc.packed = true;
  const std::weak_ptr<const void> codes = desc.codes_owner;
  const Weights packed(spec, std::move(desc));
  EXPECT_FALSE(codes.expired());
  LayerInputs inputs(spec, 9);
  inputs.Logits();
  ExpectSame(RunOnGpu(packed, inputs.get()), TwinLayer(source).Run(inputs));
}

Caught RefusalOfPacking(const MoeSpec& spec) {
  const LayerWeights storage(SourceOf(spec));
  DeviceMirror mirror;
  WeightsDesc desc = mirror.Copy(storage.desc());
  desc.packed = true;
  return CatchError([&] { const Weights weights(spec, desc); });
}

TEST(GpuPackedWeights, OtherFormatsAreRefusedByName) {
  HOPYARD_NEEDS_GPU();
  const Caught caught = RefusalOfPacking(SmallSpec(WeightFormat::kMxInt4, ActivationFormat::kBf16));
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  EXPECT_EQ(caught.message,
            "weights.packed=true, but mxint4 weights have no packed order; wanted mxfp4 or nvfp4, "
            "or packed=false");
}

// GEMM2 of that pair applies scales every 128 of K, for which packed weights have no kernel.
TEST(GpuPackedWeights, PairsWithoutAKernelAreRefusedByName) {
  HOPYARD_NEEDS_GPU();
  const Caught caught =
      RefusalOfPacking(SmallSpec(WeightFormat::kNvFp4, ActivationFormat::kFp8PerToken));
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
  EXPECT_EQ(caught.message.rfind("weights.routed: there is no kernel for packed nvfp4 weights "
                                 "in place of nvfp4_",
                                 0),
            0U)
      << caught.message;
}

}  // namespace
}  // namespace hopyard::test
