// SPDX-License-Identifier: Apache-2.0
#include "spec/validate.h"

#include <cmath>
#include <limits>
#include <sstream>

#include "core/error.h"
#include "core/shape.h"
#include "spec/format_rules.h"
#include "spec/validate_route.h"

namespace hopyard::spec {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 31;  // of hidden and intermediate size

void CheckPerExpert(const char* name, const PerExpert& value, int num_local_experts) {
  HOPYARD_CHECK(value.each.empty() || static_cast<int>(value.each.size()) == num_local_experts,
                kInvalidArgument)
      << name << " has " << value.each.size() << " values; wanted one per local expert ("
      << num_local_experts << ") or none";
  HOPYARD_CHECK(!std::isnan(value.all), kInvalidArgument) << name << " is NaN";
  for (const float x : value.each) {
    HOPYARD_CHECK(!std::isnan(x), kInvalidArgument) << name << " holds a NaN";
  }
}

void CheckActivation(const Activation& activation, int num_local_experts) {
  CheckPerExpert("activation.alpha", activation.alpha, num_local_experts);
  CheckPerExpert("activation.beta", activation.beta, num_local_experts);
  CheckPerExpert("activation.limit", activation.limit, num_local_experts);
  const bool parametrised =
      activation.kind == ActivationKind::kSwiGlu || activation.kind == ActivationKind::kSiTu;
  const Activation usual;
  HOPYARD_CHECK(parametrised || (activation.alpha == usual.alpha && activation.beta == usual.beta &&
                                 activation.limit == usual.limit),
                kInvalidArgument)
      << "activation " << ToString(activation.kind)
      << " takes no alpha, beta or limit; only swiglu and situ do";
  for (int e = 0; e < num_local_experts; ++e) {
    HOPYARD_CHECK(activation.limit.at(e) > 0.0F, kInvalidArgument)
        << "activation.limit=" << activation.limit.at(e) << " for local expert " << e
        << "; wanted a positive clamp (infinity: none)";
    HOPYARD_CHECK(activation.kind != ActivationKind::kSiTu ||
                      (activation.alpha.at(e) > 0.0F && activation.beta.at(e) > 0.0F),
                  kInvalidArgument)
        << "situ needs alpha > 0 and beta > 0; local expert " << e
        << " has alpha=" << activation.alpha.at(e) << " beta=" << activation.beta.at(e);
  }
}

void CheckLocal(const MoeSpec& spec) {
  const ExpertMap& local = spec.local;
  if (local.kind == ExpertMap::Kind::kAll) {
    return;
  }
  HOPYARD_CHECK(local.count >= 1, kInvalidArgument)
      << "local.count=" << local.count << "; a rank holds at least 1 expert";
  if (local.kind == ExpertMap::Kind::kRange) {
    HOPYARD_CHECK(local.offset >= 0 && local.offset + local.count <= spec.num_experts,
                  kInvalidArgument)
        << "local experts [" << local.offset << ", " << local.offset + local.count
        << ") are not within the " << spec.num_experts << " experts";
  }
}

}  // namespace

std::string ShapeString(const TensorView& tensor) {
  std::ostringstream out;
  out << '[';
  for (int d = 0; d < tensor.ndim; ++d) {
    out << (d > 0 ? ", " : "") << tensor.shape.at(static_cast<size_t>(d));
  }
  out << ']';
  return out.str();
}

