// SPDX-License-Identifier: Apache-2.0
// Random expert weights in every format and layout. A value depends on (seed, expert, part, row,
// column) alone, so shards, moved experts and other layouts of the same experts agree bit for bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/weights.h"

#include "tests/buffers.h"
#include "tests/canonical.h"

namespace hopyard::test {

struct WeightLayout {
  RowOrder order = RowOrder::kGateUp;
  RowMap map = RowMap::kNatural;
  MajorOrder major = MajorOrder::kKMajor;
  ScaleLayout scales = ScaleLayout::kLinear;
  bool separate = false;      // gate and up apart
  bool per_expert = false;    // one allocation per expert
  int64_t padding = 0;        // poisoned bytes after every row (K-major only) and every expert
  int64_t row_alignment = 1;  // more of them, so that rows begin on so many bytes (K-major only)
  DType bias_dtype = DType::kFloat32;
};
[[nodiscard]] std::string ToString(const WeightLayout& layout);
// Every row order in K-major layouts, natural, shuffled and in K blocks; gate and up apart; rows
// with `padding` bytes between them.
[[nodiscard]] std::vector<WeightLayout> KMajorLayouts(int64_t padding);

struct WeightSource {
  MoeSpec spec;
  uint64_t seed = 1;
  std::vector<int> experts;  // logical id of each local slot; empty: the spec's own
  int64_t shard_begin = 0;   // intermediate features [shard_begin, + intermediate_size) ...
  int64_t shard_of = 0;      // ... of this many; 0: all
  bool bias = false;
  bool gemm2_bias = true;          // together with `bias`; one shard of several carries it
  bool integers = false;           // -2 .. 2, exact in bf16
  float gain = 1.0F;               // multiplies every weight
  bool parameter_tensors = false;  // alpha, beta and limit of the spec as tensors
  WeightLayout layout;
  int64_t shared_offset = 1000;  // logical id of shared expert 0
};

// One expert before any layout.
struct CanonicalExpert {
  CanonicalMatrix gemm1;  // fused, in the layout's row order (also when kept apart: see gate, up)
  CanonicalMatrix gate;
  CanonicalMatrix up;
  CanonicalMatrix gemm2;
  std::vector<float> gemm1_bias;
  std::vector<float> gate_bias;
  std::vector<float> up_bias;
  std::vector<float> gemm2_bias;
};

class LayerWeights {
 public:
  explicit LayerWeights(const WeightSource& source);

  [[nodiscard]] const WeightsDesc& desc() const { return desc_; }
  [[nodiscard]] WeightsDesc* mutable_desc() { return &desc_; }
  [[nodiscard]] Weights Make() const { return {source_.spec, desc_}; }
  [[nodiscard]] const CanonicalExpert& expert(int64_t local) const {
    return experts_[static_cast<size_t>(local)];
  }
  [[nodiscard]] bool Intact() const { return arena_.Intact(); }

 private:
  CanonicalExpert MakeExpert(int64_t logical, WeightFormat format) const;
  void FillGroup(int64_t first, int64_t count, ExpertMatrices* group);
  void AddParameters(bool routed, int64_t count, ExpertMatrices* group);
  MatrixSet Store(const std::vector<const CanonicalMatrix*>& matrices,
                  const std::vector<std::vector<float>>& biases);

  WeightSource source_;
  Arena arena_;
  std::vector<CanonicalExpert> experts_;
  WeightsDesc desc_;
};

// Static activation scales that LayerWeights sets where the activation format has them.
[[nodiscard]] float StaticHiddenScale(ActivationFormat format);
[[nodiscard]] float StaticIntermediateScale(ActivationFormat format);

}  // namespace hopyard::test
