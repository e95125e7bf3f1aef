// SPDX-License-Identifier: Apache-2.0
// What MakePlan and Explain know from measurements.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/tune.h"

namespace hopyard::tune {

// What the tables say of a plan's layer.
struct Tuned {
  bool looked = false;  // false where the options ask for no measurements
  bool found = false;
  bool served = false;             // a table of this machine was there
  std::vector<TunedRange> ranges;  // as in TunedLayer
  std::string remark;              // what was measured differently than the plan runs, or empty
};
// `options` with overlap_launches as the environment left it.
[[nodiscard]] Tuned FindTuned(const MoeSpec& spec, Device device, const PlanOptions& options);

// "12.3 us at 8 tokens, untuned cpu_avx512_bf16 14.0 us"; without the second time where it is the
// same kernel. Reasons of candidates say "tuned: " before it.
[[nodiscard]] std::string MeasuredText(const TunedRange& range);

// TuningStats of a plan that was made; `stale` of its tactics are not in this build.
void CountPlan(const TuningKey& key, const Tuned& tuned, int64_t stale);
// TuningStats of `candidates` that were measured.
void CountMeasured(int64_t candidates);

}  // namespace hopyard::tune