void CheckTensor(const TensorView& tensor, const TensorRule& rule) {
  HOPYARD_CHECK(tensor.defined(), kInvalidArgument) << rule.name << " is missing";
  HOPYARD_CHECK(tensor.device.kind == DeviceKind::kCpu, kInvalidArgument)
      << rule.name << " is a CUDA tensor; the plan's device is the CPU";
  bool dtype_ok = false;
  std::ostringstream wanted;
  for (const DType dtype : rule.dtypes) {
    dtype_ok = dtype_ok || tensor.dtype == dtype;
    wanted << (wanted.tellp() > 0 ? " or " : "") << ToString(dtype);
  }
  HOPYARD_CHECK(dtype_ok, kInvalidArgument)
      << rule.name << " is " << ToString(tensor.dtype) << "; wanted " << wanted.str();
  bool shape_ok = tensor.ndim == static_cast<int>(rule.shape.size());
  std::ostringstream shape;
  int d = 0;
  for (const int64_t extent : rule.shape) {
    shape << (d > 0 ? ", " : "");
    extent < 0 ? shape << '*' : shape << extent;
    shape_ok = shape_ok && (extent < 0 || tensor.shape.at(static_cast<size_t>(d)) == extent);
    ++d;
  }
  HOPYARD_CHECK(shape_ok, kInvalidArgument)
      << rule.name << " has shape " << ShapeString(tensor) << "; wanted [" << shape.str() << "]";
  HOPYARD_CHECK(tensor.is_contiguous(), kInvalidArgument)
      << rule.name << " is not contiguous; make it so";
  HOPYARD_CHECK(tensor.data != nullptr || tensor.numel() == 0, kInvalidArgument)
      << rule.name << " has a null pointer";
}

void ValidateSpec(const MoeSpec& spec) {
  HOPYARD_CHECK(spec.struct_size == sizeof(MoeSpec), kInvalidArgument)
      << "MoeSpec.struct_size=" << spec.struct_size << "; this library knows " << sizeof(MoeSpec)
      << ": compile against its headers";
  HOPYARD_CHECK(spec.hidden_size > 0 && spec.hidden_size < kMaxSize, kInvalidArgument)
      << "hidden_size=" << spec.hidden_size << "; wanted 1 .. " << kMaxSize - 1;
  HOPYARD_CHECK(spec.intermediate_size > 0 && spec.intermediate_size < kMaxSize, kInvalidArgument)
      << "intermediate_size=" << spec.intermediate_size << "; wanted 1 .. " << kMaxSize - 1;
  ValidateRule(spec.routing, spec.num_experts, spec.top_k);
  CheckLocal(spec);
  HOPYARD_CHECK(spec.num_local_experts() <= kMaxExperts, kInvalidArgument)
      << "local experts=" << spec.num_local_experts() << "; at most " << kMaxExperts;
  HOPYARD_CHECK(spec.shared.count >= 0 && spec.slots_per_token() <= kMaxTopK, kInvalidArgument)
      << "top_k + shared experts = " << spec.top_k << " + " << spec.shared.count
      << "; wanted at most " << kMaxTopK << " slots and no negative count";
  HOPYARD_CHECK(std::isfinite(spec.shared.weight), kInvalidArgument)
      << "shared.weight=" << spec.shared.weight << " is not finite";
  CheckActivation(spec.activation, spec.num_local_experts());
}

std::string UnsupportedReason(const MoeSpec& spec) {
  std::ostringstream reason;
  const auto pair = [&](WeightFormat weights) {
    if (!IsSupportedPair(weights, spec.activations)) {
      reason << ToString(weights) << " weights with " << ToString(spec.activations)
             << " activations are not a supported pair; use bf16 activations, or see the table of "
                "docs/formats.md";
      return false;
    }
    return true;
  };
  if (!pair(spec.weights) || (spec.shared.count > 0 && !pair(spec.shared.weights))) {
    return reason.str();
  }
  const auto packed = [&](WeightFormat weights) {
    const int per_byte = RuleOf(weights).codes_per_byte;
    if (spec.hidden_size % per_byte != 0 || spec.intermediate_size % per_byte != 0) {
      reason << ToString(weights) << " packs 2 codes a byte, so hidden_size (" << spec.hidden_size
             << ") and intermediate_size (" << spec.intermediate_size
             << ") must be even; zero-pad the weights by one column";
      return false;
    }
    return true;
  };
  if (!packed(spec.weights) || (spec.shared.count > 0 && !packed(spec.shared.weights))) {
    return reason.str();
  }
  return {};
}

}  // namespace hopyard::spec
