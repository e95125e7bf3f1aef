// SPDX-License-Identifier: Apache-2.0
#include "core/environment.h"

#include <cstdlib>

#include "core/error.h"

namespace hopyard {

bool EnvironmentSwitch(const char* name) {
  const std::string value = EnvironmentText(name);
  HOPYARD_CHECK(value.empty() || value == "0" || value == "1", kInvalidArgument)
      << name << '=' << value << "; wanted 0 or 1";
  return value != "0";
}

std::string EnvironmentText(const char* name) {
  // NOLINTNEXTLINE(concurrency-mt-unsafe): a race only for who changes the environment meanwhile.
  const char* const text = std::getenv(name);
  return text == nullptr ? "" : text;
}

}  // namespace hopyard
