// SPDX-License-Identifier: Apache-2.0
#include "tests/inputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "hopyard/quantize.h"

#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "tests/canonical.h"
#include "tests/weights.h"

namespace hopyard::test {
namespace {

enum Stream : uint64_t {
  kHiddenStream = 100,
  kLogitStream,
  kBiasStream,
  kIdStream,
  kWeightStream,
  kTokenIdStream,
  kTableStream,
  kSharedStream,
  kDeltaStream,
};

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

void StoreFloat(const TensorView& view, int64_t index, float value) {
  if (view.dtype == DType::kBf16) {
    view.as<uint16_t>()[index] = formats::EncodeBf16(value);
  } else {
    view.as<float>()[index] = value;
  }
}

// `count` distinct experts in [begin, end), in a random order that depends on `key`.
std::vector<int32_t> Distinct(uint64_t key, int begin, int end, int count) {
  std::vector<int32_t> experts;
  for (int e = begin; e < end; ++e) {
    experts.push_back(e);
  }
  for (size_t i = experts.size(); i > 1; --i) {
    std::swap(experts[i - 1], experts[Hash(key, i) % i]);
  }
  experts.resize(Index(count));
  return experts;
}

std::vector<int32_t> RowOfIds(IdPattern pattern, const MoeSpec& spec, int64_t token) {
  static constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();
  static constexpr int32_t kHighest = std::numeric_limits<int32_t>::max();
  const int experts = spec.num_experts;
  const uint64_t key = Hash(kIdStream, static_cast<uint64_t>(token));
  std::vector<int32_t> row;
  const int room = experts - 1;
  switch (pattern) {
    case IdPattern::kRandom:
      return Distinct(key, 0, experts, spec.top_k);
    case IdPattern::kAllOnOneExpert:
      return std::vector<int32_t>(Index(spec.top_k), experts / 2);
    case IdPattern::kFirstExpertEmpty:
      return Distinct(key, 1, experts, std::min(spec.top_k, room));
    case IdPattern::kLastExpertEmpty:
      return Distinct(key, 0, experts - 1, std::min(spec.top_k, room));
    case IdPattern::kAllButOneEmpty:
      row.assign(Index(spec.top_k), -1);
      row[Index(token % spec.top_k)] = experts - 1;
      return row;
    case IdPattern::kSomeInvalid: {
      const int32_t invalid[] = {-1, experts, kLowest, kHighest, -7};
      row = Distinct(key, 0, experts, spec.top_k);
      for (int64_t k = 0; k < spec.top_k; ++k) {
        if ((token + k) % 3 == 0) {
          row[Index(k)] = invalid[(token + k) / 3 % 5];
        }
      }
      return row;
    }
    case IdPattern::kAllInvalid: {
      const int32_t invalid[] = {-1, experts, kLowest};
      for (int64_t k = 0; k < spec.top_k; ++k) {
        row.push_back(invalid[(token + k) % 3]);
      }
      return row;
    }
    case IdPattern::kDuplicates:
      row = Distinct(key, 0, experts, spec.top_k);
      row.back() = row.front();
      return row;
  }
  return row;
}

}  // namespace

std::string ToString(IdPattern pattern) {
  static constexpr const char* kNames[] = {"Random",          "AllOnOneExpert", "FirstExpertEmpty",
                                           "LastExpertEmpty", "AllButOneEmpty", "SomeInvalid",
                                           "AllInvalid",      "Duplicates"};
  return kNames[static_cast<int>(pattern)];
}

std::vector<int32_t> MakeIds(IdPattern pattern, const MoeSpec& spec, int64_t tokens) {
  std::vector<int32_t> ids;
  for (int64_t token = 0; token < tokens; ++token) {
    std::vector<int32_t> row = RowOfIds(pattern, spec, token);
    row.resize(Index(spec.top_k), -1);
    ids.insert(ids.end(), row.begin(), row.end());
  }
  return ids;
}

std::vector<int64_t> EdgeTokenCounts(int64_t tile) {
  return {0, 1, tile - 1, tile, tile + 1};
}

MoeSpec SmallSpec(WeightFormat weights, ActivationFormat activations) {
  MoeSpec spec;
  spec.hidden_size = 256;
  spec.intermediate_size = 128;
  spec.num_experts = 8;
  spec.top_k = 2;
  spec.routing = RoutingRule::Renormalize();
  spec.weights = weights;
  spec.activations = activations;
  return spec;
}

std::vector<FormatPair> SupportedPairs() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {{W::kBf16, A::kBf16},
          {W::kFp8Block128, A::kFp8Block128},
          {W::kFp8Block128, A::kBf16},
          {W::kFp8PerTensor, A::kFp8PerTensor},
          {W::kFp8PerTensor, A::kBf16},
          {W::kFp8PerTensor, A::kFp8PerToken},
          {W::kFp8PerChannel, A::kFp8PerToken},
          {W::kFp8PerChannel, A::kFp8PerTensor},
          {W::kFp8PerChannel, A::kBf16},
          {W::kMxFp8, A::kMxFp8},
          {W::kMxFp8, A::kBf16},
          {W::kMxFp4, A::kBf16},
          {W::kMxFp4, A::kMxFp8},
          {W::kMxFp4, A::kFp8Block128},
          {W::kMxFp4, A::kFp8PerToken},
          {W::kMxFp4, A::kFp8PerTensor},
          {W::kNvFp4, A::kBf16},
          {W::kNvFp4, A::kNvFp4},
          {W::kNvFp4, A::kNvFp4PerToken},
          {W::kNvFp4, A::kFp8PerToken},
          {W::kMxInt4, A::kBf16}};
}

