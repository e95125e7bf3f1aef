// SPDX-License-Identifier: Apache-2.0
// What only a GPU shows of the tuner: captured calls, real kernels, the table's plan.
#include <algorithm>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/tune.h"

#include "gemm/sm90/operands.h"
#include "plan/backend_sm90.h"
#include "tests/gpu/runner_sm90.h"
#include "tune/layer_lab.h"

namespace hopyard::test {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMostTokens = 96;

PlanOptions PlanFor(int64_t tokens) {
  PlanOptions options;
  options.max_tokens = tokens;
  options.batch_invariant = true;
  return options;
}

TuneOptions QuickOptions() {
  TuneOptions options;
  options.max_seconds = 10.0;
  options.tokens = {1, 16, kMostTokens};
  return options;
}

WeightSource SourceOf(const FormatPair& pair) {
  WeightSource source;
  source.spec = SmallSpec(pair.weights, pair.activations);
  source.bias = true;
  return source;
}

class GpuTune : public ::testing::TestWithParam<FormatPair> {};

TEST_P(GpuTune, PlansTakeTheWinnersAndComputeTheLayer) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(GetParam()));
  const MoeSpec& spec = layer.gpu().spec();
  const Plan plan = MakePlan(spec, kGpu, PlanFor(kMostTokens));
  const int64_t free_before = GpuInfoOf(0).free_bytes;
  const TuningTable table = Tune(plan, layer.gpu(), QuickOptions());
  EXPECT_GE(GpuInfoOf(0).free_bytes, free_before - (int64_t{64} << 20)) << "memory was kept";
  ASSERT_EQ(table.layers().size(), 1U);
  const TunedLayer& tuned = table.layers().front();
  for (const TuningFault& fault : tuned.faults) {
    ADD_FAILURE() << fault.tactic << " at " << fault.tokens << ": " << fault.reason;
  }
  ASSERT_GE(tuned.ranges.size(), 3U);
  EXPECT_GE(tuned.ranges.back().last, kMostTokens);
  EXPECT_EQ(TuningTable::FromJson(table.ToJson()), table);
  for (const TunedRange& range : tuned.ranges) {
    SCOPED_TRACE(range.tactic + " at " + std::to_string(range.tokens));
    EXPECT_LE(range.us, range.untuned_us);
    EXPECT_TRUE(sm90::NeedBackend().HasTactic(spec, range.tactic));
    PlanOptions with = PlanFor(range.tokens);
    with.tuning = std::make_shared<TuningTable>(table);
    EXPECT_EQ(MakePlan(spec, kGpu, with).Explain().Chosen(), range.tactic);
    if (range.tokens <= kMostTokens) {
      LayerInputs inputs(spec, range.tokens);
      RunOptions run;
      run.plan = with;
      layer.RunAndJudge(inputs.Logits(), run);
    }
  }
}

// The plan's capacity, path and replay; ids instead of logits.
TEST_P(GpuTune, TunesThePathThatServes) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf(GetParam()));
  PlanOptions options = PlanFor(16);
  options.path = {true, true, true};
  TuneOptions tune = QuickOptions();
  tune.tokens = {16};
  tune.routings = {"balanced", "hot"};
  const TuningTable table = Tune(MakePlan(layer.gpu().spec(), kGpu, options), layer.gpu(), tune);
  EXPECT_EQ(table.layers().front().routing, "balanced,hot");
  EXPECT_FALSE(table.layers().front().ranges.empty());
  for (const TuningFault& fault : table.layers().front().faults) {
    ADD_FAILURE() << fault.tactic << ": " << fault.reason;
  }
}

// What was measured with MN-major weights, whose kernels are others, is theirs alone.
TEST(GpuTuneOnce, MnMajorWeightsHaveMeasurementsOfTheirOwn) {
  HOPYARD_NEEDS_GPU();
  WeightSource source = SourceOf({});
  source.layout.major = MajorOrder::kMnMajor;
  source.layout.order = RowOrder::kInterleavedGateUp;
  TwinLayer layer(source);
  PlanOptions options = PlanFor(16);
  TuneOptions tune = QuickOptions();
  tune.tokens = {16};
  const TuningTable table = Tune(MakePlan(layer.spec(), kGpu, options), layer.gpu(), tune);
  options.tuning = std::make_shared<TuningTable>(table);
  EXPECT_EQ(MakePlan(layer.spec(), kGpu, options).Explain().ToString().find("tuned: "),
            std::string::npos);
  options.weight_orders = OrdersOf(layer.spec(), layer.gpu().desc());
  EXPECT_THAT(MakePlan(layer.spec(), kGpu, options).Explain().ToString(), HasSubstr("tuned: "));
  LayerInputs inputs(layer.spec(), 16);
  RunOptions run;
  run.plan = options;
  layer.RunAndJudge(inputs.Logits(), run);
}

