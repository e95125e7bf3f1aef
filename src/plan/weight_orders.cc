// SPDX-License-Identifier: Apache-2.0
#include "hopyard/weights.h"

#include "formats/format_rules.h"

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

struct GroupOrders {
  ReadOrder gemm1;
  ReadOrder gemm2;
};
GroupOrders OrdersOfGroup(const MoeSpec& spec, const ExpertMatrices& matrices, bool packed) {
  if (packed) {
    return {ReadOrder::kPacked, ReadOrder::kPacked};
  }
  const bool apart = matrices.gate.defined();
  const bool interleaved =
      !apart && IsGated(spec.activation.kind) && IsInterleaved(matrices.row_order);
  return {OrderOf(apart ? matrices.gate : matrices.gemm1, interleaved),
          OrderOf(matrices.gemm2, false)};
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
    case ReadOrder::kPacked:
      return "packed";
  }
  return "?";
}

WeightOrders OrdersOf(const MoeSpec& spec, const WeightsDesc& desc) {
  WeightOrders orders;
  const auto packed = [&](WeightFormat format) {
    return desc.packed && formats::HasPackedOrder(format);
  };
  const GroupOrders routed = OrdersOfGroup(spec, desc.routed, packed(spec.weights));
  orders.gemm1 = routed.gemm1;
  orders.gemm2 = routed.gemm2;
  if (spec.shared.count > 0) {
    const GroupOrders shared = OrdersOfGroup(spec, desc.shared, packed(spec.shared.weights));
    orders.shared_gemm1 = shared.gemm1;
    orders.shared_gemm2 = shared.gemm2;
  }
  return orders;
}

}  // namespace hopyard
