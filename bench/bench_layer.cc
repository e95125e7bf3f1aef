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
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

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
  const double matrices = 3.0 * static_cast<double>(spec.hidden_size * spec.intermediate_size);
  CaseResult result;
  result.model = shape.name;
  result.tokens = tokens;
  result.bytes = 2.0 * touched * matrices + 4.0 * static_cast<double>(tokens * spec.hidden_size);
  result.flops = 2.0 * static_cast<double>(tokens * spec.top_k) * matrices;
  result.tactic = "stages, tiles of " + std::to_string(tile);
  result.times = TimeInGraph(kCalls, [&](int i, cudaStream_t stream) {
    layer.Run(x.get(), logits[static_cast<size_t>(i)].get(), nullptr, nullptr, output.get(),
              stream);
  });
  PrintCase(machine, result);
}

void BenchModel(const Machine& machine, const ModelShape& shape) {
  const LayerWeights weights(shape.spec);
  for (const int64_t tokens : kTokenCounts) {
    BenchTokens(machine, shape, weights, tokens);
  }
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  return hopyard::bench::BenchModels(argc, argv, hopyard::bench::BenchModel);
}