INSTANTIATE_TEST_SUITE_P(
    Formats, GpuTune,
    ::testing::Values(FormatPair{WeightFormat::kBf16, ActivationFormat::kBf16},
                      FormatPair{WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
                      FormatPair{WeightFormat::kMxFp4, ActivationFormat::kBf16}),
    [](const auto& test) { return ToString(test.param); });

TEST(GpuTuneOnce, RefusesAStreamThatIsCaptured) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf({}));
  const Plan plan = MakePlan(layer.gpu().spec(), kGpu, PlanFor(16));
  cudaStream_t stream = nullptr;
  HOPYARD_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const cudaStreamCaptureMode mode :
       {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
        cudaStreamCaptureModeRelaxed}) {
    HOPYARD_CUDA(cudaStreamBeginCapture(stream, mode));
    const Caught caught =
        CatchError([&] { static_cast<void>(Tune(plan, layer.gpu(), QuickOptions(), {stream})); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    EXPECT_THAT(caught.message, HasSubstr("the stream is being captured"));
    cudaGraph_t graph = nullptr;
    HOPYARD_CUDA(cudaStreamEndCapture(stream, &graph));
    HOPYARD_CUDA(cudaGraphDestroy(graph));
  }
  // The same stream does when it is not.
  TuneOptions options = QuickOptions();
  options.tokens = {1};
  EXPECT_FALSE(Tune(plan, layer.gpu(), options, {stream}).layers().front().ranges.empty());
  HOPYARD_CUDA(cudaStreamDestroy(stream));
}

// A call that fails while it is captured leaves no capture, and a working device.
TEST(GpuTuneOnce, AFailedCaptureIsCleanedUp) {
  HOPYARD_NEEDS_GPU();
  const sm90::Backend& backend = sm90::NeedBackend();
  EXPECT_THROW(static_cast<void>(backend.Capture(
                   0, nullptr, {[](void*) { throw std::runtime_error("no such kernel"); }}, {})),
               std::runtime_error);
  EXPECT_TRUE(backend.Recover(0));
  EXPECT_FALSE(backend.IsCapturing(0, nullptr));
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

// What is timed is the call: not the memory that is read before it, and more for more work.
TEST(GpuTuneOnce, CapturedCallsAreTimedAlone) {
  HOPYARD_NEEDS_GPU();
  const sm90::Backend& backend = sm90::NeedBackend();
  const int64_t bytes = int64_t{256} << 20;
  const DeviceArray<uint8_t> memory(bytes);
  const DeviceMemory flush(kGpu, bytes);
  const auto clear = [&memory](int64_t part) {
    return [&memory, part](void* stream) {
      HOPYARD_CUDA(cudaMemsetAsync(memory.get(), 0, static_cast<size_t>(part),
                                   static_cast<cudaStream_t>(stream)));
    };
  };
  const auto median = [&](int64_t part, int64_t flushed) {
    const auto timed =
        backend.Capture(0, nullptr, {clear(part), clear(part)}, {flush.data(), flushed});
    std::vector<double> times(9);
    std::generate(times.begin(), times.end(), [&] { return timed->Run(); });
    std::sort(times.begin(), times.end());
    return times[4];
  };
  const double small = median(4096, 0);
  EXPECT_GT(small, 0.0);
  // Reading 256 MiB takes 70 us and more.
  EXPECT_LT(median(4096, bytes), small + 30.0);
  EXPECT_GT(median(bytes, 0), small + 50.0);
}

TEST(GpuTuneOnce, MemoryIsAskedForBeforeItIsTaken) {
  HOPYARD_NEEDS_GPU();
  TwinLayer layer(SourceOf({}));
  const Plan plan = MakePlan(layer.gpu().spec(), kGpu, PlanFor(16));
  TuneOptions options = QuickOptions();
  options.tokens = {16, int64_t{1} << 20};
  options.max_bytes = int64_t{256} << 20;
  const TuningTable table = Tune(plan, layer.gpu(), options);
  const TunedLayer& tuned = table.layers().front();
  ASSERT_FALSE(tuned.ranges.empty());
  EXPECT_EQ(tuned.ranges.back().tokens, 16);
  ASSERT_FALSE(tuned.faults.empty());
  EXPECT_THAT(tuned.faults.back().reason, HasSubstr("may be used"));
}

// A layer whose candidates are all measured once, also those that the cost model rules out. One of
// every pair of formats, gated and not, and of every order of weights that has kernels of its own
// or is read in another way.
struct Variant {
  FormatPair pair;
  bool gated = true;
  WeightLayout layout;

  [[nodiscard]] bool IsMnMajor() const { return layout.major == MajorOrder::kMnMajor; }
  [[nodiscard]] bool IsInterleaved() const {
    return layout.order == RowOrder::kInterleavedGateUp ||
           layout.order == RowOrder::kInterleavedUpGate;
  }
  [[nodiscard]] WeightSource Source() const {
    WeightSource source = SourceOf(pair);
    source.spec.intermediate_size = 256;  // of 4-bit codes a whole block of K
    source.spec.activation.kind = gated ? ActivationKind::kSwiGlu : ActivationKind::kRelu2;
    source.layout = layout;
    return source;
  }
  [[nodiscard]] std::string ToString() const {
    return test::ToString(pair) + (gated ? "_Gated_" : "_Ungated_") + test::ToString(layout);
  }
};

std::vector<Variant> Variants() {
  const WeightLayout natural;
  WeightLayout shuffled;
  shuffled.order = RowOrder::kInterleavedUpGate;
  shuffled.map = RowMap::kShuffled128;
  shuffled.scales = ScaleLayout::kSwizzled128x4;
  WeightLayout blocks;
  blocks.map = RowMap::kShuffled64;
  blocks.major = MajorOrder::kBlockKMajor;
  WeightLayout mn_major;
  mn_major.major = MajorOrder::kMnMajor;
  WeightLayout interleaved = mn_major;
  interleaved.order = RowOrder::kInterleavedGateUp;
  std::vector<Variant> variants;
  for (const FormatPair& pair : SupportedPairs()) {
    variants.insert(variants.end(), {{pair, true, natural},
                                     {pair, false, natural},
                                     {pair, true, shuffled},
                                     {pair, true, blocks}});
    if (pair.weights == WeightFormat::kBf16) {
      variants.insert(variants.end(),
                      {{pair, true, mn_major}, {pair, false, mn_major}, {pair, true, interleaved}});
    }
  }
  return variants;
}

using Names = std::set<std::string>;

// Rows of the kernel table that compute a GEMM of the layer as its formats ask. Those for packed
// weights take part in no race: packed_sm90_test runs them.
Names RowsFor(const Variant& variant) {
  const auto operands = gemm::sm90::OperandsOf(variant.pair.weights, variant.pair.activations);
  Names names;
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const gemm::sm90::KernelInfo info = gemm::sm90::KernelAt(i);
    for (const bool is_gemm1 : {true, false}) {
      const bool gated = is_gemm1 && variant.gated;
      const bool interleaved = variant.IsMnMajor() && gated && variant.IsInterleaved();
      if (!info.packed && info.mn_major == variant.IsMnMajor() && info.interleaved == interleaved &&
          Runs(i, variant.pair.weights, is_gemm1 ? operands.x : operands.h, gated)) {
        names.insert(std::string(info.name));
      }
    }
  }
  return names;
}

// The row that runs where a tactic names `kernel`: its twin with MN-major weights.
std::string RowOf(const std::string& kernel, const Variant& variant) {
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const gemm::sm90::KernelInfo info = gemm::sm90::KernelAt(i);
    if (info.name == kernel && variant.IsMnMajor()) {
      const int twin = gemm::sm90::MnMajorTwin(i, info.gated && variant.IsInterleaved());
      return std::string(gemm::sm90::KernelAt(twin).name);
    }
  }
  return kernel;
}

