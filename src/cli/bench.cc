// SPDX-License-Identifier: Apache-2.0
// hopyard bench: a sweep over tokens, formats and skews, one JSON line per point, each beside the
// machine's own ceilings measured in the same process right before and after it.
#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/device.h"

#include "cli/commands.h"
#include "cli/device_option.h"
#include "cli/layer_source.h"
#include "cli/machine.h"
#include "cli/recorded.h"
#include "cli/session.h"
#include "cli/timing.h"
#include "cli/tokens.h"
#include "core/error.h"
#include "core/host_memory.h"
#include "core/parallel.h"
#include "core/shape.h"

#ifndef HOPYARD_GIT
#define HOPYARD_GIT "unknown"
#endif

namespace hopyard::cli {
namespace {

// Input sets that the calls of one point rotate over: other tokens, other experts.
constexpr int kMaxInputSets = 32;
constexpr int64_t kInputSetTokens = 512;
constexpr int kMinCalls = 5;
constexpr int kMaxCalls = 400;
constexpr int kMaxCopies = 8;

struct BenchOptions {
  LayerRequest layer;
  std::vector<int64_t> tokens = {1, 8, 64, 512};
  std::vector<std::string> weights;
  std::vector<std::string> skews = {"uniform"};
  std::string recorded;
  double seconds = 2.0;
  bool tuned_vs_untuned = false;
  int threads = 0;
  std::string device = "cpu";
};

struct InputSet {
  Tokens tokens;
  std::vector<float> logits;
  std::vector<int32_t> recorded;  // experts of real tokens, to be forced; else empty
};

struct Point {
  int64_t tokens = 0;
  Skew skew = Skew::kUniform;
  std::string_view routing;  // its name, or that experts were recorded
  std::vector<double> seconds;
  std::vector<double> untuned_seconds;  // --tuned-vs-untuned: of calls in turns with the others
  std::vector<double> gbps;
  double read_before = 0.0;
  double read_after = 0.0;
};

// One layer at several addresses, so that consecutive calls find none of it in a cache.
class RotatingWeights {
 public:
  explicit RotatingWeights(const Session& session) {
    const Device device = session.plan().device();
    if (device.kind == DeviceKind::kCpu) {
      CopyOnHost(session.layer());
    } else {
      CopyToGpu(session, GpuInfoOf(device.index));
    }
  }

  [[nodiscard]] const std::vector<WeightsDesc>& all() const { return weights_; }

 private:
  static int64_t Copies(int64_t cache_bytes, int64_t layer_bytes) {
    return std::min<int64_t>(CeilDiv(2 * cache_bytes, layer_bytes), kMaxCopies);
  }

  void CopyOnHost(const LoadedLayer& layer) {
    weights_.push_back(layer.weights);
    if (layer.owned == nullptr) {
      return;  // a checkpoint's own weights stay where its file is mapped
    }
    const int64_t bytes = std::max<int64_t>(layer.owned->bytes(), 1);
    const int64_t wanted = Copies(DescribeMachine().last_level_cache_bytes, bytes);
    while (static_cast<int64_t>(weights_.size()) < wanted && AvailableMemory() / 2 > bytes) {
      WeightsDesc copy = Describe(layer.owned->Copy());
      copy.routed.gemm1.bias = layer.weights.routed.gemm1.bias;
      copy.routed.gemm2.bias = layer.weights.routed.gemm2.bias;
      weights_.push_back(std::move(copy));
    }
  }

  void CopyToGpu(const Session& session, const GpuInfo& gpu) {
    // Where codes are packed they lie there twice.
    const int64_t copies = session.layer().packed ? 2 : 1;
    const int64_t bytes = std::max<int64_t>(copies * LayerBytes(session.spec()), 1);
    const int64_t fitting = std::max<int64_t>(gpu.free_bytes / 2 / bytes, 1);
    const int64_t wanted = std::min(Copies(gpu.l2_bytes, bytes), fitting);
    for (int64_t i = 0; i < wanted; ++i) {
      weights_.push_back(session.Place(session.layer().weights));
    }
  }

