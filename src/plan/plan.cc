// SPDX-License-Identifier: Apache-2.0
#include "hopyard/plan.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "hopyard/permute.h"

#include "core/environment.h"
#include "core/error.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "gemm/cpu/dot.h"
#include "plan/backend_sm90.h"
#include "spec/validate.h"
#include "stages/3_gemm1/gemm1.h"

namespace hopyard {
namespace {

// The CPU's GEMMs walk segments, not tiles: the largest tile makes the shortest list.
constexpr int64_t kPermuteTile = 65536;
constexpr Isa kAllIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kScalar};

std::string KernelName(Isa isa, WeightFormat weights) {
  std::ostringstream name;
  name << "cpu_" << ToString(isa) << '_' << ToString(weights);
  return name.str();
}

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

// Fills the candidates; the chosen one, if any, is marked.
void ChooseCpuKernel(const MoeSpec& spec, const PlanOptions& options, Explanation& out) {
  const Isa best = BestIsa();
  bool chosen = false;
  bool tactic_known = options.tactic.empty();
  for (const Isa isa : kAllIsas) {
    Candidate candidate;
    candidate.kernel = KernelName(isa, spec.weights);
    tactic_known = tactic_known || candidate.kernel == options.tactic;
    if (isa > best) {
      candidate.reason = "needs " + std::string(ToString(isa)) +
                         "; this machine (or HOPYARD_CPU_ISA)"
                         " offers " +
                         std::string(ToString(best));
    } else if (!options.tactic.empty() && candidate.kernel != options.tactic) {
      candidate.reason = "tactic " + options.tactic + " was asked for";
    } else if (chosen) {
      candidate.reason = "a wider instruction set is available";
    } else {
      candidate.chosen = true;
      candidate.reason = options.tactic.empty()
                             ? "widest instruction set of this machine; runs every"
                               " number of tokens"
                             : "asked for by name";
      chosen = true;
    }
    out.candidates.push_back(candidate);
  }
  if (!tactic_known) {
    out.reason = "tactic '" + options.tactic + "' is no kernel of this layer on the CPU; known:";
    for (const Candidate& candidate : out.candidates) {
      out.reason += ' ' + candidate.kernel;
    }
  } else if (!chosen) {
    out.reason = "tactic '" + options.tactic + "' does not run on this machine";
  }
  out.supported = chosen && tactic_known;
}

void CheckDevice(Device device) {
  HOPYARD_CHECK(device.kind <= DeviceKind::kCuda, kInvalidArgument)
      << "device.kind=" << static_cast<int>(device.kind) << " is not a DeviceKind; wanted 0 .. "
      << static_cast<int>(DeviceKind::kCuda);
  HOPYARD_CHECK(device.kind == DeviceKind::kCpu || device.index >= 0, kInvalidArgument)
      << "device.index=" << device.index << "; wanted 0 or more, CUDA's number of the GPU";
}

// The decision without the workspace cap.
Explanation ChooseKernel(const MoeSpec& spec, Device device, const PlanOptions& options) {
  CheckOptions(options);
  CheckDevice(device);
  spec::ValidateSpec(spec);
  Explanation out;
  out.reason = spec::UnsupportedReason(spec);
  if (!out.reason.empty()) {
    return out;
  }
  const sm90::Backend* const backend = sm90::FindBackend();
  if (device.kind == DeviceKind::kCuda && backend == nullptr) {
    out.reason = sm90::kNoBackend;
    return out;
  }
  if (options.max_tokens > std::numeric_limits<int32_t>::max() / spec.slots_per_token()) {
    out.reason = "max_tokens " + std::to_string(options.max_tokens) + " x " +
                 std::to_string(spec.slots_per_token()) +
                 " slots pass 2^31 rows; split the batch over several calls";
    return out;
  }
  if (device.kind == DeviceKind::kCuda) {
    return backend->Choose(spec, options, {});
  }
  ChooseCpuKernel(spec, options, out);
  return out;
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
  Explanation out = ChooseKernel(spec, device, options);
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
  for (const Isa isa : kAllIsas) {
    for (const Candidate& candidate : impl->explanation.candidates) {
      if (candidate.chosen && candidate.kernel == KernelName(isa, impl->spec.weights)) {
        impl->isa = isa;
      }
    }
  }
  impl->layout = MakeWorkspaceLayout(impl->spec, impl->tokens_per_chunk, impl->num_threads);
  impl->workspace_bytes = impl->layout.bytes;
}

}  // namespace

Plan MakePlan(const MoeSpec& spec, Device device, const PlanOptions& options) {
  auto impl = std::make_shared<Plan::Impl>();
  impl->explanation = ChooseKernel(spec, device, options);
  HOPYARD_CHECK(impl->explanation.supported, kUnsupported) << impl->explanation.reason;
  const Sizing sizing = {spec, device, options};
  const std::string cap_reason = CapReason(sizing);
  HOPYARD_CHECK(cap_reason.empty(), kInvalidArgument) << cap_reason;
  impl->spec = spec;
  impl->options = options;
  impl->options.overlap_launches =
      EnvironmentSwitch("HOPYARD_OVERLAP_LAUNCHES") && options.overlap_launches;
  impl->device = device;
  impl->tokens_per_chunk = TokensPerChunk(sizing);
  if (device.kind == DeviceKind::kCuda) {
    const sm90::Backend* const backend = sm90::FindBackend();
    impl->sm90 = backend->MakePlan(spec, options, {}, impl->tokens_per_chunk);
    impl->workspace_bytes = backend->WorkspaceBytes(*impl->sm90);
  } else {
    PlanForCpu(impl.get());
  }
  Plan plan;
  plan.impl_ = std::move(impl);
  return plan;
}

}  // namespace hopyard
