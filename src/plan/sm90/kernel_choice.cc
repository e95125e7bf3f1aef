// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>

#include "core/error.h"
#include "plan/backend_sm90.h"
#include "plan/sm90/explain_choice.h"
#include "plan/sm90/kernel_roles.h"
#include "tune/lookup.h"

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KernelAt;

// Marks the kernels that "gemm1" or "gemm1+gemm2" names; empty, or why it names none.
std::string ForceTactic(const std::string& tactic, std::vector<Role>* roles) {
  if (tactic.empty()) {
    return {};
  }
  const size_t plus = tactic.find('+');
  Role& first = roles->at(0);
  Role& second = roles->at(1);
  first.forced = FindKernel(first, tactic.substr(0, plus));
  if (plus != std::string::npos) {
    second.forced = FindKernel(second, tactic.substr(plus + 1));
  }
  if (first.forced >= 0 && (plus == std::string::npos || second.forced >= 0)) {
    return {};
  }
  const Role& unknown = first.forced < 0 ? first : second;
  std::string reason = "tactic '" + tactic + "' is no kernel of this layer's " + unknown.name +
                       " on the GPU (wanted one of GEMM1, or GEMM1+GEMM2); known:";
  for (const int kernel : unknown.kernels) {
    reason += ' ' + std::string(KernelAt(kernel).name);
  }
  return reason;
}

// The model knows no better: of what costs so little more than the cheapest, the first is taken,
// smaller tiles and blocks; and the same tiles for both GEMMs, which are listed once.
constexpr double kAsCheap = 1.005;
constexpr double kAsCheapTile = 1.01;

// Kernels of some roles, and what the model expects of them.
struct Pick {
  std::vector<int> kernels;
  double us = 0.0;

  [[nodiscard]] bool IsCheaper(const Pick& than, double margin) const {
    return than.kernels.empty() || us * margin < than.us;
  }
};

// The cheapest kernel of the role with tiles of `tile` rows, or the one that was asked for.
Pick CheapestKernel(const Role& role, int tile, const Batch& batch) {
  Pick best;
  for (const int kernel : role.kernels) {
    if (KernelAt(kernel).tokens != tile || (role.forced >= 0 && role.forced != kernel)) {
      continue;
    }
    Pick pick{{kernel}, Microseconds(kernel, role, batch)};
    if (pick.IsCheaper(best, kAsCheap)) {
      best = std::move(pick);
    }
  }
  return best;
}

// The cheapest kernels of GEMM1 (0) or GEMM2 (1) for each size of tiles. Routed experts and shared
// ones, roles `gemm` and `gemm` + 2, take the same tiles.
std::map<int, Pick> PicksByTile(const std::vector<Role>& roles, size_t gemm, const Batch& batch) {
  std::map<int, Pick> picks;
  for (const int kernel : roles[gemm].kernels) {
    picks[KernelAt(kernel).tokens];
  }
  for (auto& [tile, pick] : picks) {
    for (size_t r = gemm; r < roles.size(); r += 2) {
      const Pick one = CheapestKernel(roles[r], tile, batch);
      pick.kernels.insert(pick.kernels.end(), one.kernels.begin(), one.kernels.end());
      pick.us += one.us;
    }
  }
  std::erase_if(picks,
                [&](const auto& entry) { return entry.second.kernels.size() != roles.size() / 2; });
  return picks;
}

// In the order of the roles.
Pick Join(const Pick& first, const Pick& second) {
  Pick both;
  for (size_t group = 0; group < first.kernels.size(); ++group) {
    both.kernels.insert(both.kernels.end(), {first.kernels[group], second.kernels[group]});
  }
  both.us = first.us + second.us;
  return both;
}

Pick CheapestOf(const std::map<int, Pick>& picks) {
  Pick best;
  for (const auto& [tile, pick] : picks) {
    best = pick.IsCheaper(best, kAsCheapTile) ? pick : best;
  }
  return best;
}

