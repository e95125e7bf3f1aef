// SPDX-License-Identifier: Apache-2.0
#include "hopyard/weights.h"

namespace hopyard {
namespace {

bool IsInterleaved(RowOrder order) {
  return order == RowOrder::kInterleavedGateUp || order == RowOrder::kInterleavedUpGate;
}

ReadOrder OrderOf(const MatrixSet& set, bool interleaved) {
  if (set.major != MajorOrder::kMnMajor) {
    return ReadOrder::kKMajor;
  }
  return interleaved ? ReadOrder::kMnMajorInterleaved : ReadOrder::kMnMajor;
}

ReadOrder Gemm1Order(const MoeSpec& spec, const ExpertMatrices& matrices) {
  const bool apart = matrices.gate.defined();
  return OrderOf(apart ? matrices.gate : matrices.gemm1,
                 !apart && IsGated(spec.activation.kind) && IsInterleaved(matrices.row_order));
}

}  // namespace

std::string_view ToString(ReadOrder order) {
  switch (order) {
    case ReadOrder::kKMajor:
      return "k_major";
    case ReadOrder::kMnMajor:
      return "mn_major";
    case ReadOrder::kMnMajorInterleaved:
      return "mn_major_interleaved";
  }
  return "?";
}

WeightOrders OrdersOf(const MoeSpec& spec, const WeightsDesc& desc) {
  WeightOrders orders;
  orders.gemm1 = Gemm1Order(spec, desc.routed);
  orders.gemm2 = OrderOf(desc.routed.gemm2, false);
  if (spec.shared.count > 0) {
    orders.shared_gemm1 = Gemm1Order(spec, desc.shared);
    orders.shared_gemm2 = OrderOf(desc.shared.gemm2, false);
  }
  return orders;
}

}  // namespace hopyard
