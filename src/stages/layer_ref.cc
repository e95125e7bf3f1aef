// SPDX-License-Identifier: Apache-2.0
#include "stages/layer_ref.h"

#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <type_traits>

#include "core/parallel.h"
#include "formats/codes.h"
#include "stages/1_route/route.h"
#include "stages/layer_ref_parts.h"

namespace hopyard::ref {
namespace {

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

struct RoutedIds {
  std::vector<int32_t> ids;     // [T, K]
  std::vector<double> weights;  // [T, K]
};

RoutedIds ReadGivenIds(const MoeSpec& spec, const MoeInputs& inputs, int64_t tokens) {
  const int64_t slots = tokens * spec.top_k;
  RoutedIds routed{std::vector<int32_t>(Index(slots)), std::vector<double>(Index(slots))};
  for (int64_t i = 0; i < slots; ++i) {
    if (inputs.routing == RoutingInput::kPacked) {
      const int32_t packed = inputs.packed_ids.as<const int32_t>()[i];
      routed.ids[Index(i)] = packed >> 16;
      routed.weights[Index(i)] = formats::DecodeBf16(static_cast<uint16_t>(packed & 0xFFFF));
    } else {
      routed.ids[Index(i)] = static_cast<int32_t>(ReadNumber(inputs.expert_ids, i));
      routed.weights[Index(i)] = ReadNumber(inputs.expert_weights, i);
    }
  }
  return routed;
}

RoutedIds RouteByRule(const MoeSpec& spec, const MoeInputs& inputs, int64_t tokens,
                      const std::vector<int32_t>& forced) {
  const int64_t slots = tokens * spec.top_k;
  RoutedIds routed{std::vector<int32_t>(Index(slots)), std::vector<double>(Index(slots))};
  std::vector<float> weights(Index(slots));
  RouteInputs arguments;
  arguments.logits = inputs.logits;
  arguments.bias = inputs.routing_bias;
  arguments.num_tokens = inputs.num_tokens;
  if (!forced.empty()) {
    arguments.forced_ids =
        TensorView::Contiguous(forced.data(), DType::kInt32, {tokens, spec.top_k});
  } else if (inputs.routing == RoutingInput::kReplay) {
    arguments.forced_ids = inputs.expert_ids;
  } else if (inputs.routing == RoutingInput::kHash) {
    arguments.token_ids = inputs.token_ids;
    arguments.token_to_experts = inputs.token_to_experts;
  }
  RouteOutputs outputs;
  outputs.expert_ids =
      TensorView::Contiguous(routed.ids.data(), DType::kInt32, {tokens, spec.top_k});
  outputs.weights = TensorView::Contiguous(weights.data(), DType::kFloat32, {tokens, spec.top_k});
  if (tokens > 0) {
    route::RouteRef(spec.routing, spec.top_k, arguments, outputs);
  }
  routed.weights.assign(weights.begin(), weights.end());
  return routed;
}

// Columns [0, K) of a [T, columns] array.
template <class T>
std::vector<T> LeadingColumns(const TensorView& view, int64_t tokens, int64_t count) {
  std::vector<T> result;
  result.reserve(Index(tokens * count));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t k = 0; k < count; ++k) {
      result.push_back(static_cast<T>(ReadNumber(view, token * view.shape[1] + k)));
    }
  }
  return result;
}

RoutedIds RouteTokens(const MoeSpec& spec, const MoeInputs& inputs,
                      const LayerRefOptions& options) {
  const int64_t tokens = inputs.hidden_states.shape[0];
  const bool given =
      inputs.routing == RoutingInput::kPacked || inputs.routing == RoutingInput::kUnpacked;
  std::vector<int32_t> forced;
  if (options.forced_ids.defined()) {
    forced = LeadingColumns<int32_t>(options.forced_ids, tokens, spec.top_k);
  }
  if (options.forced_weights.defined()) {
    return {forced, LeadingColumns<double>(options.forced_weights, tokens, spec.top_k)};
  }
  RoutedIds routed =
      given ? ReadGivenIds(spec, inputs, tokens) : RouteByRule(spec, inputs, tokens, forced);
  if (!forced.empty()) {
    routed.ids = forced;
  }
  return routed;
}

int64_t LocalExpert(const MoeSpec& spec, const MoeInputs& inputs, int32_t id) {
  const int64_t count = spec.num_local_experts();
  int64_t local = id;
  if (id < 0 || id >= spec.num_experts) {
    return -1;
  }
  if (spec.local.kind == ExpertMap::Kind::kRange) {
    local = int64_t{id} - spec.local.offset;
  } else if (spec.local.kind == ExpertMap::Kind::kTable) {
    local = inputs.expert_table.as<const int32_t>()[id];
  }
  return local >= 0 && local < count ? local : -1;
}