// A kernel for each role. None where a GEMM of routed and shared experts has no common tile.
Pick CheapestPick(const std::vector<Role>& roles, const Batch& batch) {
  const std::map<int, Pick> first = PicksByTile(roles, 0, batch);
  const std::map<int, Pick> second = PicksByTile(roles, 1, batch);
  if (first.empty() || second.empty()) {
    return {};
  }
  std::map<int, Pick> equal;
  for (const auto& [tile, pick] : first) {
    if (const auto other = second.find(tile); other != second.end()) {
      equal[tile] = Join(pick, other->second);
    }
  }
  const Pick best = CheapestOf(equal);
  const Pick mixed = Join(CheapestOf(first), CheapestOf(second));
  return mixed.IsCheaper(best, kAsCheapTile) ? mixed : best;
}

double Microseconds(const std::vector<int>& kernels, const std::vector<Role>& roles,
                    const Batch& batch) {
  double sum = 0.0;
  for (size_t r = 0; r < roles.size(); ++r) {
    sum += Microseconds(kernels[r], roles[r], batch);
  }
  return sum;
}

GroupKernels KernelsOf(const Pick& pick, const std::vector<Role>& roles, size_t first) {
  GroupKernels kernels;
  kernels.gemm1 = pick.kernels[first];
  kernels.gemm2 = pick.kernels[first + 1];
  kernels.rounds_apart = RoundsApart(kernels.gemm1, roles[first]);
  return kernels;
}

TileChoice ChoiceOf(const Pick& pick, const std::vector<Role>& roles) {
  TileChoice choice;
  choice.max_tokens = kAnyTokens;
  choice.routed = KernelsOf(pick, roles, 0);
  choice.shared = choice.routed;
  if (roles.size() > 2) {
    choice.shared = KernelsOf(pick, roles, 2);
    // One pass rounds the rows of both groups.
    const bool apart = choice.routed.rounds_apart || choice.shared.rounds_apart;
    choice.routed.rounds_apart = apart;
    choice.shared.rounds_apart = apart;
  }
  return choice;
}

// 1, 2, .. tokens, eight numbers to each power of two, until experts have so many rows that more
// of them change nothing.
std::vector<int64_t> TokenSteps(const MoeSpec& spec) {
  constexpr int64_t kManyRows = 2048;
  std::vector<int64_t> steps;
  for (int64_t tokens = 1; tokens * spec.top_k <= kManyRows * spec.num_experts;) {
    steps.push_back(tokens);
    tokens += std::max<int64_t>(
        1, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(tokens))) / 8);
  }
  return steps;
}

// The kernels that the model expects to be the fastest. They change where that saves more than the
// model knows: few ranges, each easy to tell.
std::vector<TileChoice> CheapestTiles(const MoeSpec& spec, const std::vector<Role>& roles) {
  constexpr double kWorthAChange = 0.995;
  std::vector<TileChoice> choices;
  std::vector<int> kernels;
  for (const int64_t tokens : TokenSteps(spec)) {
    const Batch batch(spec, tokens);
    const Pick best = CheapestPick(roles, batch);
    if (best.kernels.empty()) {
      return {};
    }
    if (choices.empty() || best.us < kWorthAChange * Microseconds(kernels, roles, batch)) {
      if (!choices.empty()) {
        choices.back().max_tokens = tokens - 1;
      }
      choices.push_back(ChoiceOf(best, roles));
      kernels = best.kernels;
    }
  }
  return choices;
}

// The kernels that the range names, with those for the other roles that the model takes at its
// number of tokens; none where this build lacks one, or they do not fit each other.
std::optional<TileChoice> MeasuredChoice(const MoeSpec& spec, const std::vector<Role>& roles,
                                         const TunedRange& range) {
  std::vector<Role> forced = roles;
  if (range.tactic.empty() || !ForceTactic(range.tactic, &forced).empty()) {
    return std::nullopt;
  }
  const Pick pick = CheapestPick(forced, Batch(spec, std::max<int64_t>(1, range.tokens)));
  if (pick.kernels.empty()) {
    return std::nullopt;
  }
  TileChoice choice = ChoiceOf(pick, roles);
  choice.measured = tune::MeasuredText(range);
  return choice;
}

