// SPDX-License-Identifier: Apache-2.0
// Tactics whose two GEMMs take the same rows in other tiles.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "gemm/sm90/grouped_gemm_sm90.h"
#include "plan/backend_sm90.h"

namespace hopyard::test {

// Rows of a kernel's tiles, and how many come together.
[[nodiscard]] inline std::pair<int, int> TilesOf(const std::string& kernel) {
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const gemm::sm90::KernelInfo info = gemm::sm90::KernelAt(i);
    if (info.name == kernel) {
      return {info.tokens, info.cluster};
    }
  }
  return {};
}

// GEMM1+GEMM2, so that each kernel of either is in one of them: none where all kernels of a GEMM
// have the tiles of all of the other, as in a build of a few.
[[nodiscard]] inline std::vector<std::string> MixedTactics(const MoeSpec& spec) {
  constexpr int64_t kTokens = 64;
  PlanOptions options;
  options.max_tokens = kTokens;
  const sm90::RankedTactics ranked = sm90::FindBackend()->Rank(spec, options, kTokens);
  std::vector<std::string> tactics;
  // The first of `others`, from one after the other on, that has other tiles.
  const auto pair_with = [&](const std::string& kernel, size_t start, bool is_gemm1) {
    const auto& others = is_gemm1 ? ranked.gemm2 : ranked.gemm1;
    for (size_t i = 0; i < others.size(); ++i) {
      const std::string& other = others[(start + i) % others.size()].kernel;
      const std::string tactic = is_gemm1 ? kernel + '+' + other : other + '+' + kernel;
      if (TilesOf(kernel) != TilesOf(other) && sm90::FindBackend()->HasTactic(spec, tactic)) {
        tactics.push_back(tactic);
        return;
      }
    }
  };
  for (size_t i = 0; i < ranked.gemm1.size(); ++i) {
    pair_with(ranked.gemm1[i].kernel, i, true);
  }
  for (size_t i = 0; i < ranked.gemm2.size(); ++i) {
    pair_with(ranked.gemm2[i].kernel, i + 1, false);
  }
  return tactics;
}

}  // namespace hopyard::test
