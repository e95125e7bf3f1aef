// SPDX-License-Identifier: Apache-2.0
// Times what runs before the first GEMM of a layer on a Hopper GPU (route, place, permute, and the
// rounding of hidden states where the layer's formats want it), one JSON line per model, number of
// tokens and way of launching: each stage by itself or, for few tokens, in as few launches as a
// layer takes; with and without overlap of launches:
//
//   bench_route COMMIT [MODEL ...]
//
// A CUDA graph holds kCalls calls with as many uniformly random logits. Hidden states come from the
// layer before, so they are as warm as their size allows.
#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "bench/gpu.h"
#include "bench/shapes.h"
#include "core/shape.h"
#include "fused/route_permute_sm90.h"
#include "gemm/sm90/operands.h"

namespace hopyard::bench {
namespace {

constexpr int kCalls = 8;
constexpr int64_t kTokenCounts[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384};
constexpr int64_t kTile = 64;  // rows of a tile: how many tiles there are hardly matters here

std::vector<float> DrawLogits(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<float> logits(static_cast<size_t>(count));
  std::generate(logits.begin(), logits.end(),
                [&random] { return static_cast<float>(random() >> 8) * 0x1p-24F; });
  return logits;
}

struct Way {
  bool together = false;
  bool overlap = false;
};
constexpr Way kWays[] = {{false, false}, {false, true}, {true, false}, {true, true}};

// The stages of one layer at one number of tokens, with everything that they write.
class Head {
 public:
  Head(const MoeSpec& spec, int64_t tokens)
      : spec_(spec),
        tokens_(tokens),
        slots_(tokens * spec.slots_per_token()),
        to_(gemm::sm90::OperandsOf(spec.weights, spec.activations).x),
        options_{spec.num_experts + spec.shared.count, kTile, 1, 1},
        max_tiles_(MaxTiles(slots_, options_)),
        ids_(slots_),
        weights_(slots_),
        slot_weights_(slots_),
        local_slots_(slots_),
        chunk_counts_(permute::PermuteScratchInts(slots_, options_.num_local_experts)),
        maps_(2 * (options_.num_local_experts + 1) + 3 * slots_ + 3 * max_tiles_ + 2),
        x_(tokens * spec.hidden_size),
        rounded_(tokens * pitch() * SizeOf(to_.dtype)),
        scales_(tokens * CeilDiv(spec.hidden_size, 128)),
        one_(std::vector<float>{1.0F}) {
    FillRandom(x_.get(), tokens * spec.hidden_size);
  }

  // BF16 rows in natural order are read as they come.
  [[nodiscard]] bool rounds() const { return to_ != gemm::sm90::RowFormat{}; }

  [[nodiscard]] fused::RoutePermuteWay way() const { return fused::WayFor(Args(nullptr)); }

  void Run(const float* logits, fused::RoutePermuteWay way, const device::Queue& queue) const {
    fused::RoutePermuteSm90(Args(logits), way, queue);
  }

  // Bytes that cannot be avoided: logits, hidden states in and out, three maps per slot.
  [[nodiscard]] double Bytes() const {
    const auto tokens = static_cast<double>(tokens_);
    const double rows = rounds() ? 2.0 * static_cast<double>(spec_.hidden_size) +
                                       static_cast<double>(pitch() * SizeOf(to_.dtype))
                                 : 0.0;
    return tokens * (4.0 * spec_.num_experts + rows) + 12.0 * static_cast<double>(slots_);
  }

 private:
  [[nodiscard]] int64_t pitch() const { return RoundUp(spec_.hidden_size, 128); }

