// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "plan/sm90/layer_plan.h"

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KernelAt;
using gemm::sm90::KernelInfo;
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

bool Fits(int index, const Role& role) {
  return gemm::sm90::Runs(index, role.weights, role.rows, role.gated);
}

// GEMM1, GEMM2, and the same of shared experts where their weights have another format.
std::vector<Role> RolesOf(const MoeSpec& spec) {
  const bool gated = IsGated(spec.activation.kind);
  const GroupFormats routed = FormatsOf(spec, spec.weights);
  std::vector<Role> roles = {{"GEMM1", routed.weights, routed.operands.x, gated},
                             {"GEMM2", routed.weights, routed.operands.h, false}};
  if (spec.shared.count > 0 && spec.shared.weights != spec.weights) {
    const GroupFormats shared = FormatsOf(spec, spec.shared.weights);
    roles.push_back({"GEMM1 of shared experts", shared.weights, shared.operands.x, gated});
    roles.push_back({"GEMM2 of shared experts", shared.weights, shared.operands.h, false});
  }
  return roles;
}

// The kernel of the role with tiles of `tile` rows: the one asked for, or the table's first; -1.
int KernelFor(const Role& role, int tile) {
  if (role.forced >= 0) {
    return KernelAt(role.forced).tokens == tile ? role.forced : -1;
  }
  for (int i = 0; i < NumKernels(); ++i) {
    if (KernelAt(i).tokens == tile && Fits(i, role)) {
      return i;
    }
  }
  return -1;
}

// Index of the role's kernel of that name, or -1.
int FindKernel(const Role& role, const std::string& name) {
  for (int i = 0; i < NumKernels(); ++i) {
    if (KernelAt(i).name == name && Fits(i, role)) {
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

GroupKernels KernelsFor(const Role& first, const Role& second, int tile, bool fused) {
  GroupKernels kernels;
  kernels.gemm1 = KernelFor(first, tile);
  kernels.gemm2 = KernelFor(second, tile);
  const bool rounded = second.rows.format != Format::kBf16;
  kernels.rounds_apart = rounded && !(fused && KernelAt(kernels.gemm1).rounds);
  return kernels;
}

// Tiles for which every role has a kernel, ascending. `fused`: GEMM1 may round its own output.
std::vector<TileChoice> CommonTiles(const std::vector<Role>& roles, bool fused) {
  std::vector<TileChoice> tiles;
  for (int i = 0; i < NumKernels(); ++i) {
    const int tile = KernelAt(i).tokens;
    const bool seen = std::any_of(tiles.begin(), tiles.end(),
                                  [&](const TileChoice& other) { return other.tile == tile; });
    const bool complete = std::all_of(roles.begin(), roles.end(),
                                      [&](const Role& role) { return KernelFor(role, tile) >= 0; });
    if (seen || !complete) {
      continue;
    }
    TileChoice choice;
    choice.tile = tile;
    choice.routed = KernelsFor(roles[0], roles[1], tile, fused);
    choice.shared = choice.routed;
    if (roles.size() > 2) {
      choice.shared = KernelsFor(roles[2], roles[3], tile, fused);
      // One pass rounds the rows of both groups.
      const bool apart = choice.routed.rounds_apart || choice.shared.rounds_apart;
      choice.routed.rounds_apart = apart;
      choice.shared.rounds_apart = apart;
    }
    tiles.push_back(choice);
  }
  std::sort(tiles.begin(), tiles.end(),
            [](const TileChoice& a, const TileChoice& b) { return a.tile < b.tile; });
  return tiles;
}

// The smallest tile that holds twice the average rows of an expert: with uniform routing few
// experts then need a second tile, and a half-empty tile costs less than reading the weights twice
// (bench_gemm, H100, 2026-11).
void SetTokenRanges(const MoeSpec& spec, std::vector<TileChoice>* tiles) {
  for (TileChoice& choice : *tiles) {
    // 2 * tokens * top_k / num_experts, rounded down, is at most the tile.
    choice.max_tokens =
        (int64_t{choice.tile + 1} * spec.num_experts - 1) / (int64_t{2} * spec.top_k);
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
  int64_t first = 1;
  for (const TileChoice& choice : tiles) {
    if (choice.tile != info.tokens) {
      first = choice.max_tokens == kAnyTokens ? kAnyTokens : choice.max_tokens + 1;
      continue;
    }
    if (KernelFor(role, choice.tile) != index) {
      return {false, "another kernel with " + tile + " comes first; ask for this one by name"};
    }
    if (first > options.max_tokens) {
      return {false, RangeString(first, choice.max_tokens) +
                         ": max_tokens=" + std::to_string(options.max_tokens) + " stays below"};
    }
    if (role.forced >= 0) {
      return {true, "asked for by name; runs every number of tokens"};
    }
    if (tiles.size() == 1) {
      return {true, options.batch_invariant ? tile + " for every batch, as batch_invariant asks"
                                            : tile + ", the only ones there are"};
    }
    return {true, RangeString(first, std::min(choice.max_tokens, options.max_tokens)) + ": " +
                      tile +
                      (choice.max_tokens == kAnyTokens
                           ? ", the largest there are"
                           : ", the smallest that hold twice an expert's average")};
  }
  return {false, options.batch_invariant || !options.tactic.empty()
                     ? tile + " are not those chosen for all of the plan's batches"
                     : "not every GEMM of this layer has a kernel with " + tile};
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
    if (!candidate.reason.empty()) {
      candidates.push_back(candidate);
    }
  }
  return candidates;
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
  std::vector<Role> roles = RolesOf(spec);
  explanation.reason = ForceTactic(options.tactic, &roles);
  if (!explanation.reason.empty()) {
    return out;
  }
  out.tiles = CommonTiles(roles, FormatsOf(spec, spec.weights).operands.fused_h);
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
  return out;
}

const TileChoice& ChoiceFor(const std::vector<TileChoice>& tiles, int64_t tokens) {
  return *std::find_if(tiles.begin(), tiles.end() - 1,
                       [&](const TileChoice& choice) { return tokens <= choice.max_tokens; });
}

}  // namespace hopyard::sm90
