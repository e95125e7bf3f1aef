// SPDX-License-Identifier: Apache-2.0
// Times whole layers (logits in, output out) of the named models on a Hopper GPU, one JSON line per
// case:
//
//   bench_forward COMMIT CASE ... [--tokens=1,8,64] [--routing=uniform,balanced,zipf,hot]
//                 [--tactic=GEMM1[+GEMM2]] [--untuned] [--shared]
//
// CASE as in bench/cases.h. A CUDA graph holds kLayerCalls calls with as many routings over
// weights that do not fit into the L2 cache together, so that weights are read cold; the time of a
// call is the replay's over kLayerCalls. Kernels come from the tuning tables that plans look into
// unless --untuned or --tactic say otherwise.
#include <cstdint>
#include <string>

#include "bench/cases.h"
#include "bench/gpu.h"
#include "bench/layer_calls.h"
#include "gemm/sm90/operands.h"

namespace hopyard::bench {
namespace {

void BenchTokens(const Machine& machine, const Case& one, const Layers& layers, int64_t tokens,
                 const std::string& routing) {
  const MoeSpec& spec = one.shape.spec;
  const LayerCalls calls(spec, layers, tokens, routing);
  PlanOptions options;
  options.tactic = one.tactic;
  options.untuned = one.untuned;
  const Weights& weights = layers.front()->weights;
  options.weight_orders = OrdersOf(spec, weights.desc());
  const Plan plan = PlanFor(spec, tokens, options);
  const DeviceBuffer<uint8_t> workspace(plan.workspace_bytes());
  const double matrices = 3.0 * static_cast<double>(spec.hidden_size * spec.intermediate_size);
  CaseResult result;
  result.model = one.shape.name;
  result.tokens = tokens;
  result.bytes = calls.touched() / spec.num_experts * static_cast<double>(layers.front()->bytes()) +
                 static_cast<double>(layers.front()->shared_bytes()) +
                 4.0 * static_cast<double>(tokens * spec.hidden_size);
  result.flops = 2.0 * static_cast<double>(tokens * spec.slots_per_token()) * matrices;
  result.tactic = plan.Explain().Chosen();
  result.times = TimeInGraph(kLayerCalls, [&](int i, cudaStream_t stream) {
    calls.Enqueue(plan, {workspace.get(), static_cast<size_t>(plan.workspace_bytes())}, i, stream);
  });
  const gemm::sm90::LayerOperands operands = gemm::sm90::OperandsOf(spec.weights, spec.activations);
  PrintCase(MachineFor(machine, operands.x.dtype), result,
            {{"weights", ToString(spec.weights)},
             {"activations", ToString(spec.activations)},
             {"routing", routing},
             {"packed", one.packed},
             {"tuned", plan.Explain().ToString().find("tuned: ") != std::string::npos}});
}

void BenchLayer(const Machine& machine, const Case& one) {
  const Layers layers = ColdLayers(one.shape.spec, one.packed);
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
