// SPDX-License-Identifier: Apache-2.0
// Times the two grouped GEMMs of the named models' layers on a Hopper GPU by themselves, with every
// kernel of the table that multiplies the pair of formats (those that plans take by name only,
// too), one JSON line per case and kernel:
//
//   bench_gemm COMMIT CASE ... [--tokens=1,8,64] [--routing=uniform,balanced,zipf,hot]
//              [--tactic=KERNEL[,KERNEL ...]]
//
// CASE as in bench/cases.h. Kernels whose tiles have fewer than 96 rows and less than an eighth of
// the average expert's are left out unless they are named. A CUDA graph holds calls with as many
// routings, over experts that together do not fit into the L2 cache, in turn, so that weights are
// read cold; token rows are as warm as their size allows, as in a layer. The time of a call is the
// replay's over their number.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "hopyard/permute.h"

#include "bench/cases.h"
#include "bench/gpu.h"
#include "bench/layer_weights.h"
#include "bench/routings.h"
#include "core/error.h"
#include "core/shape.h"
#include "gemm/sm90/grouped_gemm_sm90.h"
#include "gemm/sm90/operands.h"
#include "plan/sm90/device_weights.h"
#include "plan/weights_impl.h"

namespace hopyard::bench {
namespace {

using gemm::sm90::GroupedGemmArgs;
using gemm::sm90::KernelAt;
using gemm::sm90::KernelInfo;
using gemm::sm90::LayerOperands;
using gemm::sm90::RowFormat;

constexpr int kMinCalls = 8;
constexpr int kMaxCalls = 64;

// One of the two GEMMs with one format of its rows.
struct Gemm {
  int number = 1;
  bool gated = false;
  bool rounded = false;  // of RoundedOperandsOf: plans take its kernels by name only
  LayerOperands operands;
  int64_t k = 0;
  int64_t features = 0;

  [[nodiscard]] const RowFormat& x() const { return number == 1 ? operands.x : operands.h; }
  [[nodiscard]] int64_t Sources(const MoeSpec& spec, int64_t tokens) const {
    return number == 1 ? tokens : tokens * spec.top_k;
  }
  [[nodiscard]] int64_t WeightBytes(const LayerWeights& weights) const {
    return number == 1 ? weights.routed.gemm1.bytes() : weights.routed.gemm2.bytes();
  }
};

std::vector<Gemm> GemmsOf(const MoeSpec& spec) {
  std::vector<Gemm> gemms;
  const auto add = [&](const LayerOperands& operands, bool rounded) {
    gemms.push_back({1, IsGated(spec.activation.kind), rounded, operands, spec.hidden_size,
                     spec.intermediate_size});
    gemms.push_back({2, false, rounded, operands, spec.intermediate_size, spec.hidden_size});
  };
  add(gemm::sm90::OperandsOf(spec.weights, spec.activations), false);
  const auto rounded = gemm::sm90::RoundedOperandsOf(spec.weights, spec.activations);
  if (rounded.has_value()) {
    add(*rounded, true);
  }
  return gemms;
}

// The experts of each call's tokens. Calls take turns with the layers, and within a layer experts
// are renamed so that a call touches those that were left alone longest.
class Routings {
 public:
  Routings(const MoeSpec& spec, int64_t tokens, const std::string& routing, size_t layers)
      : spec_(spec), tokens_(tokens), routing_(routing), next_(layers, 0) {}

  struct Call {
    std::vector<int32_t> experts;  // [tokens, top_k]
    int64_t touched = 0;
  };
  const Call& At(int call) {
    while (static_cast<int>(calls_.size()) <= call) {
      Draw();
    }
    return calls_[static_cast<size_t>(call)];
  }

