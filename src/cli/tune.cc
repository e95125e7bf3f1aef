// SPDX-License-Identifier: Apache-2.0
// hopyard tune: measures the kernels of a layer and writes a tuning file.
#include "hopyard/tune.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "cli/commands.h"
#include "cli/device_option.h"
#include "cli/layer_source.h"
#include "cli/recorded.h"
#include "cli/session.h"
#include "cli/tokens.h"
#include "cli/tune_files.h"
#include "cli/tune_plot.h"
#include "core/error.h"

namespace hopyard::cli {
namespace {

struct Options {
  LayerRequest layer;
  std::string device = "cpu";
  std::vector<int64_t> tokens;
  int64_t max_tokens = 8192;
  CallPath path;
  int threads = 0;
  TuneOptions tune;
  std::string recorded;
  std::string output;
  std::string plot;
};

std::atomic<bool> g_interrupted{false};

// Ctrl-C ends the measuring, not the program: what was measured is still written. A second one
// ends the program.
class InterruptGuard {
 public:
  InterruptGuard() {
    previous_ = std::signal(SIGINT, [](int) {
      g_interrupted = true;
      std::signal(SIGINT, SIG_DFL);
    });
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  ~InterruptGuard() { std::signal(SIGINT, previous_); }

 private:
  void (*previous_)(int) = SIG_DFL;
};

PlanOptions PlanOptionsOf(const Options& options) {
  PlanOptions plan;
  plan.max_tokens = options.tokens.empty()
                        ? options.max_tokens
                        : *std::max_element(options.tokens.begin(), options.tokens.end());
  plan.num_threads = options.threads;
  plan.path = options.path;
  plan.untuned = true;
  return plan;
}

Json ToJson(const std::vector<TuningTime>& times) {
  Json out = Json::array();
  for (const TuningTime& time : times) {
    out.push_back({{"tactic", time.tactic}, {"tokens", time.tokens}, {"us", time.us}});
  }
  return out;
}

void WritePlot(const std::string& path, const std::string& svg) {
  std::ofstream file(path);
  file << svg;
  file.close();
  HOPYARD_CHECK(file.good(), kInvalidArgument)
      << "--plot names " << path << ", which cannot be written; wanted a file in a folder that can";
}

std::string StatusText(const TuneProgress& progress) {
  return fmt::format("{} of {} batches, {} tokens: {} candidates, best {} {:.1f} us, {:.0f} s left",
                     progress.done, progress.total, progress.tokens, progress.candidates,
                     progress.best, progress.best_us, progress.seconds_left);
}

TuningTable Measure(const Options& options, const LayerPlan& plan, std::vector<TuningTime>* times) {
  const Device device = ParseDevice(options.device);
  const PlanOptions plan_options = PlanOptionsOf(options);
  CheckPacked(plan, device);
  (void)MakePlan(plan.spec, device, plan_options);  // refuses before weights are loaded
  Session session(LoadLayer(plan, options.layer.seed), plan_options, device);
  const Tokens tokens = RandomTokens(64, plan.spec.hidden_size, options.layer.seed);
  const std::vector<float> logits = RouterLogits(tokens, session.layer());
  session.Calibrate(MakeInputs(session.layer(), tokens, logits, {}));
  TuneOptions tune = options.tune;
  tune.tokens = options.tokens;
  tune.seed = options.layer.seed;
  const Recorded recorded(options.recorded, plan.spec);
  tune.recorded = recorded.View();
  const InterruptGuard guard;
  StatusLine line;
  tune.progress = [&](const TuneProgress& progress) {
    line.Show(static_cast<double>(progress.done) / static_cast<double>(progress.total),
              [&] { return StatusText(progress); });
    return !g_interrupted;
  };
  tune.measured = [&](const TuningTime& time) { times->push_back(time); };
  return Tune(session.plan(), session.placed_weights(), tune);
}

void Run(const Options& options, bool json) {
  HOPYARD_CHECK(!options.layer.target.empty(), kInvalidArgument)
      << "tune has no target; wanted a preset, a .json file that states a layer, a checkpoint "
         "directory, or one of: show, diff, merge, prune";
  const LayerPlan plan = ResolveLayer(options.layer);
  for (const std::string& note : plan.notes) {
    PrintNote(note);
  }
  if (!options.output.empty()) {
    // A file that cannot take the result is refused before it is measured.
    TuningTable(MachineOf(ParseDevice(options.device), options.threads)).Save(options.output);
  }
  std::vector<TuningTime> times;
  const TuningTable table = Measure(options, plan, &times);
  const TunedLayer& layer = table.layers().front();
  if (layer.ranges.empty()) {
    PrintNote("nothing was measured to its end: no kernel is tuned");
  } else if (!options.output.empty()) {
    table.Save(options.output);
  }
  if (!options.plot.empty()) {
    WritePlot(options.plot, PlotSvg(plan.name + ", " + table.machine().device, layer, times));
  }
  if (json) {
    PrintJson({{"layer", plan.name},
               {"interrupted", g_interrupted.load()},
               {"table", Json::parse(table.ToJson())},
               {"times", ToJson(times)}});
    return;
  }
  fmt::print("{}{}\n{}", plan.name, g_interrupted ? " (interrupted)" : "", RangesTable(layer));
  if (options.output.empty()) {
    PrintNote("nothing was written; --output FILE keeps the table");
  }
}

void AddOptions(CLI::App& command, Options* options) {
  AddLayerOptions(command, &options->layer, true, true);
  AddPackedOption(command, &options->layer);
  AddDeviceOption(command, &options->device);
  command
      .add_option("--tokens", options->tokens,
                  "Numbers of tokens to measure at (default: steps up to --max-tokens)")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command.add_option("--max-tokens", options->max_tokens, "Largest number of tokens")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  CLI::Option* const routing =
      command
          .add_option("--routing", options->tune.routings,
                      "Routings that calls rotate over: uniform, zipf, balanced, hot")
          ->delimiter(',')
          ->capture_default_str();
  AddRecordedOption(command, &options->recorded, routing);
  command.add_option("--seconds", options->tune.max_seconds, "Time limit")->capture_default_str();
  command.add_option("--margin", options->tune.margin, "A winner is faster by this share")
      ->capture_default_str();
  command.add_option("--block", options->tune.blocklist, "Tactics or kernels never to run")
      ->delimiter(',');
  command.add_option("--threads", options->threads, "CPU threads, 0: all")->capture_default_str();
  command.add_flag("--given-ids", options->path.ids, "Calls bring experts and weights, not logits");
  command.add_flag("--unfinalised", options->path.unfinalised, "Calls take rows, not sums");
  command.add_flag("--records-replay", options->path.replay, "Calls record their experts");
  command.add_option("--output", options->output, "Tuning file; merged into if it exists");
  command.add_option("--plot", options->plot, "SVG file: time against tokens per tactic");
}

}  // namespace

void AddTuneCommand(CLI::App& app, CommandContext* context) {
  CLI::App* command = app.add_subcommand(
      "tune",
      "Measure the kernels of a layer and keep the fastest; show, diff, merge, prune files");
  command->require_subcommand(0, 1);
  auto options = std::make_shared<Options>();
  AddOptions(*command, options.get());
  AddTuneFileCommands(*command, context);
  AddCommonOptions(*command, context);
  command->final_callback([command, options, context] {
    if (command->get_subcommands().empty()) {
      Run(*options, context->common.json);
    }
  });
}

}  // namespace hopyard::cli
