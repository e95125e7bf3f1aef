// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "gemm/sm90/cost.h"
#include "plan/sm90/layer_plan.h"

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KernelAt;
using gemm::sm90::KernelInfo;
using gemm::sm90::MnMajorTwin;
using gemm::sm90::NumKernels;
using gemm::sm90::RowFormat;

constexpr int64_t kAnyTokens = std::numeric_limits<int64_t>::max();

// One of the GEMMs of a pass, as the kernel table and the cost model see it.
struct Role {
  const char* name = "";
  RowFormat rows;
  bool gated = false;
  gemm::sm90::GemmShape shape;  // of the local experts that rows are routed to
  int64_t shared_experts = 0;   // beside them, with every token's rows
  // GEMM1's output must be rounded for GEMM2, which kernels that can (`fused`) do themselves.
  bool rounded = false;
  bool fused = false;
  std::vector<int> kernels;  // that run it, by index
  int forced = -1;           // the kernel that options.tactic names
};

// Kernels for K-major weights; those for MN-major ones stand in for them when a call brings such.
std::vector<int> KernelsThatRun(const Role& role) {
  std::vector<int> kernels;
  for (int i = 0; i < NumKernels(); ++i) {
    if (!KernelAt(i).mn_major && gemm::sm90::Runs(i, role.shape.weights, role.rows, role.gated)) {
      kernels.push_back(i);
    }
  }
  return kernels;
}
bool Fits(int index, const Role& role) {
  return std::find(role.kernels.begin(), role.kernels.end(), index) != role.kernels.end();
}
bool HasName(int index, const std::string& name) {
  return index >= 0 && KernelAt(index).name == name;
}

// GEMM1 and GEMM2 of a group of experts.
void AddRoles(const MoeSpec& spec, const GroupFormats& formats, bool shared,
              std::vector<Role>* roles) {
  Role first;
  first.name = shared ? "GEMM1 of shared experts" : "GEMM1";
  first.rows = formats.operands.x;
  first.gated = IsGated(spec.activation.kind);
  first.rounded = formats.operands.h.format != Format::kBf16;
  first.fused = formats.operands.fused_h;
  first.shape = {formats.weights, spec.hidden_size, spec.intermediate_size,
                 shared ? 0 : spec.num_local_experts()};
  first.shared_experts = shared ? spec.shared.count : 0;
  Role second;
  second.name = shared ? "GEMM2 of shared experts" : "GEMM2";
  second.rows = formats.operands.h;
  second.shape = {formats.weights, spec.intermediate_size, spec.hidden_size, first.shape.experts};
  second.shared_experts = first.shared_experts;
  for (Role* role : {&first, &second}) {
    role->kernels = KernelsThatRun(*role);
    roles->push_back(std::move(*role));
  }
}

