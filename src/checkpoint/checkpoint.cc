// SPDX-License-Identifier: Apache-2.0
#include "hopyard/checkpoint.h"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/family.h"
#include "checkpoint/json_file.h"
#include "checkpoint/layer_reader.h"
#include "checkpoint/tensor_store.h"
#include "checkpoint/text.h"
#include "core/error.h"

namespace hopyard {

struct Checkpoint::Impl {
  checkpoint::Family family;
  std::shared_ptr<const checkpoint::TensorStore> store;
};

Checkpoint Checkpoint::Open(const std::string& directory) {
  const std::string config = directory + "/config.json";
  auto impl = std::make_shared<Impl>();
  impl->family = checkpoint::ReadFamily(
      checkpoint::ReadJsonObject(config, checkpoint::kMaxConfigBytes), config);
  impl->store = std::make_shared<const checkpoint::TensorStore>(directory);
  Checkpoint opened;
  opened.impl_ = std::move(impl);
  return opened;
}

std::string_view Checkpoint::model_type() const {
  return impl_->family.model_type;
}

std::vector<int> Checkpoint::moe_layers() const {
  return impl_->family.moe_layers;
}

CheckpointLayer Checkpoint::Layer(int index) const {
  const std::vector<int>& layers = impl_->family.moe_layers;
  if (!std::binary_search(layers.begin(), layers.end(), index)) {
    const std::string known =
        layers.empty() ? "none" : fmt::format("{} to {}", layers.front(), layers.back());
    HOPYARD_CHECK(index >= 0 && index < impl_->family.num_layers, kInvalidArgument)
        << checkpoint::Printable(impl_->store->directory()) << ": layer " << index
        << " does not exist; the model has " << impl_->family.num_layers
        << " layers, those with experts: " << known;
    HOPYARD_CHECK(false, kInvalidArgument)
        << checkpoint::Printable(impl_->store->directory()) << ": layer " << index
        << " is dense, it has no experts; " << layers.size() << " layers have: " << known;
  }
  return checkpoint::ReadLayer(impl_->family, impl_->store, index);
}

std::vector<std::string> Checkpoint::tensor_names() const {
  return impl_->store->names();
}

TensorView Checkpoint::Tensor(std::string_view name) const {
  return impl_->store->View(name);
}

}  // namespace hopyard
