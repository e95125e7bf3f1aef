// SPDX-License-Identifier: Apache-2.0
// For the tests of the tests.
#pragma once

#include <functional>

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

namespace hopyard::test {

// Whether `check`, a piece of a test made of EXPECT_s and ASSERT_s, finds anything wrong. What it
// finds is no failure of the calling test.
[[nodiscard]] inline bool Rejects(const std::function<void()>& check) {
  ::testing::TestPartResultArray found;
  {
    using Reporter = ::testing::ScopedFakeTestPartResultReporter;
    const Reporter reporter(Reporter::INTERCEPT_ONLY_CURRENT_THREAD, &found);
    check();
  }
  for (int i = 0; i < found.size(); ++i) {
    if (found.GetTestPartResult(i).failed()) {
      return true;
    }
  }
  return false;
}

}  // namespace hopyard::test
