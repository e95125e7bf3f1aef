// SPDX-License-Identifier: Apache-2.0
#include "tune/tuner.h"

#include <algorithm>
#include <cmath>
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
// A border is halved so often, or until its sides are this close, relative to the lower one.
constexpr int kBorderSteps = 3;
constexpr int64_t kCloseBorder = 8;
// Between numbers of tokens with the same winner it is measured again so that the next is at most
// this factor away: how tiles fill up does not grow steadily. On an H100, BF16, 128 experts, the
// kernels that were 5 % faster than the untuned ones at 6144 and at 8192 tokens were 17 % slower at
// 6865: one more tile of 128 for every expert is 2048 tokens more (2026-11-22).
constexpr double kFarApart = 1.15;

bool IsFarApart(int64_t low, int64_t high) {
  // One more by rounding.
  return static_cast<double>(high - 1) > kFarApart * static_cast<double>(low);
}

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

std::vector<std::string> WinnersOf(const TunedRange& low, const TunedRange& high) {
  if (low.tactic == high.tactic) {
    return {low.tactic};
  }
  return {low.tactic, high.tactic};
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
  // make borders and stand beside a change of the untuned choice.
  size_t before = 0;
  do {
    before = points_.size();
    ValidateChanges();
    RefineBorders();
    ValidateBetween();
  } while (points_.size() > before && !Over());
  DropUnproven();
  if (callers_error_) {
    std::rethrow_exception(callers_error_);
  }
  return {Ranges(), faults_, measured_};
}

