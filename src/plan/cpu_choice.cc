// SPDX-License-Identifier: Apache-2.0
#include "plan/cpu_choice.h"

#include <algorithm>
#include <optional>

#include <fmt/format.h>

#include "tune/lookup.h"

namespace hopyard {
namespace {

constexpr Isa kAllIsas[] = {Isa::kAvx512, Isa::kAvx2, Isa::kScalar};

std::string KernelName(Isa isa, WeightFormat weights) {
  return fmt::format("cpu_{}_{}", ToString(isa), ToString(weights));
}

// Empty for names that are no kernel of the layer.
std::optional<Isa> IsaOf(const MoeSpec& spec, const std::string& tactic) {
  for (const Isa isa : kAllIsas) {
    if (tactic == KernelName(isa, spec.weights)) {
      return isa;
    }
  }
  return std::nullopt;
}

// Numbers of tokens with one reason for their kernel.
struct Reasoned {
  IsaRange range;
  std::string reason;
};

std::vector<Reasoned> ByName(const PlanOptions& options, std::optional<Isa> named) {
  if (!named || *named > BestIsa()) {
    return {};
  }
  return {{{options.max_tokens, *named}, "asked for by name"}};
}

Reasoned NotMeasured(int64_t first, int64_t last) {
  return {{last, BestIsa()},
          fmt::format("{} .. {} tokens: widest instruction set; not measured", first, last)};
}

Reasoned Measured(const MoeSpec& spec, const TunedRange& range, int64_t first, int64_t last) {
  if (!range.measured()) {
    return NotMeasured(first, last);
  }
  const bool runs = HasCpuTactic(spec, range.tactic);
  return {{last, runs ? *IsaOf(spec, range.tactic) : BestIsa()},
          fmt::format("{} .. {} tokens: {}", first, last,
                      runs ? "tuned: " + tune::MeasuredText(range)
                           : "widest instruction set; the measured " + range.tactic +
                                 " does not run here")};
}

std::vector<Reasoned> ByMeasurement(const MoeSpec& spec, const PlanOptions& options,
                                    const std::vector<TunedRange>& tuned) {
  std::vector<Reasoned> ranges;
  int64_t first = 1;
  for (size_t i = 0; i < tuned.size() && first <= options.max_tokens; ++i) {
    const int64_t last = std::min(tuned[i].last, options.max_tokens);
    ranges.push_back(Measured(spec, tuned[i], first, last));
    first = last + 1;
  }
  if (first <= options.max_tokens) {
    ranges.push_back(NotMeasured(first, options.max_tokens));
  }
  if (options.batch_invariant) {
    // A token's output must not depend on the batch: all take what the largest takes.
    ranges.erase(ranges.begin(), ranges.end() - 1);
    ranges.back().reason = "batch_invariant, so every number of tokens as " + ranges.back().reason;
  }
  return ranges;
}

std::vector<Reasoned> Choose(const MoeSpec& spec, const PlanOptions& options,
                             const std::vector<TunedRange>& tuned) {
  if (!options.tactic.empty()) {
    return ByName(options, IsaOf(spec, options.tactic));
  }
  if (!tuned.empty()) {
    return ByMeasurement(spec, options, tuned);
  }
  return {{{options.max_tokens, BestIsa()},
           "widest instruction set of this machine; runs every number of tokens"}};
}

Candidate CandidateOf(const MoeSpec& spec, const PlanOptions& options, Isa isa,
                      const std::vector<Reasoned>& ranges) {
  Candidate candidate;
  candidate.kernel = KernelName(isa, spec.weights);
  for (const Reasoned& range : ranges) {
    if (range.range.isa == isa) {
      candidate.chosen = true;
      candidate.reason += (candidate.reason.empty() ? "" : "; ") + range.reason;
    }
  }
  if (candidate.chosen) {
    return candidate;
  }
  if (isa > BestIsa()) {
    candidate.reason = fmt::format("needs {}; this machine (or HOPYARD_CPU_ISA) offers {}",
                                   ToString(isa), ToString(BestIsa()));
  } else if (!options.tactic.empty()) {
    candidate.reason = "tactic " + options.tactic + " was asked for";
  } else if (isa == BestIsa() || ranges.size() > 1 || ranges.front().range.isa < isa) {
    candidate.reason = "measured slower, or not measured, at every number of tokens";
  } else {
    candidate.reason = "a wider instruction set is available";
  }
  return candidate;
}

}  // namespace

bool HasCpuTactic(const MoeSpec& spec, const std::string& tactic) {
  const std::optional<Isa> isa = IsaOf(spec, tactic);
  return isa && *isa <= BestIsa();
}

CpuChoice ChooseCpu(const MoeSpec& spec, const PlanOptions& options,
                    const std::vector<TunedRange>& tuned) {
  CpuChoice out;
  const std::vector<Reasoned> ranges = Choose(spec, options, tuned);
  for (const Reasoned& range : ranges) {
    if (!out.ranges.empty() && out.ranges.back().isa == range.range.isa) {
      out.ranges.pop_back();  // one with this
    }
    out.ranges.push_back(range.range);
  }
  std::string known;
  for (const Isa isa : kAllIsas) {
    out.explanation.candidates.push_back(CandidateOf(spec, options, isa, ranges));
    known += ' ' + KernelName(isa, spec.weights);
  }
  out.explanation.supported = !ranges.empty();
  if (ranges.empty()) {
    out.explanation.reason = IsaOf(spec, options.tactic)
                                 ? "tactic '" + options.tactic + "' does not run on this machine"
                                 : "tactic '" + options.tactic +
                                       "' is no kernel of this layer on the CPU; known:" + known;
  }
  return out;
}

}  // namespace hopyard
