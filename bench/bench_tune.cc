// SPDX-License-Identifier: Apache-2.0
// Tunes layers of the named models on a Hopper GPU and judges the result, as JSON lines:
//
//   bench_tune COMMIT CASE ... [--routing=uniform,zipf] [--seconds=60] [--max-tokens=8192]
//              [--output=FILE] [--repeat=1] [--check=0] [--rounds=15] [--regret=]
//
// CASE as in bench/cases.h; its numbers of tokens are not used. "tune": one per run, with the
// seconds it took; --output merges the first run's table into a file. "flips" of --repeat runs with
// other seeds: where they name another winner than the first. "check": the tuned plan against the
// untuned one at so many numbers of tokens, the buckets with their neighbours and random ones,
// replayed in turns, --rounds times; plans with the same kernels count as equal and are not
// measured. "ratio" is of the rounds' times, "noise" its standard error, "all" over all kinds of
// routing together, each counting the same; "within": no slower than the tuner promises. "regret":
// by that ratio, the tuned plan against the fastest of all kernels of either GEMM and of the best
// three of each together. "regret" is against those that lose to the untuned plan with no kind of
// routing, which the tuner takes no others of; "regret_any" against all.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <iterator>
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
#include "core/error.h"
#include "plan/backend_sm90.h"
#include "tune/paired_times.h"

namespace hopyard::bench {
namespace {

using Json = nlohmann::ordered_json;

struct TuneRequest {
  double seconds = 60;
  int64_t max_tokens = 8192;
  std::string output;
  int repeat = 1;
  int64_t check = 0;
  int rounds = 15;  // of the check
  std::vector<int64_t> regret;
};

// What is judged: a case with its weights and the table that a run gave.
struct Subject {
  const Machine& machine;
  const Case& one;
  const Layers& layers;

  [[nodiscard]] const MoeSpec& spec() const { return one.shape.spec; }
  // Of every plan that is timed.
  [[nodiscard]] PlanOptions Options() const {
    PlanOptions options;
    options.weight_orders = OrdersOf(spec(), layers.front()->weights.desc());
    return options;
  }
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

// Microseconds of a call with each plan, replayed in turns: [plan][round].
using Rounds = std::vector<std::vector<double>>;

Rounds TimeInTurns(const LayerCalls& calls, const std::vector<Plan>& plans, int rounds) {
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
  Rounds times(plans.size());
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
  return times;
}

// A plan against the untuned one, as the tuner compares them.
struct Against {
  std::vector<tune::Difference> kinds;  // of routing
  tune::Difference all;                 // the mean of the kinds' ratios, round by round

  // `times`: of each kind of routing; `plan` and `untuned` are places in them.
  Against(const std::vector<Rounds>& times, size_t plan, size_t untuned) {
    std::vector<double> means(times.front()[plan].size(), 0.0);
    for (const Rounds& kind : times) {
      kinds.push_back(tune::Compare(kind[plan], kind[untuned]));
      for (size_t i = 0; i < means.size(); ++i) {
        means[i] += kind[plan][i] / kind[untuned][i] / static_cast<double>(times.size());
      }
    }
    all = tune::Compare(means, std::vector<double>(means.size(), 1.0));
  }

