// SPDX-License-Identifier: Apache-2.0
// The Hopper backend as Plan, Weights and Forward see it: they hold what it makes, and know nothing
// of kernels. A build without CUDA has none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hopyard/device.h"
#include "hopyard/forward.h"
#include "hopyard/routing.h"
#include "hopyard/tune.h"

#include "device/timed_calls.h"
#include "gemm/slice_write.h"
#include "plan/plan_impl.h"
#include "plan/weights_impl.h"

namespace hopyard::sm90 {

// One part of a slice on its way into weights on the device.
struct PartWrite {
  gemm::SliceWrite write;
  bool source_on_host = false;
};

// A slice of Weights::Update whose arguments have been checked.
struct Update {
  int64_t expert = 0;  // segment
  WeightPart part = WeightPart::kGemm1;
  std::vector<PartWrite> parts;
  const float* global_scale = nullptr;  // on the host; null: none
  float* global_scale_target = nullptr;
};

struct Call {
  const Plan::Impl* plan = nullptr;
  const Weights::Impl* weights = nullptr;
  const MoeInputs* inputs = nullptr;
  const MoeOutputs* outputs = nullptr;
  uint8_t* workspace = nullptr;
  void* stream = nullptr;  // cudaStream_t
};

struct RouteCall {
  const RoutingRule* rule = nullptr;
  int top_k = 0;
  const RouteInputs* inputs = nullptr;
  const RouteOutputs* outputs = nullptr;
  Device device;
  void* stream = nullptr;  // cudaStream_t
};

// The kernels that run each GEMM of a layer exactly as its formats ask, at a number of tokens;
// cheapest first by the cost model, the pass that rounds for a kernel included. Not every two fit
// each other: see HasTactic.
struct RankedTactics {
  struct Entry {
    std::string kernel;
    double us = 0.0;  // expected of the GEMM
  };
  std::string untuned;  // GEMM1+GEMM2 of a plan that nothing was measured for
  std::vector<Entry> gemm1;
  std::vector<Entry> gemm2;
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  // Kernels of a valid spec, whatever the workspace. Needs no GPU, like all of a plan. `tuned`
  // ascends; its tactics take the place of the cost model's for their numbers of tokens, the last
  // one's also for more, unless options.tactic names one. Those that HasTactic denies do not.
  [[nodiscard]] virtual Explanation Choose(const MoeSpec& spec, const PlanOptions& options,
                                           const std::vector<TunedRange>& tuned) const = 0;
  // Whether `tactic` names kernels of this build that run a valid spec exactly as its formats ask,
  // and fit each other.
  [[nodiscard]] virtual bool HasTactic(const MoeSpec& spec, const std::string& tactic) const = 0;
  // Precondition: Choose supports the spec.
  [[nodiscard]] virtual RankedTactics Rank(const MoeSpec& spec, const PlanOptions& options,
                                           int64_t tokens) const = 0;
  // The plan of passes over up to `tokens` tokens. Precondition: Choose supports the spec.
  // WorkspaceBytes depends on neither options.tactic nor `tuned`.
  [[nodiscard]] virtual std::shared_ptr<const LayerPlan> MakePlan(
      const MoeSpec& spec, const PlanOptions& options, const std::vector<TunedRange>& tuned,
      int64_t tokens) const = 0;
  [[nodiscard]] virtual int64_t WorkspaceBytes(const LayerPlan& plan) const = 0;
  // What describes `weights` to the kernels. Error{kUnsupported} names a layout they cannot read.
  [[nodiscard]] virtual std::shared_ptr<const DeviceWeights> MakeWeights(
      const Weights::Impl& weights) const = 0;
  // Writes into the weights in stream order.
  virtual void Write(const Weights::Impl& weights, const Update& update, void* stream) const = 0;
  // One call of the layer with checked arguments and at least one token.
  virtual void Forward(const Call& call) const = 0;
  // Waits until device `index` has done all that it was given.
  virtual void Wait(int index) const = 0;
  // Copies device memory to the host.
  virtual void Read(void* to, const void* from, int64_t bytes) const = 0;
  // Routing alone, with checked arguments.
  virtual void Route(const RouteCall& call) const = 0;
  // What hopyard/device.h has, for GPUs.
  [[nodiscard]] virtual int CountGpus() const = 0;
  [[nodiscard]] virtual GpuInfo GpuInfoOf(int index) const = 0;
  // The name and multiprocessors alone, without a CUDA context.
  [[nodiscard]] virtual GpuInfo ModelOf(int index) const = 0;
  [[nodiscard]] virtual std::shared_ptr<void> Allocate(int index, int64_t bytes) const = 0;
  virtual void Copy(int index, void* to, const void* from, int64_t bytes) const = 0;
  virtual void Synchronize(int index, void* stream) const = 0;
  // What device/timed_calls.h has, of device `index`.
  [[nodiscard]] virtual std::unique_ptr<device::TimedCalls> Capture(
      int index, void* stream, const std::vector<device::Call>& calls,
      const device::Flush& flush) const = 0;
  [[nodiscard]] virtual bool IsCapturing(int index, void* stream) const = 0;
  [[nodiscard]] virtual bool Recover(int index) const = 0;
};

// Null in a build without it.
[[nodiscard]] const Backend* FindBackend();
// Error{kUnsupported} in a build without it.
[[nodiscard]] const Backend& NeedBackend();

inline constexpr const char* kNoBackend =
    "this build has no CUDA backend; plan for the CPU, or configure the build with HOPYARD_CUDA=ON";

}  // namespace hopyard::sm90
