// SPDX-License-Identifier: Apache-2.0
#include "core/environment.h"

#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace hopyard {

bool EnvironmentSwitch(const char* name) {
  // NOLINTNEXTLINE(concurrency-mt-unsafe): a race only for who changes the environment meanwhile.
  const char* const text = std::getenv(name);
  const std::string_view value = text == nullptr ? "" : text;
  HOPYARD_CHECK(value.empty() || value == "0" || value == "1", kInvalidArgument)
      << name << '=' << value << "; wanted 0 or 1";
  return value != "0";
}

}  // namespace hopyard
