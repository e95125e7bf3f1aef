// SPDX-License-Identifier: Apache-2.0
// Replay out: every entry of Route and fused_topk_deepseek writes the ids of its tokens, nothing
// behind them, and no other bit changes.
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "stages/1_route/route_expect.h"
#include "tests/rejects.h"

namespace hopyard::route {
namespace {

using testing::Bits;
using testing::Case;
using testing::Random;
using testing::Result;

constexpr int64_t kSpareRows = 5;
constexpr int16_t kUntouched = -12345;  // no id, and not the -1 of a skipped slot

// A replay buffer that is longer than the batch.
struct ReplayBuffer {
  ReplayBuffer(int64_t tokens, int top_k)
      : ids(static_cast<size_t>((tokens + kSpareRows) * top_k), kUntouched),
        view(TensorView::Contiguous(ids.data(), DType::kInt16, {tokens + kSpareRows, top_k})) {}
  ReplayBuffer(const ReplayBuffer&) = delete;
  ReplayBuffer& operator=(const ReplayBuffer&) = delete;

  // The ids of the first `tokens` tokens and nothing else.
  void ExpectHolds(const std::vector<int32_t>& wanted, int64_t tokens) const {
    const auto written = static_cast<size_t>(tokens * view.shape[1]);
    for (size_t i = 0; i < ids.size(); ++i) {
      ASSERT_EQ(ids[i], i < written ? wanted[i] : kUntouched) << "element " << i;
    }
  }

  std::vector<int16_t> ids;
  TensorView view;
};

// Logits, and the tensors that the other entries need.
class Entries {
 public:
  Entries(const RoutingRule& rule, int num_experts, int top_k, int64_t tokens)
      : case_(rule, num_experts, top_k, tokens) {
    Random random(static_cast<uint64_t>(num_experts * 1000 + tokens));
    for (float& z : case_.logits) {
      z = random.Normal();
    }
    case_.Bind();
    for (int64_t i = 0; i < tokens * top_k; ++i) {
      const int id = random.Below(num_experts + 2) - 1;  // -1 and num_experts skip their slots
      wide_.push_back(id);
      narrow_.push_back(static_cast<int16_t>(id));
      table_.push_back(random.Below(num_experts + 1) - 1);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      token_ids_.push_back(random.Below(static_cast<int>(tokens) + 1));
    }
  }
  Entries(const Entries&) = delete;
  Entries& operator=(const Entries&) = delete;

  [[nodiscard]] const Case& about() const { return case_; }
  [[nodiscard]] std::vector<std::pair<std::string, RouteInputs>> All() const {
    const int64_t tokens = case_.num_tokens;
    const RouteInputs logits = case_.inputs;
    RouteInputs i16 = logits;
    i16.forced_ids = TensorView::Contiguous(narrow_.data(), DType::kInt16, {tokens, case_.top_k});
    RouteInputs i32 = logits;
    i32.forced_ids = TensorView::Contiguous(wide_.data(), DType::kInt32, {tokens, case_.top_k});
    RouteInputs hash = logits;
    hash.token_ids = TensorView::Contiguous(token_ids_.data(), DType::kInt64, {tokens});
    hash.token_to_experts =
        TensorView::Contiguous(table_.data(), DType::kInt32, {tokens, case_.top_k});
    return {{"logits", logits}, {"forced i16", i16}, {"forced i32", i32}, {"token table", hash}};
  }

