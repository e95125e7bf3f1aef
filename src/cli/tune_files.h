// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "hopyard/tune.h"

#include "cli/commands.h"

namespace hopyard::cli {

// A layer's ranges and faults for people, one line each.
[[nodiscard]] std::string RangesTable(const TunedLayer& layer);

// show, diff, merge and prune, as commands of `hopyard tune`.
void AddTuneFileCommands(CLI::App& tune, CommandContext* context);

}  // namespace hopyard::cli
