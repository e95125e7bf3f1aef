// SPDX-License-Identifier: Apache-2.0
#include "hopyard/tune.h"

#include <utility>

#include "tune/layer_lab.h"
#include "tune/lookup.h"
#include "tune/tuner.h"

namespace hopyard {

TuningTable Tune(const Plan& plan, const Weights& weights, const TuneOptions& options,
                 Stream stream) {
  tune::LayerTask task = tune::MakeTask(plan, weights, options, stream);
  std::vector<int64_t> tokens = options.tokens;
  if (tokens.empty()) {
    tokens = TokenBuckets(plan.tokens_per_chunk());
  }
  TunedLayer layer;
  layer.key = KeyOf(plan.spec(), task.options);
  layer.routing = task.workload.ToString();
  tune::LayerLab lab(std::move(task));
  tune::TunerResult result = tune::Tuner(&lab, std::move(tokens), options).Run();
  tune::CountMeasured(result.measured);
  layer.ranges = std::move(result.ranges);
  layer.faults = std::move(result.faults);
  TuningTable table(MachineOf(plan.device(), plan.options().num_threads));
  table.Put(std::move(layer));
  return table;
}

}  // namespace hopyard
