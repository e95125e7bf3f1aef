// SPDX-License-Identifier: Apache-2.0
#include "gemm/cpu/dot.h"

namespace hopyard::gemm::cpu {

const KernelTable& Kernels(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kAvx512:
      return avx512::Table();
    case Isa::kAvx2:
      return avx2::Table();
    case Isa::kScalar:
      break;
  }
#else
  static_cast<void>(isa);
#endif
  return scalar::Table();
}

}  // namespace hopyard::gemm::cpu
