// SPDX-License-Identifier: Apache-2.0
// hopyard run: one layer on real or generated tokens, timed and verified against the oracle.
#include <cmath>
#include <memory>
#include <numeric>
#include <utility>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/checkpoint.h"

#include "cli/commands.h"
#include "cli/device_option.h"
#include "cli/histogram.h"
#include "cli/layer_source.h"
#include "cli/machine.h"
#include "cli/session.h"
#include "cli/timing.h"
#include "cli/tokens.h"
#include "cli/verify.h"
#include "core/error.h"
#include "core/parallel.h"

namespace hopyard::cli {
namespace {

struct RunOptions {
  LayerRequest layer;
  int64_t tokens = 32;
  std::string input;
  std::string output;
  std::string replay;
  std::string check;
  std::string skew = "router";
  int64_t verify = 16;
  int repeat = 5;
  int threads = 0;
  std::string device = "cpu";
};

struct RunResult {
  double setup_seconds = 0.0;
  std::vector<double> seconds;
  int64_t touched_experts = 0;
  std::vector<int64_t> load;
  std::optional<Verification> verification;
};

void CheckOptions(const RunOptions& options) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    HOPYARD_CHECK(value >= least, kInvalidArgument)
        << name << " is " << value << "; wanted at least " << least;
  };
  at_least("--tokens", options.tokens, 0);
  at_least("--verify", options.verify, 0);
  at_least("--repeat", options.repeat, 1);
  at_least("--threads", options.threads, 0);
  HOPYARD_CHECK(options.check.empty() || options.verify > 0, kInvalidArgument)
      << "--check verifies the output of a file, but --verify is 0; give --verify a count";
}

Tokens LoadTokens(const RunOptions& options, const MoeSpec& spec) {
  return options.input.empty() ? RandomTokens(options.tokens, spec.hidden_size, options.layer.seed)
                               : ReadTokens(options.input, spec.hidden_size);
}

void WriteOutput(const std::string& path, const Session& session, int64_t tokens) {
  const MoeSpec& spec = session.spec();
  const int64_t slots = spec.slots_per_token();
  WriteSafetensors(
      path, {{"output", "BF16", {tokens, spec.hidden_size}, session.output(tokens).data},
             {"expert_ids", "I32", {tokens, slots}, session.routing_ids(tokens).data},
             {"routing_weights", "F32", {tokens, slots}, session.routing_weights(tokens).data},
             {"replay", "I16", {tokens, int64_t{spec.top_k}}, session.replay(tokens).data}});
}

RunResult Execute(const RunOptions& options, Session& session, const MoeInputs& inputs) {
  const int64_t tokens = inputs.hidden_states.shape[0];
  RunResult result;
  session.Calibrate(inputs);
  session.Poison();
  // The first call fills caches and counts loads; it is the one that is verified and written, and
  // it is not timed.
  session.Forward(inputs, session.AllOutputs(tokens));
  const TensorView load = session.expert_load();
  result.load.assign(load.as<int64_t>(), load.as<int64_t>() + load.numel());
  result.touched_experts = TouchedExperts(session.routing_ids(tokens));
  if (options.verify > 0) {
    const Tokens checked = options.check.empty()
                               ? Tokens{}
                               : ReadOutput(options.check, tokens, session.spec().hidden_size);
    const TensorView output = options.check.empty() ? session.output(tokens) : checked.View();
    result.verification =
        Verify({session.spec(), session.weights(), inputs, output, session.routing_ids(tokens)},
               options.verify);
  }
  if (!options.output.empty()) {
    WriteOutput(options.output, session, tokens);
  }
  MoeOutputs timed;
  timed.output = session.output(tokens);
  const StagedCall call = session.Stage(inputs, timed);
  Progress progress("timing", options.repeat);
  for (int i = 0; i < options.repeat; ++i) {
    result.seconds.push_back(TimeSeconds([&] { session.Run(call); }));
    progress.Advance();
  }
  return result;
}

struct Figures {
  double seconds;
  double gflops;
  double gbps;
  int64_t weight_bytes;
};

Figures Summarise(const RunResult& result, const Session& session, int64_t tokens) {
  const double seconds = Quantile(result.seconds, 0.5);
  const int64_t bytes = result.touched_experts * session.weights().bytes_per_expert();
  return {seconds, LayerFlops(session.spec(), tokens) / seconds * 1e-9,
          static_cast<double>(bytes) / seconds * 1e-9, bytes};
}

