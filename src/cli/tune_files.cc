// SPDX-License-Identifier: Apache-2.0
// hopyard tune show, diff, merge, prune: tuning files without a device.
#include "cli/tune_files.h"

#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/tune.h"

#include "cli/console.h"
#include "core/error.h"

namespace hopyard::cli {
namespace {

std::string MachineString(const TuningMachine& machine) {
  return fmt::format("{}, {} {}{}{}, library {}", machine.device, machine.units,
                     machine.isa.empty() ? "multiprocessors" : "threads",
                     machine.isa.empty() ? "" : ", ", machine.isa, machine.library);
}

bool Matches(const TunedLayer& layer, const std::string& part) {
  // From the start of a field: "weights=bf16" is not "shared.weights=bf16".
  return (' ' + ToString(layer.key)).find(part.empty() ? part : ' ' + part) != std::string::npos;
}

void Show(const std::string& path, const std::string& part, bool json) {
  const TuningTable table = TuningTable::Load(path);
  if (json) {
    PrintJson(Json::parse(table.ToJson()));
    return;
  }
  fmt::print("{}\n{} layers\n", MachineString(table.machine()), table.layers().size());
  for (const TunedLayer& layer : table.layers()) {
    if (Matches(layer, part)) {
      fmt::print("\n{}\n{}", ToString(layer.key), RangesTable(layer));
    }
  }
}

const TunedRange* RangeAt(const TunedLayer& layer, int64_t tokens) {
  for (const TunedRange& range : layer.ranges) {
    if (tokens <= range.last) {
      return &range;
    }
  }
  return nullptr;
}

// Numbers of tokens, of those that `from` was measured at, where the two disagree. Beyond its last
// range a plan with `to` takes the untuned choice.
Json Differences(const TunedLayer& from, const TunedLayer& to) {
  Json out = Json::array();
  for (const TunedRange& range : from.ranges) {
    const TunedRange* const other = RangeAt(to, range.tokens);
    const std::string tactic = other == nullptr ? range.untuned : other->tactic;
    if (range.measured() && tactic != range.tactic) {
      out.push_back({{"tokens", range.tokens},
                     {"from", range.tactic},
                     {"from_us", range.us},
                     {"to", tactic},
                     {"to_us", other == nullptr ? 0.0 : other->us}});
    }
  }
  return out;
}

// `text`, or a dash where nothing was measured, which a table keeps as 0.
std::string Measured(double us, const std::string& text) {
  return us > 0.0 ? text : "-";
}

void Diff(const std::string& from_path, const std::string& to_path, bool json) {
  const TuningTable from = TuningTable::Load(from_path);
  const TuningTable to = TuningTable::Load(to_path);
  Json result = {{"same_machine", from.machine() == to.machine()},
                 {"removed", Json::array()},
                 {"added", Json::array()},
                 {"changed", Json::array()}};
  for (const TunedLayer& layer : from.layers()) {
    const TunedLayer* const other = to.Find(layer.key);
    if (other == nullptr) {
      result["removed"].push_back(ToString(layer.key));
    } else if (Json differences = Differences(layer, *other); !differences.empty()) {
      result["changed"].push_back({{"layer", ToString(layer.key)}, {"ranges", differences}});
    }
  }
  for (const TunedLayer& layer : to.layers()) {
    if (from.Find(layer.key) == nullptr) {
      result["added"].push_back(ToString(layer.key));
    }
  }
  if (json) {
    PrintJson(result);
    return;
  }
  if (!result["same_machine"].get<bool>()) {
    fmt::print("machines: {} | {}\n", MachineString(from.machine()), MachineString(to.machine()));
  }
  for (const char* what : {"removed", "added"}) {
    for (const Json& layer : result[what]) {
      fmt::print("{}: {}\n", what, layer.get<std::string>());
    }
  }
  for (const Json& layer : result["changed"]) {
    fmt::print("changed: {}\n", layer["layer"].get<std::string>());
    for (const Json& range : layer["ranges"]) {
      const auto to_us = range["to_us"].get<double>();
      fmt::print("  {:>7} tokens: {} ({:.1f} us) -> {} ({})\n", range["tokens"].get<int64_t>(),
                 range["from"].get<std::string>(), range["from_us"].get<double>(),
                 range["to"].get<std::string>(), Measured(to_us, fmt::format("{:.1f} us", to_us)));
    }
  }
}

void MergeFiles(const std::string& output, const std::vector<std::string>& inputs, bool json) {
  TuningTable table = TuningTable::Load(inputs.front());
  for (size_t i = 1; i < inputs.size(); ++i) {
    table.Merge(TuningTable::Load(inputs[i]));
  }
  table.Save(output);
  const size_t layers = TuningTable::Load(output).layers().size();
  if (json) {
    PrintJson({{"output", output}, {"layers", layers}});
    return;
  }
  fmt::print("{}: {} layers\n", output, layers);
}

// Save merges, so what is left goes to another file.
void Prune(const std::string& path, const std::string& output, const std::string& part, bool json) {
  TuningTable table = TuningTable::Load(path);
  Json removed = Json::array();
  for (const TunedLayer& layer : std::vector<TunedLayer>(table.layers())) {
    if (Matches(layer, part)) {
      removed.push_back(ToString(layer.key));
      table.Erase(layer.key);
    }
  }
  HOPYARD_CHECK(!removed.empty(), kInvalidArgument)
      << "no layer of " << path << " has '" << part << "' in its key; see: hopyard tune show "
      << path;
  table.Save(output);
  if (json) {
    PrintJson({{"output", output}, {"removed", removed}, {"layers", table.layers().size()}});
    return;
  }
  for (const Json& layer : removed) {
    fmt::print("removed: {}\n", layer.get<std::string>());
  }
  fmt::print("{}: {} layers\n", output, table.layers().size());
}

}  // namespace

std::string RangesTable(const TunedLayer& layer) {
  std::string out;
  size_t width = 6;
  for (const TunedRange& range : layer.ranges) {
    width = std::max(width, range.tactic.size());
  }
  out += fmt::format("{:>15} {:>9} {:>11} {:>11} {:>7}  {:<{}}  untuned\n", "tokens", "measured",
                     "us", "untuned us", "gain", "tactic", width);
  int64_t first = 1;
  for (const TunedRange& range : layer.ranges) {
    const double gain = 100.0 * (range.untuned_us / range.us - 1.0);
    out += fmt::format("{:>15} {:>9} {:>11} {:>11} {:>7}  {:<{}}  {}\n",
                       fmt::format("{}..{}", first, range.last),
                       Measured(range.us, std::to_string(range.tokens)),
                       Measured(range.us, fmt::format("{:.2f}", range.us)),
                       Measured(range.untuned_us, fmt::format("{:.2f}", range.untuned_us)),
                       Measured(range.untuned_us, fmt::format("{:.1f}%", gain)), range.tactic,
                       width, range.tactic == range.untuned ? "the same" : range.untuned);
    first = range.last + 1;
  }
  for (const TuningFault& fault : layer.faults) {
    out += fmt::format("  skipped {} at {} tokens: {}\n", fault.tactic, fault.tokens, fault.reason);
  }
  return out;
}

void AddTuneFileCommands(CLI::App& tune, CommandContext* context) {
  struct Options {
    std::string file;
    std::string other;
    std::string part;
    std::vector<std::string> files;
  };
  const auto add = [&](const char* name, const char* help, auto&& setup, auto&& run) {
    CLI::App* command = tune.add_subcommand(name, help);
    auto options = std::make_shared<Options>();
    setup(command, options.get());
    AddCommonOptions(*command, context);
    command->final_callback([=] { run(*options, context->common.json); });
  };
  add(
      "show", "Print a tuning file",
      [](CLI::App* command, Options* o) {
        command->add_option("file", o->file, "Tuning file")->required();
        command->add_option("--layer", o->part, "Only layers whose key has this text");
      },
      [](const Options& o, bool json) { Show(o.file, o.part, json); });
  add(
      "diff", "What two tuning files choose differently",
      [](CLI::App* command, Options* o) {
        command->add_option("from", o->file, "Tuning file")->required();
        command->add_option("to", o->other, "Tuning file")->required();
      },
      [](const Options& o, bool json) { Diff(o.file, o.other, json); });
  add(
      "merge", "Merge tuning files of one machine into the first; later ones win",
      [](CLI::App* command, Options* o) {
        command->add_option("output", o->file, "File to write; kept and merged into if it exists")
            ->required();
        command->add_option("inputs", o->files, "Tuning files")->required();
      },
      [](const Options& o, bool json) { MergeFiles(o.file, o.files, json); });
  add(
      "prune", "Write a tuning file without some of its layers",
      [](CLI::App* command, Options* o) {
        command->add_option("file", o->file, "Tuning file")->required();
        command->add_option("output", o->other, "File to write")->required();
        command->add_option("--layer", o->part, "Layers whose key has this text go")->required();
      },
      [](const Options& o, bool json) { Prune(o.file, o.other, o.part, json); });
}

}  // namespace hopyard::cli