// What failed later, and winners whose other side is too far away because the time ran out: the
// untuned choice stays.
void Tuner::DropUnproven() {
  const auto drop = [this](TunedRange* point) {
    if (Allowed(point->untuned)) {
      point->tactic = point->untuned;
      point->us = point->untuned_us;
      point->noise = 0.0;
    }
  };
  for (auto& [tokens, point] : points_) {
    if (!Allowed(point.tactic)) {
      drop(&point);
    }
  }
  for (auto low = points_.begin(); low != points_.end() && std::next(low) != points_.end(); ++low) {
    const TunedRange& below = low->second;
    TunedRange& above = std::next(low)->second;
    const bool wins = below.tactic != below.untuned && above.tactic != above.untuned;
    if (wins && below.tactic == above.tactic && IsFarApart(below.tokens, above.tokens)) {
      drop(&above);
    }
  }
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

void Tuner::ValidateAbove() {
  if (points_.empty() || points_.rbegin()->first != tokens_.back()) {
    return;
  }
  const int64_t above = 2 * points_.rbegin()->first;
  const std::vector<std::string> among = {points_.rbegin()->second.tactic};
  const std::string untuned = UntunedAt(above);
  if (untuned.empty() || untuned == among.front()) {
    return;  // no plan has so many tokens, or it would take the winner anyway
  }
  if (Over()) {
    Fault(among.front(), above, WhyOver() + "; not measured beyond the largest number of tokens");
    return;
  }
  Measure(above, end_, &among);
}

// A winner over one untuned choice may lose to the other: both sides of the change are measured.
// On an H100, FP8, 128 experts, the winner at 2560 tokens was 17 % faster than the untuned choice
// there and 5 % slower than the one at 2559 (zipf, 2026-11-22).
void Tuner::ValidateChanges() {
  const std::map<int64_t, TunedRange> points = points_;
  for (auto low = points.begin(); low != points.end() && std::next(low) != points.end(); ++low) {
    const auto high = std::next(low);
    const std::string& before = low->second.untuned;
    const bool kept = low->second.tactic == before && high->second.tactic == high->second.untuned;
    if (before == high->second.untuned || kept) {
      continue;
    }
    const int64_t first = LastWithUntuned(low->first, high->first);
    const std::vector<std::string> among = WinnersOf(low->second, high->second);
    for (const int64_t tokens : {first, first + 1}) {
      if (points_.count(tokens) == 0 && !MeasureMore(tokens, among)) {
        return;
      }
    }
  }
}

void Tuner::ValidateBetween() {
  std::vector<int64_t> between;
  for (auto low = points_.begin(); low != points_.end(); ++low) {
    const auto high = std::next(low);
    if (high == points_.end() || low->second.tactic != high->second.tactic) {
      continue;  // borders are refined
    }
    if (!IsFarApart(low->first, high->first)) {
      continue;
    }
    const auto first = static_cast<double>(low->first);
    const double factor = static_cast<double>(high->first) / first;
    const int steps = static_cast<int>(std::ceil(std::log(factor) / std::log(kFarApart)));
    for (int step = 1; step < steps; ++step) {
      const int64_t tokens =
          std::llround(first * std::pow(factor, static_cast<double>(step) / steps));
      if (tokens > low->first && tokens < high->first &&
          (between.empty() || between.back() < tokens)) {
        between.push_back(tokens);
      }
    }
  }
  for (const int64_t tokens : between) {
    const auto high = points_.lower_bound(tokens);
    // The one below may be new and have another winner.
    const std::vector<std::string> among = WinnersOf(std::prev(high)->second, high->second);
    if ((among.size() > 1 || among.front() != UntunedAt(tokens)) && !MeasureMore(tokens, among)) {
      return;
    }
  }
}

// False where the time is over, which a fault says.
bool Tuner::MeasureMore(int64_t tokens, const std::vector<std::string>& among) {
  if (Over()) {
    Fault(among.front(), tokens, WhyOver() + "; not measured between its neighbours");
    return false;
  }
  Measure(tokens, end_, &among);
  return true;
}

void Tuner::RefineBorders() {
  std::vector<std::pair<int64_t, int64_t>> borders;
  for (auto low = points_.begin(); low != points_.end(); ++low) {
    const auto high = std::next(low);
    if (high != points_.end() && low->second.tactic != high->second.tactic) {
      borders.emplace_back(low->first, high->first);
    }
  }
  for (const auto& [low, high] : borders) {
    RefineBorder(low, high);
  }
}

// Where the untuned choice in the middle is a third tactic and wins, the lower of its two borders
// is halved on.
void Tuner::RefineBorder(int64_t low, int64_t high) {
  for (int step = 0; step < kBorderSteps && !Over(); ++step) {
    if (high - low <= std::max<int64_t>(low / kCloseBorder, 1)) {
      return;
    }
    const std::string below = points_[low].tactic;
    const std::vector<std::string> among = {below, points_[high].tactic};
    const int64_t middle = low + (high - low) / 2;
    if (!Measure(middle, end_, &among)) {
      return;
    }
    (points_[middle].tactic == below ? low : high) = middle;
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
    field.reference = StandIn(field, tokens);
  }
  return field;
}

// The first pair that may run.
std::string Tuner::StandIn(const Field& field, int64_t tokens) {
  const std::vector<std::string> alone = {std::string()};
  for (const std::string& first : field.gemm1) {
    for (const std::string& second : field.gemm2.empty() ? alone : field.gemm2) {
      std::string tactic = Join(first, second);
      if (Admit(tactic, tokens)) {
        return tactic;
      }
    }
  }
  HOPYARD_CHECK(false, kUnsupported)
      << "every candidate is on the blocklist or has failed; shorten the blocklist";
  return {};
}

bool Tuner::Measure(int64_t tokens, double deadline, const std::vector<std::string>* among) {
  std::string tactic;
  try {
    const Field field = FieldAt(tokens);
    tactic = field.reference;
    const std::unique_ptr<Bench> bench = lab_->Open(tokens);
    RaceRules rules;
    rules.margin = options_.margin;
    rules.pulse = [&](int candidates, const std::string& best, double best_us) {
      return Pulse({done_, static_cast<int64_t>(tokens_.size()), tokens, candidates, best, best_us,
                    0.0, 0.0});
    };
    Race race(lab_, bench.get(), field.reference, std::move(rules));
    RunRace(&race, field, tokens, deadline, among);
  } catch (const std::exception& error) {
    const auto* const own = dynamic_cast<const Error*>(&error);
    Fault(tactic.empty() ? UntunedAt(tokens) : tactic, tokens,
          own != nullptr ? own->message() : error.what());
    if (ended_ == RaceEnd::kNone && !lab_->Recover()) {
      ended_ = RaceEnd::kDeviceLost;
    }
  }
  return points_.count(tokens) > 0;
}

void Tuner::RunRace(Race* race, const Field& field, int64_t tokens, double deadline,
                    const std::vector<std::string>* among) {
  Decision decision;
  try {
    race->EnterReference();
    if (among == nullptr) {
      decision = RaceAll(race, field, tokens, deadline);
    } else {
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
  if (race->end() != RaceEnd::kNone) {
    ended_ = race->end();
    Fault(field.reference, tokens, WhyOver() + " while it was measured");
    return;
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

// The largest number of tokens from `low` on, below `high`, with the untuned choice of `low`, where
// it changes once.
int64_t Tuner::LastWithUntuned(int64_t low, int64_t high) const {
  const std::string untuned = UntunedAt(low);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (UntunedAt(middle) == untuned ? low : high) = middle;
  }
  return low;
}

// Up to where the tactic of `low` runs, of the numbers of tokens between two that were measured. A
// winner on both sides runs between them; else the untuned choice does where there is one: on an
// H100 winners by 1 to 2 % at 512 and 2048 tokens lost 4 % at 541 and 2162, before the next that
// was measured (2026-11-22).
int64_t Tuner::BorderBetween(const TunedRange& low, const TunedRange& high) const {
  const bool untuned_below = low.tactic == low.untuned;
  const bool untuned_above = high.tactic == high.untuned;
  if (untuned_below && untuned_above) {
    return LastWithUntuned(low.tokens, high.tokens);
  }
  if (untuned_below || untuned_above) {
    return untuned_below ? high.tokens - 1 : low.tokens;
  }
  return low.tokens + (high.tokens - low.tokens) / 2;
}

std::vector<TunedRange> Tuner::Ranges() const {
  std::vector<TunedRange> ranges;
  for (auto point = points_.begin(); point != points_.end(); ++point) {
    TunedRange range = point->second;
    const auto next = std::next(point);
    if (next != points_.end() && next->second.tactic != range.tactic) {
      range.last = BorderBetween(range, next->second);
    }
    ranges.push_back(std::move(range));
  }
  return ranges;
}

}  // namespace hopyard::tune
