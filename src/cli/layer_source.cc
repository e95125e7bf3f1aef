// SPDX-License-Identifier: Apache-2.0
#include "cli/layer_source.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/quantize.h"

#include "cli/console.h"
#include "cli/machine.h"
#include "cli/random.h"
#include "cli/spec_file.h"
#include "core/error.h"
#include "core/host_memory.h"

namespace hopyard::cli {
namespace {

constexpr uint64_t kRouterPurpose = 11;
constexpr uint64_t kRouterBiasPurpose = 12;
constexpr uint64_t kRoutingBiasPurpose = 13;
constexpr double kRouterBiasStddev = 0.1;
constexpr double kRoutingBiasStddev = 0.02;

// Fewer experts: top_k and groups follow where they must, with a note each.
void ReduceExperts(int experts, LayerPlan* plan) {
  MoeSpec& spec = plan->spec;
  HOPYARD_CHECK(experts >= 1 && experts <= spec.num_experts, kInvalidArgument)
      << "--experts is " << experts << "; " << plan->name << " has " << spec.num_experts
      << ", wanted 1 .. " << spec.num_experts;
  spec.num_experts = experts;
  plan->name += fmt::format(" ({} experts)", experts);
  if (spec.top_k > experts) {
    plan->notes.push_back(
        fmt::format("top_k reduced from {} to {}, the number of experts", spec.top_k, experts));
    spec.top_k = experts;
  }
  RoutingRule& rule = spec.routing;
  if (rule.num_groups > 1 && (experts % rule.num_groups != 0 || experts / rule.num_groups < 2 ||
                              experts / rule.num_groups * rule.top_groups < spec.top_k)) {
    plan->notes.push_back(fmt::format("{} experts do not fill {} groups: grouped selection is off",
                                      experts, rule.num_groups));
    rule.num_groups = 1;
    rule.top_groups = 1;
  }
}

LayerPlan ResolvePreset(const LayerRequest& request, const bench::ModelShape& shape) {
  LayerPlan plan;
  plan.name = shape.name;
  plan.spec = shape.spec;
  plan.preset = &shape;
  HOPYARD_CHECK(request.layer < 0, kInvalidArgument)
      << "--layer is " << request.layer << ", but " << shape.name
      << " is a preset of one layer; leave --layer out or name a checkpoint directory";
  if (request.experts != 0) {
    ReduceExperts(request.experts, &plan);
  }
  return plan;
}

bool IsSpecFile(const std::string& target) {
  return std::filesystem::path(target).extension() == ".json" &&
         !std::filesystem::is_directory(target);
}

LayerPlan ResolveSpecFile(const LayerRequest& request) {
  for (const auto& [given, option] :
       {std::pair{request.layer >= 0, "--layer"}, std::pair{request.experts != 0, "--experts"}}) {
    HOPYARD_CHECK(!given, kInvalidArgument)
        << option << " is given, but " << request.target << " states the layer; leave it out";
  }
  auto shape = std::make_shared<bench::ModelShape>();
  shape->spec = ReadSpecFile(request.target);
  LayerPlan plan;
  plan.name = request.target;
  plan.spec = shape->spec;
  plan.preset = shape.get();
  plan.stated = std::move(shape);
  return plan;
}

LayerPlan ResolveCheckpoint(const LayerRequest& request) {
  const Checkpoint checkpoint = Checkpoint::Open(request.target);
  const std::vector<int> layers = checkpoint.moe_layers();
  HOPYARD_CHECK(!layers.empty(), kInvalidArgument)
      << request.target << " (" << checkpoint.model_type() << ") has no layer with experts";
  const int index = request.layer >= 0 ? request.layer : layers.front();
  HOPYARD_CHECK(std::find(layers.begin(), layers.end(), index) != layers.end(), kInvalidArgument)
      << "--layer is " << index << "; " << request.target << " has experts in " << layers.size()
      << " layers, " << layers.front() << " to " << layers.back();
  HOPYARD_CHECK(request.experts == 0, kInvalidArgument)
      << "--experts reduces presets only, but " << request.target
      << " is a checkpoint; leave it out";
  LayerPlan plan;
  plan.checkpoint = checkpoint.Layer(index);
  plan.name = plan.checkpoint->name;
  plan.spec = plan.checkpoint->spec;
  return plan;
}

void ApplyFormats(const LayerRequest& request, LayerPlan* plan) {
  MoeSpec& spec = plan->spec;
  if (!request.weights.empty()) {
    const WeightFormat wanted = ParseWeightFormat(request.weights);
    plan->requantise = plan->checkpoint.has_value() && wanted != spec.weights;
    const bool keep = plan->checkpoint.has_value() && !plan->requantise;
    if (!keep) {
      spec.weights = wanted;
      spec.shared.weights = wanted;
      spec.activations = bench::DefaultActivations(wanted);
    }
  }
  if (!request.activations.empty()) {
    spec.activations = ParseActivationFormat(request.activations);
  }
}

std::vector<float> RandomFloats(int64_t count, double stddev, uint64_t seed) {
  std::vector<float> values(static_cast<size_t>(count));
  GaussianSource(stddev).Fill(values.data(), count, seed);
  return values;
}

LoadedLayer LoadPreset(const LayerPlan& plan, uint64_t seed) {
  const MoeSpec& spec = plan.spec;
  const bool biases = plan.preset->biases;
  LoadedLayer loaded;
  loaded.spec = spec;
  loaded.owned = RandomLayer(spec, plan.preset->row_order, biases, seed);
  loaded.weights = Describe(loaded.owned);
  const double router_stddev = 1.0 / std::sqrt(static_cast<double>(spec.hidden_size));
  loaded.router_weight = RandomFloats(spec.num_experts * spec.hidden_size, router_stddev,
                                      StreamSeed(seed, kRouterPurpose, 0));
  if (biases) {
    loaded.router_bias =
        RandomFloats(spec.num_experts, kRouterBiasStddev, StreamSeed(seed, kRouterBiasPurpose, 0));
  }
  if (spec.routing.use_bias) {
    loaded.routing_bias = RandomFloats(spec.num_experts, kRoutingBiasStddev,
                                       StreamSeed(seed, kRoutingBiasPurpose, 0));
  }
  return loaded;
}

// Biases stay views of the checkpoint; static input scales of another format mean nothing.
void CarryBiases(const WeightsDesc& from, WeightsDesc* to) {
  to->routed.gemm1.bias = from.routed.gemm1.bias;
  to->routed.gemm1.bias_per_expert = from.routed.gemm1.bias_per_expert;
  to->routed.gemm2.bias = from.routed.gemm2.bias;
  to->routed.gemm2.bias_per_expert = from.routed.gemm2.bias_per_expert;
}

struct Owners {
  std::shared_ptr<const void> weights;
  std::shared_ptr<const void> file;
};

LoadedLayer LoadCheckpoint(const LayerPlan& plan) {
  const CheckpointLayer& source = *plan.checkpoint;
  LoadedLayer loaded;
  loaded.spec = plan.spec;
  if (plan.requantise) {
    loaded.owned = RequantizedLayer(plan.spec, source.weights, {});
    loaded.weights = Describe(loaded.owned);
    CarryBiases(source.weights, &loaded.weights);
    loaded.weights.owner =
        std::make_shared<Owners>(Owners{loaded.weights.owner, source.weights.owner});
  } else {
    loaded.weights = source.weights;
  }
  loaded.router_weight = ToFloats(source.router_weight);
  if (source.router_bias.defined()) {
    loaded.router_bias = ToFloats(source.router_bias);
  }
  if (source.routing_bias.defined()) {
    loaded.routing_bias = ToFloats(source.routing_bias);
  }
  return loaded;
}

// Experts that `have` bytes would hold, for the remedy of a refusal.
std::string MemoryRemedy(const LayerPlan& plan, int64_t need) {
  const int64_t have = AvailableMemory();
  const int64_t per_expert = need / std::max(plan.spec.num_experts, 1);
  const int64_t fit = per_expert > 0 ? have * 9 / 10 / per_expert : 0;
  std::string remedy;
  if (plan.preset != nullptr && plan.stated == nullptr && fit >= 1) {
    remedy = fmt::format("use --experts {}", std::min<int64_t>(fit, plan.spec.num_experts));
  }
  if (plan.spec.weights != WeightFormat::kMxFp4) {
    remedy += fmt::format("{}--weights mxfp4", remedy.empty() ? "use " : " or ");
  }
  return remedy.empty() ? "use a machine with more memory" : remedy;
}

}  // namespace

void AddLayerOptions(CLI::App& command, LayerRequest* request, bool with_weights,
                     bool without_target) {
  command
      .add_option("target", request->target,
                  "Preset (" + bench::ShapeNames() +
                      "), .json file that states a layer, or checkpoint directory")
      ->required(!without_target);
  if (with_weights) {
    command.add_option("--weights", request->weights,
                       "Weight format: bf16, fp8_block128, fp8_per_tensor, fp8_per_channel, mxfp8, "
                       "nvfp4, mxfp4, mxint4 (default: as published)");
  }
  command.add_option("--activations", request->activations,
                     "Activation format: bf16, fp8_block128, fp8_per_tensor, fp8_per_token, mxfp8, "
                     "nvfp4, nvfp4_per_token (default: the weights' own)");
  command.add_option("--layer", request->layer,
                     "Layer of a checkpoint (default: the first with experts)");
  command.add_option("--experts", request->experts, "Reduce a preset to this many experts");
  command.add_option("--seed", request->seed, "Seed of everything random")->capture_default_str();
}

void AddPackedOption(CLI::App& command, LayerRequest* request) {
  command.add_flag("--packed", request->packed,
                   "mxfp4 and nvfp4 weights on a GPU: in the order in which kernels are fastest");
}

LayerPlan ResolveLayer(const LayerRequest& request) {
  LayerPlan plan;
  if (const bench::ModelShape* shape = bench::FindShape(request.target)) {
    plan = ResolvePreset(request, *shape);
  } else if (IsSpecFile(request.target)) {
    plan = ResolveSpecFile(request);
  } else {
    HOPYARD_CHECK(std::filesystem::is_directory(request.target), kInvalidArgument)
        << "'" << request.target
        << "' is neither a preset nor a directory nor a .json file; presets are "
        << bench::ShapeNames();
    plan = ResolveCheckpoint(request);
  }
  ApplyFormats(request, &plan);
  plan.packed = request.packed;
  return plan;
}

WeightOrders CheckPacked(const LayerPlan& plan, Device device) {
  if (!plan.packed) {
    return {};
  }
  HOPYARD_CHECK(device.kind != DeviceKind::kCpu, kInvalidArgument)
      << "--packed is for weights on a GPU, the CPU reads them as they are; add --device cuda";
  WeightsDesc packed;
  packed.packed = true;
  const WeightOrders orders = OrdersOf(plan.spec, packed);
  const bool any = orders.gemm1 == ReadOrder::kPacked || orders.shared_gemm1 == ReadOrder::kPacked;
  HOPYARD_CHECK(any, kInvalidArgument)
      << "--packed is for mxfp4 and nvfp4 weights, these are " << ToString(plan.spec.weights)
      << "; leave it out, or add --weights mxfp4";
  return orders;
}

int64_t LoadBytes(const LayerPlan& plan) {
  if (plan.checkpoint && !plan.requantise) {
    return 0;
  }
  const int64_t scratch = plan.spec.gemm1_rows() * plan.spec.hidden_size * 2;
  return LayerBytes(plan.spec) + scratch;
}

LoadedLayer LoadLayer(const LayerPlan& plan, uint64_t seed) {
  // Random inputs hold neither a table of experts nor weights of shared experts.
  HOPYARD_CHECK(plan.spec.local.kind == ExpertMap::Kind::kAll &&
                    !(plan.spec.shared.count > 0 && plan.spec.shared.per_token_weight),
                kUnsupported)
      << plan.name << ": local experts of one rank and shared experts with per-token weights can "
      << "be explained, but not run here; use the library";
  const int64_t need = LoadBytes(plan);
  CheckMemory(plan.name + ": the weights", need, MemoryRemedy(plan, need));
  LoadedLayer layer = plan.preset != nullptr ? LoadPreset(plan, seed) : LoadCheckpoint(plan);
  layer.packed = plan.packed;
  return layer;
}

std::vector<float> ToFloats(const TensorView& tensor) {
  const int64_t count = tensor.numel();
  std::vector<float> values(static_cast<size_t>(count));
  HOPYARD_CHECK(tensor.is_contiguous(), kInvalidArgument) << "the tensor is not contiguous";
  if (count == 0) {
    return values;
  }
  if (tensor.dtype == DType::kFloat32) {
    std::memcpy(values.data(), tensor.data, values.size() * sizeof(float));
    return values;
  }
  HOPYARD_CHECK(tensor.dtype == DType::kBf16 || tensor.dtype == DType::kFp16, kInvalidArgument)
      << "the tensor is " << ToString(tensor.dtype) << "; wanted f32, bf16 or f16";
  QuantizedView source;
  source.format = tensor.dtype == DType::kBf16 ? Format::kBf16 : Format::kFp16;
  source.codes = TensorView::Contiguous(tensor.data, tensor.dtype, {1, count});
  Dequantize(source, TensorView::Contiguous(values.data(), DType::kFloat32, {1, count}));
  return values;
}

}  // namespace hopyard::cli
