// SPDX-License-Identifier: Apache-2.0
// Time against tokens per tactic, as an SVG picture.
#pragma once

#include <string>
#include <vector>

#include "hopyard/tune.h"

namespace hopyard::cli {

// Both axes logarithmic; the winners' line is thick, the untuned choice's dashed. `times` as
// TuneOptions::measured gave them. Empty text without times.
[[nodiscard]] std::string PlotSvg(const std::string& title, const TunedLayer& layer,
                                  const std::vector<TuningTime>& times);

}  // namespace hopyard::cli
