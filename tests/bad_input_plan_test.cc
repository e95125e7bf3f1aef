// SPDX-License-Identifier: Apache-2.0
// Specs and plan options that mean nothing or that no kernel runs: MakePlan, Explain and Weights
// give the same answer, without a GPU.
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "plan/backend_sm90.h"
#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using A = ActivationFormat;

constexpr int kMaxInt = std::numeric_limits<int>::max();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The spec is refused, with the same message, by each function that takes one.
void ExpectBadSpec(const MoeSpec& spec, const std::vector<std::string>& parts) {
  ExpectInvalid([&] { std::ignore = MakePlan(spec, Device{}, OptionsFor(4)); }, parts);
  ExpectInvalid([&] { std::ignore = Explain(spec, Device{}, OptionsFor(4)); }, parts);
  ExpectInvalid([&] { const Weights weights(spec, WeightsDesc{}); }, parts);
}

void ExpectBadSpec(const std::function<void(MoeSpec*)>& spoil,
                   const std::vector<std::string>& parts) {
  MoeSpec spec = TinySpec();
  spoil(&spec);
  ExpectBadSpec(spec, parts);
}

// Explain says no with this reason, MakePlan throws it.
void ExpectNoKernel(const MoeSpec& spec, const PlanOptions& options, Device device,
                    const std::vector<std::string>& parts) {
  const Explanation explanation = Explain(spec, device, options);
  EXPECT_FALSE(explanation.supported);
  for (const std::string& part : parts) {
    EXPECT_THAT(explanation.reason, ::testing::HasSubstr(part));
  }
  EXPECT_THAT(explanation.ToString(), ::testing::HasSubstr("unsupported: " + explanation.reason));
  for (const Candidate& candidate : explanation.candidates) {
    EXPECT_FALSE(candidate.chosen) << candidate.kernel;
  }
  ExpectUnsupported([&] { std::ignore = MakePlan(spec, device, options); }, parts);
}

TEST(BadSpec, Row06TopK) {
  for (const int top_k : {0, -1, std::numeric_limits<int>::min()}) {
    ExpectBadSpec([&](MoeSpec* s) { s->top_k = top_k; },
                  {"top_k=" + std::to_string(top_k), "wanted 1 .. 32"});
  }
  ExpectBadSpec([](MoeSpec* s) { s->top_k = 5; }, {"top_k=5", "between 1 and num_experts=4"});
}

TEST(BadSpec, Row32TopKBeyond32) {
  for (const int top_k : {33, kMaxInt}) {
    ExpectBadSpec(
        [&](MoeSpec* s) {
          s->num_experts = 64;
          s->top_k = top_k;
        },
        {"top_k=" + std::to_string(top_k), "wanted 1 .. 32"});
  }
}

TEST(BadSpec, ExpertCount) {
  for (const int experts : {0, -4, 2049, kMaxInt}) {
    ExpectBadSpec([&](MoeSpec* s) { s->num_experts = experts; },
                  {"num_experts=" + std::to_string(experts), "wanted 1 .. 2048"});
  }
}

TEST(BadSpec, Row07LocalExperts) {
  for (const auto kind : {ExpertMap::Kind::kRange, ExpertMap::Kind::kTable}) {
    for (const int count : {0, -1, 2049, kMaxInt}) {
      ExpectBadSpec(
          [&](MoeSpec* s) {
            s->local = {kind, 0, count};
          },
          {"local.count=" + std::to_string(count), "wanted 1 .. 2048"});
    }
  }
  ExpectBadSpec(
      [](MoeSpec* s) {
        s->local = {ExpertMap::Kind::kRange, 0, 5};
      },
      {"local.count=5", "within the 4 experts"});
}

TEST(BadSpec, Row08LocalOffset) {
  for (const int offset : {-1, 3, kMaxInt}) {
    ExpectBadSpec(
        [&](MoeSpec* s) {
          s->local = {ExpertMap::Kind::kRange, offset, 2};
        },
        {"local.offset=" + std::to_string(offset), "local.count=2", "4 experts"});
  }
  // A range whose kind was forgotten is not taken for all experts.
  ExpectBadSpec(
      [](MoeSpec* s) {
        s->local = {ExpertMap::Kind::kAll, 2, 2};
      },
      {"local.offset=2", "local.count=2", "kAll", "kRange"});
}

