// SPDX-License-Identifier: Apache-2.0
#include "plan/sm90/explain_choice.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include <fmt/format.h>

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KernelAt;
using gemm::sm90::KernelInfo;
using gemm::sm90::MnMajorTwin;
using gemm::sm90::NumKernels;
using gemm::sm90::PackedTwin;

const char* RoundingOf(const MoeSpec& spec) {
  return spec.weights == WeightFormat::kNvFp4 ? "rounds weights to e4m3"
                                              : "rounds activations to e4m3 in blocks of 128";
}

std::string RangeString(int64_t first, int64_t last) {
  return "tokens " + std::to_string(first) +
         (last == kAnyTokens ? " and more" : ".." + std::to_string(last));
}

// What the model expects of a kernel at some numbers of tokens: "12 us at 1, 95 us at 37".
std::string TimesString(int index, const Role& role, const MoeSpec& spec,
                        const std::set<int64_t>& tokens) {
  std::string text;
  for (const int64_t count : tokens) {
    text += (text.empty() ? "about " : ", ") +
            std::to_string(std::lround(Microseconds(index, role, Batch(spec, count)))) + " us at " +
            std::to_string(count);
  }
  return text;
}

// Adds an entry to a list in words.
void AddTo(std::string* list, const std::string& entry) {
  *list += (list->empty() || entry.empty() ? "" : ", ") + entry;
}

// What became of the kernels in a role that they fit.
class Judge {
 public:
  Judge(const MoeSpec& spec, const PlanOptions& options, const std::vector<TileChoice>& tiles)
      : spec_(spec), options_(options), tiles_(tiles) {}

  struct Verdict {
    bool chosen = false;
    std::string reason;
  };
  [[nodiscard]] Verdict Of(int index, const Role& role, size_t number) const {
    if (role.forced >= 0 && role.forced != index) {
      return {false, "tactic " + options_.tactic + " was asked for"};
    }
    if (tiles_.empty()) {
      return {false, "not every GEMM of this layer has a kernel that fits the others"};
    }
    const std::vector<Range> ranges = RangesOf(index, number);
    return ranges.empty() ? NotTaken(index, role, number) : Taken(index, role, ranges);
  }

 private:
  // Numbers of tokens, and how they were found to be this kernel's.
  struct Range {
    int64_t first;
    int64_t last;
    std::string measured;
  };
  [[nodiscard]] std::vector<Range> RangesOf(int index, size_t number) const {
    std::vector<Range> ranges;
    int64_t first = 1;
    for (const TileChoice& choice : tiles_) {
      if (KernelOf(choice, number) == index) {
        if (ranges.empty() || ranges.back().last + 1 != first) {
          ranges.push_back({first, choice.max_tokens, choice.measured});
        } else {
          Range& range = ranges.back();
          range.last = choice.max_tokens;
          // Nothing is said of what no batch of this plan takes.
          AddTo(&range.measured, first <= options_.max_tokens ? choice.measured : "");
        }
      }
      first = choice.max_tokens == kAnyTokens ? kAnyTokens : choice.max_tokens + 1;
    }
    return ranges;
  }
  // Begins what is said of a kernel in whose place another runs.
  [[nodiscard]] static std::string RunsAs(int index, const Role& role) {
    const int runs = KernelThatRuns(index, role);
    return runs == index ? "" : "packed, runs as " + std::string(KernelAt(runs).name) + ": ";
  }
  [[nodiscard]] Verdict NotTaken(int index, const Role& role, size_t number) const {
    for (const TileChoice& choice : tiles_) {
      const int other = KernelOf(choice, number);
      if (OutcomeOf(index, role) == OutcomeOf(other, role)) {
        return {false, RunsAs(index, role) + "no other than " + std::string(KernelAt(other).name)};
      }
    }
    const int64_t tokens = options_.max_tokens;
    const int instead = KernelOf(ChoiceFor(tiles_, tokens), number);
    return {false, TimesString(index, role, spec_, {tokens}) + " tokens, " +
                       std::string(KernelAt(instead).name) + " " +
                       TimesString(instead, role, spec_, {tokens}) +
                       "; not taken for any number of tokens: ask for it by name"};
  }
  [[nodiscard]] Verdict Taken(int index, const Role& role, const std::vector<Range>& ranges) const {
    const KernelInfo info = KernelAt(KernelThatRuns(index, role));
    const std::string tile = RunsAs(index, role) + "tiles of " + std::to_string(info.tokens) +
                             " rows, blocks of " + std::to_string(info.features) + " features, ";
    std::string all;
    std::string text;
    std::string measured;
    std::set<int64_t> tokens;
    for (const Range& range : ranges) {
      all += (all.empty() ? "" : " and ") + RangeString(range.first, range.last);
      if (range.first <= options_.max_tokens) {
        const int64_t last = std::min(range.last, options_.max_tokens);
        tokens.insert({range.first, last});
        text += (text.empty() ? "" : " and ") + RangeString(range.first, last);
        AddTo(&measured, range.measured);
      }
    }
    if (text.empty()) {
      return {false, all + ": max_tokens=" + std::to_string(options_.max_tokens) + " stays below"};
    }
    const std::string times = TimesString(index, role, spec_, tokens);
    if (role.forced >= 0) {
      return {true,
              RunsAs(index, role) + "asked for by name; runs every number of tokens, " + times};
    }
    if (tiles_.size() == 1) {
      text = options_.batch_invariant ? "every batch, as batch_invariant asks"
                                      : "every number of tokens";
    }
    return {true, text + ": " + tile + times + (measured.empty() ? "" : "; tuned: ") + measured};
  }

