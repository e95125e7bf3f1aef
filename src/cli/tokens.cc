// SPDX-License-Identifier: Apache-2.0
#include "cli/tokens.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

#include "hopyard/checkpoint.h"
#include "hopyard/quantize.h"

#include "cli/npy.h"
#include "cli/random.h"
#include "core/error.h"
#include "core/parallel.h"

namespace hopyard::cli {
namespace {

constexpr uint64_t kTokenPurpose = 21;
constexpr uint64_t kNoisePurpose = 22;
constexpr uint64_t kRankPurpose = 23;
// Far apart for every score: sigmoid(-4) + any small bias stays below sigmoid(3).
constexpr float kChosenLogit = 3.0F;
constexpr float kOtherLogit = -4.0F;
constexpr float kNoiseScale = 0.05F;

bool EndsWith(std::string_view text, std::string_view ending) {
  return text.size() >= ending.size() && text.substr(text.size() - ending.size()) == ending;
}

void CheckShape(const std::string& path, const TensorView& view, int64_t rows, int64_t cols) {
  const bool ok = view.ndim == 2 && (rows < 0 || view.shape[0] == rows) && view.shape[1] == cols;
  if (ok) {
    return;
  }
  std::string got;
  for (int d = 0; d < view.ndim; ++d) {
    got += (d > 0 ? ", " : "") + std::to_string(view.shape.at(static_cast<size_t>(d)));
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << path << ": the tensor is [" << got << "]; wanted ["
      << (rows < 0 ? std::string("tokens") : std::to_string(rows)) << ", " << cols << "]";
}

// A tensor of a .npy or .safetensors file, with what keeps it in memory.
struct FileTensor {
  std::optional<NpyArray> npy;
  std::optional<SafetensorsFile> file;
  TensorView view;

  // Throws unless the tensor is [rows, cols]; rows < 0: any.
  FileTensor Checked(const std::string& path, int64_t rows, int64_t cols) && {
    CheckShape(path, view, rows, cols);
    return std::move(*this);
  }
};

template <size_t kNames>
FileTensor ReadTensor(const std::string& path, const std::array<std::string_view, kNames>& names) {
  FileTensor result;
  if (EndsWith(path, ".npy")) {
    result.npy = ReadNpy(path);
    result.view = result.npy->View();
    return result;
  }
  HOPYARD_CHECK(EndsWith(path, ".safetensors"), kInvalidArgument)
      << path << ": wanted a .safetensors or .npy file";
  result.file = SafetensorsFile::Open(path);
  const std::vector<std::string> present = result.file->names();
  for (const std::string_view name : names) {
    if (std::find(present.begin(), present.end(), name) != present.end()) {
      result.view = result.file->Tensor(name);
      return result;
    }
  }
  HOPYARD_CHECK(present.size() == 1, kInvalidArgument)
      << path << " holds " << present.size() << " tensors, none named " << names[0]
      << "; name one so";
  result.view = result.file->Tensor(present.front());
  return result;
}

Tokens ToTokens(const std::string& path, const FileTensor& file) {
  const DType dtype = file.view.dtype;
  HOPYARD_CHECK(dtype == DType::kFloat32 || dtype == DType::kBf16 || dtype == DType::kFp16,
                kInvalidArgument)
      << path << ": the tensor is " << ToString(dtype) << "; wanted f32, f16 or bf16";
  const int64_t count = file.view.shape[0];
  const int64_t width = file.view.shape[1];
  Tokens tokens{count, width, Buffer(count * width * SizeOf(DType::kBf16))};
  QuantizedView destination;
  destination.codes = tokens.View();
  Quantize(file.view, destination);
  return tokens;
}

float Dot(const float* a, const float* b, int64_t count) {
  constexpr int kLanes = 16;
  std::array<float, kLanes> sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[static_cast<size_t>(lane)] += a[i + lane] * b[i + lane];
    }
  }
  float sum = std::accumulate(sums.begin(), sums.end(), 0.0F);
  for (; i < count; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

// Adding Gumbel noise to log-probabilities makes top-k draw without replacement from them.
float Gumbel(uint64_t seed, uint64_t index) {
  return static_cast<float>(-std::log(-std::log(Uniform(seed, index))));
}

// log-probability of every expert.
std::vector<float> SkewLogProbabilities(Skew skew, int experts, uint64_t seed) {
  std::vector<float> values(static_cast<size_t>(experts), 0.0F);
  if (skew == Skew::kHot) {
    values[static_cast<size_t>(experts / 3)] = 16.0F;
  }
  if (skew == Skew::kZipf) {
    std::vector<int> order(static_cast<size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    const uint64_t stream = StreamSeed(seed, kRankPurpose, 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return RandomBits(stream, static_cast<uint64_t>(a)) <
             RandomBits(stream, static_cast<uint64_t>(b));
    });
    for (int rank = 0; rank < experts; ++rank) {
      values[static_cast<size_t>(order[static_cast<size_t>(rank)])] =
          -std::log(static_cast<float>(rank + 1));
    }
  }
  return values;
}

}  // namespace

TensorView Tokens::View() const {
  return TensorView::Contiguous(values.data(), DType::kBf16, {count, hidden_size});
}

Tokens RandomTokens(int64_t count, int64_t hidden_size, uint64_t seed) {
  Tokens tokens{count, hidden_size, Buffer(count * hidden_size * SizeOf(DType::kBf16))};
  static const GaussianSource source(1.0);
  source.Fill(tokens.values.as<uint16_t>(), count * hidden_size,
              StreamSeed(seed, kTokenPurpose, 0));
  return tokens;
}

Tokens ReadTokens(const std::string& path, int64_t hidden_size) {
  constexpr std::array<std::string_view, 3> kNames = {"hidden_states", "tokens", "input"};
  return ToTokens(path, ReadTensor(path, kNames).Checked(path, -1, hidden_size));
}

Tokens ReadOutput(const std::string& path, int64_t tokens, int64_t hidden_size) {
  constexpr std::array<std::string_view, 1> kNames = {"output"};
  return ToTokens(path, ReadTensor(path, kNames).Checked(path, tokens, hidden_size));
}

std::vector<int32_t> ReadReplay(const std::string& path, int64_t tokens, const MoeSpec& spec) {
  constexpr std::array<std::string_view, 2> kNames = {"replay", "expert_ids"};
  const FileTensor file = ReadTensor(path, kNames).Checked(path, tokens, spec.top_k);
  const DType dtype = file.view.dtype;
  HOPYARD_CHECK(dtype == DType::kInt16 || dtype == DType::kInt32, kInvalidArgument)
      << path << ": the expert ids are " << ToString(dtype) << "; wanted i16 or i32";
  const auto count = static_cast<size_t>(file.view.numel());
  std::vector<int32_t> ids(count);
  if (dtype == DType::kInt16) {
    std::copy_n(file.view.as<const int16_t>(), count, ids.begin());
  } else {
    std::copy_n(file.view.as<const int32_t>(), count, ids.begin());
  }
  for (size_t i = 0; i < count; ++i) {
    HOPYARD_CHECK(ids[i] >= -1 && ids[i] < spec.num_experts, kInvalidArgument)
        << path << ": expert id " << ids[i] << " at token " << i / static_cast<size_t>(spec.top_k)
        << "; wanted -1 .. " << spec.num_experts - 1;
  }
  return ids;
}

Skew ParseSkew(std::string_view name) {
  for (const Skew skew :
       {Skew::kRouter, Skew::kBalanced, Skew::kUniform, Skew::kZipf, Skew::kHot}) {
    if (name == ToString(skew)) {
      return skew;
    }
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << "--skew is '" << name << "'; wanted router, balanced, uniform, zipf or hot";
  return Skew::kRouter;
}

std::string_view ToString(Skew skew) {
  switch (skew) {
    case Skew::kRouter:
      return "router";
    case Skew::kBalanced:
      return "balanced";
    case Skew::kUniform:
      return "uniform";
    case Skew::kZipf:
      return "zipf";
    case Skew::kHot:
      return "hot";
  }
  return "?";
}

std::vector<float> RouterLogits(const Tokens& tokens, const LoadedLayer& layer) {
  const int64_t experts = layer.spec.num_experts;
  const int64_t hidden = layer.spec.hidden_size;
  HOPYARD_CHECK(static_cast<int64_t>(layer.router_weight.size()) == experts * hidden,
                kInvalidArgument)
      << "the router weight has " << layer.router_weight.size() << " elements; wanted [" << experts
      << ", " << hidden << "]";
  const std::vector<float> values = ToFloats(tokens.View());
  std::vector<float> logits(static_cast<size_t>(tokens.count * experts));
  ParallelFor(0, tokens.count, 1, MaxThreads(), [&](int64_t token, int /*thread*/) {
    const float* x = values.data() + token * hidden;
    float* out = logits.data() + token * experts;
    for (int64_t expert = 0; expert < experts; ++expert) {
      const float bias =
          layer.router_bias.empty() ? 0.0F : layer.router_bias[static_cast<size_t>(expert)];
      out[expert] = Dot(x, layer.router_weight.data() + expert * hidden, hidden) + bias;
    }
  });
  return logits;
}

std::vector<float> SkewedLogits(Skew skew, int64_t tokens, const MoeSpec& spec, uint64_t seed,
                                int64_t first_token) {
  const int64_t experts = spec.num_experts;
  const uint64_t stream = StreamSeed(seed, kNoisePurpose, static_cast<uint64_t>(first_token));
  const std::vector<float> offsets = SkewLogProbabilities(skew, spec.num_experts, seed);
  std::vector<float> logits(static_cast<size_t>(tokens * experts));
  for (int64_t token = 0; token < tokens; ++token) {
    float* out = logits.data() + token * experts;
    for (int64_t expert = 0; expert < experts; ++expert) {
      const float noise = Gumbel(stream, static_cast<uint64_t>(token * experts + expert));
      out[expert] = skew == Skew::kBalanced ? kOtherLogit + kNoiseScale * std::tanh(noise)
                                            : offsets[static_cast<size_t>(expert)] + noise;
    }
    if (skew == Skew::kBalanced) {
      // Neighbouring experts, so that grouped selection keeps them together.
      for (int64_t choice = 0; choice < spec.top_k; ++choice) {
        const int64_t slot = (first_token + token) * spec.top_k + choice;
        out[slot % experts] += kChosenLogit - kOtherLogit;
      }
    }
  }
  return logits;
}

}  // namespace hopyard::cli