std::string ToString(const FormatPair& pair) {
  std::string text(ToString(pair.weights));
  text += "_x_";
  text += ToString(pair.activations);
  return text;
}

std::vector<float> MakeWeights(const MoeSpec& spec, int64_t tokens, uint64_t seed) {
  std::vector<float> weights;
  for (int64_t token = 0; token < tokens; ++token) {
    std::vector<float> row;
    float sum = 0.0F;
    for (int k = 0; k < spec.top_k; ++k) {
      const uint64_t hash =
          Hash(seed, kWeightStream, static_cast<uint64_t>(token), static_cast<uint64_t>(k));
      row.push_back(0.25F + static_cast<float>(hash % 1024) / 1024.0F);
      sum += row.back();
    }
    for (const float weight : row) {
      weights.push_back(weight / sum);
    }
  }
  return weights;
}

LayerInputs::LayerInputs(const MoeSpec& spec, int64_t tokens, uint64_t seed)
    : spec_(spec), tokens_(tokens), seed_(seed) {
  inputs_.hidden_states = arena_.Array(DType::kBf16, {tokens, spec.hidden_size});
  for (int64_t t = 0; t < tokens; ++t) {
    const uint64_t key = Hash(seed_, kHiddenStream, static_cast<uint64_t>(t));
    for (int64_t c = 0; c < spec.hidden_size; ++c) {
      StoreFloat(inputs_.hidden_states, t * spec.hidden_size + c, Normal(Sequence(key, c)));
    }
  }
}

LayerInputs& LayerInputs::Logits(DType dtype) {
  inputs_.routing = RoutingInput::kLogits;
  inputs_.logits = arena_.Array(dtype, {tokens_, spec_.num_experts});
  for (int64_t i = 0; i < tokens_ * spec_.num_experts; ++i) {
    StoreFloat(inputs_.logits, i, Normal(Hash(seed_, kLogitStream, static_cast<uint64_t>(i))));
  }
  return *this;
}

LayerInputs& LayerInputs::RoutingBias() {
  inputs_.routing_bias = arena_.Array(DType::kFloat32, {spec_.num_experts});
  for (int64_t e = 0; e < spec_.num_experts; ++e) {
    StoreFloat(inputs_.routing_bias, e,
               0.1F * Normal(Hash(seed_, kBiasStream, static_cast<uint64_t>(e))));
  }
  return *this;
}

LayerInputs& LayerInputs::Packed(const std::vector<int32_t>& ids,
                                 const std::vector<float>& weights) {
  inputs_.routing = RoutingInput::kPacked;
  inputs_.packed_ids = arena_.Array(DType::kInt32, {tokens_, spec_.top_k});
  for (int64_t i = 0; i < tokens_ * spec_.top_k; ++i) {
    const auto id = static_cast<uint32_t>(ids[Index(i)]) << 16;
    const uint32_t bits = formats::EncodeBf16(weights[Index(i)]);
    inputs_.packed_ids.as<int32_t>()[i] = static_cast<int32_t>(id | bits);
  }
  return *this;
}

LayerInputs& LayerInputs::Unpacked(const std::vector<int32_t>& ids,
                                   const std::vector<float>& weights, DType dtype) {
  inputs_.routing = RoutingInput::kUnpacked;
  inputs_.expert_ids = arena_.Array(DType::kInt32, {tokens_, spec_.top_k});
  inputs_.expert_weights = arena_.Array(dtype, {tokens_, spec_.top_k});
  for (int64_t i = 0; i < tokens_ * spec_.top_k; ++i) {
    inputs_.expert_ids.as<int32_t>()[i] = ids[Index(i)];
    StoreFloat(inputs_.expert_weights, i, weights[Index(i)]);
  }
  return *this;
}

LayerInputs& LayerInputs::Replay(const std::vector<int32_t>& ids, DType dtype) {
  inputs_.routing = RoutingInput::kReplay;
  inputs_.expert_ids = arena_.Array(dtype, {tokens_, spec_.top_k});
  for (int64_t i = 0; i < tokens_ * spec_.top_k; ++i) {
    if (dtype == DType::kInt16) {
      inputs_.expert_ids.as<int16_t>()[i] = static_cast<int16_t>(ids[Index(i)]);
    } else {
      inputs_.expert_ids.as<int32_t>()[i] = ids[Index(i)];
    }
  }
  return *this;
}

