// SPDX-License-Identifier: Apache-2.0
// New weights written into live ones by slices in random order: what reinforcement learning does
// between two rollouts.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "hopyard/weights.h"

#include "tests/weights.h"

namespace hopyard::test {

// A slice of a canonical matrix, with views into it.
[[nodiscard]] WeightSlice SliceOf(const CanonicalMatrix& matrix, const Window& window);

class Refit {
 public:
  explicit Refit(uint64_t seed) : seed_(seed) {}

  // Adds the slices of one part; `bias` may be empty.
  void Add(int64_t expert, WeightPart part, const CanonicalMatrix& matrix,
           const std::vector<float>& bias);
  // The expert's global scale, set before its slices, which then repeat it.
  void AddGlobal(int64_t expert, WeightPart part, float global);
  // Every part of experts 0 .. `experts` of `fresh`; gate and up one by one.
  void AddParts(const LayerWeights& fresh, int64_t experts, bool separate);
  // The same with gate and up as one matrix.
  void AddFused(const LayerWeights& fresh, int64_t experts);

  // Hands every slice to `update`. Its views live until the next one.
  void Apply(bool has_global, const std::function<void(const WeightSlice&)>& update);

 private:
  struct Pending {
    WeightSlice slice;
    std::vector<float> bias;
    float global = 1.0F;
  };

  uint64_t seed_;
  std::vector<Pending> globals_;
  std::vector<Pending> updates_;
};

// Formats and layouts that updates are tested with.
struct UpdateCase {
  WeightFormat format;
  WeightLayout layout;
};
[[nodiscard]] std::vector<UpdateCase> UpdateCases();
[[nodiscard]] std::string ToString(const UpdateCase& update);

}  // namespace hopyard::test