std::string TacticOf(const TileChoice& choice) {
  return fmt::format("{}+{}", KernelAt(choice.routed.gemm1).name,
                     KernelAt(choice.routed.gemm2).name);
}

// The part of `choices` for numbers of tokens from `first` to `last`.
void AddPart(const std::vector<TileChoice>& choices, int64_t first, int64_t last,
             std::vector<TileChoice>* out) {
  for (const TileChoice& choice : choices) {
    if (choice.max_tokens >= first) {
      out->push_back(choice);
      out->back().max_tokens = std::min(choice.max_tokens, last);
      if (choice.max_tokens >= last) {
        return;
      }
    }
  }
}

// Whether the choice runs routed experts as `tactic` does. Packed weights have one kernel for
// several names.
bool RunsAs(const TileChoice& choice, const std::string& tactic, const std::vector<Role>& roles) {
  std::vector<Role> forced = roles;
  if (!ForceTactic(tactic, &forced).empty()) {
    return false;
  }
  const auto runs = [](int taken, const Role& role) {
    // A tactic may leave GEMM2 to the model.
    return role.forced < 0 || OutcomeOf(taken, role) == OutcomeOf(role.forced, role);
  };
  return runs(choice.routed.gemm1, forced[0]) && runs(choice.routed.gemm2, forced[1]);
}

// Whether nothing was found to be faster than the model's choice, or looked for. It may be another
// one by now: what was measured is then kept, which no candidate was much faster than.
bool IsUntuned(const TunedRange& range, const std::vector<TileChoice>& cheapest,
               const std::vector<Role>& roles) {
  return range.tactic == range.untuned &&
         (!range.measured() || RunsAs(ChoiceFor(cheapest, range.tokens), range.tactic, roles));
}

// The model's kernels in the range; those that were measured say so.
void AddUntuned(const std::vector<TileChoice>& cheapest, const std::vector<Role>& roles,
                int64_t first, const TunedRange& range, std::vector<TileChoice>* out) {
  const size_t begin = out->size();
  AddPart(cheapest, first, range.last, out);
  for (size_t i = begin; i < out->size(); ++i) {
    if (range.measured() && RunsAs((*out)[i], range.tactic, roles)) {
      (*out)[i].measured = tune::MeasuredText(range);
    }
  }
}

// `cheapest` where nothing was measured, and above the last range.
std::vector<TileChoice> WithMeasured(const MoeSpec& spec, const std::vector<Role>& roles,
                                     const std::vector<TileChoice>& cheapest,
                                     const std::vector<TunedRange>& tuned) {
  std::vector<TileChoice> choices;
  int64_t first = 1;
  for (const TunedRange& range : tuned) {
    if (range.last < first) {
      continue;
    }
    if (IsUntuned(range, cheapest, roles)) {
      AddUntuned(cheapest, roles, first, range, &choices);
    } else if (std::optional<TileChoice> choice = MeasuredChoice(spec, roles, range)) {
      choice->max_tokens = range.last;
      choices.push_back(*std::move(choice));
    } else {
      AddPart(cheapest, first, range.last, &choices);
    }
    first = range.last + 1;
  }
  AddPart(cheapest, first, kAnyTokens, &choices);
  return choices;
}

// The kernels of a role, cheapest first. Of those whose place one kernel takes, the first.
std::vector<RankedTactics::Entry> RankRole(const Role& role, const Batch& batch) {
  std::vector<RankedTactics::Entry> entries;
  std::set<std::pair<int, bool>> listed;
  for (const int kernel : role.kernels) {
    if (listed.insert(OutcomeOf(kernel, role)).second) {
      entries.push_back({std::string(KernelAt(kernel).name), Microseconds(kernel, role, batch)});
    }
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](const auto& one, const auto& other) { return one.us < other.us; });
  return entries;
}

