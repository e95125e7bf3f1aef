// SPDX-License-Identifier: Apache-2.0
#include "core/environment.h"

#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

#include "core/error.h"

namespace hopyard {
namespace {

constexpr const char* kName = "HOPYARD_TEST_SWITCH";

TEST(EnvironmentSwitch, IsOnUnlessItIsZero) {
  ASSERT_EQ(unsetenv(kName), 0);
  EXPECT_TRUE(EnvironmentSwitch(kName));
  for (const char* on : {"", "1"}) {
    ASSERT_EQ(setenv(kName, on, 1), 0);
    EXPECT_TRUE(EnvironmentSwitch(kName)) << on;
  }
  ASSERT_EQ(setenv(kName, "0", 1), 0);
  EXPECT_FALSE(EnvironmentSwitch(kName));
}

TEST(EnvironmentSwitch, RefusesOtherValues) {
  for (const char* value : {"00", "2", "-1", "true", "off", " 0"}) {
    ASSERT_EQ(setenv(kName, value, 1), 0);
    try {
      static_cast<void>(EnvironmentSwitch(kName));
      FAIL() << value;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
      EXPECT_EQ(error.message(), std::string(kName) + '=' + value + "; wanted 0 or 1");
    }
  }
}

}  // namespace
}  // namespace hopyard