  [[nodiscard]] fused::RoutePermuteArgs Args(const float* logits) const {
    fused::RoutePermuteArgs args;
    route::RouteSm90Args& route = args.route;
    route.rule = spec_.routing;
    route.num_experts = spec_.num_experts;
    route.top_k = spec_.top_k;
    route.max_tokens = tokens_;
    route.logits = logits;
    route.ids = ids_.get();
    route.weights = weights_.get();
    permute::PlaceSm90Args& place = args.place;
    place.num_experts = spec_.num_experts;
    place.top_k = spec_.top_k;
    place.shared = spec_.shared.count;
    place.max_tokens = tokens_;
    place.ids = ids_.get();
    place.weights = weights_.get();
    place.slot_weights = slot_weights_.get();
    place.local_slots = local_slots_.get();
    args.permute = PermuteArgs();
    if (rounds()) {
      args.rounding[args.roundings++] = RoundArgs();
    }
    return args;
  }
  [[nodiscard]] permute::PermuteSm90Args PermuteArgs() const {
    int32_t* next = maps_.get();
    const auto take = [&next](int64_t count) {
      int32_t* const begin = next;
      next += count;
      return begin;
    };
    permute::PermuteSm90Args args;
    args.segments = options_.num_local_experts;
    args.max_tokens = tokens_;
    args.slots_per_token = spec_.slots_per_token();
    args.local_slots = local_slots_.get();
    args.chunk_counts = chunk_counts_.get();
    args.expert_offsets = take(options_.num_local_experts + 1);
    args.expert_counts = take(options_.num_local_experts);
    args.slot_to_row = take(slots_);
    args.row_to_slot = take(slots_);
    args.row_to_token = take(slots_);
    args.tiles[0] = {kTile, 1, take(max_tiles_), take(max_tiles_), take(max_tiles_), take(1)};
    args.num_rows = take(1);
    return args;
  }
  [[nodiscard]] gemm1::RoundRowsArgs RoundArgs() const {
    gemm1::RoundRowsArgs args;
    args.to = to_;
    args.row_global = spec_.activations == ActivationFormat::kNvFp4PerToken;
    args.in = x_.get();
    args.in_pitch = spec_.hidden_size;
    args.static_scale = one_.get();
    args.max_rows = tokens_;
    args.cols = spec_.hidden_size;
    args.out = rounded_.get();
    args.out_pitch = pitch();
    args.out_block_scales = scales_.get();
    args.out_row_scales = scales_.get();
    return args;
  }

  MoeSpec spec_;
  int64_t tokens_;
  int64_t slots_;
  gemm::sm90::RowFormat to_;
  PermuteOptions options_;
  int64_t max_tiles_;
  DeviceBuffer<int32_t> ids_;
  DeviceBuffer<float> weights_;
  DeviceBuffer<float> slot_weights_;
  DeviceBuffer<int32_t> local_slots_;
  DeviceBuffer<int32_t> chunk_counts_;
  DeviceBuffer<int32_t> maps_;
  DeviceBuffer<uint16_t> x_;
  DeviceBuffer<uint8_t> rounded_;
  DeviceBuffer<float> scales_;
  DeviceBuffer<float> one_;
};

// The launches, one after the other.
std::string NameOf(fused::RoutePermuteWay way, bool rounds) {
  const std::string also = rounds ? " + round" : "";
  switch (way) {
    case fused::RoutePermuteWay::kOneBlock:
      return "one block" + also;
    case fused::RoutePermuteWay::kTokenBlock:
      return "block per token" + also + ", permute";
    case fused::RoutePermuteWay::kApart:
      break;
  }
  return rounds ? "route, place, permute, round" : "route, place, permute";
}

void BenchTokens(const Machine& machine, const ModelShape& shape, int64_t tokens) {
  const MoeSpec& spec = shape.spec;
  std::vector<DeviceBuffer<float>> logits;
  for (unsigned i = 0; i < kCalls; ++i) {
    logits.emplace_back(DrawLogits(tokens * spec.num_experts, 100 + i));
  }
  const Head head(spec, tokens);
  for (const Way& way : kWays) {
    const fused::RoutePermuteWay launches =
        way.together ? head.way() : fused::RoutePermuteWay::kApart;
    if (way.together && launches == fused::RoutePermuteWay::kApart) {
      continue;
    }
    CaseResult result;
    result.model = shape.name;
    result.tokens = tokens;
    result.bytes = head.Bytes();
    result.tactic = NameOf(launches, head.rounds());
    result.times = TimeInGraph(kCalls, [&](int i, cudaStream_t stream) {
      head.Run(logits[static_cast<size_t>(i)].get(), launches, {stream, way.overlap});
    });
    PrintCase(machine, result,
              {{"weights", ToString(spec.weights)},
               {"activations", ToString(spec.activations)},
               {"overlap_launches", way.overlap},
               {"cold_l2", false}});
  }
}

void BenchModel(const Machine& machine, const ModelShape& shape) {
  for (const int64_t tokens : kTokenCounts) {
    BenchTokens(machine, shape, tokens);
  }
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  return hopyard::bench::BenchModels(argc, argv, hopyard::bench::BenchModel);
}