std::vector<int64_t> TokensToCompute(const MoeInputs& inputs, const LayerRefOptions& options) {
  if (!options.tokens.empty()) {
    return options.tokens;
  }
  int64_t count = inputs.hidden_states.shape[0];
  if (inputs.num_tokens.defined()) {
    count = *inputs.num_tokens.as<const int32_t>();
  }
  std::vector<int64_t> tokens(Index(count));
  std::iota(tokens.begin(), tokens.end(), int64_t{0});
  return tokens;
}

SlotTable MakeSlots(const MoeSpec& spec, const MoeInputs& inputs, const LayerRefOptions& options) {
  const RoutedIds routed = RouteTokens(spec, inputs, options);
  SlotTable table;
  table.tokens = TokensToCompute(inputs, options);
  for (const int64_t token : table.tokens) {
    for (int64_t k = 0; k < spec.top_k; ++k) {
      const int32_t id = routed.ids[Index(token * spec.top_k + k)];
      const bool skipped = id < 0 || id >= spec.num_experts;
      table.ids.push_back(skipped ? -1 : id);
      table.weights.push_back(skipped ? 0.0 : routed.weights[Index(token * spec.top_k + k)]);
      table.experts.push_back(LocalExpert(spec, inputs, id));
    }
    for (int64_t j = 0; j < spec.shared.count; ++j) {
      table.ids.push_back(static_cast<int32_t>(spec.num_experts + j));
      table.weights.push_back(spec.shared.per_token_weight
                                  ? ReadNumber(inputs.shared_weights, token * spec.shared.count + j)
                                  : static_cast<double>(spec.shared.weight));
      table.experts.push_back(spec.num_local_experts() + j);
    }
  }
  return table;
}

template <class Real>
struct ActivationParameters {
  Real alpha;
  Real beta;
  Real limit;
};

template <class Real>
Real Sigmoid(Real x) {
  return Real{1} / (Real{1} + std::exp(-x));
}

template <class Real>
Real GaussianCdf(Real x) {
  return Real{0.5} * (Real{1} + std::erf(x * static_cast<Real>(0.70710678118654752)));
}

template <class Real>
Real GeluTanh(Real x) {
  const Real inner =
      static_cast<Real>(0.7978845608028654) * (x + static_cast<Real>(0.044715) * x * x * x);
  return Real{0.5} * x * (Real{1} + std::tanh(inner));
}

// Comparisons that let NaN through: a NaN never turns into a limit.
template <class Real>
Real AtMost(Real x, Real limit) {
  return x > limit ? limit : x;
}

template <class Real>
Real AtLeast(Real x, Real limit) {
  return x < limit ? limit : x;
}

// x0 is the up value and x1 the gate value; ungated activations take x0.
template <class Real>
Real Activate(ActivationKind kind, const ActivationParameters<Real>& p, Real x0, Real x1) {
  const Real gate = AtMost(x1, p.limit);
  const Real up = AtLeast(AtMost(x0, p.limit), -p.limit);
  switch (kind) {
    case ActivationKind::kSwiGlu:
      return (up + p.beta) * gate * Sigmoid(p.alpha * gate);
    case ActivationKind::kGeGlu:
      return x0 * x1 * GaussianCdf(x1);
    case ActivationKind::kGeGluTanh:
      return x0 * GeluTanh(x1);
    case ActivationKind::kSiTu:
      return p.beta * std::tanh(up / p.beta) * p.alpha * std::tanh(gate / p.alpha) * Sigmoid(gate);
    case ActivationKind::kRelu2:
      return x0 > Real{0} ? x0 * x0 : x0 * Real{0};
    case ActivationKind::kSilu:
      return x0 * Sigmoid(x0);
    case ActivationKind::kGelu:
      return x0 * GaussianCdf(x0);
    case ActivationKind::kIdentity:
      return x0;
  }
  return x0;
}

// One slot of one computed token that goes through an expert.
struct Assignment {
  int64_t token = 0;  // in the batch
  int64_t row = 0;    // (index of the token in SlotTable) * slots_per_token + slot
  int64_t slot = 0;
};

// Evaluates the layer expert by expert in arithmetic `Real`: double is the oracle, float the plain
// implementation with its roundings.
template <class Real>
class Evaluator {
 public:
  Evaluator(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs, int64_t width)
      : spec_(spec), desc_(weights.desc()), inputs_(inputs), width_(width) {}

