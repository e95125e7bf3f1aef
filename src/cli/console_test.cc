// SPDX-License-Identifier: Apache-2.0
#include "cli/console.h"

#include <gtest/gtest.h>

namespace hopyard::cli {
namespace {

// docs/cli.md: scripts tell a wrong call (2) from a defect of Hopyard (3).
TEST(ExitCode, ADefectIsNoBadInput) {
  EXPECT_EQ(ExitCodeOf(ErrorKind::kInternal), 3);
  for (const ErrorKind kind : {ErrorKind::kInvalidArgument, ErrorKind::kUnsupported,
                               ErrorKind::kOutOfMemory, ErrorKind::kTimeout}) {
    EXPECT_EQ(ExitCodeOf(kind), 2) << ToString(kind);
  }
}

}  // namespace
}  // namespace hopyard::cli
