// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <vector>

#include "device/timed_calls.h"

namespace hopyard::tune {

// Calls on the CPU, in turn. The flushed memory is read by all threads, whose own caches the calls
// use.
[[nodiscard]] std::unique_ptr<device::TimedCalls> HostCalls(std::vector<device::Call> calls,
                                                            const device::Flush& flush);

}  // namespace hopyard::tune