 private:
  void Draw() {
    const Logits drawn(spec_, tokens_, routing_, 100 + static_cast<unsigned>(calls_.size()));
    int64_t& next = next_[calls_.size() % next_.size()];
    std::vector<int32_t> names(static_cast<size_t>(spec_.num_experts), -1);
    Call call{{}, drawn.touched};
    for (const int32_t expert : drawn.experts) {
      int32_t& name = names[static_cast<size_t>(expert)];
      if (name < 0) {
        name = static_cast<int32_t>(next++ % spec_.num_experts);
      }
      call.experts.push_back(name);
    }
    calls_.push_back(std::move(call));
  }

  const MoeSpec& spec_;
  int64_t tokens_;
  std::string routing_;
  std::vector<int64_t> next_;  // of each layer
  std::vector<Call> calls_;
};

// A routing cut into tiles, on the device.
class DeviceTiles {
 public:
  DeviceTiles(const MoeSpec& spec, int64_t tokens, const std::vector<int32_t>& experts,
              const KernelInfo& kernel) {
    PermuteOptions options;
    options.num_local_experts = spec.num_experts;
    options.tile = kernel.tokens;
    options.cluster = kernel.cluster;
    slots_ = tokens * spec.top_k;
    max_tiles_ = MaxTiles(slots_, options);
    std::vector<int32_t> ints(
        static_cast<size_t>(2 * spec.num_experts + 1 + 3 * slots_ + 3 * max_tiles_ + 2));
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      used += count;
      return TensorView::Contiguous(ints.data() + used - count, DType::kInt32, {count});
    };
    PermuteOutputs outputs;
    outputs.row_to_token = take(slots_);
    outputs.row_to_slot = take(slots_);
    outputs.tile_expert = take(max_tiles_);
    outputs.tile_row_begin = take(max_tiles_);
    outputs.tile_row_end = take(max_tiles_);
    outputs.num_tiles = take(1);
    outputs.num_rows = take(1);
    outputs.slot_to_row = take(slots_);
    outputs.expert_offsets = take(spec.num_experts + 1);
    outputs.expert_counts = take(spec.num_experts);
    Permute(TensorView::Contiguous(experts.data(), DType::kInt32, {tokens, spec.top_k}), options,
            outputs);
    ints_ = std::make_unique<DeviceBuffer<int32_t>>(ints);
  }

  void Set(GroupedGemmArgs* args) const {
    args->row_to_source = ints_->get();
    args->row_to_slot = ints_->get() + slots_;
    args->tile_expert = args->row_to_slot + slots_;
    args->tile_row_begin = args->tile_expert + max_tiles_;
    args->tile_row_end = args->tile_row_begin + max_tiles_;
    args->num_tiles = args->tile_row_end + max_tiles_;
    args->max_tiles = max_tiles_;
  }

 private:
  int64_t slots_ = 0;
  int64_t max_tiles_ = 0;
  std::unique_ptr<DeviceBuffer<int32_t>> ints_;
};

// Token rows of a GEMM and its output, of up to `tokens` tokens.
class Rows {
 public:
  Rows(const MoeSpec& spec, const Gemm& gemm, int64_t tokens)
      : x_pitch_(PitchOf(gemm.x(), gemm.k)),
        x_bytes_(gemm.Sources(spec, tokens) * x_pitch_ * SizeOf(gemm.x().dtype)),
        x_(x_bytes_),
        scales_(std::vector<float>(
            static_cast<size_t>(gemm.Sources(spec, tokens) * CeilDiv(gemm.k, 128)), 0x1p-5F)),
        slot_weights_(std::vector<float>(static_cast<size_t>(tokens * spec.top_k), 0.5F)),
        out_(tokens * spec.top_k * RoundUp(gemm.features, gemm::sm90::kKGroup)),
        out_scales_(tokens * spec.top_k * CeilDiv(gemm.features, 128)) {
    if (gemm.x().dtype == DType::kE4m3) {
      FillBytes(x_.get(), x_bytes_, E4m3Byte);
    } else {
      FillRandom(static_cast<uint16_t*>(static_cast<void*>(x_.get())), x_bytes_ / 2);
    }
  }

