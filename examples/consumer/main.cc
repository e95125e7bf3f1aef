// SPDX-License-Identifier: Apache-2.0
// Prints what one expert's GEMM1 weights take in MXFP4: proof that an installed Hopyard compiles,
// links and runs from a project of one's own.
#include <cstdint>
#include <iostream>

#include "hopyard/hopyard.h"

int main() {
  constexpr int64_t kRows = 1536;
  constexpr int64_t kCols = 2048;
  try {
    const hopyard::FormatShape shape = hopyard::ShapeOf(hopyard::Format::kMxFp4, kRows, kCols);
    std::cout << "hopyard " << HOPYARD_VERSION << ": [" << kRows << ", " << kCols << "] in "
              << hopyard::ToString(hopyard::Format::kMxFp4) << " is " << kRows * shape.code_cols
              << " bytes of codes and " << shape.scale_numel << " scales of "
              << hopyard::ToString(shape.scale_dtype) << '\n';
    // Two codes a byte, one scale per 32 columns.
    const bool right = shape.code_cols == kCols / 2 && shape.scale_numel == kRows * (kCols / 32);
    return right ? 0 : 1;
  } catch (const hopyard::Error& error) {
    std::cerr << hopyard::ToString(error.kind()) << ": " << error.what() << '\n';
    return 2;
  }
}
