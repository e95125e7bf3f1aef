// SPDX-License-Identifier: Apache-2.0
// Valid inputs for a layer's calls, made on the host: equal for equal options.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/forward.h"
#include "hopyard/tune.h"

namespace hopyard::tune {

// What the routing of one call reads. What its mode does not read is empty.
struct RoutedTokens {
  std::vector<float> logits;   // [T, E]
  std::vector<int32_t> ids;    // [T, K]
  std::vector<float> weights;  // [T, K]
};

class Workload {
 public:
  // Error{kInvalidArgument} for names that no routing has, and for `recorded` that is no replay of
  // this layer's.
  Workload(const MoeSpec& spec, const CallPath& path, const TuneOptions& options);

  [[nodiscard]] int kinds() const { return static_cast<int>(names_.size()); }
  [[nodiscard]] const std::string& name(int kind) const {
    return names_[static_cast<size_t>(kind)];
  }
  // "uniform,zipf" or "recorded"
  [[nodiscard]] std::string ToString() const;
  [[nodiscard]] RoutingInput mode() const { return mode_; }

  // Call `set` of the calls with this kind of routing: other tokens in every set, and other experts
  // that many of them take.
  [[nodiscard]] RoutedTokens Make(int kind, int set, int64_t tokens) const;
  // Local experts that a call with this kind of routing reads, at least.
  [[nodiscard]] int64_t ExpertsTouched(int kind, int64_t tokens) const;

  // bf16 [tokens, hidden_size]; no zeros
  [[nodiscard]] std::vector<uint16_t> HiddenStates(int64_t tokens) const;
  // f32 [tokens, shared experts], for specs whose shared experts have weights per token; else empty
  [[nodiscard]] std::vector<float> SharedWeights(int64_t tokens) const;
  // i32 [num_experts], for specs with a table: as many experts from 0 on as there are local slots.
  [[nodiscard]] std::vector<int32_t> ExpertTable() const;

 private:
  [[nodiscard]] std::vector<float> Logits(int kind, int set, int64_t tokens) const;
  [[nodiscard]] std::vector<int32_t> RecordedIds(int set, int64_t tokens) const;
  // What the layer's rule makes of logits, or of recorded ids beside them.
  void RouteOnHost(RoutedTokens* routed, int64_t tokens) const;
  // Where the experts of this rank begin.
  [[nodiscard]] int64_t first_local() const;

  MoeSpec spec_;
  std::vector<std::string> names_;
  std::vector<int32_t> recorded_;  // [n, K]
  RoutingInput mode_ = RoutingInput::kLogits;
  uint64_t seed_;
};

}  // namespace hopyard::tune