 private:
  Case case_;
  std::vector<int32_t> wide_;
  std::vector<int16_t> narrow_;
  std::vector<int32_t> table_;  // one row per token
  std::vector<int64_t> token_ids_;
};

// Routes `count` of the tokens with and without replay.
void CheckRoute(const Case& c, RouteInputs inputs, int32_t count) {
  if (count < c.num_tokens) {
    inputs.num_tokens = TensorView::Contiguous(&count, DType::kInt32, {1});
  }
  Result plain(c.num_tokens, c.top_k);
  Route(c.rule, c.top_k, inputs, plain.outputs);
  ReplayBuffer replay(c.num_tokens, c.top_k);
  std::vector<int64_t> load(static_cast<size_t>(c.num_experts), 0);
  Result recorded(c.num_tokens, c.top_k);
  recorded.outputs.replay = replay.view;
  recorded.outputs.expert_load =
      TensorView::Contiguous(load.data(), DType::kInt64, {c.num_experts});
  Route(c.rule, c.top_k, inputs, recorded.outputs);
  ASSERT_EQ(recorded.ids, plain.ids);
  ASSERT_EQ(Bits(recorded.weights), Bits(plain.weights));
  ASSERT_NO_FATAL_FAILURE(replay.ExpectHolds(plain.ids, count));
  for (size_t i = 0; i < plain.ids.size(); ++i) {
    const bool written = i < static_cast<size_t>(int64_t{count} * c.top_k);
    ASSERT_EQ(plain.ids[i] == -77, !written) << "Result's own poison";
    if (written && plain.ids[i] >= 0) {
      --load[static_cast<size_t>(plain.ids[i])];
    }
  }
  ASSERT_EQ(load, std::vector<int64_t>(load.size(), 0)) << "the load is the replay's histogram";
}

TEST(Replay, EveryEntryMethodAndPath) {
  const std::vector<std::pair<int64_t, int>> shapes = {{1, 16},  {4, 16},   {16, 16},
                                                       {32, 16}, {32, 256}, {512, 16}};
  for (const testing::Method& method : testing::Methods(4, 2)) {
    for (const auto& [tokens, num_experts] : shapes) {
      for (const int top_k : {1, 2, 4}) {
        const Entries entries(method.rule, num_experts, top_k, tokens);
        for (const auto& [name, inputs] : entries.All()) {
          for (const int64_t count : {int64_t{0}, tokens / 2, tokens}) {
            CheckRoute(entries.about(), inputs, static_cast<int32_t>(count));
            ASSERT_FALSE(HasFatalFailure()) << method.name << " from " << name << ": " << count
                                            << " of " << tokens << " tokens";
          }
        }
      }
    }
  }
}

// The test of the test: every element of the buffer is looked at.
TEST(Replay, AnyOtherElementIsRejected) {
  const std::vector<int32_t> ids = {4, 2, -1, 0, 7, 1};  // three tokens, two of them routed
  ReplayBuffer replay(3, 2);
  std::copy(ids.begin(), ids.begin() + 4, replay.ids.begin());
  ASSERT_NO_FATAL_FAILURE(replay.ExpectHolds(ids, 2));
  for (int16_t& element : replay.ids) {
    for (const int wrong : {element + 1, element == -1 ? -2 : -1}) {
      const int16_t right = std::exchange(element, static_cast<int16_t>(wrong));
      EXPECT_TRUE(hopyard::test::Rejects([&] { replay.ExpectHolds(ids, 2); }));
      element = right;
    }
  }
}

TEST(Replay, FusedTopkDeepseekWithALongerBuffer) {
  struct Shape {
    int num_experts, groups, top_groups;
  };
  constexpr Shape kShapes[] = {{16, 4, 2}, {256, 8, 4}, {384, 1, 1}};
  for (const Shape& shape : kShapes) {
    for (const int64_t tokens : {0, 1, 7, 32}) {
      for (const int top_k : {2, 4}) {
        const RoutingRule rule = RoutingRule::DeepSeekV3(shape.groups, shape.top_groups, 2.5F);
        const Entries entries(rule, shape.num_experts, top_k, tokens);
        const Case& c = entries.about();
        Result plain(tokens, top_k);
        FusedTopkDeepseek(c.inputs.logits, {}, rule, plain.outputs.weights,
                          plain.outputs.expert_ids, {});
        ReplayBuffer replay(tokens, top_k);
        Result recorded(tokens, top_k);
        FusedTopkDeepseek(c.inputs.logits, {}, rule, recorded.outputs.weights,
                          recorded.outputs.expert_ids, replay.view);
        ASSERT_EQ(recorded.ids, plain.ids);
        ASSERT_EQ(Bits(recorded.weights), Bits(plain.weights));
        ASSERT_NO_FATAL_FAILURE(replay.ExpectHolds(plain.ids, tokens));
        ASSERT_NO_FATAL_FAILURE(testing::ExpectDefinition(c, plain));
      }
    }
  }
}

}  // namespace
}  // namespace hopyard::route
