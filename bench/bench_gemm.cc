// SPDX-License-Identifier: Apache-2.0
// Times the grouped GEMMs of the named models' layers on a Hopper GPU, every kernel of the table
// that fits, and prints one JSON line per case:
//
//   bench_gemm COMMIT [MODEL ...]
//
// A CUDA graph holds kRoutings launches with as many uniformly random routings, so that weights are
// read cold; the time of a launch is the replay's over their number, median of 15 replays.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bench/gpu.h"
#include "bench/shapes.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::bench {
namespace {

namespace sm90 = gemm::sm90;

constexpr int kRoutings = 8;
constexpr int64_t kTokenCounts[] = {1, 8, 64, 256, 1024, 4096, 16384};

// One routing, laid out in tiles.
struct Tiles {
  std::vector<int32_t> row_to_token;
  std::vector<int32_t> expert;
  std::vector<int32_t> begin;
  std::vector<int32_t> end;
  int64_t touched = 0;
};

Tiles MakeTiles(const MoeSpec& spec, int64_t tokens, int tile, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::vector<int32_t>> rows(static_cast<size_t>(spec.num_experts));
  std::vector<int> ids(static_cast<size_t>(spec.num_experts));
  std::iota(ids.begin(), ids.end(), 0);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int k = 0; k < spec.top_k; ++k) {
      std::swap(ids[static_cast<size_t>(k)],
                ids[static_cast<size_t>(k) + random() % (ids.size() - static_cast<size_t>(k))]);
      rows[static_cast<size_t>(ids[static_cast<size_t>(k)])].push_back(static_cast<int32_t>(t));
    }
  }
  Tiles tiles;
  for (size_t e = 0; e < rows.size(); ++e) {
    const auto first = static_cast<int32_t>(tiles.row_to_token.size());
    const auto count = static_cast<int32_t>(rows[e].size());
    tiles.row_to_token.insert(tiles.row_to_token.end(), rows[e].begin(), rows[e].end());
    tiles.touched += count > 0 ? 1 : 0;
    for (int32_t at = 0; at < count; at += tile) {
      tiles.expert.push_back(static_cast<int32_t>(e));
      tiles.begin.push_back(first + at);
      tiles.end.push_back(first + std::min(at + tile, count));
    }
  }
  return tiles;
}

// A routing on the device.
struct DeviceTiles {
  int64_t count;
  DeviceBuffer<int32_t> row_to_token;
  DeviceBuffer<int32_t> expert;
  DeviceBuffer<int32_t> begin;
  DeviceBuffer<int32_t> end;
  DeviceBuffer<int32_t> num_tiles;

  explicit DeviceTiles(const Tiles& tiles)
      : count(static_cast<int64_t>(tiles.expert.size())),
        row_to_token(tiles.row_to_token),
        expert(tiles.expert),
        begin(tiles.begin),
        end(tiles.end),
        num_tiles(std::vector<int32_t>{static_cast<int32_t>(tiles.expert.size())}) {}
};

// What all cases of a model share: weights of both GEMMs and room for inputs and outputs.
struct Buffers {
  DeviceBuffer<uint16_t> gemm1;
  DeviceBuffer<uint16_t> gemm2;
  DeviceBuffer<uint16_t> x;
  DeviceBuffer<uint16_t> h;
  DeviceBuffer<uint16_t> y;

  explicit Buffers(const MoeSpec& spec)
      : gemm1(spec.num_experts * spec.gemm1_rows() * spec.hidden_size),
        gemm2(spec.num_experts * spec.hidden_size * spec.intermediate_size),
        x(MaxTokens() * spec.hidden_size),
        h(MaxTokens() * spec.top_k * spec.intermediate_size),
        y(MaxTokens() * spec.top_k * spec.hidden_size) {
    FillRandom(gemm1.get(), spec.num_experts * spec.gemm1_rows() * spec.hidden_size);
    FillRandom(gemm2.get(), spec.num_experts * spec.hidden_size * spec.intermediate_size);
    FillRandom(x.get(), MaxTokens() * spec.hidden_size);
    FillRandom(h.get(), MaxTokens() * spec.top_k * spec.intermediate_size);
  }
  static int64_t MaxTokens() {
    return *std::max_element(std::begin(kTokenCounts), std::end(kTokenCounts));
  }
};

