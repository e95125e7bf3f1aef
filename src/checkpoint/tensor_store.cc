// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/tensor_store.h"

#include <algorithm>
#include <filesystem>

#include <nlohmann/json.hpp>

#include "checkpoint/json_file.h"
#include "checkpoint/text.h"
#include "core/error.h"

namespace hopyard::checkpoint {
namespace {

constexpr std::string_view kSuffix = ".safetensors";

bool Exists(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::exists(path, ignored);
}

// Files of the directory itself that end in .safetensors, sorted.
std::vector<std::string> ListFiles(const std::string& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    std::string name = entry->path().filename().string();
    if (name.size() > kSuffix.size() && name.ends_with(kSuffix)) {
      names.push_back(std::move(name));
    }
  }
  HOPYARD_CHECK(!error, kInvalidArgument)
      << Printable(directory) << ": cannot be listed: " << error.message();
  std::sort(names.begin(), names.end());
  return names;
}

// A shard is a file of the directory itself, whatever the index says.
void CheckShardName(const std::string& shard, const std::string& tensor, const std::string& index) {
  const bool plain = shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos &&
                     shard.find("..") == std::string::npos && shard.size() > kSuffix.size() &&
                     shard.ends_with(kSuffix) && shard.front() != '.';
  HOPYARD_CHECK(plain, kInvalidArgument)
      << Printable(index) << ": weight_map puts tensor '" << Printable(tensor) << "' into '"
      << Printable(shard)
      << "'; the name of a .safetensors file in the same directory is wanted, without '/' or '..'";
}

}  // namespace

TensorStore::TensorStore(const std::string& directory) : directory_(directory) {
  const std::string single = "model.safetensors";
  const std::string index = directory + "/model.safetensors.index.json";
  if (Exists(directory + "/" + single)) {
    AddAll(OpenFile(single));
    return;
  }
  if (Exists(index)) {
    AddShards(index);
    return;
  }
  const std::vector<std::string> names = ListFiles(directory);
  HOPYARD_CHECK(!names.empty(), kInvalidArgument)
      << Printable(directory)
      << ": has neither model.safetensors nor model.safetensors.index.json nor any other "
         ".safetensors file";
  for (const std::string& name : names) {
    AddAll(OpenFile(name));
  }
}

const TensorStore::File* TensorStore::OpenFile(const std::string& name) {
  std::unique_ptr<const File>& file = files_[name];
  if (!file) {
    file = std::make_unique<const File>(directory_ + "/" + name);
  }
  return file.get();
}

void TensorStore::AddAll(const File* file) {
  for (const StoredTensor& tensor : file->header.tensors) {
    const auto [at, added] = tensors_.try_emplace(tensor.name, Location{file, &tensor});
    HOPYARD_CHECK(added, kInvalidArgument)
        << Printable(directory_) << ": tensor '" << Printable(tensor.name) << "' is both in "
        << Printable(at->second.file->map.path()) << " and in " << Printable(file->map.path());
  }
}

void TensorStore::AddShards(const std::string& index_path) {
  const nlohmann::json index = ReadJsonObject(index_path, kMaxIndexBytes);
  const auto map = index.find("weight_map");
  HOPYARD_CHECK(map != index.end() && map->is_object(), kInvalidArgument)
      << Printable(index_path) << ": field 'weight_map' is "
      << (map == index.end() ? "missing" : map->type_name()) << "; an object is wanted";
  for (const auto& [name, value] : map->items()) {
    HOPYARD_CHECK(value.is_string(), kInvalidArgument)
        << Printable(index_path) << ": weight_map['" << Printable(name) << "'] is "
        << value.type_name() << "; a file name is wanted";
    const std::string& shard = value.get_ref<const std::string&>();
    CheckShardName(shard, name, index_path);
    const File* file = OpenFile(shard);
    const auto& tensors = file->header.tensors;
    const auto found = std::lower_bound(
        tensors.begin(), tensors.end(), name,
        [](const StoredTensor& tensor, const std::string& key) { return tensor.name < key; });
    HOPYARD_CHECK(found != tensors.end() && found->name == name, kInvalidArgument)
        << Printable(index_path) << ": weight_map puts tensor '" << Printable(name) << "' into "
        << Printable(shard) << ", which does not hold it";
    tensors_.emplace(found->name, Location{file, &*found});
  }
}

const StoredTensor* TensorStore::Find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : found->second.tensor;
}

TensorView TensorStore::View(std::string_view name) const {
  const auto found = tensors_.find(name);
  HOPYARD_CHECK(found != tensors_.end(), kInvalidArgument)
      << Printable(directory_) << ": has no tensor '" << Printable(name) << "' among its "
      << tensors_.size();
  const File& file = *found->second.file;
  return ViewOf(*found->second.tensor, file.header, file.map.data(), file.map.path());
}

const std::string& TensorStore::PathOf(std::string_view name) const {
  const auto found = tensors_.find(name);
  HOPYARD_INTERNAL(found != tensors_.end()) << Printable(name);
  return found->second.file->map.path();
}

std::vector<std::string> TensorStore::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, location] : tensors_) {
    names.emplace_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace hopyard::checkpoint