// Runs each of the tuner's candidates as it enters a race, and compares what comes out.
class Measurements {
 public:
  Measurements(const Variant& variant, tune::LayerTask task, int64_t tokens)
      : variant_(variant), lab_(std::move(task)), bench_(lab_.Open(tokens)) {}

  void Measure(const std::string& first, const std::string& second) {
    const std::string tactic = first + '+' + second;
    EXPECT_TRUE(lab_.Fits(tactic)) << tactic;
    bench_->Prepare(tactic);
    reference_ = reference_.empty() ? tactic : reference_;
    for (int kind = 0; kind < lab_.kinds(); ++kind) {
      EXPECT_GT(bench_->Run(tactic, kind), 0.0) << tactic;
      if (tactic == reference_) {
        EXPECT_EQ(bench_->NotFinite(tactic, kind), "") << tactic;
      } else {
        EXPECT_EQ(bench_->Check(tactic, reference_, kind), "") << tactic;
      }
    }
    ran_.insert(RowOf(first, variant_));
    ran_.insert(RowOf(second, variant_));
  }
  [[nodiscard]] const Names& ran() const { return ran_; }

 private:
  const Variant& variant_;
  tune::LayerLab lab_;
  std::unique_ptr<tune::Bench> bench_;
  std::string reference_;  // the tactic that came first
  Names ran_;
};

