// SPDX-License-Identifier: Apache-2.0
// What the tuner does between, below and beyond the numbers of tokens that it is told to measure.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tune/tuner.h"

namespace hopyard::tune {
namespace {

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

std::vector<std::string> WinnersOf(const TunedRange& low, const TunedRange& high) {
  if (low.tactic == high.tactic) {
    return {low.tactic};
  }
  return {low.tactic, high.tactic};
}

}  // namespace

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

// A full race: what stands in was no candidate's neighbour yet. Without time the number of tokens
// is left out.
void Tuner::MeasureBrokenAgain() {
  const std::map<int64_t, TunedRange> points = points_;
  for (const auto& [tokens, point] : points) {
    if (Allowed(point.tactic) || Allowed(point.untuned)) {
      continue;
    }
    points_.erase(tokens);
    if (Over()) {
      Fault(point.untuned, tokens, WhyOver() + "; failed later, nothing stands in for it here");
    } else {
      Measure(tokens, end_, nullptr);
    }
  }
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
  // What stands in for an untuned choice that may not run does so up to where that changes.
  const TunedRange& winner = untuned_below ? high : low;
  if ((untuned_below || untuned_above) && !Allowed(winner.untuned)) {
    return LastWithUntuned(low.tokens, high.tokens);
  }
  if (untuned_below || untuned_above) {
    return untuned_below ? high.tokens - 1 : low.tokens;
  }
  return low.tokens + (high.tokens - low.tokens) / 2;
}

std::vector<TunedRange> Tuner::Ranges() const {
  std::vector<TunedRange> ranges;
  if (!points_.empty()) {
    const auto& [tokens, first] = *points_.begin();
    // Nothing below the first was measured beside its winner either.
    if (tokens > 1 && first.tactic != first.untuned && Allowed(first.untuned)) {
      ranges.push_back({tokens - 1, tokens - 1, first.untuned, 0.0, first.untuned});
    }
  }
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