sm90::GroupedGemmArgs MakeArgs(const MoeSpec& spec, const Buffers& buffers, bool gated,
                               const DeviceTiles& tiles) {
  sm90::GroupedGemmArgs args;
  args.experts = spec.num_experts;
  args.tile_expert = tiles.expert.get();
  args.tile_row_begin = tiles.begin.get();
  args.tile_row_end = tiles.end.get();
  args.num_tiles = tiles.num_tiles.get();
  args.max_tiles = tiles.count;
  args.weights = gated ? buffers.gemm1.get() : buffers.gemm2.get();
  args.rows = gated ? spec.gemm1_rows() : spec.hidden_size;
  args.k = gated ? spec.hidden_size : spec.intermediate_size;
  args.features = gated ? spec.intermediate_size : spec.hidden_size;
  args.up_begin = spec.intermediate_size;
  args.activation = gated ? ActivationKind::kSwiGlu : ActivationKind::kIdentity;
  args.x = gated ? buffers.x.get() : buffers.h.get();
  args.row_to_source = gated ? tiles.row_to_token.get() : nullptr;
  args.out = gated ? buffers.h.get() : buffers.y.get();
  args.row_stride = args.k;
  args.expert_stride = args.rows * args.k;
  args.x_pitch = args.k;
  args.out_pitch = args.features;
  return args;
}

void BenchCase(const Machine& machine, const ModelShape& shape, const Buffers& buffers, int kernel,
               int64_t tokens) {
  const sm90::KernelInfo info = sm90::KernelAt(kernel);
  std::vector<DeviceTiles> routings;
  std::vector<sm90::GroupedGemmArgs> launches;
  int64_t touched = 0;
  for (unsigned r = 0; r < kRoutings; ++r) {
    const Tiles tiles = MakeTiles(shape.spec, tokens, info.tokens, 100 + r);
    touched += tiles.touched;
    routings.emplace_back(tiles);
  }
  for (const DeviceTiles& tiles : routings) {
    launches.push_back(MakeArgs(shape.spec, buffers, info.gated, tiles));
  }
  const sm90::GroupedGemmArgs& args = launches.front();
  const double rows = static_cast<double>(tokens * shape.spec.top_k);
  const double experts = static_cast<double>(touched) / kRoutings;
  const double matrix = static_cast<double>(args.rows) * static_cast<double>(args.k);
  const double inputs =
      (info.gated ? static_cast<double>(tokens) : rows) * static_cast<double>(args.k);
  CaseResult result;
  result.model = shape.name;
  result.tokens = tokens;
  result.bytes = 2.0 * (experts * matrix + inputs + rows * static_cast<double>(args.features));
  result.flops = 2.0 * rows * matrix;
  result.tactic = info.name;
  result.times = TimeInGraph(kRoutings, [&](int i, cudaStream_t stream) {
    sm90::RunGroupedGemm(kernel, launches[static_cast<size_t>(i)], stream);
  });
  PrintCase(machine, result, {{"gemm", info.gated ? 1 : 2}});
}

void BenchModel(const Machine& machine, const ModelShape& shape) {
  const Buffers buffers(shape.spec);
  for (const int64_t tokens : kTokenCounts) {
    for (int kernel = 0; kernel < sm90::NumKernels(); ++kernel) {
      // Tiles of 16 tokens for 16384 tokens, or of 128 for one, are nobody's choice.
      const int64_t rows_per_expert =
          std::max<int64_t>(1, tokens * shape.spec.top_k / shape.spec.num_experts);
      const int tile = sm90::KernelAt(kernel).tokens;
      if (tile <= 16 * rows_per_expert && rows_per_expert <= 8 * tile) {
        BenchCase(machine, shape, buffers, kernel, tokens);
      }
    }
  }
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  return hopyard::bench::BenchModels(argc, argv, hopyard::bench::BenchModel);
}
