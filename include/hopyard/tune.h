// SPDX-License-Identifier: Apache-2.0
// Measured choices of kernels: how they are made (Tune), kept (TuningTable) and used (UseTuning,
// PlanOptions::tuning). docs/tuning.md tells how.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "hopyard/forward.h"
#include "hopyard/plan.h"
#include "hopyard/spec.h"
#include "hopyard/tensor.h"
#include "hopyard/weights.h"

namespace hopyard {

// The machine that times were measured on. A table holds for one; one of another is ignored.
struct TuningMachine {
  std::string device;   // the GPU's or CPU's model name
  int units = 0;        // multiprocessors; threads of a CPU plan
  std::string isa;      // instruction set of a CPU, "" for a GPU
  std::string library;  // HOPYARD_VERSION

  friend bool operator==(const TuningMachine&, const TuningMachine&) = default;
};
// Of a plan's device in this process. A GPU that is not there counts as an H100 SXM: plans need no
// GPU. `num_threads` as in PlanOptions.
[[nodiscard]] TuningMachine MachineOf(Device device, int num_threads = 0);

// Everything of a spec and its calls that changes which kernels a layer has or which of them is
// fast. Where the experts of a rank begin is not part of it: ranks share their tables.
struct TuningKey {
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int num_experts = 0;
  int local_experts = 0;
  ExpertMap::Kind local = ExpertMap::Kind::kAll;
  int top_k = 0;
  RoutingRule routing;
  ActivationKind activation = ActivationKind::kSwiGlu;
  WeightFormat weights = WeightFormat::kBf16;
  ActivationFormat activations = ActivationFormat::kBf16;
  SharedExperts shared;
  bool router_weight_on_input = false;
  bool overlap_launches = false;
  CallPath path;
  WeightOrders weight_orders;

  friend bool operator==(const TuningKey&, const TuningKey&) = default;
};
[[nodiscard]] TuningKey KeyOf(const MoeSpec& spec, const PlanOptions& options);
// One line of name=value pairs; equal for equal keys only. Tables are sorted by it.
[[nodiscard]] std::string ToString(const TuningKey& key);

// Numbers of tokens that one kernel won: from the range before it on up to `last`.
struct TunedRange {
  int64_t last = 0;
  int64_t tokens = 0;   // where it was measured; first <= tokens <= last
  std::string tactic;   // as PlanOptions::tactic: names, never indices
  double us = 0.0;      // median of a call; 0: nothing was measured here, the untuned choice runs
  std::string untuned;  // what a plan would take without a table; equal to `tactic` where it won
  double untuned_us = 0.0;
  double noise = 0.0;  // relative, of the difference

  [[nodiscard]] bool measured() const { return us > 0.0; }

  friend bool operator==(const TunedRange&, const TunedRange&) = default;
};

// A candidate that was not measured to the end, and why.
struct TuningFault {
  std::string tactic;
  int64_t tokens = 0;
  std::string reason;

  friend bool operator==(const TuningFault&, const TuningFault&) = default;
};

struct TunedLayer {
  TuningKey key;
  std::vector<TunedRange> ranges;  // ascending; larger batches take the untuned choice
  std::vector<TuningFault> faults;
  std::string routing;  // what the calls were routed by: "uniform,zipf" or "recorded"

  friend bool operator==(const TunedLayer&, const TunedLayer&) = default;
};

// Layers of one machine; a value. One JSON file each.
class TuningTable {
 public:
  TuningTable() = default;
  explicit TuningTable(TuningMachine machine) : machine_(std::move(machine)) {}

  [[nodiscard]] const TuningMachine& machine() const { return machine_; }
  [[nodiscard]] const std::vector<TunedLayer>& layers() const { return layers_; }  // by key
  // The layer of this key; null where there is none.
  [[nodiscard]] const TunedLayer* Find(const TuningKey& key) const;
  // That of a plan's layer: of its key, else the first whose key differs in `routing` alone, else
  // in `path`, too: the same kernels run it.
  [[nodiscard]] const TunedLayer* FindFor(const TuningKey& key) const;
  // Adds a layer, or replaces the one of its key. Error{kInvalidArgument} for ranges that do not
  // ascend, and for numbers that are not finite.
  void Put(TunedLayer layer);
  bool Erase(const TuningKey& key);
  // Puts all layers of `other`; of a layer that is here already, what was measured where the other
  // has measured nothing stays: at more tokens than it covers, or below its first. Numbers of
  // tokens that neither covers take the untuned choice. Error{kInvalidArgument} where it is of
  // another machine.
  void Merge(const TuningTable& other);

