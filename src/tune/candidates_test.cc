// SPDX-License-Identifier: Apache-2.0
#include "tune/candidates.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "tests/forward_runner.h"
#include "tests/layer.h"

namespace hopyard::tune {
namespace {

using ::testing::ElementsAre;

TEST(Candidates, WhatTheModelRulesOutIsNotMeasured) {
  const sm90::RankedTactics ranked = {
      "a+x",
      {{"a", 10.0}, {"b", 11.0}, {"c", 12.4}, {"d", 12.6}, {"e", 100.0}},
      {{"x", 5.0}, {"y", 5.1}, {"z", 5.2}, {"u", 5.3}, {"v", 5.4}, {"w", 5.5}, {"t", 5.6}}};
  const Kernels kernels = Prune(ranked);
  EXPECT_EQ(kernels.untuned, "a+x");
  EXPECT_THAT(kernels.gemm1, ElementsAre("a", "b", "c"));
  EXPECT_THAT(kernels.gemm2, ElementsAre("x", "y", "z", "u", "v", "w"));
}

// An untuned plan prefers tiles of as many rows in both GEMMs: one of its kernels may be dear.
TEST(Candidates, TheUntunedStays) {
  const Kernels kernels = Prune({"e+y", {{"a", 10.0}, {"e", 100.0}}, {{"x", 5.0}, {"y", 9.0}}});
  EXPECT_THAT(kernels.gemm1, ElementsAre("a", "e"));
  EXPECT_THAT(kernels.gemm2, ElementsAre("x", "y"));
}

TEST(Candidates, OfTheCpuAreAllThatRun) {
  const MoeSpec spec = test::MiniSpec();
  PlanOptions options;
  options.max_tokens = 16;
  const Kernels kernels = KernelsOf(spec, Device{}, options, 8);
  EXPECT_EQ(kernels.gemm1, test::RunnableKernels(spec));
  EXPECT_EQ(kernels.untuned, kernels.gemm1.front());
  EXPECT_TRUE(kernels.gemm2.empty());
  EXPECT_TRUE(FitsLayer(spec, Device{}, options, kernels.untuned));
  EXPECT_FALSE(FitsLayer(spec, Device{}, options, "cpu_abacus_bf16"));
  // A tactic that the tuned plan names is one of several here.
  options.tactic = kernels.gemm1.back();
  EXPECT_EQ(KernelsOf(spec, Device{}, options, 8).gemm1, kernels.gemm1);
}

TEST(Candidates, NoPlanNoCandidates) {
  PlanOptions options;
  options.max_tokens = 16;
  const test::Caught caught = test::CatchError(
      [&] { static_cast<void>(KernelsOf(test::MiniSpec(), Device{}, options, int64_t{1} << 40)); });
  EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
}

}  // namespace
}  // namespace hopyard::tune
