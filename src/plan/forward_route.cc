// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "formats/rows.h"
#include "plan/forward_pass.h"
#include "stages/1_route/route.h"

namespace hopyard {
namespace {

// Ids and weights that the caller computed: copied, recorded and counted. An id outside
// [0, num_experts) skips its slot.
void TakePrecomputed(const ForwardPass& pass) {
  const MoeInputs& in = *pass.inputs;
  const MoeSpec& spec = pass.spec();
  const int64_t count = pass.tokens * spec.top_k;
  const int64_t offset = pass.token_begin * spec.top_k;
  const bool packed = in.routing == RoutingInput::kPacked;
  for (int64_t i = 0; i < count; ++i) {
    int32_t id = 0;
    float weight = 0.0F;
    if (packed) {
      // (id << 16) | bf16 bits; the arithmetic shift keeps negative ids negative.
      const int32_t word = in.packed_ids.as<const int32_t>()[offset + i];
      id = word >> 16;
      weight = formats::DecodeBf16(static_cast<uint16_t>(word & 0xFFFF));
    } else {
      id = in.expert_ids.as<const int32_t>()[offset + i];
      weight = in.expert_weights.dtype == DType::kBf16
                   ? formats::DecodeBf16(in.expert_weights.as<const uint16_t>()[offset + i])
                   : in.expert_weights.as<const float>()[offset + i];
    }
    const bool valid = id >= 0 && id < spec.num_experts;
    pass.ids()[i] = valid ? id : -1;
    pass.weights_k()[i] = valid ? weight : 0.0F;
    if (pass.outputs->replay.defined()) {
      pass.outputs->replay.as<int16_t>()[offset + i] = static_cast<int16_t>(valid ? id : -1);
    }
  }
  if (pass.outputs->expert_load.defined()) {
    route::CountLoad(pass.ids(), count, pass.outputs->expert_load, pass.plan->num_threads);
  }
}

// Segment of a global id on this rank, or -1.
int32_t LocalSlot(const ForwardPass& pass, int32_t id) {
  const ExpertMap& local = pass.spec().local;
  int32_t slot = id;
  if (local.kind == ExpertMap::Kind::kRange) {
    slot = id - local.offset;
  } else if (local.kind == ExpertMap::Kind::kTable) {
    slot = id >= 0 && id < pass.spec().num_experts
               ? pass.inputs->expert_table.as<const int32_t>()[id]
               : -1;
  }
  return slot >= 0 && slot < pass.spec().num_local_experts() ? slot : -1;
}

float SharedWeight(const ForwardPass& pass, int64_t token, int shared) {
  const SharedExperts& experts = pass.spec().shared;
  if (!experts.per_token_weight) {
    return experts.weight;
  }
  const TensorView& weights = pass.inputs->shared_weights;
  const int64_t index = (pass.token_begin + token) * experts.count + shared;
  return weights.dtype == DType::kBf16 ? formats::DecodeBf16(weights.as<const uint16_t>()[index])
                                       : weights.as<const float>()[index];
}

}  // namespace

TensorView RowsOf(const TensorView& view, int64_t begin, int64_t count) {
  if (!view.defined()) {
    return view;
  }
  TensorView rows = view;
  rows.data = static_cast<uint8_t*>(view.data) + begin * view.strides[0] * SizeOf(view.dtype);
  rows.shape[0] = count;
  return rows;
}

void RouteTokens(const ForwardPass& pass) {
  const MoeInputs& in = *pass.inputs;
  if (in.routing == RoutingInput::kPacked || in.routing == RoutingInput::kUnpacked) {
    TakePrecomputed(pass);
    return;
  }
  const MoeSpec& spec = pass.spec();
  RouteInputs route;
  route.logits = RowsOf(in.logits, pass.token_begin, pass.tokens);
  route.bias = in.routing_bias;
  if (in.routing == RoutingInput::kReplay) {
    route.forced_ids = RowsOf(in.expert_ids, pass.token_begin, pass.tokens);
  } else if (in.routing == RoutingInput::kHash) {
    route.token_ids = RowsOf(in.token_ids, pass.token_begin, pass.tokens);
    route.token_to_experts = in.token_to_experts;
  }
  RouteOutputs out;
  out.expert_ids = TensorView::Contiguous(pass.ids(), DType::kInt32, {pass.tokens, spec.top_k});
  out.weights =
      TensorView::Contiguous(pass.weights_k(), DType::kFloat32, {pass.tokens, spec.top_k});
  out.replay = RowsOf(pass.outputs->replay, pass.token_begin, pass.tokens);
  out.expert_load = pass.outputs->expert_load;
  route::RouteCpu(spec.routing, spec.top_k, route, out, pass.plan->num_threads);
}

void PlaceSlots(const ForwardPass& pass) {
  const MoeSpec& spec = pass.spec();
  const int top_k = spec.top_k;
  const int slots = spec.slots_per_token();
  for (int64_t t = 0; t < pass.tokens; ++t) {
    float* weights = pass.slot_weights() + t * slots;
    int32_t* local = pass.local_slots() + t * slots;
    const int32_t* ids = pass.ids() + t * top_k;
    for (int k = 0; k < top_k; ++k) {
      weights[k] = pass.weights_k()[t * top_k + k];
      local[k] = LocalSlot(pass, ids[k]);
    }
    for (int s = 0; s < spec.shared.count; ++s) {
      weights[top_k + s] = SharedWeight(pass, t, s);
      local[top_k + s] = spec.num_local_experts() + s;
    }
    if (pass.outputs->routing_ids.defined()) {
      int32_t* out = pass.outputs->routing_ids.as<int32_t>() + (pass.token_begin + t) * slots;
      std::copy(ids, ids + top_k, out);
      for (int s = 0; s < spec.shared.count; ++s) {
        out[top_k + s] = spec.num_experts + s;
      }
    }
    if (pass.outputs->routing_weights.defined()) {
      std::copy(weights, weights + slots,
                pass.outputs->routing_weights.as<float>() + (pass.token_begin + t) * slots);
    }
  }
}

void LoadHiddenStates(const ForwardPass& pass) {
  const MoeSpec& spec = pass.spec();
  const MoeInputs& in = *pass.inputs;
  const int64_t hidden = spec.hidden_size;
  const int64_t pitch = pass.plan->layout.x_pitch;
  const Format format = formats::InputFormat(spec.activations);
  const bool dynamic = spec.activations == ActivationFormat::kNvFp4PerToken;
  const float* input_scale = pass.weights->gemm1_input_scale;
  const float scale = input_scale != nullptr && !dynamic ? *input_scale : 0.0F;
  ParallelFor(0, pass.tokens, 1, pass.plan->num_threads, [&](int64_t t, int) {
    float* x = pass.x() + t * pitch;
    const int64_t row = pass.token_begin + t;
    const TensorView& source = in.hidden_states;
    const auto* codes = source.as<const uint8_t>() + row * source.strides[0] * SizeOf(source.dtype);
    if (source.dtype == DType::kBf16) {
      formats::Bf16ToFloat(static_cast<const uint16_t*>(static_cast<const void*>(codes)), x,
                           hidden);
      formats::RoundRow(format, x, x, hidden, scale);
    } else {
      const TensorView scales = RowsOf(in.hidden_scales, row, 1);
      const float global = dynamic ? in.token_scales.as<const float>()[row] : scale;
      formats::DecodeRow(format, codes, scales.data, global, x, hidden);
    }
    std::fill(x + hidden, x + pitch, 0.0F);
  });
}

}  // namespace hopyard
