// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "plan/sm90/layer_plan.h"

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KernelAt;
using gemm::sm90::KernelInfo;
using gemm::sm90::MnMajorTwin;
using gemm::sm90::NumKernels;
using gemm::sm90::RowFormat;

constexpr int64_t kAnyTokens = std::numeric_limits<int64_t>::max();

// One of the GEMMs of a pass, as the kernel table sees it.
struct Role {
  const char* name = "";
  WeightFormat weights = WeightFormat::kBf16;
  RowFormat rows;
  bool gated = false;
  int forced = -1;  // the kernel that options.tactic names
};

// Kernels for K-major weights; those for MN-major ones stand in for them when a call brings such.
bool Fits(int index, const Role& role) {
  return !KernelAt(index).mn_major && gemm::sm90::Runs(index, role.weights, role.rows, role.gated);
}
bool HasName(int index, const std::string& name) {
  return index >= 0 && KernelAt(index).name == name;
}

// GEMM1, GEMM2, and the same of shared experts where their weights have another format.
std::vector<Role> RolesOf(const MoeSpec& spec, bool rounded) {
  const bool gated = IsGated(spec.activation.kind);
  const GroupFormats routed = FormatsOf(spec, spec.weights, rounded);
  std::vector<Role> roles = {{"GEMM1", routed.weights, routed.operands.x, gated},
                             {"GEMM2", routed.weights, routed.operands.h, false}};
  if (spec.shared.count > 0 && spec.shared.weights != spec.weights) {
    const GroupFormats shared = FormatsOf(spec, spec.shared.weights, rounded);
    roles.push_back({"GEMM1 of shared experts", shared.weights, shared.operands.x, gated});
    roles.push_back({"GEMM2 of shared experts", shared.weights, shared.operands.h, false});
  }
  return roles;
}

// Whether a plan may name kernels that round what the formats do not ask to be rounded.
bool HasRounding(const MoeSpec& spec) {
  return gemm::sm90::RoundedOperandsOf(spec.weights, spec.activations).has_value();
}
const char* RoundingOf(const MoeSpec& spec) {
  return spec.weights == WeightFormat::kNvFp4 ? "rounds weights to e4m3"
                                              : "rounds activations to e4m3 in blocks of 128";
}

// The kernel of the role with tiles of `tile` rows: the one asked for, or of those there are the
// first with the fewest or (wide) the most features in a block; -1.
int KernelFor(const Role& role, int tile, bool wide) {
  if (role.forced >= 0) {
    return KernelAt(role.forced).tokens == tile ? role.forced : -1;
  }
  int best = -1;
  for (int i = 0; i < NumKernels(); ++i) {
    if (KernelAt(i).tokens == tile && Fits(i, role)) {
      const int more = best < 0 ? 0 : KernelAt(i).features - KernelAt(best).features;
      best = best < 0 || (wide ? more > 0 : more < 0) ? i : best;
    }
  }
  return best;
}

// Index of the role's kernel of that name, its own or its MN-major twin's, or -1.
int FindKernel(const Role& role, const std::string& name) {
  for (int i = 0; i < NumKernels(); ++i) {
    const bool named = HasName(i, name) || HasName(MnMajorTwin(i, false), name) ||
                       HasName(MnMajorTwin(i, true), name);
    if (Fits(i, role) && named) {
      return i;
    }
  }
  return -1;
}

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
  for (int i = 0; i < NumKernels(); ++i) {
    if (Fits(i, unknown)) {
      reason += ' ' + std::string(KernelAt(i).name);
    }
  }
  return reason;
}

GroupKernels KernelsFor(const Role& first, const Role& second, int tile, bool wide, bool fused) {
  GroupKernels kernels;
  kernels.gemm1 = KernelFor(first, tile, wide);
  kernels.gemm2 = KernelFor(second, tile, wide);
  const bool rounded = second.rows.format != Format::kBf16;
  kernels.rounds_apart = rounded && !(fused && KernelAt(kernels.gemm1).rounds);
  return kernels;
}

