// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "hopyard/tensor.h"

namespace hopyard::cli {

// A NumPy array file, little-endian, row-major, 1 to 4 dimensions: f4, f2, i2, i4 and i8. Anything
// else is refused with an Error that names the file. The file is untrusted: the header is parsed
// strictly, and its shape must match the file's size.
struct NpyArray {
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  std::vector<char> data;

  [[nodiscard]] TensorView View() const;
};

[[nodiscard]] NpyArray ReadNpy(const std::string& path);

}  // namespace hopyard::cli
