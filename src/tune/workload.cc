// SPDX-License-Identifier: Apache-2.0
#include "tune/workload.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <set>

#include "hopyard/routing.h"

#include "core/cyclic_rows.h"
#include "core/error.h"
#include "core/parallel.h"
#include "core/random_bits.h"

namespace hopyard::tune {
namespace {

enum Purpose : uint64_t { kNoise, kRecordedRows, kHidden, kShared };

constexpr const char* kUniform = "uniform";
constexpr const char* kZipf = "zipf";
constexpr const char* kBalanced = "balanced";
constexpr const char* kHot = "hot";
constexpr const char* kRecorded = "recorded";

// Gumbel noise on log-probabilities makes top-k draw from them without replacement; any rule that
// ranks by the logits draws so. It is scaled down: of 10 million draws the largest is 16, where a
// sigmoid in FP32 is 1 for all.
constexpr float kScale = 0.5F;
// Three quarters and more of the choices fall on the hot experts.
constexpr float kHotLead = 4.0F;
// Beyond all noise.
constexpr float kBalancedLead = 8.0F;
constexpr float kBalancedNoise = 0.01F;

float Gumbel(uint64_t stream, uint64_t index) {
  return static_cast<float>(-std::log(-std::log(Uniform(stream, index))));
}

std::vector<int32_t> ReadRecorded(const MoeSpec& spec, const TensorView& recorded) {
  HOPYARD_CHECK(recorded.device.kind == DeviceKind::kCpu && recorded.ndim == 2 &&
                    recorded.shape[1] == spec.top_k && recorded.shape[0] >= 1 &&
                    recorded.data != nullptr && recorded.is_contiguous(),
                kInvalidArgument)
      << "recorded: wanted a contiguous replay [n, " << spec.top_k
      << "] in host memory, n at least 1; copy it there (MoeOutputs::replay has the shape)";
  HOPYARD_CHECK(recorded.dtype == DType::kInt16 || recorded.dtype == DType::kInt32,
                kInvalidArgument)
      << "recorded is " << hopyard::ToString(recorded.dtype) << "; wanted i16 or i32";
  std::vector<int32_t> ids(static_cast<size_t>(recorded.numel()));
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = recorded.dtype == DType::kInt16 ? recorded.as<const int16_t>()[i]
                                             : recorded.as<const int32_t>()[i];
    HOPYARD_CHECK(ids[i] >= -1 && ids[i] < spec.num_experts, kInvalidArgument)
        << "recorded has expert " << ids[i] << " at token " << i / static_cast<size_t>(spec.top_k)
        << "; wanted -1 .. " << spec.num_experts - 1;
  }
  return ids;
}

}  // namespace

Workload::Workload(const MoeSpec& spec, const CallPath& path, const TuneOptions& options)
    : spec_(spec), names_(options.routings), seed_(options.seed) {
  if (options.recorded.defined()) {
    names_ = {kRecorded};
    recorded_ = ReadRecorded(spec, options.recorded);
    mode_ = RoutingInput::kReplay;
  }
  if (path.ids) {
    mode_ = RoutingInput::kUnpacked;
  }
  HOPYARD_CHECK(!names_.empty(), kInvalidArgument)
      << "routings is empty; wanted some of uniform, zipf, balanced, hot";
  for (const std::string& name : options.recorded.defined() ? std::vector<std::string>() : names_) {
    HOPYARD_CHECK(name == kUniform || name == kZipf || name == kBalanced || name == kHot,
                  kInvalidArgument)
        << "routings has '" << name << "'; wanted uniform, zipf, balanced or hot";
  }
}

std::string Workload::ToString() const {
  std::string text;
  for (const std::string& name : names_) {
    text += (text.empty() ? "" : ",") + name;
  }
  return text;
}

int64_t Workload::first_local() const {
  return spec_.local.kind == ExpertMap::Kind::kRange ? spec_.local.offset : 0;
}

std::vector<float> Workload::Logits(int kind, int set, int64_t tokens) const {
  const std::string& name = names_[static_cast<size_t>(kind)];
  const int64_t experts = spec_.num_experts;
  const int64_t local = std::max(spec_.num_local_experts(), 1);
  const uint64_t stream = StreamSeed(StreamSeed(seed_, kNoise, static_cast<uint64_t>(kind)), kNoise,
                                     static_cast<uint64_t>(set));
  // What the expert's place is in the kind of routing: sets begin elsewhere.
  std::vector<float> lead(static_cast<size_t>(experts), 0.0F);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t own = (e - first_local() + experts) % experts;  // 0 .. local - 1 on this rank
    if (name == kZipf) {
      lead[static_cast<size_t>(e)] =
          -std::log(static_cast<float>((own * 7 + 3 + int64_t{13} * set) % experts + 1));
    } else if (name == kHot && own < local) {
      const int64_t place = (own - int64_t{spec_.top_k} * set % local + local) % local;
      lead[static_cast<size_t>(e)] = place < spec_.top_k ? kHotLead : 0.0F;
    }
  }
  std::vector<float> logits(static_cast<size_t>(tokens * experts));
  ParallelFor(0, tokens, 64, MaxThreads(), [&](int64_t t, int /*thread*/) {
    // A balanced token takes the choices after those of the token before it; neighbours, so that
    // rules with groups of experts can take them.
    const int64_t walk = (t + int64_t{set} * tokens) * spec_.top_k % experts;
    for (int64_t e = 0; e < experts; ++e) {
      const auto i = static_cast<size_t>(t * experts + e);
      const float noise = Gumbel(stream, i);
      if (name == kBalanced) {
        const bool chosen = (e - walk + experts) % experts < spec_.top_k;
        logits[i] = kScale * ((chosen ? kBalancedLead : -kBalancedLead) + kBalancedNoise * noise);
      } else {
        logits[i] = kScale * (lead[static_cast<size_t>(e)] + noise);
      }
    }
  });
  return logits;
}