  static int64_t PitchOf(const RowFormat& rows, int64_t cols) {
    return RoundUp(cols, rows.order == gemm::sm90::KOrder::kNatural ? 16 : gemm::sm90::kKGroup);
  }

  void Set(const MoeSpec& spec, const Gemm& gemm, const KernelInfo& kernel,
           GroupedGemmArgs* args) const {
    const RowFormat& x = gemm.x();
    args->x = x_.get();
    args->x_pitch = x_pitch_;
    const bool row_global = spec.activations == ActivationFormat::kNvFp4PerToken;
    if (x.format == Format::kFp8Block1x128) {
      args->x_block_scales = scales_.get();
    }
    if (x.format == Format::kFp8PerRow || row_global) {
      args->x_token_scales = scales_.get();
    }
    args->out = out_.get();
    args->out_pitch = RoundUp(gemm.features, 16);
    if (gemm.number == 2) {
      args->row_to_source = nullptr;
      args->row_to_slot = nullptr;
      return;
    }
    if (spec.router_weight_on_input) {
      args->slot_weights = slot_weights_.get();
    }
    // As in a layer: kernels that can round write GEMM2's operand, for others a pass of its own
    // does.
    const RowFormat& h = gemm.operands.h;
    if (h.format == Format::kBf16 || (gemm.operands.fused_h && kernel.rounds)) {
      args->out_format = h;
      args->out_pitch = PitchOf(h, gemm.features);
      if (h.format == Format::kFp8Block1x128) {
        args->out_block_scales = out_scales_.get();
      }
    }
  }