  // Sorted and complete: equal tables give equal bytes.
  [[nodiscard]] std::string ToJson() const;
  // Error{kInvalidArgument} says where the text is no table, or of a later format than this
  // library knows.
  [[nodiscard]] static TuningTable FromJson(std::string_view text);
  // Error{kInvalidArgument} for a file that cannot be read.
  [[nodiscard]] static TuningTable Load(const std::string& path);
  // Merges into what the file holds (this table's layers win) and replaces it in one step, also
  // beside other writers: a reader sees the old file or the new one. Error{kInvalidArgument} where
  // the file is of another machine or no table, or cannot be written: it stays as it is.
  // Error{kTimeout} where another writer does not end. Leaves `path`.lock, which writers wait for.
  void Save(const std::string& path) const;

  friend bool operator==(const TuningTable&, const TuningTable&) = default;

 private:
  TuningMachine machine_;
  std::vector<TunedLayer> layers_;
};

// Tables that plans of this process look into when they are made, after PlanOptions::tuning and
// before those that come with the library; the last one given first. The file that the
// environment's HOPYARD_TUNING_FILE names, read by the first plan, comes after all of them. A table
// of another machine is never found; that is reported once per table (TuningStats::ignored).
void UseTuning(const TuningTable& table);
void ForgetTuning();  // those that UseTuning has given

// Since the process began, or ResetTuningStats.
struct TuningStats {
  int64_t hits = 0;      // plans that found their layer
  int64_t misses = 0;    // plans that did not; named tactics and PlanOptions::untuned look none up
  int64_t stale = 0;     // tactics found that this build does not have: the untuned choice ran
  int64_t measured = 0;  // candidates measured
  std::vector<std::string> missed;   // keys of the misses, once each
  std::vector<std::string> ignored;  // tables not used, and why
};
[[nodiscard]] TuningStats GetTuningStats();
void ResetTuningStats();

// Numbers of tokens to measure at: powers of two up to 256, then in steps of 256 to 2048 and of 512
// to 4096, then powers of two, and `max_tokens` (spec 6.8). Ascending.
[[nodiscard]] std::vector<int64_t> TokenBuckets(int64_t max_tokens);

// The median time of a call.
struct TuningTime {
  std::string tactic;
  int64_t tokens = 0;
  double us = 0.0;
};

// What a tuning run reports as it goes.
struct TuneProgress {
  int64_t done = 0;  // numbers of tokens; of `total`
  int64_t total = 0;
  int64_t tokens = 0;  // being measured
  int candidates = 0;  // still in the race
  std::string best;    // so far, at `tokens`
  double best_us = 0.0;
  double seconds = 0.0;       // since the start
  double seconds_left = 0.0;  // expected
};

struct TuneOptions {
  uint32_t struct_size = sizeof(TuneOptions);
  std::vector<int64_t> tokens;  // empty: TokenBuckets(plan.tokens_per_chunk())
  // Routings that calls rotate over; a kernel must win over all of them and lose in none:
  // "uniform", "zipf", "balanced", "hot". Ignored with `recorded`.
  std::vector<std::string> routings = {"uniform", "zipf"};
  TensorView recorded;      // [n, top_k] i16 or i32 on the host: a replay of real tokens, n >= 1
  double max_seconds = 60;  // then what was measured is kept
  double margin = 0.01;     // relative; a winner must be faster by it, and by twice the noise
  int64_t max_bytes = 0;    // memory that inputs, outputs and workspace may take; 0: half the free
  std::vector<std::string> blocklist;  // tactics, or kernels of them, that are never run
  uint64_t seed = 1;
  // Called between measurements; false ends the run and keeps what was measured.
  std::function<bool(const TuneProgress&)> progress;
  // Called with every candidate that was measured to the end, when a number of tokens is done.
  std::function<void(const TuningTime&)> measured;
};

// Measures the kernels of the plan's layer, on its device with these weights, and returns a table
// with one layer, whose key has the order that these weights have. What runs is what
// PlanOptions::path says: logits or ids, finalised or not, with replay or not. A candidate that
// throws, runs out of memory, takes far too long or gives other values than the untuned kernels is
// a TuningFault of the result, not an error. Allocates and waits; `stream` is where a GPU's calls
// are enqueued. Error{kInvalidArgument} for options that mean nothing, for weights of another spec,
// and for a stream that is being captured.
[[nodiscard]] TuningTable Tune(const Plan& plan, const Weights& weights,
                               const TuneOptions& options = {}, Stream stream = {});

// The layer of this key out of a file that another process writes: looks until it is there,
// measured by this version of the library.
// Error{kTimeout} after `seconds`, Error{kInvalidArgument} for a file that is no table.
[[nodiscard]] TunedLayer WaitForTuning(const std::string& path, const TuningKey& key,
                                       double seconds);

}  // namespace hopyard
