// SPDX-License-Identifier: Apache-2.0
// One pass of the layer over a chunk of tokens: the workspace carved into typed pointers, and the
// steps in order. Internal to Forward.
#pragma once

#include <cstdint>

#include "hopyard/forward.h"

#include "plan/plan_impl.h"
#include "plan/weights_impl.h"
#include "stages/3_gemm1/gemm1.h"

namespace hopyard {

struct ForwardPass {
  const Plan::Impl* plan = nullptr;
  const Weights::Impl* weights = nullptr;
  const MoeInputs* inputs = nullptr;
  const MoeOutputs* outputs = nullptr;
  uint8_t* workspace = nullptr;
  int64_t token_begin = 0;  // this chunk is [token_begin, token_begin + tokens)
  int64_t tokens = 0;

  [[nodiscard]] const MoeSpec& spec() const { return plan->spec; }
  template <class T>
  [[nodiscard]] T* At(int64_t offset) const {
    return static_cast<T*>(static_cast<void*>(workspace + offset));
  }
  [[nodiscard]] int32_t* ids() const { return At<int32_t>(plan->layout.ids); }
  [[nodiscard]] float* weights_k() const { return At<float>(plan->layout.weights); }
  [[nodiscard]] float* slot_weights() const { return At<float>(plan->layout.slot_weights); }
  [[nodiscard]] int32_t* local_slots() const { return At<int32_t>(plan->layout.local_slots); }
  [[nodiscard]] int32_t* slot_to_row() const { return At<int32_t>(plan->layout.slot_to_row); }
  [[nodiscard]] float* x() const { return At<float>(plan->layout.x); }
  [[nodiscard]] float* h() const { return At<float>(plan->layout.h); }
};

// Rows [begin, begin + count) of a view whose first dimension is tokens; absent stays absent.
[[nodiscard]] TensorView RowsOf(const TensorView& view, int64_t begin, int64_t count);

// Fills ids and weights [tokens, top_k], replay and loads, from whichever routing input is given.
void RouteTokens(const ForwardPass& pass);
// Adds shared slots, maps global ids to local segments, writes the optional routing outputs.
void PlaceSlots(const ForwardPass& pass);
// Hidden states -> FP32 in the layer's activation format.
void LoadHiddenStates(const ForwardPass& pass);

}  // namespace hopyard
