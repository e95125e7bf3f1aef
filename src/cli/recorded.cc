// SPDX-License-Identifier: Apache-2.0
#include "cli/recorded.h"

#include <CLI/CLI.hpp>

#include "cli/tokens.h"
#include "core/cyclic_rows.h"
#include "core/error.h"

namespace hopyard::cli {

void AddRecordedOption(CLI::App& command, std::string* path, CLI::Option* other) {
  command
      .add_option("--recorded", *path,
                  "Replay of real tokens to route by, as run --output writes it")
      ->excludes(other);
}

Recorded::Recorded(const std::string& path, const MoeSpec& spec) : top_k_(spec.top_k) {
  if (path.empty()) {
    return;
  }
  ids_ = ReadReplay(path, -1, spec);
  HOPYARD_CHECK(!ids_.empty(), kInvalidArgument)
      << "--recorded names " << path << ", which has no tokens; wanted one at least";
}

TensorView Recorded::View() const {
  const auto rows = static_cast<int64_t>(ids_.size()) / top_k_;
  return empty() ? TensorView()
                 : TensorView::Contiguous(ids_.data(), DType::kInt32, {rows, top_k_});
}

std::vector<int32_t> Recorded::Ids(int64_t first, int64_t tokens) const {
  return empty() ? ids_ : CyclicRows(ids_, top_k_, first, tokens);
}

}  // namespace hopyard::cli
