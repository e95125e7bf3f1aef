// SPDX-License-Identifier: Apache-2.0
#include "hopyard/plan.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <utility>
#include <vector>

#include "hopyard/permute.h"

#include "core/environment.h"
#include "core/error.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "gemm/cpu/dot.h"
#include "plan/backend_sm90.h"
#include "plan/cpu_choice.h"
#include "spec/validate.h"
#include "stages/3_gemm1/gemm1.h"
#include "tune/lookup.h"

namespace hopyard {
namespace {

// The CPU's GEMMs walk segments, not tiles: the largest tile makes the shortest list.
constexpr int64_t kPermuteTile = 65536;

void CheckOptions(const PlanOptions& options) {
  HOPYARD_CHECK(options.struct_size == sizeof(PlanOptions), kInvalidArgument)
      << "PlanOptions.struct_size=" << options.struct_size << "; this library knows "
      << sizeof(PlanOptions) << ": compile against its headers";
  HOPYARD_CHECK(options.max_tokens >= 1, kInvalidArgument)
      << "max_tokens=" << options.max_tokens << "; wanted at least 1, the plan's capacity";
  HOPYARD_CHECK(options.workspace_cap >= 0, kInvalidArgument)
      << "workspace_cap=" << options.workspace_cap << " bytes; wanted 0 (none) or more";
  HOPYARD_CHECK(options.num_threads >= 0, kInvalidArgument)
      << "num_threads=" << options.num_threads << "; wanted 0 (all) or more";
}

void CheckDevice(Device device) {
  HOPYARD_CHECK(device.kind <= DeviceKind::kCuda, kInvalidArgument)
      << "device.kind=" << static_cast<int>(device.kind) << " is not a DeviceKind; wanted 0 .. "
      << static_cast<int>(DeviceKind::kCuda);
  HOPYARD_CHECK(device.kind == DeviceKind::kCpu || device.index >= 0, kInvalidArgument)
      << "device.index=" << device.index << "; wanted 0 or more, CUDA's number of the GPU";
}

// Why no backend on the device runs a valid spec with these options; empty where one may.
std::string DeviceReason(const MoeSpec& spec, Device device, const PlanOptions& options) {
  std::string reason = spec::UnsupportedReason(spec);
  if (!reason.empty()) {
    return reason;
  }
  if (device.kind == DeviceKind::kCuda && sm90::FindBackend() == nullptr) {
    return sm90::kNoBackend;
  }
  if (options.max_tokens > std::numeric_limits<int32_t>::max() / spec.slots_per_token()) {
    return "max_tokens " + std::to_string(options.max_tokens) + " x " +
           std::to_string(spec.slots_per_token()) +
           " slots pass 2^31 rows; split the batch over several calls";
  }
  return {};
}

// The decision without the workspace cap.
struct Decision {
  Explanation explanation;
  tune::Tuned tuned;
  std::vector<IsaRange> isas;  // CPU
};

// Says of every kernel that measurements chose what they do not cover, and of the others that there
// are none of this layer.
void AddRemark(const tune::Tuned& tuned, Explanation* explanation) {
  const std::string remark =
      tuned.served && !tuned.found ? "no table has measurements of this layer" : tuned.remark;
  for (Candidate& candidate : explanation->candidates) {
    const bool measured = candidate.reason.find("tuned: ") != std::string::npos;
    if (candidate.chosen && !remark.empty() && measured == tuned.found) {
      candidate.reason += " (" + remark + ")";
    }
  }
}

// `options` as ResolvedOptions left them.
Decision Decide(const MoeSpec& spec, Device device, const PlanOptions& options) {
  CheckOptions(options);
  CheckDevice(device);
  spec::ValidateSpec(spec);
  Decision out;
  out.explanation.reason = DeviceReason(spec, device, options);
  if (!out.explanation.reason.empty()) {
    return out;
  }
  out.tuned = tune::FindTuned(spec, device, options);
  if (device.kind == DeviceKind::kCuda) {
    out.explanation = sm90::FindBackend()->Choose(spec, options, out.tuned.ranges);
  } else {
    CpuChoice choice = ChooseCpu(spec, options, out.tuned.ranges);
    out.explanation = std::move(choice.explanation);
    out.isas = std::move(choice.ranges);
  }
  AddRemark(out.tuned, &out.explanation);
  return out;
}

// As the environment leaves them.
PlanOptions ResolvedOptions(PlanOptions options) {
  options.overlap_launches =
      EnvironmentSwitch("HOPYARD_OVERLAP_LAUNCHES") && options.overlap_launches;
  return options;
}

// Measured tactics that the plan cannot run.
int64_t CountStale(const Plan::Impl& plan, const std::vector<TunedRange>& ranges) {
  return std::count_if(ranges.begin(), ranges.end(), [&](const TunedRange& range) {
    return plan.device.kind == DeviceKind::kCuda
               ? !sm90::FindBackend()->HasTactic(plan.spec, range.tactic)
               : !HasCpuTactic(plan.spec, range.tactic);
  });
}

int ThreadsOf(const PlanOptions& options) {
  return options.num_threads > 0 ? options.num_threads : MaxThreads();
}

// A supported layer on a device: what the size of its workspace depends on.
struct Sizing {
  const MoeSpec& spec;
  Device device;
  const PlanOptions& options;

