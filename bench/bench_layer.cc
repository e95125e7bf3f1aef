// SPDX-License-Identifier: Apache-2.0
// Times the Hopper stages in a row (route, permute, GEMM1, GEMM2, finalize; logits in, output out)
// on the named models' layers in BF16, one JSON line per number of tokens:
//
//   bench_layer COMMIT [MODEL ...]
//
// A CUDA graph holds kCalls calls with as many uniformly random logits, so that weights are read
// cold.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <iostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "bench/gpu.h"
#include "bench/shapes.h"
#include "tests/gpu/layer_sm90.h"

namespace hopyard::bench {
namespace {

constexpr int kCalls = 8;
constexpr int64_t kTokenCounts[] = {1, 2, 4, 8, 64, 256, 1024, 4096, 16384};

// Logits of one call, and the experts that its tokens touch.
struct Logits {
  std::vector<float> values;
  int64_t touched = 0;

  Logits(const MoeSpec& spec, int64_t tokens, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<bool> used(static_cast<size_t>(spec.num_experts));
    std::vector<std::pair<float, int>> row(used.size());
    for (int64_t t = 0; t < tokens; ++t) {
      for (size_t e = 0; e < row.size(); ++e) {
        row[e] = {static_cast<float>(random() >> 8) * 0x1p-24F, static_cast<int>(e)};
        values.push_back(row[e].first);
      }
      std::partial_sort(row.begin(), row.begin() + spec.top_k, row.end(), std::greater<>());
      for (int k = 0; k < spec.top_k; ++k) {
        used[static_cast<size_t>(row[static_cast<size_t>(k)].second)] = true;
      }
    }
    touched = std::count(used.begin(), used.end(), true);
  }
};

struct LayerWeights {
  DeviceBuffer<uint16_t> gemm1;
  DeviceBuffer<uint16_t> gemm2;

  explicit LayerWeights(const MoeSpec& spec)
      : gemm1(Elements(spec, 2 * spec.intermediate_size)),
        gemm2(Elements(spec, spec.intermediate_size)) {
    FillRandom(gemm1.get(), Elements(spec, 2 * spec.intermediate_size));
    FillRandom(gemm2.get(), Elements(spec, spec.intermediate_size));
  }
  static int64_t Elements(const MoeSpec& spec, int64_t rows) {
    return spec.num_experts * rows * spec.hidden_size;
  }
};

void BenchTokens(const Machine& machine, const ModelShape& shape, const LayerWeights& weights,
                 int64_t tokens) {
  const MoeSpec& spec = shape.spec;
  std::vector<DeviceBuffer<float>> logits;
  double touched = 0.0;
  for (unsigned i = 0; i < kCalls; ++i) {
    const Logits drawn(spec, tokens, 100 + i);
    touched += static_cast<double>(drawn.touched) / kCalls;
    logits.emplace_back(drawn.values);
  }
  const DeviceBuffer<uint16_t> x(tokens * spec.hidden_size);
  FillRandom(x.get(), tokens * spec.hidden_size);
  const DeviceBuffer<uint16_t> output(tokens * spec.hidden_size);
  const int tile = test::TileFor(spec, tokens);
  test::LayerSm90 layer(spec, tokens, tile, weights.gemm1.get(), weights.gemm2.get());
  const std::vector<double> times = TimeInGraph(kCalls, [&](int i, cudaStream_t stream) {
    layer.Run(x.get(), logits[static_cast<size_t>(i)].get(), nullptr, nullptr, output.get(),
              stream);
  });
  const double matrices = 3.0 * static_cast<double>(spec.hidden_size * spec.intermediate_size);
  const double bytes =
      2.0 * touched * matrices + 4.0 * static_cast<double>(tokens * spec.hidden_size);
  const double flops = 2.0 * static_cast<double>(tokens * spec.top_k) * matrices;
  const double floor_us =
      std::max(machine.ceilings.launch_us + bytes / machine.ceilings.bytes_per_us,
               flops / machine.ceilings.flops_per_us);
  const double median = times[times.size() / 2];
  const nlohmann::ordered_json line = {{"gpu", machine.gpu},
                                       {"commit", machine.commit},
                                       {"model", shape.name},
                                       {"weights", "bf16"},
                                       {"activations", "bf16"},
                                       {"tokens", tokens},
                                       {"routing", "uniform"},
                                       {"median_us", median},
                                       {"p10_us", times[times.size() / 10]},
                                       {"p90_us", times[times.size() * 9 / 10]},
                                       {"floor_us", floor_us},
                                       {"of_floor", floor_us / median},
                                       {"tactic", "stages, tiles of " + std::to_string(tile)},
                                       {"graph", true},
                                       {"cold_l2", true}};
  std::cout << line.dump() << std::endl;
}

int Run(const std::vector<std::string>& arguments) {
  const Machine machine = DescribeMachine(arguments.front());
  for (size_t i = 1; i < arguments.size(); ++i) {
    const ModelShape* shape = FindShape(arguments[i]);
    HOPYARD_CHECK(shape != nullptr, kInvalidArgument)
        << "no model " << arguments[i] << "; known: " << ShapeNames();
    const LayerWeights weights(shape->spec);
    for (const int64_t tokens : kTokenCounts) {
      BenchTokens(machine, *shape, weights, tokens);
    }
  }
  return 0;
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: bench_layer COMMIT MODEL ...; models: " << hopyard::bench::ShapeNames()
              << '\n';
    return 2;
  }
  try {
    return hopyard::bench::Run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "bench_layer: " << error.what() << '\n';
    return 1;
  }
}
