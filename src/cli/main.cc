// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include <CLI/CLI.hpp>

#include "hopyard/hopyard.h"

#include "cli/commands.h"

namespace hopyard::cli {

void AddCommonOptions(CLI::App& command, CommandContext* context) {
  command.add_flag("--json", context->common.json, "Results as JSON on stdout");
  command
      .add_option("--progress", context->common.progress,
                  "Progress on stderr: auto, bar, lines or off")
      ->capture_default_str();
  command.parse_complete_callback(
      [context] { SetProgressMode(ParseProgressMode(context->common.progress)); });
}

namespace {

int Fail(ErrorKind kind, const std::string& message, bool json) {
  PrintError(ToString(kind), message, json);
  return ExitCodeOf(kind);
}

int Main(int argc, char** argv) {
  CommandContext context;
  CLI::App app("Hopyard: fused Mixture-of-Experts layers for LLM inference", "hopyard");
  app.set_version_flag("--version", HOPYARD_VERSION);
  app.require_subcommand(1);
  AddInfoCommand(app, &context);
  AddExplainCommand(app, &context);
  AddRunCommand(app, &context);
  AddBenchCommand(app, &context);
  AddTuneCommand(app, &context);
  AddQuantizeCommand(app, &context);
  // Errors of the parser itself come before --json is known to it.
  const bool json = std::any_of(argv, argv + argc,
                                [](const char* text) { return std::strcmp(text, "--json") == 0; });
  try {
    app.parse(argc, argv);
    return context.exit_code;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      return app.exit(error);  // --help and --version
    }
    return Fail(ErrorKind::kInvalidArgument, std::string(error.what()) + " (see hopyard --help)",
                json);
  } catch (const Error& error) {
    return Fail(error.kind(), error.message(), json);
  } catch (const std::bad_alloc&) {
    return Fail(ErrorKind::kOutOfMemory,
                "out of memory; use fewer --experts or --tokens, or a smaller weight format", json);
  } catch (const std::exception& error) {
    return Fail(ErrorKind::kInternal, error.what(), json);
  }
}

}  // namespace
}  // namespace hopyard::cli

int main(int argc, char** argv) {
  try {
    return hopyard::cli::Main(argc, argv);
  } catch (...) {
    // What is thrown while an error is being printed, by a closed stdout say.
    return hopyard::cli::ExitCodeOf(hopyard::ErrorKind::kInternal);
  }
}