// The roles that the tactic means: those of exact products, or, where it names a kernel that
// rounds, those. Empty, or why it names none.
std::string TakeTactic(const MoeSpec& spec, const PlanOptions& options, std::vector<Role>* roles,
                       bool* rounded) {
  std::string reason = ForceTactic(options.tactic, roles);
  if (reason.empty() || !HasRounding(spec)) {
    return reason;
  }
  std::vector<Role> others = RolesOf(spec, true, options.weight_orders);
  const std::string other_reason = ForceTactic(options.tactic, &others);
  if (!other_reason.empty()) {
    return reason + "; by name only:" + other_reason.substr(other_reason.rfind(':') + 1);
  }
  *roles = std::move(others);
  *rounded = true;
  return {};
}

// Limits of the kernels that hold for every format.
std::string SpecReason(const MoeSpec& spec) {
  if (spec.hidden_size % 8 != 0) {
    return "hidden_size=" + std::to_string(spec.hidden_size) +
           "; the GPU moves BF16 rows in pieces of 16 bytes and wants a multiple of 8: zero-pad "
           "hidden states and weights, or plan for the CPU";
  }
  return {};
}

// Where weights are packed every kernel that a plan may choose must have one for them: Weights
// refuse them otherwise.
std::string PackedReason(const std::vector<Role>& roles) {
  for (const Role& role : roles) {
    for (const int kernel : role.kernels) {
      if (role.shape.packed && gemm::sm90::PackedTwin(kernel) < 0) {
        return NoPackedKernel(role.shape.weights, kernel);
      }
    }
  }
  return {};
}

}  // namespace

KernelChoice ChooseKernels(const MoeSpec& spec, const PlanOptions& options,
                           const std::vector<TunedRange>& tuned) {
  KernelChoice out;
  Explanation& explanation = out.explanation;
  explanation.reason = SpecReason(spec);
  if (!explanation.reason.empty()) {
    return out;
  }
  std::vector<Role> roles = RolesOf(spec, false, options.weight_orders);
  explanation.reason = TakeTactic(spec, options, &roles, &out.rounded);
  if (explanation.reason.empty()) {
    explanation.reason = PackedReason(roles);
  }
  if (!explanation.reason.empty()) {
    return out;
  }
  out.tiles = CheapestTiles(spec, roles);
  if (out.tiles.empty()) {
    explanation.reason = NoTileReason(spec, roles, options);
  } else {
    if (options.tactic.empty() && !tuned.empty()) {
      out.tiles = WithMeasured(spec, roles, out.tiles, tuned);
    }
    // One choice for all batches; a tactic that names one GEMM's kernel fixes the other's, too.
    if (options.batch_invariant || !options.tactic.empty()) {
      out.tiles = {ChoiceFor(out.tiles, options.max_tokens)};
      out.tiles.back().max_tokens = kAnyTokens;
    }
    explanation.supported = true;
  }
  explanation.candidates = ListCandidates(spec, options, roles, out);
  return out;
}

bool HasTactic(const MoeSpec& spec, const std::string& tactic) {
  std::vector<Role> roles = RolesOf(spec, false);
  return !tactic.empty() && SpecReason(spec).empty() && ForceTactic(tactic, &roles).empty() &&
         !CheapestPick(roles, Batch(spec, 1)).kernels.empty();
}

RankedTactics RankTactics(const MoeSpec& spec, const PlanOptions& options, int64_t tokens) {
  PlanOptions untuned = options;
  untuned.tactic.clear();
  const KernelChoice choice = ChooseKernels(spec, untuned, {});
  HOPYARD_CHECK(choice.explanation.supported, kUnsupported) << choice.explanation.reason;
  const std::vector<Role> roles = RolesOf(spec, false, options.weight_orders);
  const Batch batch(spec, tokens);
  return {TacticOf(ChoiceFor(choice.tiles, tokens)), RankRole(roles[0], batch),
          RankRole(roles[1], batch)};
}

const TileChoice& ChoiceFor(const std::vector<TileChoice>& tiles, int64_t tokens) {
  return *std::find_if(tiles.begin(), tiles.end() - 1,
                       [&](const TileChoice& choice) { return tokens <= choice.max_tokens; });
}

}  // namespace hopyard::sm90
