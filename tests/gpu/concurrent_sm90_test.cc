// SPDX-License-Identifier: Apache-2.0
// Calls that run at the same time on one plan and one set of weights, from threads and streams of
// their own: each gives the bits that it gives alone.
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/captured_call.h"

namespace hopyard::test {
namespace {

constexpr int kCallers = 3;

// Repeats a call eagerly and captured, many at a time; what went wrong, or nothing.
std::string Repeat(const RepeatedCall& call, const CapturedCall& graph,
                   const std::vector<uint16_t>& wanted) {
  const int rounds = SmallTests() ? 1 : 20;
  for (int round = 0; round < rounds; ++round) {
    for (int i = 0; i < 10; ++i) {
      call.Poison(round + i, graph.stream());
      if (i % 2 == 0) {
        call.Run(graph.stream());
      } else {
        graph.Launch();
      }
    }
    if (!SameBits(call.Output(), wanted)) {
      return "other bits in round " + std::to_string(round);
    }
  }
  return {};
}

class GpuConcurrent : public ::testing::TestWithParam<FormatPair> {};

TEST_P(GpuConcurrent, CallsKeepTheirBits) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(GetParam().weights, GetParam().activations);
  source.bias = true;
  TwinLayer layer(source);
  PlanOptions options;
  options.max_tokens = 130;
  const Plan plan = MakePlan(source.spec, kGpu, options);
  DeviceMirror mirror;
  std::vector<std::unique_ptr<RepeatedCall>> calls;
  std::vector<std::unique_ptr<CapturedCall>> graphs;
  std::vector<std::vector<uint16_t>> wanted;
  // One kernel before the GEMMs, two and more.
  for (const int64_t tokens : {7, 40, 130}) {
    LayerInputs inputs(source.spec, tokens, static_cast<uint64_t>(tokens));
    calls.push_back(
        std::make_unique<RepeatedCall>(plan, layer.gpu(), mirror.Copy(inputs.Logits().get())));
    graphs.push_back(std::make_unique<CapturedCall>(*calls.back()));
    calls.back()->Run(graphs.back()->stream());
    wanted.push_back(calls.back()->Output());
  }
  std::vector<std::string> problems(kCallers);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kCallers; ++i) {
    threads.emplace_back([&, i] { problems[i] = Repeat(*calls[i], *graphs[i], wanted[i]); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (size_t i = 0; i < kCallers; ++i) {
    EXPECT_EQ(problems[i], "") << "caller " << i;
    EXPECT_TRUE(calls[i]->Intact());
  }
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuConcurrent, ::testing::ValuesIn(FamilyPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
