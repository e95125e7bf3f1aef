// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"
#include "hopyard/weights.h"

namespace hopyard {

// One MoE layer read from a Hugging Face checkpoint directory.
struct CheckpointLayer {
  std::string name;          // "model.layers.3.mlp"
  MoeSpec spec;              // weights and activations as the checkpoint stores them
  WeightsDesc weights;       // views into the mapped files, read-only; `owner` keeps the maps alive
  TensorView router_weight;  // [E, H]: logits = hidden @ router_weight^T + router_bias
  TensorView router_bias;    // [E] linear bias of the router; absent for most models
  TensorView routing_bias;   // [E] selection bias (DeepSeek e_score_correction_bias); may be absent
};

// A directory with config.json and one or more .safetensors files. Files are memory-mapped and
// treated as untrusted: every header length, offset, dtype, shape product and overlap is checked
// before any access. Errors (kInvalidArgument) name file, tensor, got and wanted.
// Families: mixtral, qwen3_moe, deepseek_v3, gpt_oss, llama4 (text), glm4_moe.
class Checkpoint {
 public:
  static Checkpoint Open(const std::string& directory);

  [[nodiscard]] std::string_view model_type() const;
  [[nodiscard]] std::vector<int> moe_layers() const;  // indices of layers that have experts
  [[nodiscard]] CheckpointLayer Layer(int index) const;
  [[nodiscard]] std::vector<std::string> tensor_names() const;
  [[nodiscard]] TensorView Tensor(std::string_view name) const;  // view of the mapped file

  struct Impl;

 private:
  Checkpoint() = default;  // Open makes them: there is no empty one

  std::shared_ptr<const Impl> impl_;
};

// A tensor to be written, and a safetensors file writer (quantize command, tests).
struct NamedTensor {
  std::string name;
  std::string dtype;  // safetensors name: "BF16", "F8_E4M3", "U8", "F32", ...
  std::vector<int64_t> shape;
  const void* data = nullptr;
};
// Atomic: writes a temporary file beside `path` and renames it.
void WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors);

// A .safetensors file as views of the mapped file; tokens files of the CLI use it as well.
class SafetensorsFile {
 public:
  static SafetensorsFile Open(const std::string& path);
  [[nodiscard]] std::vector<std::string> names() const;
  [[nodiscard]] TensorView Tensor(std::string_view name) const;
  [[nodiscard]] std::shared_ptr<const void> owner() const;

  struct Impl;

 private:
  SafetensorsFile() = default;

  std::shared_ptr<const Impl> impl_;
};

}  // namespace hopyard
