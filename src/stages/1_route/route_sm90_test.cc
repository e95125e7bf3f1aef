// SPDX-License-Identifier: Apache-2.0
// Routing on the GPU against the CPU backend, which the other tests tie to the definition: ids,
// weights, replay and counters bit for bit.
#include "stages/1_route/route_sm90.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "stages/1_route/route.h"
#include "stages/1_route/route_testing.h"
#include "tests/gpu/device_array.h"

namespace hopyard::route {
namespace {

using test::DeviceArray;
using testing::Bits;
using testing::Case;
using testing::Fill;
using testing::Method;
using testing::Methods;
using testing::Random;
using testing::Result;

std::vector<uint8_t> Bytes(const TensorView& view) {
  const auto* data = view.as<const uint8_t>();
  return {data, data + view.numel() * SizeOf(view.dtype)};
}

// Runs the case on both and compares everything. `spare` rows of replay stay poisoned.
void ExpectCpuBits(Case& c, const RouteInputs& inputs, const char* what) {
  const int64_t count = c.num_tokens * c.top_k;
  Result want(c.num_tokens, c.top_k);
  std::vector<int64_t> want_load(static_cast<size_t>(c.num_experts));
  want.outputs.expert_load =
      TensorView::Contiguous(want_load.data(), DType::kInt64, {c.num_experts});
  RouteCpu(c.rule, c.top_k, inputs, want.outputs, 1);

  const DeviceArray<uint8_t> logits(Bytes(inputs.logits));
  const DeviceArray<uint8_t> bias(inputs.bias.defined() ? Bytes(inputs.bias)
                                                        : std::vector<uint8_t>(1));
  const DeviceArray<uint8_t> forced(inputs.forced_ids.defined() ? Bytes(inputs.forced_ids)
                                                                : std::vector<uint8_t>(1));
  const DeviceArray<uint8_t> tokens(inputs.token_ids.defined() ? Bytes(inputs.token_ids)
                                                               : std::vector<uint8_t>(1));
  const DeviceArray<uint8_t> table(
      inputs.token_to_experts.defined() ? Bytes(inputs.token_to_experts) : std::vector<uint8_t>(1));
  const DeviceArray<int32_t> ids(count);
  const DeviceArray<float> weights(count);
  const DeviceArray<int16_t> replay(count + 5);
  const DeviceArray<int64_t> load(std::vector<int64_t>(static_cast<size_t>(c.num_experts)));

  RouteSm90Args args;
  args.rule = c.rule;
  args.num_experts = c.num_experts;
  args.top_k = c.top_k;
  args.max_tokens = c.num_tokens;
  args.logits = logits.get();
  args.logits_dtype = inputs.logits.dtype;
  if (inputs.bias.defined()) {
    args.bias = bias.get();
    args.bias_dtype = inputs.bias.dtype;
  }
  if (inputs.forced_ids.defined()) {
    args.source = IdSource::kForced;
    args.forced_ids = forced.get();
    args.forced_dtype = inputs.forced_ids.dtype;
  } else if (inputs.token_ids.defined()) {
    args.source = IdSource::kTable;
    args.token_ids = tokens.get();
    args.token_dtype = inputs.token_ids.dtype;
    args.table = static_cast<const int32_t*>(static_cast<const void*>(table.get()));
    args.table_rows = inputs.token_to_experts.shape[0];
  }
  args.ids = ids.get();
  args.weights = weights.get();
  args.replay = replay.get();
  args.load = load.get();
  args.load_dtype = DType::kInt64;
  RouteSm90(args, nullptr);

  ASSERT_EQ(ids.Download(), want.ids) << what;
  ASSERT_EQ(Bits(weights.Download()), Bits(want.weights)) << what;
  ASSERT_EQ(load.Download(), want_load) << what;
  const std::vector<int16_t> recorded = replay.Download();
  for (int64_t i = 0; i < count + 5; ++i) {
    const auto at = static_cast<size_t>(i);
    ASSERT_EQ(recorded[at], i < count ? static_cast<int16_t>(want.ids[at]) : -1) << what;
  }
  ASSERT_TRUE(ids.GuardsIntact() && weights.GuardsIntact() && replay.GuardsIntact() &&
              load.GuardsIntact())
      << what;
}

struct Shape {
  int experts;
  int top_k;
  int groups;
  int top_groups;
};
constexpr Shape kShapes[] = {{1, 1, 1, 1},       {8, 2, 1, 1},     {16, 4, 4, 2},
                             {31, 5, 1, 1},      {60, 6, 3, 1},    {128, 8, 1, 1},
                             {160, 6, 8, 3},     {256, 8, 8, 4},   {384, 8, 1, 1},
                             {512, 32, 512, 40}, {2048, 32, 1, 1}, {2048, 16, 64, 8}};

TEST(RouteSm90, EveryMethodAndShapeHasTheBitsOfTheCpu) {
  HOPYARD_NEEDS_GPU();
  constexpr DType kTypes[] = {DType::kFloat32, DType::kBf16, DType::kFp16};
  Random random(1);
  for (const Shape& shape : kShapes) {
    for (const Method& method : Methods(shape.groups, shape.top_groups)) {
      for (int kind = 0; kind < testing::kLogitKinds; ++kind) {
        for (const int64_t tokens : {1, 7, 300}) {
          Case c(method.rule, shape.experts, shape.top_k, tokens);
          c.logits_dtype = kTypes[random.Below(3)];
          c.bias_dtype = kTypes[random.Below(3)];
          Fill(&random, kind, &c.logits);
          if (method.rule.use_bias && random.Below(4) != 0) {
            c.bias.resize(static_cast<size_t>(shape.experts));
            Fill(&random, random.Below(2), &c.bias);
          }
          ExpectCpuBits(c, c.Bind(), method.name.c_str());
          if (HasFatalFailure()) {
            FAIL() << method.name << " E=" << shape.experts << " K=" << shape.top_k
                   << " T=" << tokens << " kind " << kind;
          }
        }
      }
    }
  }
}

TEST(RouteSm90, GivenIdsAndTablesAreWeighedAsOnTheCpu) {
  HOPYARD_NEEDS_GPU();
  Random random(2);
  constexpr int kExperts = 40;
  constexpr int kTopK = 6;
  constexpr int64_t kTokens = 50;
  constexpr int64_t kVocabulary = 11;
  for (const Method& method : Methods()) {
    Case c(method.rule, kExperts, kTopK, kTokens);
    Fill(&random, 0, &c.logits);
    RouteInputs inputs = c.Bind();
    std::vector<int16_t> narrow(kTokens * kTopK);
    std::vector<int32_t> wide(kTokens * kTopK);
    for (size_t i = 0; i < wide.size(); ++i) {
      wide[i] = random.Below(kExperts + 4) - 2;
      narrow[i] = static_cast<int16_t>(wide[i]);
    }
    inputs.forced_ids = TensorView::Contiguous(wide.data(), DType::kInt32, {kTokens, kTopK});
    ExpectCpuBits(c, inputs, method.name.c_str());
    inputs.forced_ids = TensorView::Contiguous(narrow.data(), DType::kInt16, {kTokens, kTopK});
    ExpectCpuBits(c, inputs, method.name.c_str());
    inputs.forced_ids = {};
    std::vector<int64_t> tokens(kTokens);
    for (int64_t& token : tokens) {
      token = random.Below(kVocabulary + 4) - 2;
    }
    std::vector<int32_t> table(kVocabulary * kTopK);
    for (int32_t& id : table) {
      id = random.Below(kExperts + 2) - 1;
    }
    inputs.token_ids = TensorView::Contiguous(tokens.data(), DType::kInt64, {kTokens});
    inputs.token_to_experts =
        TensorView::Contiguous(table.data(), DType::kInt32, {kVocabulary, kTopK});
    ExpectCpuBits(c, inputs, method.name.c_str());
    ASSERT_FALSE(HasFatalFailure());
  }
}

TEST(RouteSm90, ManyTokensTakeStrides) {
  HOPYARD_NEEDS_GPU();
  Random random(3);
  Case c(RoutingRule::DeepSeekV3(8, 4, 2.5F), 256, 8, testing::Scaled(200000));
  Fill(&random, 0, &c.logits);
  c.bias.resize(256);
  Fill(&random, 0, &c.bias);
  ExpectCpuBits(c, c.Bind(), "many");
}

TEST(RouteSm90, TokensBeyondTheDeviceCountAreUntouched) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kCapacity = 40;
  Random random(4);
  Case c(RoutingRule::Renormalize(), 64, 4, kCapacity);
  Fill(&random, 0, &c.logits);
  (void)c.Bind();
  const DeviceArray<float> logits(c.logits);
  for (const int32_t live : {-3, 0, 1, 39, 40, 1000}) {
    const DeviceArray<int32_t> count(std::vector<int32_t>{live});
    const DeviceArray<int32_t> ids(kCapacity * 4);
    const DeviceArray<float> weights(kCapacity * 4);
    RouteSm90Args args;
    args.rule = c.rule;
    args.num_experts = 64;
    args.top_k = 4;
    args.max_tokens = kCapacity;
    args.num_tokens = count.get();
    args.logits = logits.get();
    args.ids = ids.get();
    args.weights = weights.get();
    RouteSm90(args, nullptr);
    const std::vector<int32_t> got = ids.Download();
    const std::vector<float> got_weights = weights.Download();
    const auto end = static_cast<size_t>(std::clamp<int32_t>(live, 0, kCapacity)) * 4;
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_EQ(got[i] >= 0, i < end) << live;
      ASSERT_EQ(std::isnan(got_weights[i]), i >= end) << live;
    }
  }
}

}  // namespace
}  // namespace hopyard::route