class GpuEveryCandidate : public ::testing::TestWithParam<Variant> {};

TEST_P(GpuEveryCandidate, RunsAsTheTunerRunsIt) {
  HOPYARD_NEEDS_GPU();
  const int64_t tokens = SmallTests() ? 40 : 300;
  TwinLayer layer(GetParam().Source());
  const Plan plan = MakePlan(layer.spec(), kGpu, PlanFor(tokens));
  TuneOptions options;
  options.routings = {"uniform", "hot"};
  tune::LayerTask task = tune::MakeTask(plan, layer.gpu(), options, {});
  task.sets = 1;
  task.cold = false;
  Measurements measurements(GetParam(), std::move(task), tokens);
  const sm90::RankedTactics ranked = sm90::NeedBackend().Rank(layer.spec(), plan.options(), tokens);
  for (const sm90::RankedTactics::Entry& first : ranked.gemm1) {
    measurements.Measure(first.kernel, ranked.gemm2.front().kernel);
  }
  for (const sm90::RankedTactics::Entry& second : ranked.gemm2) {
    measurements.Measure(ranked.gemm1.front().kernel, second.kernel);
  }
  EXPECT_EQ(measurements.ran(), RowsFor(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Variants, GpuEveryCandidate, ::testing::ValuesIn(Variants()),
                         [](const auto& test) { return test.param.ToString(); });

// Without a GPU: together they are every row of the table, but for those that a plan must name.
TEST(GpuEveryCandidateRows, AreTheTableWithoutThoseByNameOnly) {
  Names candidates;
  Names by_name;
  for (const Variant& variant : Variants()) {
    const MoeSpec spec = variant.Source().spec;
    const sm90::RankedTactics ranked =
        sm90::NeedBackend().Rank(spec, PlanFor(kMostTokens), kMostTokens);
    Names rows;
    for (const auto* const entries : {&ranked.gemm1, &ranked.gemm2}) {
      for (const sm90::RankedTactics::Entry& entry : *entries) {
        rows.insert(RowOf(entry.kernel, variant));
      }
    }
    EXPECT_EQ(rows, RowsFor(variant)) << variant.ToString();
    candidates.merge(rows);
    for (const Candidate& candidate : Explain(spec, kGpu, PlanFor(kMostTokens)).candidates) {
      if (candidate.reason.find("by name only") != std::string::npos) {
        by_name.insert(candidate.kernel);
      }
    }
  }
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const std::string kernel(gemm::sm90::KernelAt(i).name);
    if (gemm::sm90::KernelAt(i).packed) {
      continue;
    }
    // What one pair of formats takes by name only may be a candidate of another.
    EXPECT_TRUE(candidates.count(kernel) > 0 || by_name.count(kernel) > 0) << kernel;
  }
  EXPECT_LT(candidates.size(), static_cast<size_t>(gemm::sm90::NumKernels()));
}

}  // namespace
}  // namespace hopyard::test