  [[nodiscard]] int64_t Bytes(int64_t tokens) const {
    if (device.kind == DeviceKind::kCpu) {
      return MakeWorkspaceLayout(spec, tokens, ThreadsOf(options)).bytes;
    }
    const sm90::Backend* const backend = sm90::FindBackend();
    return backend->WorkspaceBytes(*backend->MakePlan(spec, options, {}, tokens));
  }
};

// Empty, or why not even one token at a time fits under the cap.
std::string CapReason(const Sizing& sizing) {
  const int64_t cap = sizing.options.workspace_cap;
  if (cap == 0 || sizing.Bytes(1) <= cap) {
    return {};
  }
  return "workspace_cap=" + std::to_string(cap) + " bytes; one token needs " +
         std::to_string(sizing.Bytes(1)) + ": raise the cap to at least that, or 0 (none)";
}

// The most tokens that one pass handles; one fits.
int64_t TokensPerChunk(const Sizing& sizing) {
  const PlanOptions& options = sizing.options;
  const auto fits = [&](int64_t tokens) { return sizing.Bytes(tokens) <= options.workspace_cap; };
  if (options.workspace_cap == 0 || fits(options.max_tokens)) {
    return options.max_tokens;
  }
  int64_t low = 1;  // fits
  int64_t high = options.max_tokens;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

}  // namespace

Explanation Explain(const MoeSpec& spec, Device device, const PlanOptions& options) {
  Explanation out = Decide(spec, device, ResolvedOptions(options)).explanation;
  const std::string reason = out.supported ? CapReason({spec, device, options}) : std::string();
  if (reason.empty()) {
    return out;
  }
  out.supported = false;
  out.reason = reason;
  for (Candidate& candidate : out.candidates) {
    if (candidate.chosen) {
      candidate.chosen = false;
      candidate.reason = reason;
    }
  }
  return out;
}

std::string Explanation::ToString() const {
  std::ostringstream out;
  out << (supported ? "supported" : "unsupported: " + reason) << '\n';
  for (const Candidate& candidate : candidates) {
    out << (candidate.chosen ? "  * " : "  - ") << candidate.kernel << ": " << candidate.reason
        << '\n';
  }
  return out.str();
}

std::string Explanation::Chosen(std::string_view between) const {
  std::string names;
  for (const Candidate& candidate : candidates) {
    if (candidate.chosen) {
      names += (names.empty() ? "" : std::string(between)) + candidate.kernel;
    }
  }
  return names;
}

WorkspaceLayout MakeWorkspaceLayout(const MoeSpec& spec, int64_t tokens, int num_threads) {
  WorkspaceLayout layout;
  layout.x_pitch = RoundUp(spec.hidden_size, gemm::cpu::kLanes);
  layout.h_pitch = RoundUp(spec.intermediate_size, gemm::cpu::kLanes);
  layout.scratch_floats = RoundUp(GemmScratchFloats(spec), kWorkspaceAlignment / 4);
  layout.permute.num_local_experts = spec.num_local_experts() + spec.shared.count;
  layout.permute.tile = kPermuteTile;
  layout.TakeRouting(spec, tokens, MaxTiles(tokens * spec.slots_per_token(), layout.permute));
  layout.active = layout.Take(layout.segments * 4);
  layout.x = layout.Take(tokens * layout.x_pitch * 4);
  layout.h = layout.Take(layout.slots * layout.h_pitch * 4);
  layout.y = layout.Take(layout.slots * spec.hidden_size * 2);
  layout.scratch = layout.Take(num_threads * layout.scratch_floats * 4);
  return layout;
}

Isa Plan::Impl::IsaFor(int64_t tokens) const {
  for (const IsaRange& range : isas) {
    if (tokens <= range.last) {
      return range.isa;
    }
  }
  return isas.back().isa;
}

Plan::Plan() = default;

const MoeSpec& Plan::spec() const {
  return impl().spec;
}
const PlanOptions& Plan::options() const {
  return impl().options;
}
Device Plan::device() const {
  return impl().device;
}
int64_t Plan::workspace_bytes() const {
  return impl().workspace_bytes;
}
int64_t Plan::tokens_per_chunk() const {
  return impl().tokens_per_chunk;
}
const Explanation& Plan::Explain() const {
  return impl().explanation;
}
const Plan::Impl& Plan::impl() const {
  HOPYARD_CHECK(impl_ != nullptr, kInvalidArgument) << "plan is empty; make one with MakePlan";
  return *impl_;
}

namespace {

void PlanForCpu(Plan::Impl* impl) {
  impl->num_threads = ThreadsOf(impl->options);
  impl->layout = MakeWorkspaceLayout(impl->spec, impl->tokens_per_chunk, impl->num_threads);
  impl->workspace_bytes = impl->layout.bytes;
}

}  // namespace

Plan MakePlan(const MoeSpec& spec, Device device, const PlanOptions& options) {
  auto impl = std::make_shared<Plan::Impl>();
  impl->spec = spec;
  impl->options = ResolvedOptions(options);
  impl->device = device;
  Decision decision = Decide(spec, device, impl->options);
  HOPYARD_CHECK(decision.explanation.supported, kUnsupported) << decision.explanation.reason;
  const Sizing sizing = {spec, device, options};
  const std::string cap_reason = CapReason(sizing);
  HOPYARD_CHECK(cap_reason.empty(), kInvalidArgument) << cap_reason;
  impl->explanation = std::move(decision.explanation);
  impl->isas = std::move(decision.isas);
  impl->tokens_per_chunk = TokensPerChunk(sizing);
  if (device.kind == DeviceKind::kCuda) {
    const sm90::Backend* const backend = sm90::FindBackend();
    impl->sm90 = backend->MakePlan(spec, options, decision.tuned.ranges, impl->tokens_per_chunk);
    impl->workspace_bytes = backend->WorkspaceBytes(*impl->sm90);
  } else {
    PlanForCpu(impl.get());
  }
  tune::CountPlan(KeyOf(spec, impl->options), decision.tuned,
                  CountStale(*impl, decision.tuned.ranges));
  Plan plan;
  plan.impl_ = std::move(impl);
  return plan;
}

}  // namespace hopyard
