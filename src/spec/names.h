// SPDX-License-Identifier: Apache-2.0
// Names of the values of a rule and of an expert map, in files and messages; "?" for other values.
#pragma once

#include <string_view>

#include "hopyard/routing.h"
#include "hopyard/spec.h"

namespace hopyard::spec {

[[nodiscard]] std::string_view NameOf(RoutingScore score);
[[nodiscard]] std::string_view NameOf(RoutingWeight weight);
[[nodiscard]] std::string_view NameOf(Renormalise renormalise);
[[nodiscard]] std::string_view NameOf(ExpertMap::Kind kind);

}  // namespace hopyard::spec
