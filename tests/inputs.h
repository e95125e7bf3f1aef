// SPDX-License-Identifier: Apache-2.0
// Named input sets of the whole layer, and the list of edge cases that every op is tested with.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/forward.h"

#include "tests/buffers.h"

namespace hopyard::test {

// Who goes where. Ids are global; every row holds distinct experts unless it says otherwise.
enum class IdPattern {
  kRandom,
  kAllOnOneExpert,  // top_k copies of one id: the longest segment there is
  kFirstExpertEmpty,
  kLastExpertEmpty,
  kAllButOneEmpty,  // expert E - 1 or a skip
  kSomeInvalid,     // -1, num_experts, INT_MIN and INT_MAX between valid ids
  kAllInvalid,
  kDuplicates,  // every row names an expert twice
};
inline constexpr IdPattern kAllIdPatterns[] = {
    IdPattern::kRandom,          IdPattern::kAllOnOneExpert, IdPattern::kFirstExpertEmpty,
    IdPattern::kLastExpertEmpty, IdPattern::kAllButOneEmpty, IdPattern::kSomeInvalid,
    IdPattern::kAllInvalid,      IdPattern::kDuplicates};
[[nodiscard]] std::string ToString(IdPattern pattern);
[[nodiscard]] std::vector<int32_t> MakeIds(IdPattern pattern, const MoeSpec& spec, int64_t tokens);

// Token counts at which tiled code changes its mind: 0, 1, tile - 1, tile, tile + 1.
[[nodiscard]] std::vector<int64_t> EdgeTokenCounts(int64_t tile);

// A small layer of one pair of formats: 8 experts, top 2, SwiGLU.
[[nodiscard]] MoeSpec SmallSpec(WeightFormat weights, ActivationFormat activations);

inline constexpr WeightFormat kWeightFormats[] = {
    WeightFormat::kBf16,          WeightFormat::kFp8Block128, WeightFormat::kFp8PerTensor,
    WeightFormat::kFp8PerChannel, WeightFormat::kMxFp8,       WeightFormat::kNvFp4,
    WeightFormat::kMxFp4,         WeightFormat::kMxInt4};
inline constexpr ActivationFormat kActivationFormats[] = {
    ActivationFormat::kBf16,         ActivationFormat::kFp8Block128,
    ActivationFormat::kFp8PerTensor, ActivationFormat::kFp8PerToken,
    ActivationFormat::kMxFp8,        ActivationFormat::kNvFp4,
    ActivationFormat::kNvFp4PerToken};

// Every (weights, activations) pair that layers compute, as a list of its own: tests hold
// formats::IsSupportedPair to it.
struct FormatPair {
  WeightFormat weights = WeightFormat::kBf16;
  ActivationFormat activations = ActivationFormat::kBf16;
};
[[nodiscard]] std::vector<FormatPair> SupportedPairs();
[[nodiscard]] std::string ToString(const FormatPair& pair);

// Owns what MoeInputs points to. Hidden states are bf16 normal numbers; a token's values depend on
// (seed, token) alone.
class LayerInputs {
 public:
  LayerInputs(const MoeSpec& spec, int64_t tokens, uint64_t seed = 7);

  // Logits of distinct random values, as the routing input.
  LayerInputs& Logits(DType dtype = DType::kFloat32);
  LayerInputs& RoutingBias();
  LayerInputs& Packed(const std::vector<int32_t>& ids, const std::vector<float>& weights);
  LayerInputs& Unpacked(const std::vector<int32_t>& ids, const std::vector<float>& weights,
                        DType dtype = DType::kFloat32);
  LayerInputs& Replay(const std::vector<int32_t>& ids, DType dtype);  // needs Logits first
  LayerInputs& HashTable(int64_t vocabulary);                         // needs Logits first
  LayerInputs& SharedWeights(DType dtype = DType::kFloat32);
  LayerInputs& ExpertTable(const std::vector<int32_t>& table);
  LayerInputs& Delta();
  LayerInputs& NumTokens(int32_t count);
  // Rounds the hidden states to the spec's activation format and passes codes and scales.
  LayerInputs& QuantizeHidden();
  // Integers -2 .. 2 as hidden states.
  LayerInputs& IntegerHidden();
  // Row `to` gets the hidden state and logits of row `from` of `other`.
  void CopyToken(const LayerInputs& other, int64_t from, int64_t to);

  [[nodiscard]] const MoeInputs& get() const { return inputs_; }
  [[nodiscard]] MoeInputs* mutable_inputs() { return &inputs_; }
  [[nodiscard]] int64_t tokens() const { return tokens_; }

 private:
  MoeSpec spec_;
  int64_t tokens_;
  uint64_t seed_;
  Arena arena_;
  MoeInputs inputs_;
};

// Positive weights that sum to 1 per row, for given ids.
[[nodiscard]] std::vector<float> MakeWeights(const MoeSpec& spec, int64_t tokens,
                                             uint64_t seed = 3);

}  // namespace hopyard::test