// Tiles for which every role has a kernel, ascending, and each twice where some role has a wider
// one. `fused`: GEMM1 may round its own output.
std::vector<TileChoice> CommonTiles(const std::vector<Role>& roles, bool fused) {
  std::set<int> sizes;
  for (int i = 0; i < NumKernels(); ++i) {
    sizes.insert(KernelAt(i).tokens);
  }
  std::vector<TileChoice> tiles;
  for (const int tile : sizes) {
    const bool complete = std::all_of(roles.begin(), roles.end(), [&](const Role& role) {
      return KernelFor(role, tile, false) >= 0;
    });
    const bool widens = std::any_of(roles.begin(), roles.end(), [&](const Role& role) {
      return KernelFor(role, tile, false) != KernelFor(role, tile, true);
    });
    for (const bool wide : {false, true}) {
      if (!complete || (wide && !widens)) {
        continue;
      }
      TileChoice choice;
      choice.tile = tile;
      choice.wide = wide;
      choice.routed = KernelsFor(roles[0], roles[1], tile, wide, fused);
      choice.shared = choice.routed;
      if (roles.size() > 2) {
        choice.shared = KernelsFor(roles[2], roles[3], tile, wide, fused);
        // One pass rounds the rows of both groups.
        const bool apart = choice.routed.rounds_apart || choice.shared.rounds_apart;
        choice.routed.rounds_apart = apart;
        choice.shared.rounds_apart = apart;
      }
      tiles.push_back(choice);
    }
  }
  return tiles;
}

// Most tokens of which, uniformly routed, about one expert in 400 gets more rows than the tile has
// (a Poisson distribution's average + 2.8 sqrt(average)): that one reads its weights again. A tile
// that is half empty costs less than reading all weights twice (bench_forward, H100, 2026-11).
int64_t MostTokensOfTile(const MoeSpec& spec, int tile) {
  constexpr double kDeviations = 2.8;
  const double root = (std::sqrt(kDeviations * kDeviations + 4.0 * tile) - kDeviations) / 2.0;
  return static_cast<int64_t>(root * root * spec.num_experts / spec.top_k);
}

// Most tokens, up to `limit`, that leave GEMM1 with too few of the wide blocks. These take turns on
// 264 places; below some 700 of them the last turn leaves more of the places idle than wide blocks
// save (MXFP4, 128 experts of 768 and of 2880 features, T = 8 .. 64, H100, 2026-11).
int64_t MostTokensOfNarrow(const MoeSpec& spec, int wide_features, int64_t limit) {
  constexpr double kWideBlocks = 700.0;
  const int64_t per_expert = (spec.intermediate_size + wide_features - 1) / wide_features;
  const double missed = 1.0 - static_cast<double>(spec.top_k) / spec.num_experts;
  int64_t tokens = 0;
  double untouched = 1.0;  // part of the experts that `tokens` tokens leave alone
  while (tokens < limit) {
    untouched *= missed;
    if ((1.0 - untouched) * static_cast<double>(spec.num_local_experts() * per_expert) >=
        kWideBlocks) {
      break;
    }
    ++tokens;
  }
  return tokens;
}

void SetTokenRanges(const MoeSpec& spec, std::vector<TileChoice>* tiles) {
  for (size_t i = 0; i < tiles->size(); ++i) {
    TileChoice& choice = tiles->at(i);
    choice.max_tokens = MostTokensOfTile(spec, choice.tile);
    if (i + 1 < tiles->size() && tiles->at(i + 1).tile == choice.tile) {
      const int wide = KernelAt(tiles->at(i + 1).routed.gemm1).features;
      choice.max_tokens = MostTokensOfNarrow(spec, wide, choice.max_tokens);
    }
  }
  tiles->back().max_tokens = kAnyTokens;
}

std::string RangeString(int64_t first, int64_t last) {
  return "tokens " + std::to_string(first) +
         (last == kAnyTokens ? " and more" : ".." + std::to_string(last));
}

// What became of the kernel `index` in a role that it fits.
struct Verdict {
  bool chosen = false;
  std::string reason;
};

Verdict Judge(int index, const Role& role, const std::vector<TileChoice>& tiles,
              const PlanOptions& options) {
  const KernelInfo info = KernelAt(index);
  const std::string tile = "tiles of " + std::to_string(info.tokens) + " rows";
  if (role.forced >= 0 && role.forced != index) {
    return {false, "tactic " + options.tactic + " was asked for"};
  }
  const auto runs = [&](const TileChoice& choice) {
    return KernelFor(role, choice.tile, choice.wide) == index;
  };
  const auto begin = std::find_if(tiles.begin(), tiles.end(), runs);
  if (begin == tiles.end()) {
    const bool other = std::any_of(tiles.begin(), tiles.end(), [&](const TileChoice& choice) {
      return choice.tile == info.tokens;
    });
    if (other) {
      return {false, "another kernel with " + tile + " comes first; ask for this one by name"};
    }
    return {false, options.batch_invariant || !options.tactic.empty()
                       ? tile + " are not those chosen for all of the plan's batches"
                       : "not every GEMM of this layer has a kernel with " + tile};
  }
  const auto end = std::find_if_not(begin, tiles.end(), runs);
  const int64_t first = begin == tiles.begin() ? 1 : (begin - 1)->max_tokens + 1;
  const int64_t last = (end - 1)->max_tokens;
  if (last < first) {
    return {false, "blocks of more features suit every number of tokens"};
  }
  if (first > options.max_tokens) {
    return {false, RangeString(first, last) + ": max_tokens=" + std::to_string(options.max_tokens) +
                       " stays below"};
  }
  if (role.forced >= 0) {
    return {true, "asked for by name; runs every number of tokens"};
  }
  if (tiles.size() == 1) {
    return {true, options.batch_invariant ? tile + " for every batch, as batch_invariant asks"
                                          : tile + ", the only ones there are"};
  }
  return {true, RangeString(first, std::min(last, options.max_tokens)) + ": " + tile +
                    (last == kAnyTokens ? ", the largest there are"
                                        : ", the smallest that few experts exceed") +
                    ", blocks of " + std::to_string(info.features) + " features"};
}