  std::vector<WeightsDesc> weights_;
};

std::vector<InputSet> MakeInputSets(int64_t tokens, Skew skew, const Recorded& recorded,
                                    const LoadedLayer& layer, uint64_t seed) {
  const int64_t count =
      std::clamp<int64_t>(kInputSetTokens / std::max<int64_t>(tokens, 1), 2, kMaxInputSets);
  std::vector<InputSet> sets;
  for (int64_t i = 0; i < count; ++i) {
    InputSet set;
    set.tokens =
        RandomTokens(tokens, layer.spec.hidden_size, seed + static_cast<uint64_t>(i) * 7919);
    set.logits = skew == Skew::kRouter ? RouterLogits(set.tokens, layer)
                                       : SkewedLogits(skew, tokens, layer.spec, seed, i * tokens);
    set.recorded = recorded.Ids(i * tokens, tokens);
    sets.push_back(std::move(set));
  }
  return sets;
}

// Bytes of weights that one input set makes a call read.
int64_t TouchedBytes(Session& session, const MoeInputs& inputs) {
  const int64_t tokens = inputs.hidden_states.shape[0];
  session.Forward(inputs, session.AllOutputs(tokens));
  return TouchedExperts(session.routing_ids(tokens)) * session.weights().bytes_per_expert();
}

// `untuned`: a plan to take turns with the session's; null: none.
void TimePoint(const BenchOptions& options, const Recorded& recorded, Session& session,
               const RotatingWeights& rotating, const Plan* untuned, Point* point) {
  const std::vector<InputSet> sets =
      MakeInputSets(point->tokens, point->skew, recorded, session.layer(), options.layer.seed);
  const auto inputs_of = [&](const InputSet& set) {
    return MakeInputs(session.layer(), set.tokens, set.logits, set.recorded);
  };
  session.Calibrate(inputs_of(sets.front()));
  std::vector<int64_t> bytes;
  bytes.reserve(sets.size());
  for (const InputSet& set : sets) {
    bytes.push_back(TouchedBytes(session, inputs_of(set)));
  }
  // Every copy has its own handle: switching costs nothing inside the timed call.
  std::vector<Weights> weights;
  for (const WeightsDesc& desc : rotating.all()) {
    weights.push_back(session.MakeWeights(desc));
  }
  MoeOutputs outputs;
  outputs.output = session.output(point->tokens);
  std::vector<StagedCall> calls;
  std::vector<StagedCall> untuned_calls;
  calls.reserve(sets.size());
  for (const InputSet& set : sets) {
    calls.push_back(session.Stage(inputs_of(set), outputs));
    if (untuned != nullptr) {
      untuned_calls.push_back(Session::Stage(*untuned, inputs_of(set), outputs));
    }
  }
  double total = 0.0;
  for (int call = 0; call < kMaxCalls && (call < kMinCalls || total < options.seconds); ++call) {
    const size_t set = static_cast<size_t>(call) % sets.size();
    // A set meets each copy in turn, also when both counts share a factor.
    const size_t copy =
        (static_cast<size_t>(call) + static_cast<size_t>(call) / sets.size()) % weights.size();
    const auto time = [&](const std::vector<StagedCall>& from) {
      const double seconds = TimeSeconds([&] { session.Run(from[set], weights[copy]); });
      total += seconds;
      return seconds;
    };
    // Neither is always the first to meet a set.
    const bool untuned_first = call % 2 == 1;
    if (untuned != nullptr && untuned_first) {
      point->untuned_seconds.push_back(time(untuned_calls));
    }
    point->seconds.push_back(time(calls));
    if (untuned != nullptr && !untuned_first) {
      point->untuned_seconds.push_back(time(untuned_calls));
    }
    point->gbps.push_back(static_cast<double>(bytes[set]) / point->seconds.back() * 1e-9);
  }
}

// Of the CPU; a GPU's are not measured here.
struct Ceilings {
  Machine machine;
  std::optional<ReadBandwidth> read;
  double peak_gflops = 0.0;
};

void PrintPoint(const Point& point, const Session& session, const Ceilings& ceilings,
                const std::string& name) {
  const double median = Quantile(point.seconds, 0.5);
  const double gflops = LayerFlops(session.spec(), point.tokens) / median * 1e-9;
  const double gbps = Quantile(point.gbps, 0.5);
  const double read = 0.5 * (point.read_before + point.read_after);
  const Device device = session.plan().device();
  Json line = {{"git", HOPYARD_GIT},
               {"cpu", ceilings.machine.cpu_model},
               {"isa", ToString(BestIsa())},
               {"device", ToString(device)},
               {"model", name},
               {"weights", ToString(session.spec().weights)},
               {"activations", ToString(session.spec().activations)},
               {"tokens", point.tokens},
               {"routing", point.routing},
               {"calls", point.seconds.size()},
               {"median_us", median * 1e6},
               {"p10_us", Quantile(point.seconds, 0.1) * 1e6},
               {"p90_us", Quantile(point.seconds, 0.9) * 1e6},
               {"gflops", gflops},
               {"gbps", gbps}};
  if (!point.untuned_seconds.empty()) {
    const double untuned = Quantile(point.untuned_seconds, 0.5);
    line.update({{"tflops", gflops * 1e-3},
                 {"tbps", gbps * 1e-3},
                 {"untuned_us", untuned * 1e6},
                 {"untuned_tflops", gflops * 1e-3 * median / untuned},
                 {"untuned_tbps", gbps * 1e-3 * median / untuned},
                 {"tuned_over_untuned", median / untuned}});
  }
  if (device.kind == DeviceKind::kCpu) {
    line.update({{"read_gbps", read},
                 {"read_gbps_before", point.read_before},
                 {"read_gbps_after", point.read_after},
                 {"peak_gflops", ceilings.peak_gflops},
                 {"of_read", gbps / read},
                 {"of_peak", gflops / ceilings.peak_gflops},
                 {"threads", session.threads()}});
  } else {
    line["gpu"] = GpuInfoOf(device.index).name;
    line["packed"] = session.layer().packed;
  }
  PrintJson(line);
}

void BenchFormat(const BenchOptions& options, const LayerRequest& request,
                 const std::vector<Skew>& skews, Ceilings& ceilings) {
  const LayerPlan plan = ResolveLayer(request);
  for (const std::string& note : plan.notes) {
    PrintNote(note);
  }
  PlanOptions plan_options;
  plan_options.max_tokens = *std::max_element(options.tokens.begin(), options.tokens.end());
  plan_options.num_threads = options.threads;
  const Device device = ParseDevice(options.device);
  CheckPacked(plan, device);
  (void)MakePlan(plan.spec, device, plan_options);
  Session session(LoadLayer(plan, request.seed), plan_options, device);
  std::optional<Plan> untuned;
  if (options.tuned_vs_untuned) {
    plan_options.untuned = true;
    untuned = MakePlan(plan.spec, device, plan_options);
  }
  const RotatingWeights rotating(session);
  const Recorded recorded(options.recorded, plan.spec);
  const auto read = [&ceilings] { return ceilings.read ? ceilings.read->Measure() : 0.0; };
  for (const Skew skew : skews) {
    for (const int64_t tokens : options.tokens) {
      Point point;
      point.tokens = tokens;
      point.skew = skew;
      point.routing = recorded.empty() ? ToString(skew) : "recorded";
      point.read_before = read();
      TimePoint(options, recorded, session, rotating, untuned ? &*untuned : nullptr, &point);
      point.read_after = read();
      PrintPoint(point, session, ceilings, plan.name);
    }
  }
}

void Run(const BenchOptions& options) {
  for (const int64_t tokens : options.tokens) {
    HOPYARD_CHECK(tokens >= 1, kInvalidArgument)
        << "--tokens has " << tokens << "; wanted at least 1";
  }
  HOPYARD_CHECK(options.seconds > 0.0, kInvalidArgument)
      << "--seconds is " << options.seconds << "; wanted more than 0";
  HOPYARD_CHECK(options.threads >= 0, kInvalidArgument)
      << "--threads is " << options.threads << "; wanted at least 0";
  std::vector<Skew> skews;
  for (const std::string& skew : options.skews) {
    skews.push_back(ParseSkew(skew));
  }
  LimitThreads(options.threads);
  // All formats are resolved, and files read, before the first is measured: a typing error shows at
  // once.
  std::vector<LayerRequest> requests;
  const std::vector<std::string> published = {options.layer.weights};
  for (const std::string& weights : options.weights.empty() ? published : options.weights) {
    requests.push_back(options.layer);
    requests.back().weights = weights;
    (void)Recorded(options.recorded, ResolveLayer(requests.back()).spec);
  }
  const int threads = MaxThreads();
  Ceilings ceilings;
  ceilings.machine = DescribeMachine();
  if (ParseDevice(options.device).kind == DeviceKind::kCpu) {
    ceilings.read.emplace(threads);
    ceilings.peak_gflops = MeasurePeakGflops(BestIsa(), threads);
  }
  for (const LayerRequest& request : requests) {
    BenchFormat(options, request, skews, ceilings);
  }
}

}  // namespace

void AddBenchCommand(CLI::App& app, CommandContext* context) {
  CLI::App* command = app.add_subcommand(
      "bench", "Sweep tokens, formats and routing skew; one JSON line per point on stdout");
  auto options = std::make_shared<BenchOptions>();
  AddLayerOptions(*command, &options->layer, false);
  AddPackedOption(*command, &options->layer);
  AddDeviceOption(*command, &options->device);
  command->add_option("--tokens", options->tokens, "Batch sizes")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--weights", options->weights, "Weight formats (default: as published)")
      ->delimiter(',');
  CLI::Option* const skew =
      command
          ->add_option("--skew", options->skews, "Routing: balanced, uniform, zipf, hot or router")
          ->delimiter(',')
          ->capture_default_str();
  AddRecordedOption(*command, &options->recorded, skew);
  command->add_option("--seconds", options->seconds, "Time spent on each point")
      ->capture_default_str();
  command->add_flag("--tuned-vs-untuned", options->tuned_vs_untuned,
                    "Each point also with the kernels that a plan takes without tuning tables");
  command->add_option("--threads", options->threads, "0: all")->capture_default_str();
  AddCommonOptions(*command, context);
  command->final_callback([options] { Run(*options); });
}

}  // namespace hopyard::cli
