// SPDX-License-Identifier: Apache-2.0
// Tunes layers of the named models on a Hopper GPU and judges the result, as JSON lines:
//
//   bench_tune COMMIT CASE ... [--routing=uniform,zipf] [--seconds=60] [--max-tokens=8192]
//              [--output=FILE] [--repeat=1] [--check=0] [--regret=]
//
// CASE as in bench/cases.h; its numbers of tokens are not used. "tune": one per run, with the
// seconds it took; --output merges the first run's table into a file. "flips" of --repeat runs with
// other seeds: where they name another winner than the first. "check": the tuned plan against the
// untuned one at so many numbers of tokens, the buckets with their neighbours and random ones,
// replayed in turns; plans with the same kernels count as equal and are not measured. "regret":
// the tuned plan against the fastest of all kernels of either GEMM and of the best three of each
// together.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "hopyard/tune.h"

#include "bench/cases.h"
#include "bench/gpu.h"
#include "bench/layer_calls.h"
#include "plan/backend_sm90.h"

namespace hopyard::bench {
namespace {

using Json = nlohmann::ordered_json;

struct TuneRequest {
  double seconds = 60;
  int64_t max_tokens = 8192;
  std::string output;
  int repeat = 1;
  int64_t check = 0;
  std::vector<int64_t> regret;
};

// What is judged: a case with its weights and the table that a run gave.
struct Subject {
  const Machine& machine;
  const Case& one;
  const Layers& layers;

