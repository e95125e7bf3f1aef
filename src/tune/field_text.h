// SPDX-License-Identifier: Apache-2.0
// A field of a key as text; values of enumerations by their names.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include <fmt/format.h>

#include "core/error.h"
#include "spec/names.h"

namespace hopyard::tune {

template <class Enum>
[[nodiscard]] std::string_view EnumName(Enum value) {
  if constexpr (requires { spec::NameOf(value); }) {
    return spec::NameOf(value);
  } else {
    return ToString(value);
  }
}

// Inverse of EnumName. Error{kInvalidArgument} lists the known names.
template <class Enum>
[[nodiscard]] Enum EnumOf(std::string_view name) {
  std::string known;
  for (int i = 0; EnumName(static_cast<Enum>(i)) != "?"; ++i) {
    if (EnumName(static_cast<Enum>(i)) == name) {
      return static_cast<Enum>(i);
    }
    known += (known.empty() ? "" : ", ") + std::string(EnumName(static_cast<Enum>(i)));
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << "'" << name << "' is not known; wanted one of " << known;
  return {};
}

// Numbers have the fewest digits that read back as the same number.
template <class Field>
[[nodiscard]] std::string FieldText(const Field& field) {
  if constexpr (std::is_enum_v<Field>) {
    return std::string(EnumName(field));
  } else if constexpr (std::is_floating_point_v<Field>) {
    return fmt::format("{}", field == 0 ? Field{0} : field);  // no -0: it equals 0
  } else {
    return fmt::format("{}", field);
  }
}

}  // namespace hopyard::tune
