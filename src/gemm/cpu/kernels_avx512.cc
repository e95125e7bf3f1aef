// SPDX-License-Identifier: Apache-2.0
#include "gemm/cpu/kernels_inl.h"
#include "gemm/cpu/vec_avx512.h"

namespace hopyard::gemm::cpu::avx512 {

const KernelTable& Table() {
  static constexpr KernelTable kTable = MakeTable<V>();
  return kTable;
}

}  // namespace hopyard::gemm::cpu::avx512
