// SPDX-License-Identifier: Apache-2.0
// Plans for a GPU and tables, without a GPU: the machine is then an H100's.
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bench/shapes.h"
#include "gemm/sm90/grouped_gemm_sm90.h"
#include "plan/backend_sm90.h"
#include "tests/gpu/all_kernels.h"
#include "tune/shipped.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

constexpr Device kGpu = {DeviceKind::kCuda, 0};

MoeSpec Spec() {
  return bench::FindShape("qwen3-30b-a3b")->spec;
}

PlanOptions Options(int64_t max_tokens = 4096) {
  PlanOptions options;
  options.max_tokens = max_tokens;
  return options;
}

// A pair of kernels that an untuned plan does not take for 8 tokens.
std::string OtherTactic() {
  const sm90::Backend& backend = sm90::NeedBackend();
  const sm90::RankedTactics ranked = backend.Rank(Spec(), Options(), 8);
  for (const auto& first : ranked.gemm1) {
    for (const auto& second : ranked.gemm2) {
      const std::string tactic = first.kernel + '+' + second.kernel;
      if (tactic != ranked.untuned && backend.HasTactic(Spec(), tactic)) {
        return tactic;
      }
    }
  }
  ADD_FAILURE() << "no two pairs of kernels";
  return ranked.untuned;
}

TuningTable TableWith(const std::string& tactic, const TuningMachine& machine = MachineOf(kGpu)) {
  TunedLayer layer;
  layer.key = KeyOf(Spec(), Options());
  layer.ranges = {{16, 8, tactic, 55.5, "untuned_pair", 66.6, 0.01}};
  TuningTable table(machine);
  table.Put(layer);
  return table;
}

Plan PlanWith(const TuningTable& table, const MoeSpec& spec = Spec()) {
  PlanOptions options = Options();
  options.tuning = std::make_shared<const TuningTable>(table);
  return MakePlan(spec, kGpu, options);
}

class GpuLookup : public ::testing::Test {
 protected:
  GpuLookup() {
    ForgetTuning();
    ResetTuningStats();
  }
};

TEST_F(GpuLookup, PlansTakeMeasuredKernels) {
  const std::string tactic = OtherTactic();
  const Plan plan = PlanWith(TableWith(tactic));
  const size_t plus = tactic.find('+');
  for (const std::string& kernel : {tactic.substr(0, plus), tactic.substr(plus + 1)}) {
    bool found = false;
    for (const Candidate& candidate : plan.Explain().candidates) {
      if (candidate.kernel == kernel) {
        found = true;
        EXPECT_TRUE(candidate.chosen);
        EXPECT_THAT(candidate.reason,
                    HasSubstr("tuned: 55.5 us at 8 tokens, untuned untuned_pair 66.6 us"));
        EXPECT_THAT(candidate.reason, HasSubstr("(untuned beyond 16 tokens)"));
      }
    }
    EXPECT_TRUE(found) << kernel;
  }
  const TuningStats stats = GetTuningStats();
  EXPECT_EQ(stats.hits, 1);
  EXPECT_EQ(stats.stale, 0);
  EXPECT_THAT(stats.ignored, IsEmpty());
}

TEST_F(GpuLookup, WorkspaceDoesNotDependOnTheTable) {
  PlanOptions untuned = Options();
  untuned.untuned = true;
  EXPECT_EQ(PlanWith(TableWith(OtherTactic())).workspace_bytes(),
            MakePlan(Spec(), kGpu, untuned).workspace_bytes());
}

TEST_F(GpuLookup, TacticsThatAreNotThereAreStale) {
  const Plan plan = PlanWith(TableWith("gone+gone"));
  EXPECT_THAT(plan.Explain().ToString(), Not(HasSubstr("tuned: ")));
  EXPECT_EQ(GetTuningStats().hits, 1);
  EXPECT_EQ(GetTuningStats().stale, 1);
}

TEST_F(GpuLookup, OtherRoutingsServeAndSaySo) {
  MoeSpec spec = Spec();
  spec.routing = RoutingRule::Sigmoid();
  EXPECT_THAT(PlanWith(TableWith(OtherTactic()), spec).Explain().ToString(),
              HasSubstr("(measured with another routing rule; untuned beyond 16"));
}

TEST_F(GpuLookup, TablesOfOtherGpusAreReported) {
  TuningMachine other = MachineOf(kGpu);
  other.device = "NVIDIA Other";
  // A table that comes with the library may serve instead.
  EXPECT_THAT(PlanWith(TableWith(OtherTactic(), other)).Explain().ToString(),
              Not(HasSubstr("tuned: 55.5 us")));
  EXPECT_THAT(GetTuningStats().ignored,
              ::testing::ElementsAre(HasSubstr("a table of NVIDIA Other of ")));
  // One of the CPU is meant for plans of the CPU.
  ResetTuningStats();
  std::ignore = PlanWith(TableWith(OtherTactic(), MachineOf(Device{})));
  EXPECT_THAT(GetTuningStats().ignored, IsEmpty());
}

// The spec of a key, as far as kernels go.
MoeSpec SpecOf(const TuningKey& key) {
  MoeSpec spec;
  spec.hidden_size = key.hidden_size;
  spec.intermediate_size = key.intermediate_size;
  spec.num_experts = key.num_experts;
  spec.top_k = key.top_k;
  spec.routing = key.routing;
  spec.activation.kind = key.activation;
  spec.activation.beta.all = key.activation == ActivationKind::kSiTu ? 1.0F : 0.0F;
  spec.weights = key.weights;
  spec.activations = key.activations;
  spec.local.kind = key.local;
  spec.local.count = key.local == ExpertMap::Kind::kAll ? 0 : key.local_experts;
  spec.shared = key.shared;
  spec.router_weight_on_input = key.router_weight_on_input;
  return spec;
}

TEST(ShippedTactics, AreKernelsOfThisLibrary) {
  if (!test::HasAllKernels()) {
    GTEST_SKIP() << "this build has some of the kernels only";
  }
  for (const auto& table : ShippedTables()) {
    for (const TunedLayer& layer : table->layers()) {
      const MoeSpec spec = SpecOf(layer.key);
      ASSERT_EQ(KeyOf(spec, {}).local_experts, layer.key.local_experts);
      for (const TunedRange& range : layer.ranges) {
        EXPECT_TRUE(sm90::NeedBackend().HasTactic(spec, range.tactic))
            << table->machine().device << ": " << range.tactic << " of " << ToString(layer.key);
      }
    }
  }
}

}  // namespace
}  // namespace hopyard::tune::testing