  [[nodiscard]] double ratio() const { return 1.0 + all.median; }
  // No slower than the tuner promises.
  [[nodiscard]] static bool Within(const tune::Difference& difference) {
    constexpr double kMargin = 0.01;
    constexpr double kNoises = 2.0;
    return difference.median <= std::max(kMargin, kNoises * difference.noise);
  }
  [[nodiscard]] bool LosesNowhere() const {
    return std::all_of(kinds.begin(), kinds.end(), Within);
  }
};

Json ToJson(const tune::Difference& difference) {
  return {{"ratio", 1.0 + difference.median}, {"noise", difference.noise}};
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

// The winner; empty where the untuned choice runs.
std::string TacticAt(const TuningTable& table, int64_t tokens) {
  const std::vector<TunedRange>& ranges = table.layers().front().ranges;
  const auto range = std::find_if(ranges.begin(), ranges.end(),
                                  [&](const TunedRange& one) { return tokens <= one.last; });
  return range == ranges.end() || range->tactic == range->untuned ? "" : range->tactic;
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
  PlanOptions tuned = subject.Options();
  tuned.tuning = std::make_shared<const TuningTable>(table);
  PlanOptions untuned = subject.Options();
  untuned.untuned = true;
  for (const int64_t tokens : CheckedTokens(request)) {
    const std::vector<Plan> plans = {PlanFor(subject.spec(), tokens, tuned),
                                     PlanFor(subject.spec(), tokens, untuned)};
    Json fields = {{"tokens", tokens},
                   {"tuned", plans[0].Explain().Chosen()},
                   {"untuned", plans[1].Explain().Chosen()},
                   {"equal", plans[0].Explain().Chosen() == plans[1].Explain().Chosen()}};
    if (!fields["equal"].get<bool>()) {
      std::vector<Rounds> times;
      for (const std::string& routing : subject.one.routings) {
        const LayerCalls calls(subject.spec(), subject.layers, tokens, routing);
        times.push_back(TimeInTurns(calls, plans, request.rounds));
      }
      const Against against(times, 0, 1);
      for (size_t kind = 0; kind < times.size(); ++kind) {
        Json of_kind = {{"tuned_us", tune::Median(times[kind][0])},
                        {"untuned_us", tune::Median(times[kind][1])}};
        of_kind.update(ToJson(against.kinds[kind]));
        of_kind["within"] = Against::Within(against.kinds[kind]);
        fields[subject.one.routings[kind]] = of_kind;
      }
      fields["all"] = ToJson(against.all);
    }
    subject.Print("check", fields);
  }
}

std::string Kernel(const std::string& tactic, int gemm) {
  const size_t plus = tactic.find('+');
  return gemm == 1 ? tactic.substr(0, plus) : tactic.substr(plus + 1);
}

// A tactic that was timed beside the untuned one.
struct TimedTactic {
  std::string tactic;
  Against against;
  std::vector<double> us;  // medians, by kind of routing
};

class Exhaustive {
 public:
  Exhaustive(const Subject& subject, int64_t tokens) : subject_(subject), tokens_(tokens) {
    PlanOptions options = subject.Options();
    options.max_tokens = tokens;
    ranked_ = sm90::NeedBackend().Rank(subject.spec(), options, tokens);
    for (const std::string& routing : subject.one.routings) {
      calls_.push_back(
          std::make_unique<LayerCalls>(subject.spec(), subject.layers, tokens, routing));
    }
  }

  [[nodiscard]] const sm90::RankedTactics& ranked() const { return ranked_; }

  // These and the untuned one, the fastest first.
  [[nodiscard]] std::vector<TimedTactic> Time(std::set<std::string> names) const {
    constexpr int kRounds = 9;
    names.insert(ranked_.untuned);
    std::vector<Plan> plans;
    for (const std::string& tactic : names) {
      PlanOptions named = subject_.Options();
      named.tactic = tactic;
      plans.push_back(PlanFor(subject_.spec(), tokens_, named));
    }
    std::vector<Rounds> times;
    for (const auto& calls : calls_) {
      times.push_back(TimeInTurns(*calls, plans, kRounds));
    }
    const auto untuned =
        static_cast<size_t>(std::distance(names.begin(), names.find(ranked_.untuned)));
    std::vector<TimedTactic> timed;
    for (const std::string& tactic : names) {
      const size_t place = timed.size();
      timed.push_back({tactic, Against(times, place, untuned), {}});
      for (const Rounds& kind : times) {
        timed.back().us.push_back(tune::Median(kind[place]));
      }
    }
    std::sort(timed.begin(), timed.end(), [](const TimedTactic& one, const TimedTactic& other) {
      return one.against.ratio() < other.against.ratio();
    });
    return timed;
  }

  // Of one GEMM's kernels beside the untuned one of the other, the best three.
  [[nodiscard]] std::vector<std::string> BestKernels(int gemm) const {
    constexpr size_t kBest = 3;
    std::set<std::string> names;
    for (const auto& entry : gemm == 1 ? ranked_.gemm1 : ranked_.gemm2) {
      names.insert(gemm == 1 ? entry.kernel + "+" + Kernel(ranked_.untuned, 2)
                             : Kernel(ranked_.untuned, 1) + "+" + entry.kernel);
    }
    std::vector<std::string> best;
    for (const TimedTactic& one : Time(names)) {
      if (best.size() < kBest) {
        best.push_back(Kernel(one.tactic, gemm));
      }
    }
    return best;
  }

 private:
  const Subject& subject_;
  int64_t tokens_;
  sm90::RankedTactics ranked_;
  std::vector<std::unique_ptr<LayerCalls>> calls_;  // by kind of routing
};

void Regret(const Subject& subject, const TuningTable& table, int64_t tokens) {
  const Exhaustive exhaustive(subject, tokens);
  const sm90::RankedTactics& ranked = exhaustive.ranked();
  const std::string winner = TacticAt(table, tokens);
  const std::string chosen = winner.empty() ? ranked.untuned : winner;
  std::set<std::string> finals = {chosen};
  const std::vector<std::string> seconds = exhaustive.BestKernels(2);
  for (const std::string& first : exhaustive.BestKernels(1)) {
    for (const std::string& second : seconds) {
      finals.insert(first + "+" + second);
    }
  }
  const std::vector<TimedTactic> timed = exhaustive.Time(finals);
  const auto find = [&](auto&& is) { return *std::find_if(timed.begin(), timed.end(), is); };
  const TimedTactic tuned = find([&](const TimedTactic& one) { return one.tactic == chosen; });
  const TimedTactic untuned =
      find([&](const TimedTactic& one) { return one.tactic == ranked.untuned; });
  const TimedTactic best = find(
      [&](const TimedTactic& one) { return one.tactic == chosen || one.against.LosesNowhere(); });
  const TimedTactic& any = timed.front();
  Json fields = {{"tokens", tokens},
                 {"tuned", chosen},
                 {"untuned", ranked.untuned},
                 {"best", best.tactic},
                 {"best_any", any.tactic},
                 {"tuned_against_untuned", ToJson(tuned.against.all)},
                 {"regret", tuned.against.ratio() / best.against.ratio() - 1.0},
                 {"regret_any", tuned.against.ratio() / any.against.ratio() - 1.0},
                 {"candidates", ranked.gemm1.size() + ranked.gemm2.size()}};
  for (size_t kind = 0; kind < subject.one.routings.size(); ++kind) {
    fields[subject.one.routings[kind]] = {{"tuned_us", tuned.us[kind]},
                                          {"untuned_us", untuned.us[kind]},
                                          {"best_us", best.us[kind]},
                                          {"best_any_us", any.us[kind]}};
  }
  subject.Print("regret", fields);
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
  } else if (name == "--rounds") {
    request->rounds = std::stoi(value);
    HOPYARD_CHECK(request->rounds > 0, kInvalidArgument)
        << "--rounds=" << value << "; wanted 1 or more";
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