// GEMM1, GEMM2, and the same of shared experts where their weights have another format.
std::vector<Role> RolesOf(const MoeSpec& spec, bool rounded) {
  std::vector<Role> roles;
  AddRoles(spec, FormatsOf(spec, spec.weights, rounded), false, &roles);
  if (spec.shared.count > 0 && spec.shared.weights != spec.weights) {
    AddRoles(spec, FormatsOf(spec, spec.shared.weights, rounded), true, &roles);
  } else {
    roles[0].shared_experts = spec.shared.count;
    roles[1].shared_experts = spec.shared.count;
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
  for (const int kernel : unknown.kernels) {
    reason += ' ' + std::string(KernelAt(kernel).name);
  }
  return reason;
}

// A number of tokens, uniformly routed.
struct Batch {
  gemm::sm90::RowSpread routed;
  gemm::sm90::RowSpread shared;

  Batch(const MoeSpec& spec, int64_t tokens)
      : routed(tokens, static_cast<double>(spec.top_k) / spec.num_experts), shared(tokens, 1.0) {}
};

bool RoundsApart(int index, const Role& role) {
  return role.rounded && !(role.fused && KernelAt(index).rounds);
}

// What the cost model expects of kernel `index` in a role.
double Microseconds(int index, const Role& role, const Batch& batch) {
  double sum = 0.0;
  gemm::sm90::GemmShape shape = role.shape;
  for (const gemm::sm90::RowSpread* rows : {&batch.routed, &batch.shared}) {
    if (shape.experts > 0) {
      sum += EstimateMicroseconds(index, shape, *rows);
      if (RoundsApart(index, role)) {
        sum += gemm::sm90::EstimateRounding(rows->average() * static_cast<double>(shape.experts),
                                            shape.features);
      }
    }
    shape.experts = role.shared_experts;
  }
  return sum;
}

// A kernel for each role, with tiles of as many rows.
struct Pick {
  int tile = 0;
  std::vector<int> kernels;
  double us = 0.0;
};

// The model knows no better: of what costs so little more than the cheapest, the first is taken,
// smaller tiles and blocks.
constexpr double kAsCheap = 1.005;
constexpr double kAsCheapTile = 1.01;

// The cheapest kernel of the role with tiles of `tile` rows, or the one that was asked for; -1.
int CheapestKernel(const Role& role, int tile, const Batch& batch) {
  if (role.forced >= 0) {
    return KernelAt(role.forced).tokens == tile ? role.forced : -1;
  }
  int best = -1;
  double best_us = 0.0;
  for (const int kernel : role.kernels) {
    if (KernelAt(kernel).tokens != tile) {
      continue;
    }
    const double us = Microseconds(kernel, role, batch);
    if (best < 0 || us * kAsCheap < best_us) {
      best = kernel;
      best_us = us;
    }
  }
  return best;
}

double Microseconds(const std::vector<int>& kernels, const std::vector<Role>& roles,
                    const Batch& batch) {
  double sum = 0.0;
  for (size_t r = 0; r < roles.size(); ++r) {
    sum += Microseconds(kernels[r], roles[r], batch);
  }
  return sum;
}

// No kernels where no tile has one for every role.
Pick CheapestPick(const std::vector<Role>& roles, const Batch& batch) {
  std::set<int> sizes;
  for (const int kernel : roles.front().kernels) {
    sizes.insert(KernelAt(kernel).tokens);
  }
  Pick best;
  for (const int tile : sizes) {
    Pick pick;
    pick.tile = tile;
    for (const Role& role : roles) {
      pick.kernels.push_back(CheapestKernel(role, tile, batch));
    }
    if (std::find(pick.kernels.begin(), pick.kernels.end(), -1) != pick.kernels.end()) {
      continue;
    }
    pick.us = Microseconds(pick.kernels, roles, batch);
    if (best.kernels.empty() || pick.us * kAsCheapTile < best.us) {
      best = std::move(pick);
    }
  }
  return best;
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
  choice.tile = pick.tile;
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

int KernelOf(const TileChoice& choice, size_t role) {
  const GroupKernels& kernels = role < 2 ? choice.routed : choice.shared;
  return role % 2 == 0 ? kernels.gemm1 : kernels.gemm2;
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
    const std::string tile = "tiles of " + std::to_string(KernelAt(index).tokens) + " rows";
    if (tiles_.empty()) {
      return {false, "not every GEMM of this layer has a kernel with " + tile};
    }
    std::vector<Range> ranges;
    int64_t first = 1;
    for (const TileChoice& choice : tiles_) {
      if (KernelOf(choice, number) == index) {
        if (!ranges.empty() && ranges.back().last + 1 == first) {
          ranges.back().last = choice.max_tokens;
        } else {
          ranges.push_back({first, choice.max_tokens});
        }
      }
      first = choice.max_tokens == kAnyTokens ? kAnyTokens : choice.max_tokens + 1;
    }
    return ranges.empty() ? NotTaken(index, role, number) : Taken(index, role, ranges);
  }

 private:
  struct Range {
    int64_t first;
    int64_t last;
  };
  [[nodiscard]] Verdict NotTaken(int index, const Role& role, size_t number) const {
    const int64_t tokens = options_.max_tokens;
    const int instead = KernelOf(ChoiceFor(tiles_, tokens), number);
    return {false, TimesString(index, role, spec_, {tokens}) + " tokens, " +
                       std::string(KernelAt(instead).name) + " " +
                       TimesString(instead, role, spec_, {tokens}) +
                       "; not taken for any number of tokens: ask for it by name"};
  }
  [[nodiscard]] Verdict Taken(int index, const Role& role, const std::vector<Range>& ranges) const {
    const KernelInfo info = KernelAt(index);
    const std::string tile = "tiles of " + std::to_string(info.tokens) + " rows, blocks of " +
                             std::to_string(info.features) + " features, ";
    std::string all;
    std::string text;
    std::set<int64_t> tokens;
    for (const Range& range : ranges) {
      all += (all.empty() ? "" : " and ") + RangeString(range.first, range.last);
      if (range.first <= options_.max_tokens) {
        const int64_t last = std::min(range.last, options_.max_tokens);
        tokens.insert({range.first, last});
        text += (text.empty() ? "" : " and ") + RangeString(range.first, last);
      }
    }
    if (text.empty()) {
      return {false, all + ": max_tokens=" + std::to_string(options_.max_tokens) + " stays below"};
    }
    const std::string times = TimesString(index, role, spec_, tokens);
    if (role.forced >= 0) {
      return {true, "asked for by name; runs every number of tokens, " + times};
    }
    if (tiles_.size() == 1) {
      text = options_.batch_invariant ? "every batch, as batch_invariant asks"
                                      : "every number of tokens";
    }
    return {true, text + ": " + tile + times};
  }

  const MoeSpec& spec_;
  const PlanOptions& options_;
  const std::vector<TileChoice>& tiles_;
};

std::vector<Candidate> ListCandidates(const std::vector<Role>& roles, const Judge& judge) {
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
    if (role.kernels.empty()) {
      return "this build has no GPU kernel for " + std::string(role.name) + " of " +
             std::string(ToString(role.shape.weights)) + " weights with " +
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
  out.tiles = CheapestTiles(spec, roles);
  if (out.tiles.empty()) {
    explanation.reason = NoTileReason(spec, roles, options);
  } else {
    // One choice for all batches; a tactic that names one GEMM's kernel fixes the other's, too.
    if (options.batch_invariant || !options.tactic.empty()) {
      out.tiles = {ChoiceFor(out.tiles, options.max_tokens)};
      out.tiles.back().max_tokens = kAnyTokens;
    }
    explanation.supported = true;
  }
  explanation.candidates = ListCandidates(roles, Judge(spec, options, out.tiles));
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
