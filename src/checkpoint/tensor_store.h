// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "hopyard/tensor.h"

#include "checkpoint/safetensors.h"

namespace hopyard::checkpoint {

// All tensors of a checkpoint directory by name: model.safetensors; else the shards that
// model.safetensors.index.json lists; else every *.safetensors file. Every header is checked when
// the store is opened.
class TensorStore {
 public:
  explicit TensorStore(const std::string& directory);

  [[nodiscard]] bool Has(std::string_view name) const { return Find(name) != nullptr; }
  // Null when there is none.
  [[nodiscard]] const StoredTensor* Find(std::string_view name) const;
  // Error{kInvalidArgument} when there is none.
  [[nodiscard]] TensorView View(std::string_view name) const;
  [[nodiscard]] const std::string& PathOf(std::string_view name) const;  // of an existing tensor
  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::vector<std::string> names() const;  // sorted

 private:
  using File = SafetensorsFile::Impl;
  struct Location {
    const File* file = nullptr;
    const StoredTensor* tensor = nullptr;
  };

  const File* OpenFile(const std::string& name);
  void AddAll(const File* file);
  void AddShards(const std::string& index_path);

  std::string directory_;
  std::unordered_map<std::string, std::unique_ptr<const File>> files_;  // by file name
  std::unordered_map<std::string_view, Location> tensors_;              // keys live in the files
};

}  // namespace hopyard::checkpoint
