// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"
#include "hopyard/weights.h"

namespace hopyard {

class TuningTable;  // hopyard/tune.h

// How the calls of a plan get and give: what tuned kernels were measured with (hopyard/tune.h).
// A plan runs calls of every kind.
struct CallPath {
  bool ids = false;          // experts and weights are given; else logits
  bool unfinalised = false;  // MoeOutputs::rows instead of the output
  bool replay = false;       // MoeOutputs::replay is there

  friend bool operator==(const CallPath&, const CallPath&) = default;
};

struct PlanOptions {
  uint32_t struct_size = sizeof(PlanOptions);
  int64_t max_tokens = 0;  // capacity; Forward accepts 0 .. max_tokens
  // Kernel name to use; empty: the library chooses. On a GPU a kernel of GEMM1, or one of each GEMM
  // joined by '+'; it then runs every number of tokens. Some are taken by name only, see Explain.
  std::string tactic;
  bool batch_invariant = false;  // a token's output depends on that token alone
  int64_t workspace_cap = 0;     // bytes; 0 = none. Larger batches are cut into chunks of tokens
  int num_threads = 0;           // CPU: 0 = all that OpenMP gives at MakePlan
  // GPU: a call's kernels may be scheduled before the work ahead of them in the stream has ended,
  // and then wait for it on the device (programmatic dependent launch). Same bits; slower in
  // captured graphs of the layers measured so far (docs/perf-notes.md).
  // Kernels of the caller that are launched so ahead of a call must wait for their own
  // predecessors. HOPYARD_OVERLAP_LAUNCHES=0, read by MakePlan and Explain, turns it off.
  bool overlap_launches = false;
  CallPath path;
  // Of the weights that calls bring (OrdersOf): what measurements are looked for, and what the cost
  // model expects of a GPU's kernels. A plan runs calls with all of them; one for packed weights is
  // refused where these have no kernels.
  WeightOrders weight_orders;
  // Where no tactic is named, kernels come from measurements: of this table, then of those that
  // UseTuning gave, of the file that HOPYARD_TUNING_FILE names, and of those that come with the
  // library; without any, from a cost model.
  std::shared_ptr<const TuningTable> tuning;
  bool untuned = false;  // from the cost model alone
};

// One kernel candidate and what became of it.
struct Candidate {
  std::string kernel;
  bool chosen = false;
  std::string reason;  // why refused, or why chosen

  friend bool operator==(const Candidate&, const Candidate&) = default;
};

struct Explanation {
  bool supported = false;
  std::string reason;  // when unsupported: the rule that was broken and the remedy
  std::vector<Candidate> candidates;

  [[nodiscard]] std::string ToString() const;
  // Names of the chosen kernels, joined: where one batch takes all of them, its tactic.
  [[nodiscard]] std::string Chosen(std::string_view between = "+") const;
};

// Immutable, cheap to copy, safe to share between threads. Concurrent Forwards need distinct
// workspaces.
class Plan {
 public:
  Plan();  // empty; usable only as an assignment target
  [[nodiscard]] const MoeSpec& spec() const;
  // As given to MakePlan; overlap_launches as the environment left it.
  [[nodiscard]] const PlanOptions& options() const;
  [[nodiscard]] Device device() const;
  // Bytes that Forward needs; alignment 256; content undefined at entry. Known without a device.
  [[nodiscard]] int64_t workspace_bytes() const;
  // Tokens that one pass handles under workspace_cap.
  [[nodiscard]] int64_t tokens_per_chunk() const;
  [[nodiscard]] const Explanation& Explain() const;

  struct Impl;
  [[nodiscard]] const Impl& impl() const;

 private:
  friend Plan MakePlan(const MoeSpec& spec, Device device, const PlanOptions& options);
  std::shared_ptr<const Impl> impl_;
};

// Throws Error{kInvalidArgument} for a spec that means nothing, a workspace_cap below what one
// token needs or an environment variable of unknown value, and Error{kUnsupported} (with Explain's
// reason) for a spec that no kernel runs.
Plan MakePlan(const MoeSpec& spec, Device device, const PlanOptions& options);

// The same decision without throwing for unsupported specs and too small a workspace_cap; needs no
// device. A candidate's reason says for which numbers of tokens it is taken.
Explanation Explain(const MoeSpec& spec, Device device, const PlanOptions& options);

}  // namespace hopyard
