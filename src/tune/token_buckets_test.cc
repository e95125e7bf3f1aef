// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

using ::testing::ElementsAre;

// The bucket that a number of tokens is rounded up to, by the rule of FlashInfer's tuner.
int64_t BucketOf(int64_t tokens, int64_t max_tokens) {
  const auto round_up = [](int64_t value, int64_t step) {
    return (value + step - 1) / step * step;
  };
  int64_t bucket = 0;
  if (tokens <= 256 || tokens > 4096) {
    bucket = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens)));
  } else {
    bucket = round_up(tokens, tokens <= 2048 ? 256 : 512);
  }
  return std::min(bucket, max_tokens);
}

TEST(TokenBuckets, AreThoseOfTheHybridRule) {
  EXPECT_THAT(TokenBuckets(1), ElementsAre(1));
  EXPECT_THAT(TokenBuckets(2), ElementsAre(1, 2));
  EXPECT_THAT(TokenBuckets(5), ElementsAre(1, 2, 4, 5));
  EXPECT_THAT(TokenBuckets(300), ElementsAre(1, 2, 4, 8, 16, 32, 64, 128, 256, 300));
  EXPECT_THAT(TokenBuckets(8192),
              ElementsAre(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048,
                          2560, 3072, 3584, 4096, 8192));
}

TEST(TokenBuckets, HoldEveryNumberRoundedUp) {
  for (const int64_t max_tokens : {1, 3, 255, 256, 257, 511, 1000, 2049, 4095, 4097, 20000}) {
    std::vector<int64_t> wanted;
    for (int64_t tokens = 1; tokens <= max_tokens; ++tokens) {
      wanted.push_back(BucketOf(tokens, max_tokens));
    }
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    EXPECT_EQ(TokenBuckets(max_tokens), wanted) << max_tokens;
  }
}

TEST(TokenBuckets, EndAtTheLargestNumber) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(TokenBuckets(most).back(), most);
  EXPECT_EQ(TokenBuckets(most).size(), 20U + 51U);  // 1 .. 4096, 2^13 .. 2^62, the number
  ExpectError(ErrorKind::kInvalidArgument, {"max_tokens=0", "wanted at least 1"},
              [] { std::ignore = TokenBuckets(0); });
}

}  // namespace
}  // namespace hopyard::tune::testing
