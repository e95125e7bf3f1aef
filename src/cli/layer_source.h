// SPDX-License-Identifier: Apache-2.0
// A layer to work on: a preset's or a spec file's shape with random weights, or a checkpoint's.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hopyard/checkpoint.h"
#include "hopyard/spec.h"
#include "hopyard/weights.h"

#include "bench/shapes.h"
#include "cli/owned_layer.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11 has it so
class App;
}

namespace hopyard::cli {

// What the user asked for.
struct LayerRequest {
  std::string target;       // preset name, .json file that states a spec, or checkpoint directory
  std::string weights;      // empty: as published
  std::string activations;  // empty: the default for the weights
  int layer = -1;           // checkpoint layer; -1: the first with experts
  int experts = 0;          // presets: fewer experts than published; 0: all
  bool packed = false;      // WeightsDesc::packed of the weights on a GPU
  uint64_t seed = 1;
};

// Adds the target argument and the options above to a command; true where the target may be left
// out, which is then the command's to check.
void AddLayerOptions(CLI::App& command, LayerRequest* request, bool with_weights,
                     bool without_target = false);
// For commands that call CheckPacked before they load the layer.
void AddPackedOption(CLI::App& command, LayerRequest* request);

// The layer without its weights in memory.
struct LayerPlan {
  std::string name;
  MoeSpec spec;
  std::shared_ptr<const bench::ModelShape> stated;  // by a spec file
  const bench::ModelShape* preset = nullptr;        // or the same as `stated`; or
  std::optional<CheckpointLayer> checkpoint;
  bool requantise = false;  // the checkpoint's weights change format
  bool packed = false;
  std::vector<std::string> notes;
};

// Throws Error for unknown names, files and formats.
[[nodiscard]] LayerPlan ResolveLayer(const LayerRequest& request);

// Everything a layer needs at run time except tokens.
struct LoadedLayer {
  MoeSpec spec;
  WeightsDesc weights;
  std::shared_ptr<const OwnedLayer> owned;  // null for a checkpoint's own weights
  std::vector<float> router_weight;         // [E, H]
  std::vector<float> router_bias;           // [E] or empty
  std::vector<float> routing_bias;          // [E] or empty
  bool packed = false;                      // on a GPU
};

// Throws Error where --packed asks for what Weights on the device refuse. The orders that
// the weights then have there, K-major where nothing is packed.
WeightOrders CheckPacked(const LayerPlan& plan, Device device);

// Bytes that LoadLayer will allocate.
[[nodiscard]] int64_t LoadBytes(const LayerPlan& plan);

// Checks memory, then makes or reads the weights.
[[nodiscard]] LoadedLayer LoadLayer(const LayerPlan& plan, uint64_t seed);

// f32, bf16 or f16 elements, contiguous, as floats.
[[nodiscard]] std::vector<float> ToFloats(const TensorView& tensor);

}  // namespace hopyard::cli
