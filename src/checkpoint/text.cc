// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/text.h"

#include <fmt/format.h>

namespace hopyard::checkpoint {

std::string Printable(std::string_view text) {
  constexpr size_t kMaxBytes = 200;
  std::string printable;
  for (const char c : text.substr(0, kMaxBytes)) {
    if (c >= 0x20 && c < 0x7F) {
      printable += c;
    } else {
      printable += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  if (text.size() > kMaxBytes) {
    printable += fmt::format("... ({} bytes)", text.size());
  }
  return printable;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::vector<int64_t> ShapeOf(const TensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.ndim};
}

}  // namespace hopyard::checkpoint