LayerInputs& LayerInputs::HashTable(int64_t vocabulary) {
  inputs_.routing = RoutingInput::kHash;
  inputs_.token_ids = arena_.Array(DType::kInt64, {tokens_});
  for (int64_t t = 0; t < tokens_; ++t) {
    inputs_.token_ids.as<int64_t>()[t] = static_cast<int64_t>(
        Hash(seed_, kTokenIdStream, static_cast<uint64_t>(t)) % static_cast<uint64_t>(vocabulary));
  }
  inputs_.token_to_experts = arena_.Array(DType::kInt32, {vocabulary, spec_.top_k});
  for (int64_t v = 0; v < vocabulary; ++v) {
    const auto row = Distinct(Hash(seed_, kTableStream, static_cast<uint64_t>(v)), 0,
                              spec_.num_experts, spec_.top_k);
    std::copy(row.begin(), row.end(), inputs_.token_to_experts.as<int32_t>() + v * spec_.top_k);
  }
  return *this;
}

LayerInputs& LayerInputs::SharedWeights(DType dtype) {
  inputs_.shared_weights = arena_.Array(dtype, {tokens_, spec_.shared.count});
  for (int64_t i = 0; i < tokens_ * spec_.shared.count; ++i) {
    const uint64_t hash = Hash(seed_, kSharedStream, static_cast<uint64_t>(i));
    StoreFloat(inputs_.shared_weights, i, static_cast<float>(hash % 256) / 256.0F);
  }
  return *this;
}

LayerInputs& LayerInputs::ExpertTable(const std::vector<int32_t>& table) {
  inputs_.expert_table = arena_.Array(DType::kInt32, {static_cast<int64_t>(table.size())});
  std::copy(table.begin(), table.end(), inputs_.expert_table.as<int32_t>());
  return *this;
}

LayerInputs& LayerInputs::Delta() {
  const int64_t rows = spec_.gemm1_rows();
  inputs_.gemm1_delta = arena_.Array(DType::kBf16, {tokens_, spec_.top_k, rows});
  const uint64_t key = Hash(seed_, kDeltaStream);
  for (int64_t i = 0; i < tokens_ * spec_.top_k * rows; ++i) {
    StoreFloat(inputs_.gemm1_delta, i, 0.5F * Normal(Sequence(key, i)));
  }
  return *this;
}

LayerInputs& LayerInputs::NumTokens(int32_t count) {
  inputs_.num_tokens = arena_.Array(DType::kInt32, {1});
  *inputs_.num_tokens.as<int32_t>() = count;
  return *this;
}

LayerInputs& LayerInputs::IntegerHidden() {
  for (int64_t i = 0; i < tokens_ * spec_.hidden_size; ++i) {
    const uint64_t hash = Hash(seed_, kHiddenStream, static_cast<uint64_t>(i));
    StoreFloat(inputs_.hidden_states, i, static_cast<float>(static_cast<int>(hash % 5) - 2));
  }
  return *this;
}

LayerInputs& LayerInputs::QuantizeHidden() {
  const Format format = formats::InputFormat(spec_.activations);
  const int64_t hidden = spec_.hidden_size;
  const bool per_token = spec_.activations == ActivationFormat::kNvFp4PerToken;
  const FormatShape shape = ShapeOf(format, tokens_, hidden);
  const TensorView source = inputs_.hidden_states;
  inputs_.hidden_states = arena_.Array(shape.code_dtype, {tokens_, shape.code_cols});
  TensorView& scales = inputs_.hidden_scales;
  if (format == Format::kFp8PerRow) {
    scales = arena_.Array(DType::kFloat32, {tokens_});
  } else if (shape.scale_rows > 0 && format != Format::kFp8PerTensor) {
    scales = arena_.Array(shape.scale_dtype, {tokens_, shape.scale_cols});
  }
  if (per_token) {
    inputs_.token_scales = arena_.Array(DType::kFloat32, {tokens_});
  }
  for (int64_t t = 0; t < tokens_; ++t) {
    const auto row_of = [t](const TensorView& all) {
      const int64_t cols = all.ndim == 2 ? all.shape[1] : 1;
      auto* data = all.as<uint8_t>() + t * cols * SizeOf(all.dtype);
      return TensorView::Contiguous(data, all.dtype, {1, cols});
    };
    QuantizedView view;
    view.format = format;
    view.codes = row_of(inputs_.hidden_states);
    if (scales.defined()) {
      view.scales = row_of(scales);
    }
    if (format == Format::kFp8PerTensor || format == Format::kNvFp4) {
      view.global_scale = per_token ? 0.0F : StaticHiddenScale(spec_.activations);
    }
    const float used = Quantize(row_of(source), view);
    if (per_token) {
      inputs_.token_scales.as<float>()[t] = used;
    }
  }
  return *this;
}

void LayerInputs::CopyToken(const LayerInputs& other, int64_t from, int64_t to) {
  const auto copy = [&](const TensorView& source, const TensorView& destination) {
    const int64_t bytes = source.strides[0] * SizeOf(source.dtype);
    std::memcpy(destination.as<uint8_t>() + to * bytes, source.as<const uint8_t>() + from * bytes,
                Index(bytes));
  };
  copy(other.inputs_.hidden_states, inputs_.hidden_states);
  copy(other.inputs_.logits, inputs_.logits);
}

}  // namespace hopyard::test