Json ToJson(const RunResult& result, const Session& session, int64_t tokens,
            const std::string& name) {
  const Figures figures = Summarise(result, session, tokens);
  Json json = {{"layer", name},
               {"spec", ToString(session.spec())},
               {"weights", ToString(session.spec().weights)},
               {"activations", ToString(session.spec().activations)},
               {"tokens", tokens},
               {"device", ToString(session.plan().device())},
               {"kernel", session.plan().Explain().Chosen(", ")},
               {"threads", session.threads()},
               {"setup_seconds", result.setup_seconds},
               {"repeat", result.seconds.size()},
               {"median_us", figures.seconds * 1e6},
               {"gflops", figures.gflops},
               {"gbps", figures.gbps},
               {"weight_bytes_touched", figures.weight_bytes},
               {"experts_touched", result.touched_experts},
               {"expert_load", result.load}};
  if (result.verification) {
    json["verification"] = ToJson(*result.verification);
  }
  return json;
}

void PrintText(const RunResult& result, const Session& session, int64_t tokens,
               const std::string& name) {
  const Figures figures = Summarise(result, session, tokens);
  fmt::print("layer    {}\nspec     {}\n", name, ToString(session.spec()));
  const Device device = session.plan().device();
  fmt::print("kernel   {}\n", session.plan().Explain().Chosen(", "));
  fmt::print("device   {}; ready after {:.1f} s\n",
             device.kind == DeviceKind::kCpu ? fmt::format("cpu, {} threads", session.threads())
                                             : ToString(device),
             result.setup_seconds);
  fmt::print("time     {:.3f} ms for {} tokens (median of {})\n", figures.seconds * 1e3, tokens,
             result.seconds.size());
  fmt::print("rate     {:.1f} GFLOP/s, {:.1f} GB/s of weights ({} in {} experts)\n", figures.gflops,
             figures.gbps, HumanBytes(figures.weight_bytes), result.touched_experts);
  fmt::print("{}", LoadHistogram(result.load));
  if (result.verification) {
    fmt::print("{}", ToText(*result.verification));
  }
}

int Run(const RunOptions& options, bool json) {
  CheckOptions(options);
  const Device device = ParseDevice(options.device);
  const Skew skew = ParseSkew(options.skew);
  LimitThreads(options.threads);
  LayerPlan plan = ResolveLayer(options.layer);
  for (const std::string& note : plan.notes) {
    PrintNote(note);
  }
  // Cheap refusals come before the weights are made.
  const Tokens tokens = LoadTokens(options, plan.spec);
  const std::vector<int32_t> replay = options.replay.empty()
                                          ? std::vector<int32_t>{}
                                          : ReadReplay(options.replay, tokens.count, plan.spec);
  PlanOptions plan_options;
  plan_options.max_tokens = std::max<int64_t>(tokens.count, 1);
  plan_options.num_threads = options.threads;
  CheckPacked(plan, device);
  (void)MakePlan(plan.spec, device, plan_options);
  std::optional<Session> session;
  std::vector<float> logits;
  const double setup_seconds = TimeSeconds([&] {
    session.emplace(LoadLayer(plan, options.layer.seed), plan_options, device);
    logits = skew == Skew::kRouter
                 ? RouterLogits(tokens, session->layer())
                 : SkewedLogits(skew, tokens.count, plan.spec, options.layer.seed, 0);
  });
  const MoeInputs inputs = MakeInputs(session->layer(), tokens, logits, replay);
  RunResult result = Execute(options, *session, inputs);
  result.setup_seconds = setup_seconds;
  if (json) {
    PrintJson(ToJson(result, *session, tokens.count, plan.name));
  } else {
    PrintText(result, *session, tokens.count, plan.name);
  }
  const bool failed = result.verification && !result.verification->passed;
  return failed ? kExitVerificationFailed : kExitOk;
}

}  // namespace

void AddRunCommand(CLI::App& app, CommandContext* context) {
  CLI::App* command =
      app.add_subcommand("run", "Run one layer and verify sampled tokens against the oracle");
  auto options = std::make_shared<RunOptions>();
  AddLayerOptions(*command, &options->layer, true);
  AddPackedOption(*command, &options->layer);
  AddDeviceOption(*command, &options->device);
  CLI::Option* tokens =
      command->add_option("--tokens", options->tokens, "Generated tokens")->capture_default_str();
  command
      ->add_option("--input", options->input,
                   "Tokens [T, hidden] from a .safetensors or .npy file instead")
      ->excludes(tokens);
  command->add_option("--output", options->output,
                      "Write output, expert_ids, routing_weights and replay (.safetensors)");
  command->add_option("--replay", options->replay,
                      "Force the expert ids [T, top_k] of a .safetensors or .npy file");
  command->add_option("--check", options->check,
                      "Verify the output in this file instead of this run's own");
  command->add_option("--skew", options->skew, "Routing: router, balanced, uniform, zipf or hot")
      ->capture_default_str();
  command->add_option("--verify", options->verify, "Tokens to verify; 0: none")
      ->capture_default_str();
  command->add_option("--repeat", options->repeat, "Timed calls")->capture_default_str();
  command->add_option("--threads", options->threads, "0: all")->capture_default_str();
  AddCommonOptions(*command, context);
  command->final_callback(
      [options, context] { context->exit_code = Run(*options, context->common.json); });
}

}  // namespace hopyard::cli
