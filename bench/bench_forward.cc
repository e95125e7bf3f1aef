// SPDX-License-Identifier: Apache-2.0
// Times whole layers (logits in, output out) of the named models on a Hopper GPU, one JSON line per
// case:
//
//   bench_forward COMMIT CASE ... [--tokens=1,8,64] [--routing=uniform,balanced,zipf,hot]
//                 [--tactic=GEMM1[+GEMM2]]
//
// CASE as in bench/cases.h. A CUDA graph holds kCalls calls with as many routings over weights that
// do not fit into the L2 cache together, so that weights are read cold; the time of a call is the
// replay's over kCalls.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hopyard/forward.h"

#include "bench/cases.h"
#include "bench/gpu.h"
#include "bench/layer_weights.h"
#include "bench/routings.h"
#include "gemm/sm90/operands.h"

namespace hopyard::bench {
namespace {

constexpr int kCalls = 8;

std::string ChosenKernels(const Plan& plan) {
  std::string names;
  for (const Candidate& candidate : plan.Explain().candidates) {
    names += candidate.chosen ? (names.empty() ? "" : "+") + candidate.kernel : "";
  }
  return names;
}

void BenchTokens(const Machine& machine, const Case& one,
                 const std::vector<std::unique_ptr<LayerWeights>>& layers, int64_t tokens,
                 const std::string& routing) {
  const MoeSpec& spec = one.shape.spec;
  std::vector<DeviceBuffer<float>> logits;
  double touched = 0.0;
  for (unsigned i = 0; i < kCalls; ++i) {
    const Logits drawn(spec, tokens, routing, 100 + i);
    touched += static_cast<double>(drawn.touched) / kCalls;
    logits.emplace_back(drawn.values);
  }
  const DeviceBuffer<uint16_t> x(tokens * spec.hidden_size);
  FillRandom(x.get(), tokens * spec.hidden_size);
  const DeviceBuffer<uint16_t> output(tokens * spec.hidden_size);
  const DeviceBuffer<float> bias(std::vector<float>(static_cast<size_t>(spec.num_experts), 0.0F));
  PlanOptions options;
  options.max_tokens = tokens;
  // The plan for this number of tokens alone: what it names is what runs.
  options.batch_invariant = true;
  options.tactic = one.tactic;
  const Plan plan = MakePlan(spec, kGpu, options);
  const DeviceBuffer<uint8_t> workspace(plan.workspace_bytes());
  MoeInputs inputs;
  inputs.hidden_states =
      TensorView::Contiguous(x.get(), DType::kBf16, {tokens, spec.hidden_size}, kGpu);
  if (spec.routing.use_bias) {
    inputs.routing_bias =
        TensorView::Contiguous(bias.get(), DType::kFloat32, {spec.num_experts}, kGpu);
  }
  MoeOutputs outputs;
  outputs.output =
      TensorView::Contiguous(output.get(), DType::kBf16, {tokens, spec.hidden_size}, kGpu);
  const double matrices = 3.0 * static_cast<double>(spec.hidden_size * spec.intermediate_size);
  CaseResult result;
  result.model = one.shape.name;
  result.tokens = tokens;
  result.bytes = touched / spec.num_experts * static_cast<double>(layers.front()->bytes()) +
                 4.0 * static_cast<double>(tokens * spec.hidden_size);
  result.flops = 2.0 * static_cast<double>(tokens * spec.top_k) * matrices;
  result.tactic = ChosenKernels(plan);
  result.times = TimeInGraph(kCalls, [&](int i, cudaStream_t stream) {
    inputs.logits = TensorView::Contiguous(logits[static_cast<size_t>(i)].get(), DType::kFloat32,
                                           {tokens, spec.num_experts}, kGpu);
    Forward(plan, layers[static_cast<size_t>(i) % layers.size()]->weights, inputs, outputs,
            {workspace.get(), static_cast<size_t>(plan.workspace_bytes())}, {stream});
  });
  const gemm::sm90::LayerOperands operands = gemm::sm90::OperandsOf(spec.weights, spec.activations);
  PrintCase(MachineFor(machine, operands.x.dtype), result,
            {{"weights", ToString(spec.weights)},
             {"activations", ToString(spec.activations)},
             {"routing", routing}});
}

void BenchLayer(const Machine& machine, const Case& one) {
  std::vector<std::unique_ptr<LayerWeights>> layers;
  int64_t bytes = 0;
  while (layers.empty() || (bytes < kColdBytes && layers.size() < kCalls)) {
    layers.push_back(std::make_unique<LayerWeights>(one.shape.spec));
    bytes += layers.back()->bytes();
  }
  for (const std::string& routing : one.routings) {
    for (const int64_t tokens : one.tokens) {
      BenchTokens(machine, one, layers, tokens, routing);
    }
  }
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  return hopyard::bench::BenchCases(argc, argv, hopyard::bench::BenchLayer);
}
