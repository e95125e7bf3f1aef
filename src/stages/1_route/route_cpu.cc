// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "core/error.h"
#include "core/parallel.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "stages/1_route/route.h"
#include "stages/1_route/route_inl.h"
#include "stages/1_route/route_row.h"

namespace hopyard::route {
namespace {

RouteRowFn RowFunction(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512:
      return RouteRowAvx512;
    case Isa::kAvx2:
      return RouteRowAvx2;
    case Isa::kScalar:
      return RouteRowScalar;
  }
#endif
  HOPYARD_INTERNAL(isa == Isa::kScalar) << "routing has no path for " << ToString(isa);
  return RouteRowScalar;
}

RowProblem MakeProblem(const RoutingRule& rule, int top_k, const RouteInputs& inputs) {
  RowProblem problem;
  problem.rule = rule;
  problem.num_experts = static_cast<int>(inputs.logits.shape[1]);
  problem.top_k = top_k;
  problem.logits = inputs.logits.data;
  problem.logits_dtype = inputs.logits.dtype;
  if (inputs.forced_ids.defined()) {
    problem.source = IdSource::kForced;
    problem.forced_ids = inputs.forced_ids.data;
    problem.forced_dtype = inputs.forced_ids.dtype;
  } else if (inputs.token_ids.defined()) {
    problem.source = IdSource::kTable;
    problem.token_ids = inputs.token_ids.data;
    problem.token_dtype = inputs.token_ids.dtype;
    problem.table = inputs.token_to_experts.as<const int32_t>();
    problem.table_rows = inputs.token_to_experts.shape[0];
  }
  return problem;
}

float DecodeBias(const TensorView& bias, int64_t index) {
  switch (bias.dtype) {
    case DType::kBf16:
      return formats::DecodeBf16(bias.as<const uint16_t>()[index]);
    case DType::kFp16:
      return formats::DecodeFp16(bias.as<const uint16_t>()[index]);
    default:
      return bias.as<const float>()[index];
  }
}

void StoreSlots(const Slots& slots, int top_k, int64_t token, const RouteOutputs& outputs) {
  const int64_t base = token * top_k;
  for (int j = 0; j < top_k; ++j) {
    outputs.expert_ids.as<int32_t>()[base + j] = slots.ids[j];
    const float weight = slots.weights[j];
    if (outputs.weights.dtype == DType::kFloat32) {
      outputs.weights.as<float>()[base + j] = weight;
    } else if (outputs.weights.dtype == DType::kBf16) {
      outputs.weights.as<uint16_t>()[base + j] = formats::EncodeBf16(weight);
    } else {
      outputs.weights.as<uint16_t>()[base + j] = formats::EncodeFp16(weight);
    }
  }
  if (outputs.replay.defined()) {
    for (int j = 0; j < top_k; ++j) {
      outputs.replay.as<int16_t>()[base + j] = static_cast<int16_t>(slots.ids[j]);
    }
  }
}

template <class T>
void AddCounts(const std::array<int32_t, kMaxExperts>& counts, int num_experts, T* load) {
  for (int e = 0; e < num_experts; ++e) {
    const int32_t count = counts[static_cast<size_t>(e)];
    if (count != 0) {
      std::atomic_ref<T>(load[e]).fetch_add(count, std::memory_order_relaxed);
    }
  }
}

int64_t LiveTokens(const RouteInputs& inputs) {
  const int64_t capacity = inputs.logits.shape[0];
  if (!inputs.num_tokens.defined()) {
    return capacity;
  }
  return std::clamp<int64_t>(*inputs.num_tokens.as<const int32_t>(), 0, capacity);
}

}  // namespace

// Slots are counted in blocks, so that threads meet once per block and expert. Integer sums: any
// order gives the same result.
void CountLoad(const int32_t* ids, int64_t num_slots, const TensorView& load, int num_threads) {
  constexpr int64_t kBlock = 16384;
  const auto num_experts = static_cast<int>(load.shape[0]);
  ParallelFor(0, CeilDiv(num_slots, kBlock), 1, num_threads, [&](int64_t block, int /*thread*/) {
    std::array<int32_t, kMaxExperts> counts;
    std::fill_n(counts.begin(), num_experts, 0);
    const int64_t end = std::min(num_slots, (block + 1) * kBlock);
    for (int64_t slot = block * kBlock; slot < end; ++slot) {
      if (ids[slot] >= 0) {
        ++counts[static_cast<size_t>(ids[slot])];
      }
    }
    if (load.dtype == DType::kInt64) {
      AddCounts(counts, num_experts, load.as<int64_t>());
    } else {
      AddCounts(counts, num_experts, load.as<int32_t>());
    }
  });
}

void RouteRowScalar(const RowProblem& problem, int64_t token, Slots& slots) {
  RouteRow<ScalarRowOps>(problem, token, slots);
}

void RouteCpuWith(Isa isa, const RoutingRule& rule, int top_k, const RouteInputs& inputs,
                  const RouteOutputs& outputs, int num_threads) {
  RowProblem problem = MakeProblem(rule, top_k, inputs);
  alignas(64) std::array<float, kMaxExperts> bias;
  if (rule.use_bias && problem.source == IdSource::kSelect) {
    bias.fill(0.0F);
    for (int e = 0; e < problem.num_experts && inputs.bias.defined(); ++e) {
      bias[static_cast<size_t>(e)] = DecodeBias(inputs.bias, e);
    }
    problem.bias = bias.data();
  }
  const RouteRowFn route_row = RowFunction(isa);
  const int64_t num_tokens = LiveTokens(inputs);
  // Some 50 us of work at a time: less is not worth waking a thread for.
  const int64_t grain = std::max<int64_t>(1, 32768 / problem.num_experts);
  ParallelFor(0, num_tokens, grain, num_threads, [&](int64_t token, int /*thread*/) {
    Slots slots;
    route_row(problem, token, slots);
    StoreSlots(slots, top_k, token, outputs);
  });
  if (outputs.expert_load.defined()) {
    CountLoad(outputs.expert_ids.as<const int32_t>(), num_tokens * top_k, outputs.expert_load,
              num_threads);
  }
}

void RouteCpu(const RoutingRule& rule, int top_k, const RouteInputs& inputs,
              const RouteOutputs& outputs, int num_threads) {
  RouteCpuWith(BestIsa(), rule, top_k, inputs, outputs, num_threads);
}

}  // namespace hopyard::route
