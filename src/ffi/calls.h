// SPDX-License-Identifier: Apache-2.0
// The arguments of one call, from the maps that Python sends. A number of live tokens that is a
// number, not a tensor, becomes a call with fewer rows: the host knows it, so nothing is read from
// a device, and rows beyond are not part of the call.
#pragma once

#include "hopyard/hopyard.h"

#include "fields.h"

namespace hopyard::binding {

struct LayerCall {
  MoeInputs inputs;
  MoeOutputs outputs;
};

struct RouteCall {
  RouteInputs inputs;
  RouteOutputs outputs;
};

[[nodiscard]] LayerCall LayerCallOf(const MoeSpec& spec, const Fields& inputs,
                                    const Fields& outputs);
[[nodiscard]] RouteCall RouteCallOf(const Fields& inputs, const Fields& outputs);

}  // namespace hopyard::binding
