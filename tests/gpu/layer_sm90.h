// SPDX-License-Identifier: Apache-2.0
// The Hopper stages in a row, as tests and benchmarks run them: route, permute, GEMM1, GEMM2,
// finalize for a BF16 layer whose experts are all local. Owns its scratch; sizes are those of the
// capacity.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "hopyard/spec.h"

#include "core/error.h"
#include "gemm/sm90/grouped_gemm_sm90.h"
#include "stages/1_route/route_sm90.h"
#include "stages/2_permute/permute_sm90.h"
#include "stages/5_finalize/finalize_sm90.h"
#include "tests/gpu/device_array.h"

namespace hopyard::test {

// Index of the first kernel with tiles of `tokens` rows.
inline int KernelWith(int tokens, bool gated) {
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const gemm::sm90::KernelInfo info = gemm::sm90::KernelAt(i);
    if (info.tokens == tokens && info.gated == gated) {
      return i;
    }
  }
  HOPYARD_CHECK(false, kInvalidArgument) << "no kernel with tiles of " << tokens << " tokens";
  return -1;
}

// Twice the average rows of an expert: with uniform routing few experts then need a second tile,
// and a half-empty tile costs less than reading the weights twice (bench_gemm, H100, 2026-11).
inline int TileFor(const MoeSpec& spec, int64_t tokens) {
  const int64_t wanted = 2 * tokens * spec.top_k / spec.num_experts;
  return wanted <= 16 ? 16 : wanted <= 32 ? 32 : wanted <= 64 ? 64 : 128;
}

class LayerSm90 {
 public:
  // Weights [E, 2I, H], gate rows first, and [E, H, I], bf16 on the device.
  LayerSm90(const MoeSpec& spec, int64_t max_tokens, int tile, const uint16_t* gemm1,
            const uint16_t* gemm2)
      : spec_(spec),
        max_tokens_(max_tokens),
        slots_(max_tokens * spec.top_k),
        options_{spec.num_experts, tile, 1, 1},
        max_tiles_(MaxTiles(slots_, options_)),
        gemm1_(gemm1),
        gemm2_(gemm2),
        ids_(slots_),
        weights_(slots_),
        chunk_counts_(permute::PermuteScratchInts(slots_, options_)),
        maps_(2 * (spec.num_experts + 1) + 3 * slots_ + 3 * max_tiles_ + 2),
        h_(slots_ * spec.intermediate_size),
        y_(slots_ * spec.hidden_size) {
    int32_t* next = maps_.get();
    const auto take = [&next](int64_t count) {
      int32_t* const begin = next;
      next += count;
      return begin;
    };
    permute_.options = options_;
    permute_.max_tokens = max_tokens;
    permute_.slots_per_token = spec.top_k;
    permute_.local_slots = ids_.get();
    permute_.chunk_counts = chunk_counts_.get();
    permute_.expert_offsets = take(spec.num_experts + 1);
    permute_.expert_counts = take(spec.num_experts);
    permute_.slot_to_row = take(slots_);
    permute_.row_to_slot = take(slots_);
    permute_.row_to_token = take(slots_);
    permute_.tile_expert = take(max_tiles_);
    permute_.tile_row_begin = take(max_tiles_);
    permute_.tile_row_end = take(max_tiles_);
    permute_.num_tiles = take(1);
    permute_.num_rows = take(1);
  }

  // x, logits (f32), bias (f32 or null), output: device memory for max_tokens tokens. `num_tokens`
  // may be null.
  void Run(const uint16_t* x, const float* logits, const float* bias, const int32_t* num_tokens,
           uint16_t* output, void* stream) {
    route::RouteSm90Args route;
    route.rule = spec_.routing;
    route.num_experts = spec_.num_experts;
    route.top_k = spec_.top_k;
    route.max_tokens = max_tokens_;
    route.num_tokens = num_tokens;
    route.logits = logits;
    route.bias = bias;
    route.ids = ids_.get();
    route.weights = weights_.get();
    route::RouteSm90(route, stream);
    permute_.num_tokens = num_tokens;
    permute::PermuteSm90(permute_, stream);
    RunGemms(x, stream);
    finalize::FinalizeSm90Args finalize;
    finalize.y = y_.get();
    finalize.slot_to_row = permute_.slot_to_row;
    finalize.weights = weights_.get();
    finalize.output = output;
    finalize.num_tokens = num_tokens;
    finalize.max_tokens = max_tokens_;
    finalize.hidden = spec_.hidden_size;
    finalize.width = spec_.hidden_size;
    finalize.slots = spec_.top_k;
    finalize::FinalizeSm90(finalize, stream);
  }

  [[nodiscard]] const DeviceArray<int32_t>& ids() const { return ids_; }

 private:
  [[nodiscard]] gemm::sm90::GroupedGemmArgs Tiles() const {
    gemm::sm90::GroupedGemmArgs args;
    args.experts = spec_.num_experts;
    args.tile_expert = permute_.tile_expert;
    args.tile_row_begin = permute_.tile_row_begin;
    args.tile_row_end = permute_.tile_row_end;
    args.num_tiles = permute_.num_tiles;
    args.max_tiles = max_tiles_;
    return args;
  }
  void RunGemms(const uint16_t* x, void* stream) {
    const int64_t hidden = spec_.hidden_size;
    const int64_t inter = spec_.intermediate_size;
    const int tile = static_cast<int>(options_.tile);
    gemm::sm90::GroupedGemmArgs first = Tiles();
    first.weights = gemm1_;
    first.rows = 2 * inter;
    first.k = hidden;
    first.row_stride = hidden;
    first.expert_stride = 2 * inter * hidden;
    first.up_begin = inter;
    first.features = inter;
    first.activation = ActivationKind::kSwiGlu;
    first.x = x;
    first.x_pitch = hidden;
    first.row_to_source = permute_.row_to_token;
    first.out = h_.get();
    first.out_pitch = inter;
    gemm::sm90::RunGroupedGemm(KernelWith(tile, true), first, stream);
    gemm::sm90::GroupedGemmArgs second = Tiles();
    second.weights = gemm2_;
    second.rows = hidden;
    second.k = inter;
    second.row_stride = inter;
    second.expert_stride = hidden * inter;
    second.features = hidden;
    second.x = h_.get();
    second.x_pitch = inter;
    second.out = y_.get();
    second.out_pitch = hidden;
    gemm::sm90::RunGroupedGemm(KernelWith(tile, false), second, stream);
  }

  MoeSpec spec_;
  int64_t max_tokens_;
  int64_t slots_;
  PermuteOptions options_;
  int64_t max_tiles_;
  const uint16_t* gemm1_;
  const uint16_t* gemm2_;
  DeviceArray<int32_t> ids_;
  DeviceArray<float> weights_;
  DeviceArray<int32_t> chunk_counts_;
  DeviceArray<int32_t> maps_;
  DeviceArray<uint16_t> h_;
  DeviceArray<uint16_t> y_;
  permute::PermuteSm90Args permute_;
};

}  // namespace hopyard::test
