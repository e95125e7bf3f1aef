// SPDX-License-Identifier: Apache-2.0
#include "tune/tuner.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>

#include <fmt/format.h>

#include "hopyard/error.h"

#include "core/error.h"

namespace hopyard::tune {
namespace {

// How many tactics a final is between, beside the reference.
constexpr size_t kFinalists = 3;
// Who is so many standard errors of a screening short of the margin does not win a final.
constexpr double kHopelessNoises = 3.0;
// Time that the listed numbers of tokens may take; the rest is for the borders between them.
constexpr double kBucketShare = 0.75;
// Of a number of tokens' time, what goes to each of the two screenings; the rest is the final's.
constexpr double kScreenShare = 0.35;
// Up to some hundred tokens a layer reads its weights, which takes as long for few tokens, beyond
// it multiplies: a measurement takes twice as long at about so many tokens as at one.
constexpr double kTokensOfTwice = 1024.0;
double WeightOf(int64_t tokens) {
  return 1.0 + static_cast<double>(tokens) / kTokensOfTwice;
}

std::string Join(const std::string& first, const std::string& second) {
  return second.empty() ? first : first + '+' + second;
}
std::string FirstOf(const std::string& tactic) {
  return tactic.substr(0, tactic.find('+'));
}
std::string SecondOf(const std::string& tactic) {
  const size_t plus = tactic.find('+');
  return plus == std::string::npos ? std::string() : tactic.substr(plus + 1);
}

bool Contains(const std::vector<std::string>& list, const std::string& item) {
  return std::find(list.begin(), list.end(), item) != list.end();
}

// The finalists of what was screened, in the order of `tactics`, which is the cost model's: the
// same screening with other noise shall end in the same order.
std::vector<std::string> Finalists(std::vector<Standing> standings, const std::string& reference,
                                   double margin, const std::vector<std::string>& tactics) {
  const auto hopeless = [&](const Standing& standing) {
    return standing.tactic == reference ||
           standing.against.median - kHopelessNoises * standing.against.noise > -margin;
  };
  standings.erase(std::remove_if(standings.begin(), standings.end(), hopeless), standings.end());
  std::stable_sort(standings.begin(), standings.end(), [](const Standing& a, const Standing& b) {
    return a.against.median < b.against.median;
  });
  std::vector<std::string> fastest;
  for (const Standing& standing : standings) {
    if (fastest.size() < kFinalists && !Contains(fastest, standing.tactic)) {
      fastest.push_back(standing.tactic);
    }
  }
  std::vector<std::string> finalists;
  for (const std::string& tactic : tactics) {
    if (Contains(fastest, tactic) && !Contains(finalists, tactic)) {
      finalists.push_back(tactic);
    }
  }
  return finalists;
}

}  // namespace

Tuner::Tuner(Lab* lab, std::vector<int64_t> tokens, const TuneOptions& options)
    : lab_(lab),
      tokens_(std::move(tokens)),
      options_(options),
      begin_(lab->Seconds()),
      end_(begin_ + options.max_seconds),
      blocklist_(options.blocklist.begin(), options.blocklist.end()) {}

TunerResult Tuner::Run() {
  MeasureBuckets();
  ValidateAbove();
  // What is measured for a border leaves gaps with one winner, and what is measured in these may
  // make borders and stand beside a change of the untuned choice; and any of it may fail.
  size_t before = 0;
  do {
    before = points_.size() + broken_.size();
    MeasureBrokenAgain();
    ValidateChanges();
    RefineBorders();
    ValidateBetween();
  } while (points_.size() + broken_.size() > before && !Over());
  MeasureBrokenAgain();
  DropUnproven();
  if (callers_error_) {
    std::rethrow_exception(callers_error_);
  }
  return {Ranges(), faults_, measured_};
}

bool Tuner::Over() const {
  return ended_ != RaceEnd::kNone || lab_->Seconds() >= end_;
}

std::string Tuner::WhyOver() const {
  switch (ended_) {
    case RaceEnd::kStopped:
      return "stopped";
    case RaceEnd::kDeviceLost:
      return "the device is lost";
    case RaceEnd::kNone:
    case RaceEnd::kNoReference:
      break;
  }
  return fmt::format("max_seconds={} ran out", options_.max_seconds);
}

// Each number of tokens gets its share of the time that those before it have left, so that all are
// reached: one that takes less leaves more to the others. The first is measured in any case.
void Tuner::MeasureBuckets() {
  double weight = 0.0;
  for (const int64_t tokens : tokens_) {
    weight += WeightOf(tokens);
  }
  const double end = begin_ + kBucketShare * options_.max_seconds;
  for (const int64_t tokens : tokens_) {
    const double now = lab_->Seconds();
    if (done_ > 0 && Over()) {
      Fault(UntunedAt(tokens), tokens,
            fmt::format("{}; {} numbers of tokens from this one on were not measured", WhyOver(),
                        static_cast<int64_t>(tokens_.size()) - done_));
      return;
    }
    Measure(tokens, now + std::max(end - now, 0.0) * WeightOf(tokens) / weight, nullptr);
    weight -= WeightOf(tokens);
    ++done_;
  }
}

bool Tuner::Allowed(const std::string& tactic) const {
  const std::string names[] = {tactic, FirstOf(tactic), SecondOf(tactic)};
  return std::none_of(std::begin(names), std::end(names), [&](const std::string& name) {
    return blocklist_.count(name) > 0 || broken_.count(name) > 0;
  });
}

bool Tuner::Admit(const std::string& tactic, int64_t tokens) {
  for (const std::string& name : {tactic, FirstOf(tactic), SecondOf(tactic)}) {
    if (blocklist_.count(name) > 0 && reported_.insert(name).second) {
      Fault(name, tokens, "blocklisted");
    }
  }
  return Allowed(tactic) && lab_->Fits(tactic);
}

Tuner::Field Tuner::FieldAt(int64_t tokens) {
  const Kernels kernels = lab_->KernelsAt(tokens);
  Field field{kernels.untuned, kernels.untuned, kernels.gemm1, kernels.gemm2};
  if (!Admit(field.untuned, tokens)) {
    const std::vector<std::string> others = StandIns(field, tokens);
    HOPYARD_CHECK(!others.empty(), kUnsupported)
        << "every candidate is on the blocklist or has failed; shorten the blocklist";
    field.reference = others.front();
  }
  return field;
}

// All pairs that may run but the reference.
std::vector<std::string> Tuner::StandIns(const Field& field, int64_t tokens) {
  const std::vector<std::string> alone = {std::string()};
  std::vector<std::string> tactics;
  for (const std::string& first : field.gemm1) {
    for (const std::string& second : field.gemm2.empty() ? alone : field.gemm2) {
      const std::string tactic = Join(first, second);
      if (tactic != field.reference && Admit(tactic, tokens)) {
        tactics.push_back(tactic);
      }
    }
  }
  return tactics;
}

bool Tuner::Measure(int64_t tokens, double deadline, const std::vector<std::string>* among) {
  // Ends: each time there is one candidate less.
  while (MeasureOnce(tokens, deadline, among)) {
  }
  return points_.count(tokens) > 0;
}

bool Tuner::MeasureOnce(int64_t tokens, double deadline, const std::vector<std::string>* among) {
  std::string tactic;
  try {
    const Field field = FieldAt(tokens);
    tactic = field.reference;
    const std::unique_ptr<Bench> bench = lab_->Open(tokens);
    RaceRules rules;
    rules.margin = options_.margin;
    rules.stand_ins = [&] { return StandIns(field, tokens); };
    rules.finite = finite_;
    rules.pulse = [&](int candidates, const std::string& best, double best_us) {
      return Pulse({done_, static_cast<int64_t>(tokens_.size()), tokens, candidates, best, best_us,
                    0.0, 0.0});
    };
    Race race(lab_, bench.get(), field.reference, std::move(rules));
    RunRace(&race, field, tokens, deadline, among);
    return race.end() == RaceEnd::kNoReference && !Allowed(race.reference());
  } catch (const std::exception& error) {
    const auto* const own = dynamic_cast<const Error*>(&error);
    Fault(tactic.empty() ? UntunedAt(tokens) : tactic, tokens,
          own != nullptr ? own->message() : error.what());
    if (ended_ == RaceEnd::kNone && !lab_->Recover()) {
      ended_ = RaceEnd::kDeviceLost;
    }
  }
  return false;
}

void Tuner::RunRace(Race* race, Field field, int64_t tokens, double deadline,
                    const std::vector<std::string>* among) {
  Decision decision;
  try {
    race->EnterReference();
    field.reference = race->reference();
    if (race->end() == RaceEnd::kNone && among == nullptr) {
      decision = RaceAll(race, field, tokens, deadline);
    } else if (race->end() == RaceEnd::kNone) {
      std::vector<std::string> tactics;
      std::copy_if(among->begin(), among->end(), std::back_inserter(tactics),
                   [&](const std::string& tactic) { return Admit(tactic, tokens); });
      decision = race->Final(tactics, tactics, deadline);
    }
  } catch (const std::exception&) {
    KeepFailures(*race, tokens);
    throw;
  }
  KeepFailures(*race, tokens);
  if (race->end() == RaceEnd::kNoReference) {
    return;
  }
  if (race->end() != RaceEnd::kNone) {
    ended_ = race->end();
    Fault(field.reference, tokens, WhyOver() + " while it was measured");
    return;
  }
  if (!race->not_finite().empty()) {
    finite_ = false;
    Fault(
        field.reference, tokens,
        race->not_finite() + ", nor is any other candidate's finite; this is not looked at again");
  }
  const bool stands_in = field.reference != field.untuned;
  points_[tokens] = {tokens,        tokens,        decision.tactic,
                     decision.us,   field.untuned, stands_in ? 0.0 : decision.reference_us,
                     decision.noise};
  ReportTimes(*race, tokens);
}

// GEMM1's kernels beside the reference's GEMM2, GEMM2's beside the best of them, the best pairs.
Decision Tuner::RaceAll(Race* race, const Field& field, int64_t tokens, double deadline) {
  const double begin = lab_->Seconds();
  const double share = kScreenShare * std::max(deadline - begin, 0.0);
  const std::string second = SecondOf(field.reference);
  std::vector<std::string> tactics;
  for (const std::string& kernel : field.gemm1) {
    tactics.push_back(Join(kernel, second));
  }
  const std::vector<std::string> favourites = WinnersBelow(tokens);
  tactics.insert(tactics.end(), favourites.begin(), favourites.end());
  const auto admit = [&](std::vector<std::string>* list) {
    list->erase(std::remove_if(list->begin(), list->end(),
                               [&](const std::string& tactic) { return !Admit(tactic, tokens); }),
                list->end());
  };
  admit(&tactics);
  std::vector<Standing> standings = race->Screen(tactics, begin + share);
  if (!field.gemm2.empty()) {
    const auto best =
        std::find_if(standings.begin(), standings.end(),
                     [&](const Standing& standing) { return SecondOf(standing.tactic) == second; });
    const std::string first = FirstOf(best == standings.end() ? field.reference : best->tactic);
    std::vector<std::string> pairs;
    for (const std::string& kernel : field.gemm2) {
      pairs.push_back(Join(first, kernel));
    }
    admit(&pairs);
    const std::vector<Standing> others = race->Screen(pairs, begin + 2.0 * share);
    standings.insert(standings.end(), others.begin(), others.end());
    tactics.insert(tactics.end(), pairs.begin(), pairs.end());
  }
  return race->Final(Finalists(standings, field.reference, options_.margin, tactics), favourites,
                     deadline);
}

// What broke is not run again at other numbers of tokens. Of a pair that broke, the kernel that has
// not run beside another is to blame; where that is not clear, the pair alone.
void Tuner::KeepFailures(const Race& race, int64_t tokens) {
  std::set<std::string> firsts;
  std::set<std::string> seconds;
  for (const std::string& tactic : race.Ran()) {
    firsts.insert(FirstOf(tactic));
    seconds.insert(SecondOf(tactic));
    ++measured_;
  }
  for (const Failure& failure : race.failures()) {
    Fault(failure.tactic, tokens, failure.reason);
    const std::string first = FirstOf(failure.tactic);
    const std::string second = SecondOf(failure.tactic);
    if (failure.everywhere) {
      broken_.insert(failure.tactic);
    }
    if (failure.broke && firsts.count(first) + seconds.count(second) == 1) {
      broken_.insert(firsts.count(first) == 0 ? first : second);
    }
  }
}

void Tuner::Fault(const std::string& tactic, int64_t tokens, const std::string& reason) {
  faults_.push_back({tactic, tokens, reason});
}

// Empty where no plan takes so many tokens.
std::string Tuner::UntunedAt(int64_t tokens) const {
  try {
    return lab_->KernelsAt(tokens).untuned;
  } catch (const std::exception&) {
    return {};
  }
}

// Neighbours keep each other's winner where it is as good: fewer borders, and the same ones in
// every run.
std::vector<std::string> Tuner::WinnersBelow(int64_t tokens) const {
  constexpr size_t kNeighbours = 2;
  std::vector<std::string> winners;
  for (auto point = points_.lower_bound(tokens);
       point != points_.begin() && winners.size() < kNeighbours;) {
    --point;
    if (!Contains(winners, point->second.tactic)) {
      winners.push_back(point->second.tactic);
    }
  }
  return winners;
}

bool Tuner::Pulse(TuneProgress progress) {
  if (!options_.progress) {
    return true;
  }
  progress.seconds = lab_->Seconds() - begin_;
  progress.seconds_left = SecondsLeft();
  try {
    return options_.progress(progress);
  } catch (...) {
    // The race would take it for a candidate's failure.
    callers_error_ = std::current_exception();
    return false;
  }
}

void Tuner::ReportTimes(const Race& race, int64_t tokens) {
  if (!options_.measured) {
    return;
  }
  try {
    for (const auto& [tactic, us] : race.times()) {
      options_.measured({tactic, tokens, us});
    }
  } catch (...) {
    callers_error_ = std::current_exception();
    ended_ = RaceEnd::kStopped;
  }
}

// As the numbers of tokens so far took; before there are such, all the time there is.
double Tuner::SecondsLeft() const {
  const double now = lab_->Seconds();
  double done = 0.0;
  double all = 0.0;
  for (size_t i = 0; i < tokens_.size(); ++i) {
    all += WeightOf(tokens_[i]);
    done += static_cast<int64_t>(i) < done_ ? WeightOf(tokens_[i]) : 0.0;
  }
  const double most = std::max(end_ - now, 0.0);
  return done > 0.0 ? std::min(most, (now - begin_) * (all / kBucketShare - done) / done) : most;
}

}  // namespace hopyard::tune
