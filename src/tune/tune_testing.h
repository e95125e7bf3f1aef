// SPDX-License-Identifier: Apache-2.0
// Tables and errors for the tests of this folder.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"
#include "hopyard/tune.h"

#include "tune/field_text.h"
#include "tune/key_fields.h"

namespace hopyard::tune::testing {

using Random = std::mt19937_64;

inline TuningMachine AMachine() {
  return {"A processor", 8, "avx2", "0.1.0"};
}

// Another value of the field's type, valid in a table.
template <class Field>
void Change(Field* field) {
  if constexpr (std::is_same_v<Field, bool>) {
    *field = !*field;
  } else if constexpr (std::is_enum_v<Field>) {
    const auto next = static_cast<Field>(static_cast<int>(*field) + 1);
    *field = EnumName(next) == "?" ? static_cast<Field>(0) : next;
  } else {
    *field += 1;
  }
}

// One of `choices` values; two keys of few choices are often equal.
inline TuningKey RandomKey(Random* random, int choices) {
  TuningKey key;
  VisitFields(key, [&](const char* /*name*/, auto& field) {
    for (uint64_t changes = (*random)() % static_cast<uint64_t>(choices); changes > 0; --changes) {
      Change(&field);
    }
  });
  return key;
}

// Every field of it set; layers of other numbers have other keys.
inline TunedLayer ALayer(int number) {
  TunedLayer layer;
  layer.key.hidden_size = 64 + number;
  layer.key.routing.scaling_factor = 2.6F;
  layer.ranges = {{16, 8, "tactic_a", 12.5 + number, "tactic_b", 13.25, 0.001},
                  {300, 256, "tactic_b", 99.1, "tactic_b", 99.1, 0.0}};
  layer.faults = {{"tactic_c", 8, "ran out of \"memory\"\n"}};
  layer.routing = "uniform,zipf";
  return layer;
}

inline std::string BytesOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

// What `action` throws must be of this kind and say these parts.
template <class Action>
void ExpectError(ErrorKind kind, const std::vector<std::string>& parts, Action&& action) {
  try {
    action();
    ADD_FAILURE() << "nothing was thrown; wanted an error with " << parts.front();
  } catch (const Error& error) {
    EXPECT_EQ(ToString(error.kind()), ToString(kind)) << error.message();
    for (const std::string& part : parts) {
      EXPECT_THAT(error.message(), ::testing::HasSubstr(part));
    }
  }
}

}  // namespace hopyard::tune::testing
