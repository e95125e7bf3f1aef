// SPDX-License-Identifier: Apache-2.0
// Two layers that differ in any one field never share a key.
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

// The members of a struct as the compiler counts them: a new one does not compile until it is named
// here, and then fails FieldsAreAllMembers until VisitFields has it.
auto MembersOf(const RoutingRule& rule) {
  const auto& [score, weight, renormalise, bias, groups, top, factor] = rule;
  return std::tie(score, weight, renormalise, bias, groups, top, factor);
}
auto MembersOf(const SharedExperts& shared) {
  const auto& [count, per_token, weight, weights] = shared;
  return std::tie(count, per_token, weight, weights);
}
auto MembersOf(const CallPath& path) {
  const auto& [ids, unfinalised, replay] = path;
  return std::tie(ids, unfinalised, replay);
}
auto MembersOf(const WeightOrders& orders) {
  const auto& [gemm1, gemm2, shared_gemm1, shared_gemm2] = orders;
  return std::tie(gemm1, gemm2, shared_gemm1, shared_gemm2);
}
auto MembersOf(const TuningKey& key) {
  const auto& [hidden, intermediate, experts, local_experts, local, top_k, routing, activation,
               weights, activations, shared, on_input, overlap, path, orders] = key;
  return std::tie(hidden, intermediate, experts, local_experts, local, top_k, routing, activation,
                  weights, activations, shared, on_input, overlap, path, orders);
}

using Addresses = std::multiset<const void*>;

template <class Struct>
void AddMembers(const Struct& value, Addresses* addresses) {
  const auto add = [&](const auto& member) {
    if constexpr (requires { MembersOf(member); }) {
      AddMembers(member, addresses);
    } else {
      addresses->insert(&member);
    }
  };
  std::apply([&](const auto&... members) { (add(members), ...); }, MembersOf(value));
}

TEST(TuningKey, FieldsAreAllMembers) {
  const TuningKey key;
  Addresses members;
  AddMembers(key, &members);
  Addresses fields;
  std::set<std::string> names;
  VisitFields(key, [&](const char* name, const auto& field) {
    fields.insert(&field);
    EXPECT_TRUE(names.insert(name).second) << name << " names two fields";
  });
  EXPECT_EQ(fields, members);
}

// The key with field number `index` changed, and its name.
TuningKey Changed(TuningKey key, int index, std::string* name) {
  int number = 0;
  VisitFields(key, [&](const char* field_name, auto& field) {
    if (number++ == index) {
      Change(&field);
      *name = field_name;
    }
  });
  return key;
}

TEST(TuningKey, EveryFieldAloneMakesAnotherKey) {
  int count = 0;
  const TuningKey base = ALayer(0).key;
  VisitFields(base, [&](const char* /*name*/, const auto& /*field*/) { ++count; });
  TuningTable table(AMachine());
  table.Put(ALayer(0));
  for (int i = 0; i < count; ++i) {
    std::string name;
    const TuningKey key = Changed(base, i, &name);
    SCOPED_TRACE(name);
    EXPECT_FALSE(key == base);
    EXPECT_NE(ToString(key), ToString(base));
    EXPECT_EQ(table.Find(key), nullptr);
    TunedLayer other = ALayer(0);
    other.key = key;
    TuningTable both = table;
    both.Put(other);
    EXPECT_EQ(both.layers().size(), 2U);
    EXPECT_EQ(TuningTable::FromJson(both.ToJson()), both);
  }
}

TEST(TuningKey, TextIsEqualForEqualKeysOnly) {
  Random random(5);  // NOLINT(bugprone-random-generator-seed): the same cases every time
  int equal = 0;
  for (int i = 0; i < 20000; ++i) {
    // Differences in few fields are the hard ones.
    const TuningKey left = RandomKey(&random, 3);
    TuningKey right = left;
    VisitFields(right, [&](const char* /*name*/, auto& field) {
      if (random() % 32 == 0) {
        Change(&field);
      }
    });
    equal += left == right ? 1 : 0;
    ASSERT_EQ(left == right, ToString(left) == ToString(right)) << ToString(left);
  }
  EXPECT_GT(equal, 1000);
  EXPECT_LT(equal, 19000);
}