 private:
  int64_t x_pitch_;
  int64_t x_bytes_;
  DeviceBuffer<uint8_t> x_;
  DeviceBuffer<float> scales_;
  DeviceBuffer<float> slot_weights_;
  DeviceBuffer<uint16_t> out_;
  DeviceBuffer<float> out_scales_;
};

GroupedGemmArgs WeightArgs(const MoeSpec& spec, const Gemm& gemm, const LayerWeights& layer) {
  const hopyard::sm90::DeviceWeights& weights = *layer.weights.impl().sm90;
  const hopyard::sm90::Group& group = weights.routed;
  GroupedGemmArgs args;
  args.weights = spec.weights;
  args.segment_begin = group.segment_begin;
  args.segment_end = group.segment_end;
  args.k = gemm.k;
  args.features = gemm.features;
  const bool static_scale = group.gemm2_input_scale != nullptr;
  if (gemm.number == 1) {
    args.first = group.first.args;
    args.second = group.second.args;
    args.activation = spec.activation.kind;
    args.alpha = group.alpha;
    args.beta = group.beta;
    args.limit = group.limit;
    args.x_scale = static_scale ? weights.gemm1_input_scale : nullptr;
    args.out_scale = group.gemm2_input_scale;
    args.out_scale_stride = group.gemm2_input_scale_stride;
  } else {
    args.first = group.down.args;
    args.x_scale = group.gemm2_input_scale;
    args.x_scale_stride = group.gemm2_input_scale_stride;
  }
  return args;
}

// What all kernels share at one number of tokens.
struct Point {
  const Machine& machine;
  const Case& one;
  const Layers& layers;
  int64_t tokens;
  std::string routing;
};

void BenchKernel(const Point& point, const Gemm& gemm, const Rows& rows, int index,
                 Routings* routings) {
  const MoeSpec& spec = point.one.shape.spec;
  const KernelInfo kernel = KernelAt(index);
  const double expert_bytes =
      static_cast<double>(gemm.WeightBytes(*point.layers.front())) / spec.num_experts;
  const double call_bytes = expert_bytes * static_cast<double>(routings->At(0).touched);
  const int calls = static_cast<int>(std::clamp<double>(
      std::ceil(static_cast<double>(kColdBytes) / call_bytes), kMinCalls, kMaxCalls));
  double touched = 0.0;
  std::vector<DeviceTiles> tiles;
  std::vector<GroupedGemmArgs> launches;
  for (int i = 0; i < calls; ++i) {
    const Routings::Call& call = routings->At(i);
    touched += static_cast<double>(call.touched) / calls;
    tiles.emplace_back(spec, point.tokens, call.experts, kernel);
    launches.push_back(
        WeightArgs(spec, gemm, *point.layers[static_cast<size_t>(i) % point.layers.size()]));
    tiles.back().Set(&launches.back());
    rows.Set(spec, gemm, kernel, &launches.back());
  }
  const auto slots = static_cast<double>(point.tokens * spec.top_k);
  const double matrix = static_cast<double>(gemm.features * gemm.k) * (gemm.gated ? 2.0 : 1.0);
  const GroupedGemmArgs& args = launches.front();
  CaseResult result;
  result.model = point.one.shape.name;
  result.tokens = point.tokens;
  result.bytes =
      touched * expert_bytes +
      static_cast<double>(gemm.Sources(spec, point.tokens) * gemm.k * SizeOf(gemm.x().dtype)) +
      slots * static_cast<double>(gemm.features * SizeOf(args.out_format.dtype));
  result.flops = 2.0 * slots * matrix;
  result.tactic = kernel.name;
  result.times = TimeInGraph(calls, [&](int i, cudaStream_t stream) {
    gemm::sm90::RunGroupedGemm(index, launches[static_cast<size_t>(i)], stream);
  });
  PrintCase(MachineFor(point.machine, kernel.x_dtype), result,
            {{"weights", ToString(spec.weights)},
             {"activations", ToString(spec.activations)},
             {"gemm", gemm.number},
             {"routing", point.routing},
             {"by_name_only", gemm.rounded}});
}

bool IsWanted(const Point& point, const KernelInfo& kernel) {
  if (!point.one.tactic.empty()) {
    const std::vector<std::string> names = Split(point.one.tactic, ',');
    return std::find(names.begin(), names.end(), kernel.name) != names.end();
  }
  const MoeSpec& spec = point.one.shape.spec;
  constexpr int kLarge = 96;
  return kernel.tokens >= kLarge ||
         point.tokens * spec.top_k <= int64_t{8} * kernel.tokens * spec.num_experts;
}

void BenchTokens(const Point& point) {
  const MoeSpec& spec = point.one.shape.spec;
  bool any = false;
  Routings routings(spec, point.tokens, point.routing, point.layers.size());
  for (const Gemm& gemm : GemmsOf(spec)) {
    const Rows rows(spec, gemm, point.tokens);
    for (int index = 0; index < gemm::sm90::NumKernels(); ++index) {
      const KernelInfo kernel = KernelAt(index);
      if (!kernel.mn_major && !kernel.packed &&
          gemm::sm90::Runs(index, spec.weights, gemm.x(), gemm.gated) && IsWanted(point, kernel)) {
        BenchKernel(point, gemm, rows, index, &routings);
        any = true;
      }
    }
  }
  HOPYARD_CHECK(any, kInvalidArgument)
      << "no kernel '" << point.one.tactic << "' multiplies " << ToString(spec.weights)
      << " weights with " << ToString(spec.activations)
      << " activations in this build; `hopyard explain --device cuda` lists those that do";
}

void BenchLayer(const Machine& machine, const Case& one) {
  Layers layers;
  int64_t bytes = 0;
  while (bytes < kColdBytes) {
    layers.push_back(std::make_unique<LayerWeights>(one.shape.spec, false));
    bytes += layers.back()->routed.gemm2.bytes();
  }
  for (const std::string& routing : one.routings) {
    for (const int64_t tokens : one.tokens) {
      BenchTokens({machine, one, layers, tokens, routing});
    }
  }
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  return hopyard::bench::BenchCases(argc, argv, hopyard::bench::BenchLayer);
}
