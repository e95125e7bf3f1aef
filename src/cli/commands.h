// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cli/console.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11 has it so
class App;
}

namespace hopyard::cli {

// Each adds one command to `app`. The command's flags are parsed into an object that its callback
// owns; the callback runs the command and sets `exit_code`. `common` is filled before it runs.
struct CommandContext {
  CommonOptions common;
  int exit_code = kExitOk;
};

void AddInfoCommand(CLI::App& app, CommandContext* context);
void AddExplainCommand(CLI::App& app, CommandContext* context);
void AddRunCommand(CLI::App& app, CommandContext* context);
void AddBenchCommand(CLI::App& app, CommandContext* context);
void AddTuneCommand(CLI::App& app, CommandContext* context);
void AddQuantizeCommand(CLI::App& app, CommandContext* context);

// --json and --progress.
void AddCommonOptions(CLI::App& command, CommandContext* context);

}  // namespace hopyard::cli
