// SPDX-License-Identifier: Apache-2.0
#include "tune/lookup.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include <fmt/format.h>

#include "hopyard/device.h"
#include "hopyard/error.h"

#include "core/environment.h"
#include "tune/machine.h"
#include "tune/shipped.h"

namespace hopyard {
namespace {

using TablePtr = std::shared_ptr<const TuningTable>;

// What the process knows; plans may be made by several threads at once.
struct Shared {
  std::mutex mutex;
  std::vector<TablePtr> used;  // last given first
  TuningStats stats;
};

Shared& TheShared() {
  static Shared shared;
  return shared;
}

void AddOnce(std::vector<std::string>* list, const std::string& text) {
  if (std::find(list->begin(), list->end(), text) == list->end()) {
    list->push_back(text);
  }
}

void Ignore(const std::string& what) {
  Shared& shared = TheShared();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  AddOnce(&shared.stats.ignored, what);
}

constexpr const char* kFileVariable = "HOPYARD_TUNING_FILE";

// The file that the environment names: its table, or why there is none.
struct EnvironmentTable {
  TablePtr table;
  std::string fault;
};

const EnvironmentTable& TheEnvironmentTable() {
  static const EnvironmentTable read = [] {
    EnvironmentTable made;
    const std::string path = EnvironmentText(kFileVariable);
    if (!path.empty()) {
      try {
        made.table = std::make_shared<const TuningTable>(TuningTable::Load(path));
      } catch (const Error& error) {
        made.fault = fmt::format("{}={}", kFileVariable, error.message());
      }
    }
    return made;
  }();
  return read;
}

// A table that a plan looks into.
struct Source {
  TablePtr table;
  std::string name;
  bool shipped = false;
};

std::vector<Source> SourcesOf(const PlanOptions& options) {
  std::vector<Source> sources;
  if (options.tuning != nullptr) {
    sources.push_back({options.tuning, "PlanOptions::tuning"});
  }
  Shared& shared = TheShared();
  {
    const std::lock_guard<std::mutex> lock(shared.mutex);
    for (const TablePtr& table : shared.used) {
      sources.push_back({table, "UseTuning"});
    }
  }
  const EnvironmentTable& environment = TheEnvironmentTable();
  if (environment.table != nullptr) {
    sources.push_back({environment.table, kFileVariable});
  } else if (!environment.fault.empty()) {
    Ignore(environment.fault);
  }
  for (const TablePtr& table : tune::ShippedTables()) {
    sources.push_back({table, "shipped", true});
  }
  return sources;
}

bool IsOfSomeGpu(const TuningMachine& machine) {
  for (int i = 0; i < tune::GpusInOrder(); ++i) {
    if (machine == MachineOf({DeviceKind::kCuda, i})) {
      return true;
    }
  }
  return false;
}

// Whether plans of `mine` look into the table. One that no device of this process is for is
// reported; those that ship for other machines are not.
bool Serves(const Source& source, const TuningMachine& mine) {
  TuningMachine machine = source.table->machine();
  if (source.shipped) {
    machine.library = mine.library;  // built together: their tactics are checked by name
    return machine == mine;
  }
  if (machine == mine) {
    return true;
  }
  const bool of_gpu = tune::IsGpu(machine);
  if (of_gpu ? IsOfSomeGpu(machine) : tune::IsGpu(mine)) {
    return false;  // meant for another device
  }
  Ignore(fmt::format("{}: a table of {} is not used for plans of {}; measure again on this machine",
                     source.name, tune::Describe(machine), tune::Describe(mine)));
  return false;
}

// How the layer that FindFor took differs from the plan's.
std::string RemarkOf(const TunedLayer& found, const TuningKey& wanted, int64_t max_tokens) {
  std::string text;
  const auto add = [&](const std::string& remark) { text += (text.empty() ? "" : "; ") + remark; };
  if (!(found.key.routing == wanted.routing)) {
    add("measured with another routing rule");
  }
  if (const CallPath& path = found.key.path; !(path == wanted.path)) {
    add(fmt::format("measured with {}, {}, {}", path.ids ? "given ids" : "logits",
                    path.unfinalised ? "unfinalised" : "finalised",
                    path.replay ? "with replay" : "no replay"));
  }
  if (!found.ranges.empty() && max_tokens > found.ranges.back().last) {
    add(fmt::format("untuned beyond {} tokens", found.ranges.back().last));
  }
  return text;
}

}  // namespace

void UseTuning(const TuningTable& table) {
  Shared& shared = TheShared();
  auto copy = std::make_shared<const TuningTable>(table);
  const std::lock_guard<std::mutex> lock(shared.mutex);
  // Those that it repeats would never be asked.
  std::erase_if(shared.used, [&](const TablePtr& used) {
    return used->machine() == table.machine() &&
           std::all_of(used->layers().begin(), used->layers().end(),
                       [&](const TunedLayer& layer) { return table.Find(layer.key) != nullptr; });
  });
  shared.used.insert(shared.used.begin(), std::move(copy));
}

void ForgetTuning() {
  Shared& shared = TheShared();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  shared.used.clear();
}

TuningStats GetTuningStats() {
  Shared& shared = TheShared();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  return shared.stats;
}

void ResetTuningStats() {
  Shared& shared = TheShared();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  shared.stats = {};
}

namespace tune {

Tuned FindTuned(const MoeSpec& spec, Device device, const PlanOptions& options) {
  Tuned tuned;
  if (options.untuned || !options.tactic.empty()) {
    return tuned;
  }
  tuned.looked = true;
  const TuningKey key = KeyOf(spec, options);
  const TuningMachine mine = MachineOf(device, options.num_threads);
  for (const Source& source : SourcesOf(options)) {
    const bool serves = Serves(source, mine);
    const TunedLayer* const layer = serves ? source.table->FindFor(key) : nullptr;
    tuned.served = tuned.served || serves;
    // Every table is looked at, so that each that is of no use here is reported.
    if (layer != nullptr && !layer->ranges.empty() && !tuned.found) {
      tuned.found = true;
      tuned.ranges = layer->ranges;
      tuned.remark = RemarkOf(*layer, key, options.max_tokens);
    }
  }
  return tuned;
}

std::string MeasuredText(const TunedRange& range) {
  std::string text = fmt::format("{:.1f} us at {} tokens", range.us, range.tokens);
  if (range.tactic != range.untuned) {
    text += fmt::format(", untuned {} {:.1f} us", range.untuned, range.untuned_us);
  }
  return text;
}

void CountPlan(const TuningKey& key, const Tuned& tuned, int64_t stale) {
  if (!tuned.looked) {
    return;
  }
  Shared& shared = TheShared();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  TuningStats& stats = shared.stats;
  stats.hits += tuned.found ? 1 : 0;
  stats.misses += tuned.found ? 0 : 1;
  stats.stale += stale;
  if (!tuned.found) {
    AddOnce(&stats.missed, ToString(key));
  }
}

void CountMeasured(int64_t candidates) {
  Shared& shared = TheShared();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  shared.stats.measured += candidates;
}

}  // namespace tune
}  // namespace hopyard
