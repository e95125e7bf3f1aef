// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

#include "hopyard/tune.h"

#include "checkpoint/text.h"
#include "core/error.h"
#include "tune/field_text.h"
#include "tune/key_fields.h"
#include "tune/machine.h"

namespace hopyard {
namespace {

using checkpoint::Printable;

void CheckKey(const TuningKey& key) {
  tune::VisitFields(key, [](const char* name, const auto& field) {
    using Field = std::remove_cvref_t<decltype(field)>;
    if constexpr (std::is_floating_point_v<Field>) {
      HOPYARD_CHECK(std::isfinite(field), kInvalidArgument)
          << "key." << name << '=' << field << "; wanted a finite number";
    } else if constexpr (std::is_enum_v<Field>) {
      HOPYARD_CHECK(tune::EnumName(field) != "?", kInvalidArgument)
          << "key." << name << '=' << static_cast<int>(field)
          << "; wanted a value that its type has";
    }
  });
}

// `before`: where the range before it ends.
void CheckRange(const TunedRange& range, int64_t before) {
  const std::string where = "range of tactic '" + Printable(range.tactic) + "': ";
  HOPYARD_CHECK(!range.tactic.empty() && !range.untuned.empty(), kInvalidArgument)
      << where << "a tactic's name is empty (untuned: '" << Printable(range.untuned) << "')";
  HOPYARD_CHECK(range.last > before, kInvalidArgument)
      << where << "last=" << range.last << "; wanted more than " << before << ", ranges ascend";
  HOPYARD_CHECK(range.tokens > before && range.tokens <= range.last, kInvalidArgument)
      << where << "tokens=" << range.tokens << "; wanted a number above " << before
      << " up to last=" << range.last;
  for (const double number : {range.us, range.untuned_us, range.noise}) {
    HOPYARD_CHECK(std::isfinite(number) && number >= 0.0, kInvalidArgument)
        << where << "us=" << range.us << " untuned_us=" << range.untuned_us
        << " noise=" << range.noise << "; wanted finite numbers of 0 or more";
  }
}

void CheckLayer(const TunedLayer& layer) {
  CheckKey(layer.key);
  int64_t before = 0;
  for (const TunedRange& range : layer.ranges) {
    CheckRange(range, before);
    before = range.last;
  }
}

}  // namespace

const TunedLayer* TuningTable::Find(const TuningKey& key) const {
  const auto found = std::find_if(layers_.begin(), layers_.end(),
                                  [&](const TunedLayer& layer) { return layer.key == key; });
  return found == layers_.end() ? nullptr : &*found;
}

const TunedLayer* TuningTable::FindFor(const TuningKey& key) const {
  const TunedLayer* other = nullptr;
  bool other_same_path = false;
  for (const TunedLayer& layer : layers_) {
    TuningKey like = layer.key;
    like.routing = key.routing;
    const bool same_path = like.path == key.path;
    like.path = key.path;
    if (!(like == key)) {
      continue;
    }
    if (layer.key == key) {
      return &layer;
    }
    if (other == nullptr || (same_path && !other_same_path)) {
      other = &layer;
      other_same_path = same_path;
    }
  }
  return other;
}

void TuningTable::Put(TunedLayer layer) {
  CheckLayer(layer);
  const std::string name = ToString(layer.key);
  const auto place = std::lower_bound(
      layers_.begin(), layers_.end(), name,
      [](const TunedLayer& left, const std::string& right) { return ToString(left.key) < right; });
  if (place != layers_.end() && place->key == layer.key) {
    *place = std::move(layer);
  } else {
    layers_.insert(place, std::move(layer));
  }
}

bool TuningTable::Erase(const TuningKey& key) {
  return std::erase_if(layers_, [&](const TunedLayer& layer) { return layer.key == key; }) > 0;
}

namespace {

// Where nothing was measured below the first of `ranges`, what `before` has of it.
void JoinBelow(const std::vector<TunedRange>& before, std::vector<TunedRange>* ranges) {
  if (ranges->front().measured()) {
    return;
  }
  const int64_t last = ranges->front().last;
  std::vector<TunedRange> below;
  std::copy_if(before.begin(), before.end(), std::back_inserter(below),
               [&](const TunedRange& range) { return range.tokens <= last; });
  if (below.empty()) {
    return;
  }
  below.back().last = std::min(below.back().last, last);
  if (below.back().last == last) {
    ranges->erase(ranges->begin());
  }
  ranges->insert(ranges->begin(), below.begin(), below.end());
}

// What `before` has beyond the last of `ranges`. A winner is not stretched down over what a range
// that is gone ran: nothing was measured beside it there.
void JoinAbove(const std::vector<TunedRange>& before, std::vector<TunedRange>* ranges) {
  const int64_t covered = ranges->back().last;
  int64_t gone = 0;  // where the range before it ends
  for (const TunedRange& range : before) {
    if (range.tokens > covered) {
      const bool wins = range.tactic != range.untuned && range.untuned_us > 0.0;
      if (wins && gone > ranges->back().last) {
        ranges->push_back({gone, gone, range.untuned, 0.0, range.untuned});
      }
      ranges->push_back(range);
    }
    gone = range.last;
  }
}

// A layer measured again: where that measured nothing, what was measured before stays.
TunedLayer Joined(TunedLayer layer, const TunedLayer& before) {
  if (layer.ranges.empty()) {
    return before;
  }
  JoinBelow(before.ranges, &layer.ranges);
  JoinAbove(before.ranges, &layer.ranges);
  return layer;
}

}  // namespace

void TuningTable::Merge(const TuningTable& other) {
  HOPYARD_CHECK(machine_ == other.machine_, kInvalidArgument)
      << "the table was measured on another machine: " << tune::Describe(other.machine_)
      << "; this one is of " << tune::Describe(machine_) << ": keep a file for each machine";
  for (const TunedLayer& layer : other.layers_) {
    const TunedLayer* const before = Find(layer.key);
    Put(before == nullptr ? layer : Joined(layer, *before));
  }
}

}  // namespace hopyard