TEST(BadSpec, SizesThatAreNotPositive) {
  for (const int64_t size :
       {int64_t{0}, int64_t{-64}, int64_t{1} << 24, std::numeric_limits<int64_t>::max()}) {
    ExpectBadSpec([&](MoeSpec* s) { s->hidden_size = size; },
                  {"hidden_size=" + std::to_string(size), "wanted 1 .. 16777215"});
    ExpectBadSpec([&](MoeSpec* s) { s->intermediate_size = size; },
                  {"intermediate_size=" + std::to_string(size), "wanted 1 .. 16777215"});
  }
}

TEST(BadSpec, Row21ActivationParametersOfOthers) {
  for (const auto kind :
       {ActivationKind::kGeGlu, ActivationKind::kGeGluTanh, ActivationKind::kRelu2,
        ActivationKind::kSilu, ActivationKind::kGelu, ActivationKind::kIdentity}) {
    const std::string name(ToString(kind));
    ExpectBadSpec(
        [&](MoeSpec* s) {
          s->activation.kind = kind;
          s->activation.alpha.all = 1.702F;
        },
        {"activation " + name + " takes no alpha, beta or limit", "only swiglu and situ"});
    ExpectBadSpec(
        [&](MoeSpec* s) {
          s->activation.kind = kind;
          s->activation.limit.each.assign(4, 7.0F);
        },
        {"activation " + name, "only swiglu and situ"});
  }
}

TEST(BadSpec, Row23ActivationParameters) {
  const struct {
    const char* name;
    PerExpert Activation::*field;
  } fields[] = {{"activation.alpha", &Activation::alpha},
                {"activation.beta", &Activation::beta},
                {"activation.limit", &Activation::limit}};
  for (const auto& field : fields) {
    SCOPED_TRACE(field.name);
    ExpectBadSpec([&](MoeSpec* s) { (s->activation.*field.field).each.assign(3, 1.0F); },
                  {std::string(field.name) + " has 3 values", "one per local expert (4)"});
    ExpectBadSpec([&](MoeSpec* s) { (s->activation.*field.field).all = kNan; },
                  {std::string(field.name) + " is nan", "wanted a finite number"});
    ExpectBadSpec(
        [&](MoeSpec* s) {
          (s->activation.*field.field).each = {1.0F, 1.0F, kNan, 1.0F};
        },
        {std::string(field.name) + " is nan for local expert 2"});
  }
  ExpectBadSpec([](MoeSpec* s) { s->activation.alpha.all = kInfinity; },
                {"activation.alpha is inf", "finite"});
  for (const float limit : {0.0F, -7.0F}) {
    ExpectBadSpec([&](MoeSpec* s) { s->activation.limit.all = limit; },
                  {"activation.limit=", "positive clamp"});
  }
  ExpectBadSpec([](MoeSpec* s) { s->activation.kind = ActivationKind::kSiTu; },
                {"situ needs alpha > 0 and beta > 0", "beta=0"});
}

TEST(BadSpec, Row24And36ValuesOutsideTheEnums) {
  ExpectBadSpec([](MoeSpec* s) { s->activation.kind = static_cast<ActivationKind>(11); },
                {"activation.kind=11", "ActivationKind", "wanted 0 .. 7"});
  ExpectBadSpec([](MoeSpec* s) { s->weights = static_cast<W>(8); },
                {"weights=8", "WeightFormat", "wanted 0 .. 7"});
  ExpectBadSpec([](MoeSpec* s) { s->activations = static_cast<A>(255); },
                {"activations=255", "ActivationFormat", "wanted 0 .. 6"});
  ExpectBadSpec([](MoeSpec* s) { s->shared.weights = static_cast<W>(9); }, {"shared.weights=9"});
  ExpectBadSpec([](MoeSpec* s) { s->local.kind = static_cast<ExpertMap::Kind>(3); },
                {"local.kind=3", "wanted 0 .. 2"});
  ExpectBadSpec([](MoeSpec* s) { s->routing.score = static_cast<RoutingScore>(9); },
                {"score=9", "RoutingScore"});
  ExpectBadSpec([](MoeSpec* s) { s->routing.weight = static_cast<RoutingWeight>(3); },
                {"weight=3", "RoutingWeight"});
  ExpectBadSpec([](MoeSpec* s) { s->routing.renormalise = static_cast<Renormalise>(3); },
                {"renormalise=3", "Renormalise"});
}