std::vector<Candidate> ListCandidates(const std::vector<Role>& roles,
                                      const std::vector<TileChoice>& tiles,
                                      const PlanOptions& options) {
  std::vector<Candidate> candidates;
  for (int i = 0; i < NumKernels(); ++i) {
    Candidate candidate;
    candidate.kernel = KernelAt(i).name;
    for (const Role& role : roles) {
      if (Fits(i, role)) {
        const Verdict verdict = Judge(i, role, tiles, options);
        candidate.chosen = candidate.chosen || verdict.chosen;
        candidate.reason +=
            (candidate.reason.empty() ? "" : "; ") + std::string(role.name) + ", " + verdict.reason;
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
  return candidates;
}

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

std::string NoTileReason(const MoeSpec& spec, const std::vector<Role>& roles,
                         const PlanOptions& options) {
  for (const Role& role : roles) {
    bool any = false;
    for (int i = 0; i < NumKernels(); ++i) {
      any = any || Fits(i, role);
    }
    if (!any) {
      return "this build has no GPU kernel for " + std::string(role.name) + " of " +
             std::string(ToString(role.weights)) + " weights with " +
             std::string(ToString(spec.activations)) + " activations; plan for the CPU";
    }
  }
  return options.tactic.empty()
             ? "no tile size has a GPU kernel for every GEMM of this layer; plan for the CPU"
             : "tactic '" + options.tactic +
                   "': the other GEMMs have no kernel with tiles of as many rows; name another";
}

// The roles that the tactic means: those of exact products, or, where it names a kernel that
// rounds, those. Empty, or why it names none.
std::string TakeTactic(const MoeSpec& spec, const std::string& tactic, std::vector<Role>* roles,
                       bool* rounded) {
  std::string reason = ForceTactic(tactic, roles);
  if (reason.empty() || !HasRounding(spec)) {
    return reason;
  }
  std::vector<Role> others = RolesOf(spec, true);
  const std::string other_reason = ForceTactic(tactic, &others);
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

}  // namespace

KernelChoice ChooseKernels(const MoeSpec& spec, const PlanOptions& options) {
  KernelChoice out;
  Explanation& explanation = out.explanation;
  explanation.reason = SpecReason(spec);
  if (!explanation.reason.empty()) {
    return out;
  }
  std::vector<Role> roles = RolesOf(spec, false);
  explanation.reason = TakeTactic(spec, options.tactic, &roles, &out.rounded);
  if (!explanation.reason.empty()) {
    return out;
  }
  out.tiles = CommonTiles(roles, FormatsOf(spec, spec.weights, out.rounded).operands.fused_h);
  if (out.tiles.empty()) {
    explanation.reason = NoTileReason(spec, roles, options);
  } else {
    SetTokenRanges(spec, &out.tiles);
    if (options.batch_invariant) {
      out.tiles = {ChoiceFor(out.tiles, options.max_tokens)};
      out.tiles.back().max_tokens = kAnyTokens;
    }
    explanation.supported = true;
  }
  explanation.candidates = ListCandidates(roles, out.tiles, options);
  if (!out.rounded && HasRounding(spec)) {
    ListByNameOnly(spec, roles, &explanation.candidates);
  }
  return out;
}

const TileChoice& ChoiceFor(const std::vector<TileChoice>& tiles, int64_t tokens) {
  return *std::find_if(tiles.begin(), tiles.end() - 1,
                       [&](const TileChoice& choice) { return tokens <= choice.max_tokens; });
}

}  // namespace hopyard::sm90
