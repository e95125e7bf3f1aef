// SPDX-License-Identifier: Apache-2.0
// hopyard info: the machine, the version and the backends.
#include <memory>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/core.h>

#include "hopyard/hopyard.h"

#include "bench/shapes.h"
#include "cli/commands.h"
#include "cli/machine.h"

namespace hopyard::cli {
namespace {

struct InfoOptions {
  bool measure = false;
};

std::vector<GpuInfo> Gpus() {
  std::vector<GpuInfo> gpus(static_cast<size_t>(CountGpus()));
  for (size_t i = 0; i < gpus.size(); ++i) {
    gpus[i] = GpuInfoOf(static_cast<int>(i));
  }
  return gpus;
}

// By what a plan for any layer says.
bool HasGpuBackend() {
  MoeSpec spec;
  spec.hidden_size = 128;
  spec.intermediate_size = 128;
  spec.num_experts = 8;
  spec.top_k = 2;
  PlanOptions options;
  options.max_tokens = 1;
  return Explain(spec, {DeviceKind::kCuda, 0}, options).supported;
}

void Run(const InfoOptions& options, bool json) {
  const Machine machine = DescribeMachine();
  const Isa isa = BestIsa();
  const std::vector<GpuInfo> gpus = Gpus();
  const Json backends = HasGpuBackend() ? Json::array({"cpu", "sm90"}) : Json::array({"cpu"});
  Json result = {{"version", HOPYARD_VERSION},
                 {"backends", backends},
                 {"cpu",
                  {{"model", machine.cpu_model},
                   {"logical_cpus", machine.logical_cpus},
                   {"threads", machine.threads},
                   {"isa", ToString(isa)},
                   {"last_level_cache_bytes", machine.last_level_cache_bytes}}},
                 {"memory_bytes", machine.memory_bytes},
                 {"memory_available_bytes", machine.memory_available_bytes}};
  for (const GpuInfo& gpu : gpus) {
    result["gpus"].push_back(
        {{"name", gpu.name},
         {"compute", fmt::format("{}.{}", gpu.compute_major, gpu.compute_minor)},
         {"multiprocessors", gpu.multiprocessors},
         {"memory_bytes", gpu.memory_bytes},
         {"memory_free_bytes", gpu.free_bytes},
         {"l2_bytes", gpu.l2_bytes}});
  }
  for (const bench::ModelShape& shape : bench::ModelShapes()) {
    result["presets"].push_back(shape.name);
  }
  if (options.measure) {
    result["read_gbps"] = ReadBandwidth(machine.threads).Measure();
    result["peak_gflops"] = MeasurePeakGflops(isa, machine.threads);
  }
  if (json) {
    PrintJson(result);
    return;
  }
  fmt::print("hopyard   {}\nbackends  {}\n", HOPYARD_VERSION,
             HasGpuBackend() ? "cpu, sm90 (Hopper)" : "cpu");
  fmt::print("cpu       {}, {} logical CPUs, {} threads\n", machine.cpu_model, machine.logical_cpus,
             machine.threads);
  fmt::print("isa       {}\n", ToString(isa));
  fmt::print("memory    {} of {} available\n", HumanBytes(machine.memory_available_bytes),
             HumanBytes(machine.memory_bytes));
  fmt::print("cache     {} last level\n", HumanBytes(machine.last_level_cache_bytes));
  for (size_t i = 0; i < gpus.size(); ++i) {
    fmt::print("cuda:{}    {}, compute {}.{}, {} of {} free{}\n", i, gpus[i].name,
               gpus[i].compute_major, gpus[i].compute_minor, HumanBytes(gpus[i].free_bytes),
               HumanBytes(gpus[i].memory_bytes),
               WhyUnsupported(gpus[i]).empty() ? "" : "; the backend needs compute 9.0");
  }
  if (options.measure) {
    fmt::print("read      {:.1f} GB/s\nfp32      {:.0f} GFLOP/s\n",
               result["read_gbps"].get<double>(), result["peak_gflops"].get<double>());
  }
  fmt::print("presets   {}\n", bench::ShapeNames());
}

}  // namespace

void AddInfoCommand(CLI::App& app, CommandContext* context) {
  CLI::App* command = app.add_subcommand("info", "The machine, the version and the backends");
  auto options = std::make_shared<InfoOptions>();
  command->add_flag("--measure", options->measure,
                    "Measure memory read bandwidth and FP32 peak (a second)");
  AddCommonOptions(*command, context);
  command->final_callback([options, context] { Run(*options, context->common.json); });
}

}  // namespace hopyard::cli
