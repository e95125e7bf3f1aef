// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <vector>

#include "hopyard/tune.h"

#include "core/error.h"

namespace hopyard {

std::vector<int64_t> TokenBuckets(int64_t max_tokens) {
  HOPYARD_CHECK(max_tokens >= 1, kInvalidArgument)
      << "max_tokens=" << max_tokens << "; wanted at least 1, the plan's capacity";
  const auto step = [](int64_t tokens) {
    if (tokens < 256 || tokens >= 4096) {
      return tokens;
    }
    return int64_t{tokens < 2048 ? 256 : 512};
  };
  std::vector<int64_t> buckets = {1};
  while (buckets.back() < max_tokens - step(buckets.back())) {
    buckets.push_back(buckets.back() + step(buckets.back()));
  }
  if (buckets.back() < max_tokens) {
    buckets.push_back(max_tokens);
  }
  return buckets;
}

}  // namespace hopyard
