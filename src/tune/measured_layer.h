// SPDX-License-Identifier: Apache-2.0
// A layer with inputs for a number of tokens, on its device.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "hopyard/device.h"
#include "hopyard/forward.h"

#include "device/timed_calls.h"
#include "tune/lab.h"
#include "tune/workload.h"

namespace hopyard::tune {

struct LayerTask {
  PlanOptions options;  // of the plan that is tuned
  MoeSpec spec;
  Device device;
  Weights weights;
  Workload workload;
  Stream stream;
  int64_t max_bytes = 0;  // for inputs, outputs, workspace and what is read between calls
  int sets = 1;           // calls of a round, each with another routing; fewer of many tokens
  bool cold = true;       // between calls the caches are emptied of the weights

  // For `tokens` tokens at most, running `tactic` whatever their number.
  [[nodiscard]] Plan MakePlan(const std::string& tactic, int64_t tokens) const;
};

class MeasuredLayer : public Bench {
 public:
  // Error{kOutOfMemory} names what is needed and what there is, before anything is allocated.
  MeasuredLayer(const LayerTask& task, const std::string& untuned, int64_t tokens);

  void Prepare(const std::string& tactic) override;
  double Run(const std::string& tactic, int kind) override;
  std::string Check(const std::string& tactic, const std::string& reference, int kind) override;
  std::string NotFinite(const std::string& tactic, int kind) override;

 private:
  struct Tactic {
    Plan plan;
    std::vector<std::unique_ptr<device::TimedCalls>> kinds;
  };

  [[nodiscard]] Tactic Record(const std::string& tactic) const;
  [[nodiscard]] int64_t FlushBytes() const;
  void CheckMemory(int64_t workspace_bytes, int64_t flush_bytes) const;
  [[nodiscard]] TensorView Allocate(DType dtype, std::initializer_list<int64_t> shape);
  template <class T>
  [[nodiscard]] TensorView Upload(const std::vector<T>& values, DType dtype,
                                  std::initializer_list<int64_t> shape);
  void MakeInputs();
  void MakeOutputs();
  [[nodiscard]] device::Call CallOf(const Plan& plan, const MoeInputs& inputs) const;
  // The output of the first call with this kind of routing, rows in the order of tokens, or of
  // slots where it is not finalised; of a large output every n-th.
  [[nodiscard]] std::vector<uint16_t> RowsOf(const Plan& plan, int kind);
  // RowsOf, kept until those of another tactic are asked for.
  [[nodiscard]] const std::vector<uint16_t>& KeptRowsOf(const std::string& tactic, int kind);
  void Poison(const TensorView& tensor) const;
  // With the routing's name before it, unless it is empty.
  [[nodiscard]] std::string OfKind(int kind, const std::string& fault) const;

  const LayerTask& task_;
  int64_t tokens_;
  int sets_;
  int calls_;  // of a round, as many as the sets or fewer
  std::vector<DeviceMemory> memory_;
  std::vector<std::vector<MoeInputs>> inputs_;  // [kind][set]
  MoeOutputs outputs_;
  DeviceMemory workspace_;
  DeviceMemory flush_;
  std::map<std::string, Tactic> tactics_;
  std::string kept_;                                // whose rows the next are
  std::map<int, std::vector<uint16_t>> kept_rows_;  // by kind
};

}  // namespace hopyard::tune