TEST(TuningKey, RandomKeysSurviveAFile) {
  Random random(6);  // NOLINT(bugprone-random-generator-seed)
  TuningTable table(AMachine());
  for (int i = 0; i < 300; ++i) {
    TunedLayer layer = ALayer(0);
    layer.key = RandomKey(&random, 4);
    // Fractions that no short decimal number is.
    layer.key.routing.scaling_factor = std::uniform_real_distribution<float>(0, 9)(random);
    layer.key.shared.weight = 1.0F / static_cast<float>(1 + random() % 1000);
    table.Put(layer);
    EXPECT_NE(table.Find(layer.key), nullptr);
  }
  EXPECT_EQ(TuningTable::FromJson(table.ToJson()), table);
}

TEST(TuningKey, ZeroHasNoSign) {
  TuningKey negative;
  negative.shared.weight = -0.0F;
  TuningKey positive = negative;
  positive.shared.weight = 0.0F;
  EXPECT_EQ(negative, positive);
  EXPECT_EQ(ToString(negative), ToString(positive));
}

MoeSpec ASpec() {
  MoeSpec spec;
  spec.hidden_size = 64;
  spec.intermediate_size = 32;
  spec.num_experts = 16;
  spec.top_k = 4;
  spec.routing = RoutingRule::DeepSeekV3(4, 2, 2.5F);
  spec.activation.kind = ActivationKind::kGeGlu;
  spec.weights = WeightFormat::kMxFp4;
  spec.activations = ActivationFormat::kMxFp8;
  spec.local = {ExpertMap::Kind::kRange, 8, 4};
  spec.shared = {1, true, 0.5F, WeightFormat::kBf16};
  spec.router_weight_on_input = true;
  return spec;
}

TEST(KeyOf, TakesWhatChangesKernelsOrTheirTimes) {
  PlanOptions options;
  options.overlap_launches = true;
  options.path = {true, false, true};
  options.weight_orders.gemm1 = ReadOrder::kMnMajorInterleaved;
  options.weight_orders.shared_gemm2 = ReadOrder::kMnMajor;
  const TuningKey key = KeyOf(ASpec(), options);
  EXPECT_EQ(ToString(key),
            "hidden_size=64 intermediate_size=32 num_experts=16 local_experts=4 local=range "
            "top_k=4 routing.score=sigmoid routing.weight=score "
            "routing.renormalise=sum_plus_epsilon routing.use_bias=true routing.num_groups=4 "
            "routing.top_groups=2 routing.scaling_factor=2.5 activation=geglu weights=mxfp4 "
            "activations=mxfp8 shared.count=1 shared.per_token_weight=true shared.weight=0.5 "
            "shared.weights=bf16 router_weight_on_input=true overlap_launches=true path.ids=true "
            "path.unfinalised=false path.replay=true weight_orders.gemm1=mn_major_interleaved "
            "weight_orders.gemm2=k_major weight_orders.shared_gemm1=k_major "
            "weight_orders.shared_gemm2=mn_major");
}

TEST(KeyOf, RanksShareAKey) {
  MoeSpec other = ASpec();
  other.local.offset = 12;
  EXPECT_EQ(KeyOf(ASpec(), {}), KeyOf(other, {}));
  MoeSpec all = ASpec();
  all.local = {};
  EXPECT_EQ(KeyOf(all, {}).local_experts, all.num_experts);
}

TEST(TuningKey, WithoutSharedExpertsTheirFieldsMeanNothing) {
  MoeSpec spec;
  MoeSpec other;
  other.shared = {0, true, 0.5F, WeightFormat::kMxFp4};
  PlanOptions options;
  options.weight_orders.shared_gemm1 = ReadOrder::kMnMajor;
  options.weight_orders.shared_gemm2 = ReadOrder::kMnMajor;
  EXPECT_EQ(KeyOf(spec, {}), KeyOf(other, options));
  other.shared.count = 1;
  EXPECT_FALSE(KeyOf(spec, {}) == KeyOf(other, {}));
  EXPECT_FALSE(KeyOf(other, {}) == KeyOf(other, options));
}

}  // namespace
}  // namespace hopyard::tune::testing
