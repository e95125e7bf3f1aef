// SPDX-License-Identifier: Apache-2.0
// One pass of the layer over a chunk of tokens on Hopper: the workspace carved into typed pointers,
// and the steps in order. Internal to the backend's Forward.
#pragma once

#include <cstdint>

#include "device/queue.h"
#include "fused/route_permute_sm90.h"
#include "plan/backend_sm90.h"
#include "plan/sm90/device_weights.h"
#include "plan/sm90/layer_plan.h"

namespace hopyard::sm90 {

struct Pass {
  const Call* call = nullptr;
  const LayerPlan* plan = nullptr;
  const DeviceWeights* weights = nullptr;
  const TileChoice* choice = nullptr;
  int64_t token_begin = 0;  // this chunk is [token_begin, token_begin + tokens)
  int64_t tokens = 0;
  const int32_t* num_tokens = nullptr;  // live ones of the chunk, on the device; null: all

  [[nodiscard]] const MoeSpec& spec() const { return call->plan->spec; }
  [[nodiscard]] const Layout& layout() const { return plan->layout; }
  [[nodiscard]] device::Queue queue() const {
    return {call->stream, call->plan->options.overlap_launches};
  }
  [[nodiscard]] int64_t slots() const { return tokens * spec().slots_per_token(); }
  // Rows, or slots, of the batch that lie before the chunk.
  [[nodiscard]] int64_t row_base() const { return token_begin * spec().slots_per_token(); }
  template <class T>
  [[nodiscard]] T* At(int64_t offset) const {
    return static_cast<T*>(static_cast<void*>(call->workspace + offset));
  }
  // The chunk's part of a contiguous tensor whose first dimension is tokens; null where absent.
  template <class T>
  [[nodiscard]] T* Rows(const TensorView& view) const {
    const int64_t offset = token_begin * view.strides[0] * SizeOf(view.dtype);
    return static_cast<T*>(
        static_cast<void*>(view.defined() ? view.as<uint8_t>() + offset : nullptr));
  }
};

// All passes of a call.
void RunLayer(const Call& call);

// The tiles of GEMM1 (0) or GEMM2 (1), in the same memory where they are the same ones.
[[nodiscard]] permute::TileListSm90 TileListOf(const Pass& pass, int gemm);

// Ids and weights, replay and loads; each slot's weight and segment; rows and tiles; hidden states
// -> the operands of GEMM1.
void PrepareRows(const Pass& pass);
// The last of these.
void AddHiddenRoundings(const Pass& pass, fused::RoutePermuteArgs* args);
// GEMM1; its output -> the operand of GEMM2; GEMM2.
// Returns the bf16 rows.
[[nodiscard]] const uint16_t* RunGemms(const Pass& pass);
// slot_to_row of the batch, and the weighted sums.
void Finish(const Pass& pass, const uint16_t* y);

}  // namespace hopyard::sm90