// Consecutive rows from a random one on: neighbours of a batch stay together.
std::vector<int32_t> Workload::RecordedIds(int set, int64_t tokens) const {
  const auto rows = static_cast<int64_t>(recorded_.size()) / spec_.top_k;
  const auto begin = static_cast<int64_t>(
      StreamSeed(seed_, kRecordedRows, static_cast<uint64_t>(set)) % static_cast<uint64_t>(rows));
  return CyclicRows(recorded_, spec_.top_k, begin, tokens);
}

void Workload::RouteOnHost(RoutedTokens* routed, int64_t tokens) const {
  RouteInputs in;
  in.logits =
      TensorView::Contiguous(routed->logits.data(), DType::kFloat32, {tokens, spec_.num_experts});
  if (!routed->ids.empty()) {
    in.forced_ids =
        TensorView::Contiguous(routed->ids.data(), DType::kInt32, {tokens, spec_.top_k});
  }
  std::vector<int32_t> ids(static_cast<size_t>(tokens * spec_.top_k));
  routed->weights.resize(ids.size());
  RouteOutputs out;
  out.expert_ids = TensorView::Contiguous(ids.data(), DType::kInt32, {tokens, spec_.top_k});
  out.weights =
      TensorView::Contiguous(routed->weights.data(), DType::kFloat32, {tokens, spec_.top_k});
  Route(spec_.routing, spec_.top_k, in, out);
  routed->ids = std::move(ids);
}

RoutedTokens Workload::Make(int kind, int set, int64_t tokens) const {
  RoutedTokens routed;
  routed.logits = Logits(kind, set, tokens);
  if (!recorded_.empty()) {
    routed.ids = RecordedIds(set, tokens);
  }
  if (mode_ == RoutingInput::kUnpacked) {
    RouteOnHost(&routed, tokens);
    routed.logits.clear();
  }
  return routed;
}

int64_t Workload::ExpertsTouched(int kind, int64_t tokens) const {
  // More tokens touch no fewer.
  constexpr int64_t kEnough = 64;
  const int64_t count = std::min(tokens, kEnough);
  RoutedTokens routed = Make(kind, 0, count);
  if (mode_ != RoutingInput::kUnpacked) {
    RouteOnHost(&routed, count);
  }
  std::set<int32_t> touched;
  for (const int32_t id : routed.ids) {
    const int64_t own = id - first_local();
    if (id >= 0 && own >= 0 && own < spec_.num_local_experts()) {
      touched.insert(id);
    }
  }
  return static_cast<int64_t>(touched.size());
}

// Values of 0.5 .. 2 of either sign: their bits matter to the power that products draw.
std::vector<uint16_t> Workload::HiddenStates(int64_t tokens) const {
  constexpr uint64_t kSignAndFraction = 0x80FFU;
  constexpr uint64_t kExponent = 0x3F00U;
  const uint64_t stream = StreamSeed(seed_, kHidden, 0);
  std::vector<uint16_t> values(static_cast<size_t>(tokens * spec_.hidden_size));
  ParallelFor(0, tokens, 16, MaxThreads(), [&](int64_t t, int /*thread*/) {
    for (int64_t i = t * spec_.hidden_size; i < (t + 1) * spec_.hidden_size; ++i) {
      const uint64_t bits = RandomBits(stream, static_cast<uint64_t>(i));
      values[static_cast<size_t>(i)] = static_cast<uint16_t>((bits & kSignAndFraction) | kExponent);
    }
  });
  return values;
}

std::vector<float> Workload::SharedWeights(int64_t tokens) const {
  std::vector<float> weights;
  if (spec_.shared.count > 0 && spec_.shared.per_token_weight) {
    const uint64_t stream = StreamSeed(seed_, kShared, 0);
    for (int64_t i = 0; i < tokens * spec_.shared.count; ++i) {
      weights.push_back(static_cast<float>(Uniform(stream, static_cast<uint64_t>(i))));
    }
  }
  return weights;
}

std::vector<int32_t> Workload::ExpertTable() const {
  std::vector<int32_t> table;
  if (spec_.local.kind == ExpertMap::Kind::kTable) {
    for (int32_t e = 0; e < spec_.num_experts; ++e) {
      table.push_back(e < spec_.local.count ? e : -1);
    }
  }
  return table;
}

}  // namespace hopyard::tune