  [[nodiscard]] const MoeSpec& spec() const { return one.shape.spec; }
  void Print(const std::string& what, const Json& fields) const {
    Json line = {{"gpu", machine.gpu},
                 {"commit", machine.commit},
                 {"what", what},
                 {"model", one.shape.name},
                 {"weights", ToString(spec().weights)},
                 {"activations", ToString(spec().activations)},
                 {"packed", one.packed}};
    line.update(fields);
    std::cout << line.dump() << std::endl;
  }
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// Median microseconds of a call with each plan, replayed in turns.
std::vector<double> TimeInTurns(const LayerCalls& calls, const std::vector<Plan>& plans,
                                int rounds) {
  int64_t bytes = 0;
  for (const Plan& plan : plans) {
    bytes = std::max(bytes, plan.workspace_bytes());
  }
  const DeviceBuffer<uint8_t> workspace(bytes);
  std::vector<std::unique_ptr<TimedGraph>> graphs;
  for (const Plan& plan : plans) {
    graphs.push_back(std::make_unique<TimedGraph>(kLayerCalls, [&](int i, cudaStream_t stream) {
      calls.Enqueue(plan, {workspace.get(), static_cast<size_t>(bytes)}, i, stream);
    }));
  }
  std::vector<std::vector<double>> times(plans.size());
  for (int round = -1; round < rounds; ++round) {
    for (size_t i = 0; i < graphs.size(); ++i) {
      // Every second round backwards: no plan always follows the same one.
      const size_t at = round % 2 == 0 ? i : graphs.size() - 1 - i;
      const double us = graphs[at]->Replay();
      if (round >= 0) {
        times[at].push_back(us);
      }
    }
  }
  std::vector<double> medians;
  std::transform(times.begin(), times.end(), std::back_inserter(medians), Median);
  return medians;
}

TuningTable TuneOnce(const Subject& subject, const TuneRequest& request, uint64_t seed) {
  PlanOptions plan_options;
  plan_options.max_tokens = request.max_tokens;
  plan_options.untuned = true;
  const Plan plan = MakePlan(subject.spec(), kGpu, plan_options);
  TuneOptions options;
  options.max_seconds = request.seconds;
  options.seed = seed;
  options.routings = subject.one.routings;
  const auto begin = std::chrono::steady_clock::now();
  const int64_t measured = GetTuningStats().measured;
  TuningTable table = Tune(plan, subject.layers.front()->weights, options);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const TunedLayer& layer = table.layers().front();
  const auto won = std::count_if(layer.ranges.begin(), layer.ranges.end(),
                                 [](const TunedRange& r) { return r.tactic != r.untuned; });
  Json faults = Json::array();
  for (const TuningFault& fault : layer.faults) {
    faults.push_back({fault.tactic, fault.tokens, fault.reason});
  }
  subject.Print("tune", {{"seed", seed},
                         {"seconds", seconds},
                         {"measured", GetTuningStats().measured - measured},
                         {"ranges", layer.ranges.size()},
                         {"won", won},
                         {"validated_to", layer.ranges.empty() ? 0 : layer.ranges.back().last},
                         {"faults", faults}});
  return table;
}

std::string TacticAt(const TuningTable& table, int64_t tokens) {
  const std::vector<TunedRange>& ranges = table.layers().front().ranges;
  if (ranges.empty()) {
    return {};
  }
  return std::find_if(ranges.begin(), ranges.end() - 1,
                      [&](const TunedRange& range) { return tokens <= range.last; })
      ->tactic;
}

void PrintFlips(const Subject& subject, const TuneRequest& request, const TuningTable& first) {
  int64_t flips = 0;
  int64_t compared = 0;
  for (int run = 1; run < request.repeat; ++run) {
    const TuningTable other = TuneOnce(subject, request, static_cast<uint64_t>(run) + 1);
    for (const int64_t tokens : TokenBuckets(request.max_tokens)) {
      flips += TacticAt(first, tokens) == TacticAt(other, tokens) ? 0 : 1;
      ++compared;
    }
  }
  if (compared > 0) {
    subject.Print("flips", {{"flips", flips}, {"compared", compared}});
  }
}

std::set<int64_t> CheckedTokens(const TuneRequest& request) {
  std::set<int64_t> tokens;
  for (const int64_t bucket : TokenBuckets(request.max_tokens)) {
    tokens.insert({std::max<int64_t>(bucket - 1, 1), bucket, bucket + 1});
  }
  std::mt19937 random(7);
  std::uniform_int_distribution<int64_t> any(1, request.max_tokens);
  while (static_cast<int64_t>(tokens.size()) < std::min(request.check, request.max_tokens)) {
    tokens.insert(any(random));
  }
  return tokens;
}

void Check(const Subject& subject, const TuneRequest& request, const TuningTable& table) {
  constexpr int kRounds = 15;
  PlanOptions tuned;
  tuned.tuning = std::make_shared<const TuningTable>(table);
  tuned.weight_orders = OrdersOf(subject.spec(), subject.layers.front()->weights.desc());
  PlanOptions untuned;
  untuned.untuned = true;
  for (const int64_t tokens : CheckedTokens(request)) {
    const std::vector<Plan> plans = {PlanFor(subject.spec(), tokens, tuned),
                                     PlanFor(subject.spec(), tokens, untuned)};
    Json fields = {{"tokens", tokens},
                   {"tuned", plans[0].Explain().Chosen()},
                   {"untuned", plans[1].Explain().Chosen()},
                   {"equal", plans[0].Explain().Chosen() == plans[1].Explain().Chosen()}};
    if (!fields["equal"].get<bool>()) {
      for (const std::string& routing : subject.one.routings) {
        const LayerCalls calls(subject.spec(), subject.layers, tokens, routing);
        const std::vector<double> us = TimeInTurns(calls, plans, kRounds);
        fields[routing] = {{"tuned_us", us[0]}, {"untuned_us", us[1]}, {"ratio", us[0] / us[1]}};
      }
    }
    subject.Print("check", fields);
  }
}

std::string Kernel(const std::string& tactic, int gemm) {
  const size_t plus = tactic.find('+');
  return gemm == 1 ? tactic.substr(0, plus) : tactic.substr(plus + 1);
}

void Regret(const Subject& subject, const TuningTable& table, int64_t tokens) {
  constexpr int kRounds = 9;
  constexpr size_t kBest = 3;
  const MoeSpec& spec = subject.spec();
  PlanOptions options;
  options.max_tokens = tokens;
  const sm90::RankedTactics ranked = sm90::NeedBackend().Rank(spec, options, tokens);
  const LayerCalls calls(spec, subject.layers, tokens, subject.one.routings.front());
  const auto time = [&](const std::vector<std::string>& tactics) {
    std::vector<Plan> plans;
    for (const std::string& tactic : tactics) {
      PlanOptions named;
      named.tactic = tactic;
      plans.push_back(PlanFor(spec, tokens, named));
    }
    std::vector<std::pair<double, std::string>> timed;
    const std::vector<double> us = TimeInTurns(calls, plans, kRounds);
    for (size_t i = 0; i < tactics.size(); ++i) {
      timed.emplace_back(us[i], tactics[i]);
    }
    std::sort(timed.begin(), timed.end());
    return timed;
  };
  // The best of each GEMM beside the untuned kernel of the other, then those together.
  std::vector<std::vector<std::string>> best(2);
  for (const int gemm : {1, 2}) {
    std::vector<std::string> tactics;
    for (const auto& entry : gemm == 1 ? ranked.gemm1 : ranked.gemm2) {
      tactics.push_back(gemm == 1 ? entry.kernel + "+" + Kernel(ranked.untuned, 2)
                                  : Kernel(ranked.untuned, 1) + "+" + entry.kernel);
    }
    for (const auto& [us, tactic] : time(tactics)) {
      if (best[static_cast<size_t>(gemm) - 1].size() < kBest) {
        best[static_cast<size_t>(gemm) - 1].push_back(Kernel(tactic, gemm));
      }
    }
  }
  const std::string chosen = TacticAt(table, tokens);
  std::set<std::string> finals = {chosen, ranked.untuned};
  for (const std::string& first : best[0]) {
    for (const std::string& second : best[1]) {
      finals.insert(first + "+" + second);
    }
  }
  const auto timed = time({finals.begin(), finals.end()});
  const auto us_of = [&](const std::string& tactic) {
    return std::find_if(timed.begin(), timed.end(),
                        [&](const auto& entry) { return entry.second == tactic; })
        ->first;
  };
  subject.Print("regret", {{"tokens", tokens},
                           {"tuned", chosen},
                           {"tuned_us", us_of(chosen)},
                           {"untuned_us", us_of(ranked.untuned)},
                           {"best", timed.front().second},
                           {"best_us", timed.front().first},
                           {"regret", us_of(chosen) / timed.front().first - 1.0},
                           {"candidates", ranked.gemm1.size() + ranked.gemm2.size()}});
}

void BenchTuning(const Machine& machine, const Case& one, const TuneRequest& request) {
  const Layers layers = ColdLayers(one.shape.spec, one.packed);
  const Subject subject{machine, one, layers};
  const TuningTable table = TuneOnce(subject, request, 1);
  if (!request.output.empty()) {
    table.Save(request.output);
  }
  if (table.layers().front().ranges.empty()) {
    return;  // the faults have been printed
  }
  PrintFlips(subject, request, table);
  if (request.check > 0) {
    Check(subject, request, table);
  }
  for (const int64_t tokens : request.regret) {
    Regret(subject, table, tokens);
  }
}

bool TakeTuneOption(const std::string& argument, TuneRequest* request) {
  const size_t end = argument.find('=');
  const std::string name = argument.substr(0, end);
  const std::string value = end == std::string::npos ? "" : argument.substr(end + 1);
  if (name == "--seconds") {
    request->seconds = std::stod(value);
  } else if (name == "--max-tokens") {
    request->max_tokens = std::stoll(value);
  } else if (name == "--output") {
    request->output = value;
  } else if (name == "--repeat") {
    request->repeat = std::stoi(value);
  } else if (name == "--check") {
    request->check = std::stoll(value);
  } else if (name == "--regret") {
    request->regret = ParseTokens(value);
  } else {
    return false;
  }
  return true;
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  using hopyard::bench::TuneRequest;
  TuneRequest request;
  std::vector<char*> rest(argv, argv + argc);
  rest.erase(std::remove_if(rest.begin(), rest.end(),
                            [&](const char* argument) {
                              return hopyard::bench::TakeTuneOption(argument, &request);
                            }),
             rest.end());
  return hopyard::bench::BenchCases(
      static_cast<int>(rest.size()), rest.data(),
      [&](const hopyard::bench::Machine& machine, const hopyard::bench::Case& one) {
        hopyard::bench::BenchTuning(machine, one, request);
      });
}