TEST(BadSpec, Row27And28And30And31Groups) {
  const auto groups = [](int num_groups, int top_groups, int top_k) {
    return [=](MoeSpec* s) {
      s->num_experts = 12;
      s->top_k = top_k;
      s->routing = RoutingRule::DeepSeekV3(num_groups, top_groups, 1.0F);
    };
  };
  ExpectBadSpec(groups(0, 1, 2), {"num_groups=0", "wanted at least 1"});
  ExpectBadSpec(groups(-4, 1, 2), {"num_groups=-4"});
  ExpectBadSpec(groups(4, 0, 2), {"top_groups=0", "wanted 1 .. num_groups=4"});
  ExpectBadSpec(groups(5, 1, 2), {"num_experts=12", "not divisible by num_groups=5"});
  ExpectBadSpec(groups(4, 5, 2), {"top_groups=5", "wanted 1 .. num_groups=4"});
  ExpectBadSpec(groups(4, 1, 4), {"top_k=4", "exceeds the 3 experts", "top_groups=1"});
  for (const float factor : {kNan, kInfinity}) {
    ExpectBadSpec([&](MoeSpec* s) { s->routing.scaling_factor = factor; },
                  {"scaling_factor=", "finite"});
  }
}

TEST(BadSpec, SharedExpertCount) {
  for (const int count : {-1, 31, kMaxInt}) {
    ExpectBadSpec([&](MoeSpec* s) { s->shared.count = count; },
                  {"shared.count=" + std::to_string(count), "top_k=2", "wanted 0 .. 30"});
  }
  ExpectBadSpec([](MoeSpec* s) { s->shared.weight = kNan; }, {"shared.weight=nan", "finite"});
}

TEST(BadSpec, StructSizes) {
  for (const uint32_t size : {0U, static_cast<uint32_t>(sizeof(MoeSpec) - 8)}) {
    ExpectBadSpec([&](MoeSpec* s) { s->struct_size = size; },
                  {"MoeSpec.struct_size=" + std::to_string(size),
                   "knows " + std::to_string(sizeof(MoeSpec)), "headers"});
  }
  PlanOptions options = OptionsFor(4);
  options.struct_size = 4;
  ExpectInvalid([&] { std::ignore = MakePlan(TinySpec(), Device{}, options); },
                {"PlanOptions.struct_size=4", "headers"});
}

TEST(BadSpec, Row19And51And54And55PairsOfFormats) {
  int refused = 0;
  const auto supported = SupportedPairs();
  for (int w = 0; w <= static_cast<int>(W::kMxInt4); ++w) {
    for (int a = 0; a <= static_cast<int>(A::kNvFp4PerToken); ++a) {
      const FormatPair pair{static_cast<W>(w), static_cast<A>(a)};
      const MoeSpec spec = TinySpec(pair.weights, pair.activations);
      if (Explain(spec, Device{}, OptionsFor(4)).supported) {
        continue;
      }
      SCOPED_TRACE(ToString(pair));
      for (const FormatPair& known : supported) {
        EXPECT_FALSE(known.weights == pair.weights && known.activations == pair.activations);
      }
      const std::vector<std::string> parts = {std::string(ToString(pair.weights)) + " weights with",
                                              std::string(ToString(pair.activations)),
                                              "use bf16 activations", "README.md"};
      ExpectNoKernel(spec, OptionsFor(4), Device{}, parts);
      ExpectUnsupported([&] { const Weights weights(spec, WeightsDesc{}); }, parts);
      ++refused;
    }
  }
  EXPECT_GE(refused, 30);
  MoeSpec shared = TinySpec(W::kMxFp8, A::kMxFp8);
  shared.shared.count = 1;
  shared.shared.weights = W::kMxInt4;
  ExpectNoKernel(shared, OptionsFor(4), Device{}, {"mxint4 weights with mxfp8 activations"});
}