  std::vector<double> Run(const SlotTable& table) {
    const int64_t per_token = spec_.slots_per_token();
    std::map<int64_t, std::vector<Assignment>> work;
    for (int64_t row = 0; row < static_cast<int64_t>(table.experts.size()); ++row) {
      const int64_t expert = table.experts[Index(row)];
      if (expert >= 0) {
        work[expert].push_back({table.tokens[Index(row / per_token)], row, row % per_token});
      }
    }
    rows_.assign(table.experts.size() * Index(width_), Real{0});
    for (const auto& [expert, assignments] : work) {
      RunExpert(expert, assignments, table);
    }
    return Combine(table);
  }

 private:
  static constexpr bool kPlain = std::is_same_v<Real, float>;
  using Rows = std::vector<std::vector<Real>>;

  // x of every assignment: the given hidden states, rounded to the layer's format when plain.
  Rows GatherInputs(int64_t expert, const std::vector<Assignment>& assignments) const {
    const ExpertMatrices& matrices = Matrices(expert);
    const float scale = StaticScale(matrices.gemm1_input_scale, SetIndex(expert));
    Rows result;
    for (const Assignment& assignment : assignments) {
      const HiddenRow hidden = ReadHidden(spec_, inputs_, assignment.token);
      std::vector<Real> x(hidden.values.begin(), hidden.values.end());
      if (hidden.needs_static) {
        for (Real& value : x) {
          value *= static_cast<Real>(scale);
        }
      }
      if constexpr (kPlain) {
        if (!hidden.quantised) {
          RoundHidden(spec_.activations, scale, &x);
        }
      }
      result.push_back(std::move(x));
    }
    return result;
  }

  // products[a][row] = sum_k W[row, k] * x[a][k] for rows [0, rows) of a part.
  Rows Multiply(int64_t expert, WeightPart part, int64_t rows, const Rows& x) const {
    Rows products(x.size(), std::vector<Real>(Index(rows)));
    ParallelFor(0, rows, 8, MaxThreads(), [&](int64_t row, int) {
      const RowLocation location = LocateRow(spec_, desc_, expert, part, row);
      std::vector<Real> weights(Index(location.cols));
      for (int64_t k = 0; k < location.cols; ++k) {
        weights[Index(k)] = static_cast<Real>(ValueAt(location, k));
      }
      for (size_t a = 0; a < x.size(); ++a) {
        Real sum{0};
        for (size_t k = 0; k < weights.size(); ++k) {
          sum += weights[k] * x[a][k];
        }
        products[a][Index(row)] = sum;
      }
    });
    return products;
  }

  // GEMM1 of one part: products, router weight on input, bias, LoRA delta.
  Rows FirstGemm(int64_t expert, WeightPart part, const std::vector<Assignment>& assignments,
                 const Rows& x, const SlotTable& table) const {
    const int64_t intermediate = spec_.intermediate_size;
    Rows result = Multiply(expert, part, intermediate, x);
    for (size_t a = 0; a < assignments.size(); ++a) {
      const Assignment& at = assignments[a];
      const bool routed = at.slot < spec_.top_k;
      const auto scale = static_cast<Real>(table.weights[Index(at.row)]);
      for (int64_t row = 0; row < intermediate; ++row) {
        Real& value = result[a][Index(row)];
        if (spec_.router_weight_on_input) {
          value *= scale;
        }
        value += static_cast<Real>(BiasAt(LocateRow(spec_, desc_, expert, part, row)));
        if (routed && inputs_.gemm1_delta.defined()) {
          value += static_cast<Real>(Delta(at, part, row));
        }
      }
    }
    return result;
  }

  double Delta(const Assignment& at, WeightPart part, int64_t row) const {
    const int64_t base = (at.token * spec_.top_k + at.slot) * spec_.gemm1_rows();
    const int64_t column = part == WeightPart::kGate ? spec_.intermediate_size + row : row;
    return ReadNumber(inputs_.gemm1_delta, base + column);
  }

