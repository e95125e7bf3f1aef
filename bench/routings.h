// SPDX-License-Identifier: Apache-2.0
// Named kinds of routing for the benchmarks: router logits, and the experts that they lead to.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hopyard/error.h"
#include "hopyard/spec.h"

#include "core/error.h"

namespace hopyard::bench {

inline void CheckRoutingName(const std::string& name) {
  HOPYARD_CHECK(name == "uniform" || name == "balanced" || name == "zipf" || name == "hot",
                kInvalidArgument)
      << "no routing '" << name << "'; known: uniform, balanced, zipf, hot";
}

// Logits that lead to the named routing, the largest ones of each token, and the experts that the
// tokens touch.
struct Logits {
  std::vector<float> values;
  std::vector<int32_t> experts;  // [tokens, top_k]
  int64_t touched = 0;

  Logits(const MoeSpec& spec, int64_t tokens, const std::string& routing, unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(1e-6F, 1.0F);
    const auto count = static_cast<size_t>(spec.num_experts);
    const auto top_k = static_cast<size_t>(spec.top_k);
    std::vector<bool> used(count);
    std::vector<std::pair<float, size_t>> row(count);
    for (int64_t t = 0; t < tokens; ++t) {
      for (size_t e = 0; e < count; ++e) {
        const float gumbel = -std::log(-std::log(uniform(random)));
        float logit = gumbel;
        if (routing == "zipf") {
          logit -= std::log(static_cast<float>((e * 7 + 3) % count + 1));
        } else if (routing == "hot") {
          logit += e < top_k ? 4.0F : 0.0F;
        } else if (routing == "balanced") {
          // Choices t * top_k .. + top_k - 1 of a walk through all experts.
          const size_t place = (e + count * top_k - static_cast<size_t>(t) * top_k % count) % count;
          logit = place < top_k ? 8.0F + 0.01F * gumbel : -8.0F;
        }
        row[e] = {logit, e};
        values.push_back(logit);
      }
      std::partial_sort(row.begin(), row.begin() + spec.top_k, row.end(), std::greater<>());
      for (size_t k = 0; k < top_k; ++k) {
        used[row[k].second] = true;
        experts.push_back(static_cast<int32_t>(row[k].second));
      }
    }
    touched = std::count(used.begin(), used.end(), true);
  }
};

}  // namespace hopyard::bench
