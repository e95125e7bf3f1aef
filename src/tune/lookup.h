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
  std::vector<TunedRange> ranges;  // as in TunedLayer
  std::string remark;              // "measured with ...": how the layer found differs; else empty
};
// `options` with overlap_launches as the environment left it.
[[nodiscard]] Tuned FindTuned(const MoeSpec& spec, Device device, const PlanOptions& options);

// "tuned: 12.3 us at 8 tokens, untuned cpu_avx512_bf16 14.0 us"
[[nodiscard]] std::string ReasonOf(const TunedRange& range);

// TuningStats of a plan that was made; `stale` of its tactics are not in this build.
void CountPlan(const TuningKey& key, const Tuned& tuned, int64_t stale);
// TuningStats of `candidates` that were measured.
void CountMeasured(int64_t candidates);

}  // namespace hopyard::tune