  void RunExpert(int64_t expert, const std::vector<Assignment>& assignments,
                 const SlotTable& table) {
    const Rows x = GatherInputs(expert, assignments);
    const bool gated = IsGated(spec_.activation.kind);
    Rows hidden =
        FirstGemm(expert, gated ? WeightPart::kUp : WeightPart::kGemm1, assignments, x, table);
    const Rows gate = gated ? FirstGemm(expert, WeightPart::kGate, assignments, x, table) : Rows{};
    const ActivationParameters<Real> parameters = Parameters(expert);
    const float scale = StaticScale(Matrices(expert).gemm2_input_scale, SetIndex(expert));
    for (size_t a = 0; a < hidden.size(); ++a) {
      for (size_t i = 0; i < hidden[a].size(); ++i) {
        hidden[a][i] = Activate<Real>(spec_.activation.kind, parameters, hidden[a][i],
                                      gated ? gate[a][i] : Real{0});
      }
      if constexpr (kPlain) {
        RoundIntermediate(spec_.activations, scale, &hidden[a]);
      }
    }
    const Rows output = Multiply(expert, WeightPart::kGemm2, width_, hidden);
    for (size_t a = 0; a < assignments.size(); ++a) {
      for (int64_t c = 0; c < width_; ++c) {
        const RowLocation location = LocateRow(spec_, desc_, expert, WeightPart::kGemm2, c);
        Real value = output[a][Index(c)] + static_cast<Real>(BiasAt(location));
        if constexpr (kPlain) {
          value = formats::RoundToBf16(value);
        }
        rows_[Index(assignments[a].row * width_ + c)] = value;
      }
    }
  }

  // Column c of a token whose slots begin at `first_slot`, summed in slot order.
  Real SlotSum(const SlotTable& table, int64_t first_slot, int64_t c) const {
    Real sum{0};
    for (int64_t row = first_slot; row < first_slot + spec_.slots_per_token(); ++row) {
      if (table.experts[Index(row)] < 0) {
        continue;
      }
      const auto weight =
          spec_.router_weight_on_input ? Real{1} : static_cast<Real>(table.weights[Index(row)]);
      sum += weight * rows_[Index(row * width_ + c)];
    }
    return sum;
  }

  std::vector<double> Combine(const SlotTable& table) const {
    const int64_t per_token = spec_.slots_per_token();
    const auto tokens = static_cast<int64_t>(table.tokens.size());
    std::vector<double> output(Index(tokens * width_));
    for (int64_t n = 0; n < tokens; ++n) {
      for (int64_t c = 0; c < width_; ++c) {
        Real sum = SlotSum(table, n * per_token, c);
        if constexpr (kPlain) {
          sum = formats::RoundToBf16(sum);
        }
        output[Index(n * width_ + c)] = static_cast<double>(sum);
      }
    }
    return output;
  }

  // Shared experts have no entry of their own in per-expert parameters: `all` holds for them.
  ActivationParameters<Real> Parameters(int64_t expert) const {
    const Activation& activation = spec_.activation;
    const bool routed = expert < spec_.num_local_experts();
    const ExpertMatrices& group = Matrices(expert);
    const auto pick = [&](const TensorView& given, const PerExpert& parameter) {
      if (given.defined()) {
        return static_cast<Real>(ReadNumber(given, SetIndex(expert)));
      }
      return static_cast<Real>(routed ? parameter.at(expert) : parameter.all);
    };
    return {pick(group.alpha, activation.alpha), pick(group.beta, activation.beta),
            pick(group.limit, activation.limit)};
  }

  const ExpertMatrices& Matrices(int64_t expert) const {
    return expert < spec_.num_local_experts() ? desc_.routed : desc_.shared;
  }

  int64_t SetIndex(int64_t expert) const {
    const int64_t routed = spec_.num_local_experts();
    return expert < routed ? expert : expert - routed;
  }

  const MoeSpec& spec_;
  const WeightsDesc& desc_;
  const MoeInputs& inputs_;
  int64_t width_;
  std::vector<Real> rows_;  // GEMM2 rows [n * slots, W]
};

LayerRefResult Evaluate(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs,
                        int64_t output_width, const SlotTable& table, bool plain) {
  const int64_t width = output_width == 0 ? spec.hidden_size : output_width;
  LayerRefResult result{table.tokens, table.ids, table.weights, {}};
  result.output = plain ? Evaluator<float>(spec, weights, inputs, width).Run(table)
                        : Evaluator<double>(spec, weights, inputs, width).Run(table);
  return result;
}

}  // namespace

LayerRefResult LayerRef(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs,
                        int64_t output_width, const LayerRefOptions& options) {
  return Evaluate(spec, weights, inputs, output_width, MakeSlots(spec, inputs, options),
                  options.plain);
}

LayerRefPair LayerRefBoth(const MoeSpec& spec, const Weights& weights, const MoeInputs& inputs,
                          int64_t output_width, const LayerRefOptions& options) {
  const SlotTable table = MakeSlots(spec, inputs, options);
  return {Evaluate(spec, weights, inputs, output_width, table, false),
          Evaluate(spec, weights, inputs, output_width, table, true)};
}

}  // namespace hopyard::ref
