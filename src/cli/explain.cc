// SPDX-License-Identifier: Apache-2.0
// hopyard explain: which kernel a layer gets, and why others are refused. Needs no weights and no
// device.
#include <memory>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/plan.h"

#include "cli/commands.h"
#include "cli/device_option.h"
#include "cli/layer_source.h"

namespace hopyard::cli {
namespace {

struct ExplainOptions {
  LayerRequest layer;
  int64_t tokens = 32;
  std::string device = "cpu";
};

Json ToJson(const Explanation& explanation) {
  Json candidates = Json::array();
  for (const Candidate& candidate : explanation.candidates) {
    candidates.push_back(
        {{"kernel", candidate.kernel}, {"chosen", candidate.chosen}, {"reason", candidate.reason}});
  }
  return {{"supported", explanation.supported},
          {"reason", explanation.reason},
          {"candidates", candidates}};
}

void Run(const ExplainOptions& options, bool json) {
  const LayerPlan layer = ResolveLayer(options.layer);
  PlanOptions plan_options;
  plan_options.max_tokens = options.tokens;
  const Device device = ParseDevice(options.device);
  plan_options.weight_orders = CheckPacked(layer, device);
  const Explanation explanation = Explain(layer.spec, device, plan_options);
  const int64_t workspace =
      explanation.supported ? MakePlan(layer.spec, device, plan_options).workspace_bytes() : 0;
  if (json) {
    Json result = {{"layer", layer.name},
                   {"device", ToString(device)},
                   {"spec", ToString(layer.spec)},
                   {"tokens", options.tokens},
                   {"weights_bytes", LayerBytes(layer.spec)},
                   {"workspace_bytes", workspace}};
    result.update(ToJson(explanation));
    PrintJson(result);
    return;
  }
  for (const std::string& note : layer.notes) {
    PrintNote(note);
  }
  fmt::print("layer      {}\nspec       {}\n", layer.name, ToString(layer.spec));
  fmt::print("weights    {}\n", HumanBytes(LayerBytes(layer.spec)));
  if (explanation.supported) {
    fmt::print("workspace  {} for {} tokens\n", HumanBytes(workspace), options.tokens);
  }
  fmt::print("{}\n", explanation.ToString());
}

}  // namespace

void AddExplainCommand(CLI::App& app, CommandContext* context) {
  CLI::App* command =
      app.add_subcommand("explain", "Which kernel a layer gets, and why others are refused");
  auto options = std::make_shared<ExplainOptions>();
  AddLayerOptions(*command, &options->layer, true);
  AddPackedOption(*command, &options->layer);
  AddDeviceOption(*command, &options->device);
  command->add_option("--tokens", options->tokens, "Capacity of the plan")->capture_default_str();
  AddCommonOptions(*command, context);
  command->final_callback([options, context] { Run(*options, context->common.json); });
}

}  // namespace hopyard::cli
