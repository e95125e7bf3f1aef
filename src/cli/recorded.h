// SPDX-License-Identifier: Apache-2.0
// --recorded FILE: calls routed as real tokens were.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/spec.h"
#include "hopyard/tensor.h"

namespace CLI {  // NOLINT(readability-identifier-naming): CLI11 has it so
class App;
class Option;
}  // namespace CLI

namespace hopyard::cli {

// Excludes `other`, which names routings that are made up.
void AddRecordedOption(CLI::App& command, std::string* path, CLI::Option* other);

class Recorded {
 public:
  // As ReadReplay; of no file there is nothing. Error{kInvalidArgument} where it has no tokens.
  Recorded(const std::string& path, const MoeSpec& spec);

  [[nodiscard]] bool empty() const { return ids_.empty(); }
  // [n, K] i32; absent where it is empty.
  [[nodiscard]] TensorView View() const;
  // The experts [tokens, K] of tokens from one on, in turn.
  [[nodiscard]] std::vector<int32_t> Ids(int64_t first, int64_t tokens) const;

 private:
  int64_t top_k_ = 1;
  std::vector<int32_t> ids_;
};

}  // namespace hopyard::cli