  const MoeSpec& spec_;
  const PlanOptions& options_;
  const std::vector<TileChoice>& tiles_;
};

// Kernels that a plan takes only if it names one of them, beside those of `roles`.
void ListByNameOnly(const MoeSpec& spec, const std::vector<Role>& roles,
                    std::vector<Candidate>* candidates) {
  const std::vector<Role> rounded = RolesOf(spec, true);
  for (int i = 0; i < NumKernels(); ++i) {
    Candidate candidate{std::string(KernelAt(i).name), false, {}};
    for (size_t r = 0; r < 2; ++r) {
      if (Fits(i, rounded[r]) && !Fits(i, roles[r])) {
        candidate.reason += std::string(candidate.reason.empty() ? "" : "; ") + rounded[r].name +
                            ", by name only: " + RoundingOf(spec);
      }
    }
    if (!candidate.reason.empty()) {
      candidates->push_back(candidate);
    }
  }
}

// Kernels that take the place of others in a GEMM of packed weights; none for a group of experts
// that cannot be packed, whose two GEMMs are `roles` 2 i and 2 i + 1.
void ListPacked(const std::vector<Role>& roles, std::vector<Candidate>* candidates) {
  std::map<int, std::string> replaced;
  for (size_t group = 0; group + 1 < roles.size(); group += 2) {
    std::set<int> kernels(roles[group].kernels.begin(), roles[group].kernels.end());
    kernels.insert(roles[group + 1].kernels.begin(), roles[group + 1].kernels.end());
    if (!std::all_of(kernels.begin(), kernels.end(),
                     [](int kernel) { return PackedTwin(kernel) >= 0; })) {
      continue;
    }
    for (const int kernel : kernels) {
      std::string& names = replaced[PackedTwin(kernel)];
      names += (names.empty() ? "" : ", ") + std::string(KernelAt(kernel).name);
    }
  }
  for (const auto& [twin, names] : replaced) {
    candidates->push_back({std::string(KernelAt(twin).name), false,
                           "takes the place of " + names + " in a GEMM whose weights are packed"});
  }
}
}  // namespace

std::vector<Candidate> ListCandidates(const MoeSpec& spec, const PlanOptions& options,
                                      const std::vector<Role>& roles, const KernelChoice& choice) {
  const Judge judge(spec, options, choice.tiles);
  std::vector<Candidate> candidates;
  for (int i = 0; i < NumKernels(); ++i) {
    Candidate candidate;
    candidate.kernel = KernelAt(i).name;
    for (size_t r = 0; r < roles.size(); ++r) {
      if (Fits(i, roles[r])) {
        const Judge::Verdict verdict = judge.Of(i, roles[r], r);
        candidate.chosen = candidate.chosen || verdict.chosen;
        candidate.reason += (candidate.reason.empty() ? "" : "; ") + std::string(roles[r].name) +
                            ", " + verdict.reason;
      }
    }
    if (candidate.reason.empty()) {
      continue;
    }
    candidates.push_back(candidate);
    for (const bool interleaved : {false, true}) {
      const int twin = MnMajorTwin(i, interleaved);
      if (twin >= 0) {
        candidates.push_back({std::string(KernelAt(twin).name), false,
                              "takes the place of " + candidate.kernel +
                                  " in a GEMM whose weights are MN-major" +
                                  (interleaved ? ", gate and up in alternate columns" : "")});
      }
    }
  }
  ListPacked(roles, &candidates);
  if (!choice.rounded && HasRounding(spec)) {
    ListByNameOnly(spec, roles, &candidates);
  }
  return candidates;
}

std::string NoTileReason(const MoeSpec& spec, const std::vector<Role>& roles,
                         const PlanOptions& options) {
  for (const Role& role : roles) {
    if (role.kernels.empty()) {
      return "this build has no GPU kernel for " + std::string(role.name) + " of " +
             std::string(ToString(role.shape.weights)) + " weights with " +
             std::string(ToString(spec.activations)) + " activations; plan for the CPU";
    }
  }
  return options.tactic.empty()
             ? "no tile size has GPU kernels for a GEMM of routed and of shared experts; plan for "
               "the CPU"
             : "tactic '" + options.tactic +
                   "': the same GEMM of shared experts has no kernel with tiles of as many rows; "
                   "name another";
}

}  // namespace hopyard::sm90
