// SPDX-License-Identifier: Apache-2.0
// Tokens and router logits: read from files or generated.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/tensor.h"

#include "cli/buffer.h"
#include "cli/layer_source.h"

namespace hopyard::cli {

// Hidden states [T, H] in bf16.
struct Tokens {
  int64_t count = 0;
  int64_t hidden_size = 0;
  Buffer values;

  [[nodiscard]] TensorView View() const;
};

[[nodiscard]] Tokens RandomTokens(int64_t count, int64_t hidden_size, uint64_t seed);

// A .npy file (f4, f2) or a .safetensors file (f32, f16, bf16; its only tensor, or the one named
// hidden_states, tokens or input). Must be [T, hidden_size].
[[nodiscard]] Tokens ReadTokens(const std::string& path, int64_t hidden_size);

// The tensor "output" of a file that `run --output` or another implementation wrote, [T, H].
[[nodiscard]] Tokens ReadOutput(const std::string& path, int64_t tokens, int64_t hidden_size);

// Expert ids [T, K] from a .npy file (i2, i4) or the tensor "replay" or "expert_ids" of a
// .safetensors file. Ids at or above num_experts or below -1 are refused. `tokens` below 0: as many
// as there are.
[[nodiscard]] std::vector<int32_t> ReadReplay(const std::string& path, int64_t tokens,
                                              const MoeSpec& spec);

// How tokens spread over experts.
enum class Skew : uint8_t {
  kRouter,    // as the router matrix says
  kBalanced,  // every expert gets the same number of slots, give or take one
  kUniform,   // every token draws its experts uniformly
  kZipf,      // the expert of rank r is drawn with probability ~ 1 / r
  kHot,       // one expert is in every token, the rest are uniform
};

[[nodiscard]] Skew ParseSkew(std::string_view name);
[[nodiscard]] std::string_view ToString(Skew skew);

// logits [T, E] f32 = hidden @ router_weight^T + router_bias: a plain FP32 product.
[[nodiscard]] std::vector<float> RouterLogits(const Tokens& tokens, const LoadedLayer& layer);

// Logits [T, E] that make `layer`'s own routing rule choose experts with the given skew.
// `first_token` shifts the balanced pattern, so that consecutive batches rotate over experts.
[[nodiscard]] std::vector<float> SkewedLogits(Skew skew, int64_t tokens, const MoeSpec& spec,
                                              uint64_t seed, int64_t first_token);

}  // namespace hopyard::cli
