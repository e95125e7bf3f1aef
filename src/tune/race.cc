// SPDX-License-Identifier: Apache-2.0
#include "tune/race.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <exception>
#include <iterator>
#include <limits>
#include <new>

#include <fmt/format.h>

#include "hopyard/error.h"

namespace hopyard::tune {
namespace {

// Rounds of a screening. It only looks for those worth a final, which measures afresh: the fastest
// of many by few rounds is fast by luck, too.
constexpr size_t kScreenRounds = 5;
// Who leaves a screening after so many rounds, slower than the fastest by more than that. Kernels
// of one GEMM differ by less in the time of a whole layer: 10 % there are 15 % to 30 % of the
// kernel.
constexpr struct {
  size_t rounds;
  double slower;
} kDrops[] = {{2, 0.25}, {3, 0.10}};
// With noise, only what is slower by so many standard errors.
constexpr double kDropNoises = 4.0;

// Rounds of a final. Times of 2 % noise have differences of 2.8 %, over two kinds of routing 2 %:
// the median of 25 rounds has a standard error of 1.25 * 2 % / 5 = 0.5 %, twice of which is the
// usual margin. A GPU's 0.3 % is there after the fewest.
constexpr size_t kFewestRounds = 9;
// Where a call takes so long, if they agree so well (of the margin): the noise of 29 such
// differences on a GPU was 0.09 % in the median (15 rounds, 256 experts of 7168 x 2048, tune.jsonl
// at a26f9a4), and with 9 that layer took the whole minute.
constexpr size_t kFewestLongRounds = 5;
constexpr double kLongUs = 3000.0;
constexpr double kSteadyShare = 0.25;
constexpr size_t kMostRounds = 25;
// Of the reference alone, whose time is all that is asked for then.
constexpr size_t kRoundsAlone = 3;
// A difference so many standard errors from the margin will not come to its other side.
constexpr double kSureNoises = 4.0;
// How many standard errors are not chance.
constexpr double kNoises = 2.0;

// A first run of more than so many times the reference's is not waited for again. The floor: what
// loading a kernel may take beside a short call.
constexpr double kTooSlow = 100.0;
constexpr double kTooSlowFloorUs = 50e3;

bool Contains(const std::vector<std::string>& list, const std::string& item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// Round by round the mean over the kinds of routing: all count the same in it.
std::vector<double> MeanOfKinds(const std::vector<std::vector<double>>& times) {
  std::vector<double> means(times.front().size(), 0.0);
  for (const std::vector<double>& kind : times) {
    for (size_t i = 0; i < means.size(); ++i) {
      means[i] += kind[i] / static_cast<double>(times.size());
    }
  }
  return means;
}

}  // namespace

Race::Race(Lab* lab, Bench* bench, std::string reference, RaceRules rules)
    : lab_(lab), bench_(bench), reference_(std::move(reference)), rules_(std::move(rules)) {}

bool Race::Try(Tried* one) {
  try {
    bench_->Prepare(one->tactic);
    // The first run of all loads code and wakes the device: it is no measure for "too slow".
    static_cast<void>(bench_->Run(one->tactic, 0));
    one->us = bench_->Run(one->tactic, 0);
    for (int kind = 0; rules_.finite && kind < lab_->kinds() && one->not_finite.empty(); ++kind) {
      one->not_finite = bench_->NotFinite(one->tactic, kind);
    }
    return true;
  } catch (const std::exception&) {
    FailWithCurrentException(one->tactic);
  }
  return false;
}

// For want of memory nothing stands in: the others need as much. An output that is not finite is
// the kernel's fault where another's is finite; where none is, the layer's weights make it so.
void Race::EnterReference() {
  std::vector<std::string> tactics = {reference_};
  std::vector<Tried> tried;
  for (size_t i = 0; i < tactics.size() && end_ == RaceEnd::kNone; ++i) {
    Tried one{tactics[i], 0.0, {}};
    const bool ran = Try(&one);
    if (ran) {
      tried.push_back(one);
    }
    if (ran ? one.not_finite.empty() : i == 0 && !failures_.back().everywhere) {
      break;
    }
    if (i == 0) {
      const std::vector<std::string> others = rules_.stand_ins();
      tactics.insert(tactics.end(), others.begin(), others.end());
    }
  }
  if (tried.empty() || end_ != RaceEnd::kNone) {
    end_ = end_ == RaceEnd::kNone ? RaceEnd::kNoReference : end_;
    return;
  }
  const bool found = tried.back().not_finite.empty();
  const Tried chosen = found ? tried.back() : tried.front();
  for (const Tried& one : tried) {
    if (found && one.tactic != chosen.tactic) {
      Fail(one.tactic, one.not_finite, true, true);
    }
  }
  reference_ = chosen.tactic;
  reference_first_us_ = chosen.us;
  not_finite_ = chosen.not_finite;
  entered_.insert(reference_);
  Pulse({{reference_, std::vector<std::vector<double>>(1)}});
}

void Race::Fail(const std::string& tactic, const std::string& reason, bool everywhere, bool broke) {
  failed_.insert(tactic);
  failures_.push_back({tactic, reason, everywhere, broke});
}

void Race::FailWithCurrentException(const std::string& tactic) {
  bool everywhere = true;
  bool broke = true;
  std::string reason;
  try {
    throw;
  } catch (const Error& error) {
    // Less memory may do for fewer tokens. A refusal came before anything ran.
    everywhere = error.kind() != ErrorKind::kOutOfMemory;
    broke = everywhere && error.kind() != ErrorKind::kUnsupported &&
            error.kind() != ErrorKind::kInvalidArgument;
    reason = error.message();
  } catch (const std::bad_alloc&) {
    everywhere = false;
    broke = false;
    reason = "out of memory";
  } catch (const std::exception& error) {
    reason = error.what();
  }
  if (!lab_->Recover()) {
    reason += "; the device is lost";
    end_ = RaceEnd::kDeviceLost;
  }
  Fail(tactic, reason, everywhere, broke);
}

bool Race::Enter(const std::string& tactic) {
  if (end_ != RaceEnd::kNone || failed_.count(tactic) > 0) {
    return false;
  }
  if (!entered_.insert(tactic).second) {
    return true;
  }
  try {
    bench_->Prepare(tactic);
    const double us = bench_->Run(tactic, 0);
    const double limit = std::max(kTooSlow * reference_first_us_, kTooSlowFloorUs);
    if (!(us <= limit)) {
      Fail(tactic,
           fmt::format("took {:.0f} us, {} {:.0f} us: not run again", us, reference_,
                       reference_first_us_),
           true, true);
      return false;
    }
    std::string wrong;
    for (int kind = 0; kind < lab_->kinds() && wrong.empty(); ++kind) {
      wrong = bench_->Check(tactic, reference_, kind);
    }
    if (!wrong.empty()) {
      Fail(tactic, wrong, true, true);
    }
  } catch (const std::exception&) {
    FailWithCurrentException(tactic);
  }
  return failed_.count(tactic) == 0;
}

std::vector<std::string> Race::Ran() const {
  std::vector<std::string> ran;
  std::set_difference(entered_.begin(), entered_.end(), failed_.begin(), failed_.end(),
                      std::back_inserter(ran));
  return ran;
}

std::vector<Race::Runner> Race::Line(const std::vector<std::string>& tactics, double deadline) {
  const auto kinds = static_cast<size_t>(lab_->kinds());
  std::vector<Runner> runners;
  runners.push_back({reference_, std::vector<std::vector<double>>(kinds)});
  std::set<std::string> known = {reference_};
  for (const std::string& tactic : tactics) {
    const bool is_new = entered_.count(tactic) == 0 && failed_.count(tactic) == 0;
    if (is_new && end_ == RaceEnd::kNone && lab_->Seconds() > deadline) {
      Fail(tactic, "no time left for it", false, false);
    }
    if (known.insert(tactic).second && Enter(tactic)) {
      runners.push_back({tactic, std::vector<std::vector<double>>(kinds)});
      Pulse(runners);
    }
  }
  return runners;
}

void Race::RunOnce(int kind, Runner* runner) {
  if (failed_.count(runner->tactic) > 0) {
    return;
  }
  try {
    runner->times[static_cast<size_t>(kind)].push_back(bench_->Run(runner->tactic, kind));
  } catch (const std::exception&) {
    FailWithCurrentException(runner->tactic);
    if (runner->tactic == reference_ && end_ == RaceEnd::kNone) {
      end_ = RaceEnd::kNoReference;
    }
  }
}

// Every round begins with another runner and goes the other way than the one before: nobody always
// runs behind the same neighbour, or first after a pause.
void Race::RunRound(size_t round, std::vector<Runner>* runners) {
  const size_t count = runners->size();
  for (int kind = 0; kind < lab_->kinds(); ++kind) {
    for (size_t step = 0; step < count && end_ == RaceEnd::kNone; ++step) {
      const size_t place = round % 2 == 0 ? step : count - 1 - step;
      RunOnce(kind, &(*runners)[(round + place) % count]);
    }
  }
  runners->erase(
      std::remove_if(runners->begin(), runners->end(),
                     [&](const Runner& runner) { return failed_.count(runner.tactic) > 0; }),
      runners->end());
  if (end_ == RaceEnd::kNone) {
    Pulse(*runners);
  }
}

Standing Race::StandingOf(const Runner& runner, const Runner& reference) const {
  Standing standing;
  standing.tactic = runner.tactic;
  const std::vector<double> times = MeanOfKinds(runner.times);
  standing.us = Median(times);
  // The mean of the kinds' own ratios: a slow kind of routing shall not outweigh a fast one.
  std::vector<std::vector<double>> ratios = runner.times;
  for (size_t kind = 0; kind < ratios.size(); ++kind) {
    for (size_t i = 0; i < ratios[kind].size(); ++i) {
      ratios[kind][i] /= reference.times[kind][i];
    }
    const Difference own = Compare(runner.times[kind], reference.times[kind]);
    standing.loses_somewhere =
        standing.loses_somewhere || own.median > std::max(rules_.margin, kNoises * own.noise);
  }
  standing.against = Compare(MeanOfKinds(ratios), std::vector<double>(times.size(), 1.0));
  return standing;
}

// `runners` begins with the reference, which stays whatever it takes: the others are measured
// against it.
void Race::DropSlow(size_t round, std::vector<Runner>* runners) const {
  for (const auto& drop : kDrops) {
    if (round != drop.rounds) {
      continue;
    }
    std::vector<Standing> standings;
    double fastest = 0.0;
    for (const Runner& runner : *runners) {
      standings.push_back(StandingOf(runner, runners->front()));
      fastest = std::min(fastest, standings.back().against.median);
    }
    std::vector<Runner> left;
    for (size_t i = 0; i < runners->size(); ++i) {
      const Difference& against = standings[i].against;
      const double behind = (1.0 + against.median) / (1.0 + fastest) - 1.0;
      if (i == 0 || behind <= std::max(drop.slower, kDropNoises * against.noise)) {
        left.push_back((*runners)[i]);
      }
    }
    *runners = std::move(left);
  }
}

// Ends: the number of rounds is fixed, and runners only leave.
std::vector<Standing> Race::Screen(const std::vector<std::string>& tactics, double deadline) {
  std::vector<Runner> runners = Line(tactics, deadline);
  for (size_t round = 1; round <= kScreenRounds && end_ == RaceEnd::kNone; ++round) {
    const bool late = lab_->Seconds() > deadline;
    if (runners.size() == 1 || (late && round > 2)) {
      break;
    }
    RunRound(round, &runners);
    if (end_ == RaceEnd::kNone) {
      DropSlow(round, &runners);
    }
  }
  std::vector<Standing> standings;
  for (const Runner& runner : runners) {
    if (end_ == RaceEnd::kNone && !runner.times.front().empty()) {
      standings.push_back(StandingOf(runner, runners.front()));
      times_[runner.tactic] = standings.back().us;
    }
  }
  std::stable_sort(standings.begin(), standings.end(), [](const Standing& a, const Standing& b) {
    return a.against.median < b.against.median;
  });
  return standings;
}

bool Race::Wins(const Standing& standing) const {
  return -standing.against.median > std::max(rules_.margin, kNoises * standing.against.noise) &&
         !standing.loses_somewhere;
}

// Whether more rounds can hardly change who wins.
bool Race::Decided(const std::vector<Runner>& runners) const {
  return std::all_of(runners.begin() + 1, runners.end(), [&](const Runner& runner) {
    const Difference against = StandingOf(runner, runners.front()).against;
    return kNoises * against.noise <= rules_.margin ||
           std::abs(-against.median - rules_.margin) > kSureNoises * against.noise;
  });
}

bool Race::Steady(const std::vector<Runner>& runners) const {
  return reference_first_us_ >= kLongUs &&
         std::all_of(runners.begin() + 1, runners.end(), [&](const Runner& runner) {
           return StandingOf(runner, runners.front()).against.noise <= kSteadyShare * rules_.margin;
         });
}

// Ends: at most kMostRounds.
Decision Race::Final(const std::vector<std::string>& tactics,
                     const std::vector<std::string>& favourites, double deadline) {
  std::vector<Runner> runners = Line(tactics, std::numeric_limits<double>::infinity());
  for (size_t round = 1; round <= kMostRounds && end_ == RaceEnd::kNone; ++round) {
    const size_t fewest = runners.size() == 1                            ? kRoundsAlone
                          : round > kFewestLongRounds && Steady(runners) ? kFewestLongRounds
                                                                         : kFewestRounds;
    if (round > fewest && (lab_->Seconds() > deadline || Decided(runners))) {
      break;
    }
    RunRound(round, &runners);
  }
  Decision decision;
  if (end_ != RaceEnd::kNone) {
    return decision;
  }
  const Standing reference = StandingOf(runners.front(), runners.front());
  times_[reference.tactic] = reference.us;
  std::vector<Standing> winners;
  for (size_t i = 1; i < runners.size(); ++i) {
    const Standing standing = StandingOf(runners[i], runners.front());
    times_[standing.tactic] = standing.us;
    // The medians must say so, too: a table has them.
    if (Wins(standing) && standing.us < reference.us) {
      winners.push_back(standing);
    }
  }
  decision = {reference_, reference.us, reference.us, 0.0};
  if (winners.empty()) {
    return decision;
  }
  const double fastest =
      std::min_element(winners.begin(), winners.end(), [](const Standing& a, const Standing& b) {
        return a.against.median < b.against.median;
      })->against.median;
  // Of those as fast as the fastest, a favourite, else the first: the same one every time.
  const auto as_fast = [&](const Standing& standing) {
    return standing.against.median - fastest <=
           std::max(0.5 * rules_.margin, standing.against.noise);
  };
  auto winner = std::find_if(winners.begin(), winners.end(), [&](const Standing& standing) {
    return as_fast(standing) && Contains(favourites, standing.tactic);
  });
  if (winner == winners.end()) {
    winner = std::find_if(winners.begin(), winners.end(), as_fast);
  }
  return {winner->tactic, winner->us, reference.us, winner->against.noise};
}

void Race::Pulse(const std::vector<Runner>& runners) {
  std::string best = reference_;
  double best_us = reference_first_us_;
  for (const Runner& runner : runners) {
    if (runner.times.back().empty() || runner.times.back().size() != runner.times.front().size()) {
      continue;
    }
    const double us = Median(MeanOfKinds(runner.times));
    if (best_us == reference_first_us_ || us < best_us) {
      best = runner.tactic;
      best_us = us;
    }
  }
  if (end_ == RaceEnd::kNone && !rules_.pulse(static_cast<int>(runners.size()), best, best_us)) {
    end_ = RaceEnd::kStopped;
  }
}

}  // namespace hopyard::tune
