// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "hopyard/tune.h"

#include "tune/lab.h"
#include "tune/measured_layer.h"

namespace hopyard::tune {

// A layer on its device.
class LayerLab : public Lab {
 public:
  explicit LayerLab(LayerTask task) : task_(std::move(task)) {}

  [[nodiscard]] int kinds() const override { return task_.workload.kinds(); }
  [[nodiscard]] Kernels KernelsAt(int64_t tokens) const override;
  [[nodiscard]] bool Fits(const std::string& tactic) const override;
  [[nodiscard]] std::unique_ptr<Bench> Open(int64_t tokens) override;
  [[nodiscard]] bool Recover() override;
  [[nodiscard]] double Seconds() const override;

 private:
  LayerTask task_;
};

// What `options` ask to be measured. Error{kInvalidArgument} for options that mean nothing, weights
// of another spec or device, and a stream that is being captured.
[[nodiscard]] LayerTask MakeTask(const Plan& plan, const Weights& weights,
                                 const TuneOptions& options, Stream stream);

}  // namespace hopyard::tune