TEST(BadSpec, OddSizesOfPackedFormats) {
  for (const W weights : {W::kMxFp4, W::kNvFp4, W::kMxInt4}) {
    MoeSpec spec = TinySpec(weights, A::kBf16);
    spec.hidden_size = 63;
    ExpectNoKernel(spec, OptionsFor(4), Device{},
                   {std::string(ToString(weights)) + " packs 2 codes a byte", "hidden_size (63)",
                    "must be even", "zero-pad"});
    spec.hidden_size = 64;
    spec.intermediate_size = 33;
    ExpectNoKernel(spec, OptionsFor(4), Device{}, {"intermediate_size (33)", "must be even"});
  }
}

TEST(BadPlan, Row01DeviceWithoutBackend) {
  if (sm90::FindBackend() != nullptr) {
    return;  // this build has one
  }
  ExpectNoKernel(TinySpec(), OptionsFor(4), {DeviceKind::kCuda, 0}, {"CUDA", "plan for the CPU"});
}

TEST(BadPlan, Options) {
  const auto refused = [](const std::function<void(PlanOptions*)>& spoil,
                          const std::vector<std::string>& parts) {
    PlanOptions options = OptionsFor(4);
    spoil(&options);
    ExpectInvalid([&] { std::ignore = MakePlan(TinySpec(), Device{}, options); }, parts);
    if (options.workspace_cap <= 0) {
      ExpectInvalid([&] { std::ignore = Explain(TinySpec(), Device{}, options); }, parts);
    }
  };
  for (const int64_t tokens : {int64_t{0}, int64_t{-1}}) {
    refused([&](PlanOptions* o) { o->max_tokens = tokens; },
            {"max_tokens=" + std::to_string(tokens), "wanted at least 1"});
  }
  refused([](PlanOptions* o) { o->num_threads = -2; }, {"num_threads=-2", "wanted 0"});
  refused([](PlanOptions* o) { o->workspace_cap = -1; }, {"workspace_cap=-1", "wanted 0"});
  refused([](PlanOptions* o) { o->workspace_cap = 100; },
          {"workspace_cap=100", "one token needs "});
}

TEST(BadPlan, EnvironmentOfLaunches) {
  constexpr const char* kName = "HOPYARD_OVERLAP_LAUNCHES";
  const auto overlaps = [](bool asked) {
    PlanOptions options = OptionsFor(4);
    options.overlap_launches = asked;
    return MakePlan(TinySpec(), Device{}, options).options().overlap_launches;
  };
  ASSERT_EQ(unsetenv(kName), 0);
  EXPECT_TRUE(overlaps(true));
  EXPECT_FALSE(overlaps(false));
  ASSERT_EQ(setenv(kName, "0", 1), 0);
  EXPECT_FALSE(overlaps(true));
  ASSERT_EQ(setenv(kName, "1", 1), 0);
  EXPECT_TRUE(overlaps(true));
  EXPECT_FALSE(overlaps(false));
  ASSERT_EQ(setenv(kName, "yes", 1), 0);
  ExpectInvalid([&] { std::ignore = overlaps(true); },
                {"HOPYARD_OVERLAP_LAUNCHES=yes; wanted 0 or 1"});
  ASSERT_EQ(unsetenv(kName), 0);
}

TEST(BadPlan, MoreRowsThanInt32) {
  for (const int64_t tokens : {int64_t{1} << 30, std::numeric_limits<int64_t>::max()}) {
    ExpectNoKernel(TinySpec(), OptionsFor(tokens), Device{},
                   {"max_tokens " + std::to_string(tokens), "2 slots", "split the batch"});
  }
}

TEST(BadPlan, Row57To59TacticByName) {
  for (const char* name : {"cpu_avx512_mxfp4", "4096", "[32, 10000000]"}) {
    PlanOptions options = OptionsFor(4);
    options.tactic = name;
    ExpectNoKernel(TinySpec(), options, Device{},
                   {"tactic '" + options.tactic + "'", "known: cpu_avx512_bf16 cpu_avx2_bf16"});
  }
}

TEST(BadPlan, NamesOfFormatsAndActivations) {
  ExpectInvalid([] { std::ignore = ParseWeightFormat("fp6"); },
                {"weight format 'fp6'", "wanted one of bf16", "mxint4"});
  ExpectInvalid([] { std::ignore = ParseActivationFormat(""); },
                {"activation format ''", "nvfp4_per_token"});
  ExpectInvalid([] { std::ignore = ParseActivationKind("swish"); },
                {"activation 'swish'", "swiglu", "identity"});
}

}  // namespace
}  // namespace hopyard::test
