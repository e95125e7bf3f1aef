// SPDX-License-Identifier: Apache-2.0
#include "spec/validate.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <sstream>

#include "core/error.h"
#include "core/shape.h"
#include "formats/format_rules.h"
#include "spec/validate_route.h"

namespace hopyard::spec {
namespace {

// Of hidden and intermediate size: with 2^31 rows and 2^11 experts every byte count stays in 64
// bits.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxElements = int64_t{1} << 60;

bool HasRank(const TensorView& tensor) {
  return tensor.ndim >= 0 && tensor.ndim <= TensorView::kMaxDims;
}

// Whether the extents may be multiplied: none negative, the product far from overflow.
bool ElementsFit(const TensorView& tensor) {
  int64_t count = 1;
  for (int d = 0; d < tensor.ndim; ++d) {
    const int64_t extent = tensor.shape.at(static_cast<size_t>(d));
    if (extent < 0 || (extent > 0 && count > kMaxElements / extent)) {
      return false;
    }
    count *= std::max<int64_t>(extent, 1);
  }
  return true;
}

bool HasShape(const TensorView& tensor, const TensorRule& rule) {
  if (tensor.ndim != static_cast<int>(rule.shape.size())) {
    return false;
  }
  size_t d = 0;
  for (const int64_t extent : rule.shape) {
    const int64_t got = tensor.shape.at(d++);
    if (extent < 0 ? got < 0 : got != extent) {
      return false;
    }
  }
  return true;
}

std::string ListString(const std::array<int64_t, TensorView::kMaxDims>& list, int count) {
  std::string text = "[";
  for (int d = 0; d < count; ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(list.at(static_cast<size_t>(d)));
  }
  return text + "]";
}

std::array<int64_t, TensorView::kMaxDims> RowMajorStrides(const TensorView& tensor) {
  std::array<int64_t, TensorView::kMaxDims> strides{};
  int64_t stride = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    strides.at(static_cast<size_t>(d)) = stride;
    stride *= tensor.shape.at(static_cast<size_t>(d));
  }
  return strides;
}

std::string ShapeString(const TensorRule& rule) {
  std::string text = "[";
  for (const int64_t extent : rule.shape) {
    text += (text.size() > 1 ? ", " : "") + (extent < 0 ? "*" : std::to_string(extent));
  }
  return text + "]";
}

std::string DTypesString(const TensorRule& rule) {
  std::string text;
  for (const DType dtype : rule.dtypes) {
    text += (text.empty() ? "" : " or ") + std::string(ToString(dtype));
  }
  return text;
}

template <class Enum>
void CheckEnum(const char* name, Enum value, Enum last, const char* type) {
  HOPYARD_CHECK(value <= last, kInvalidArgument)
      << name << "=" << static_cast<int>(value) << " is not a " << type << "; wanted 0 .. "
      << static_cast<int>(last);
}

void CheckEnums(const MoeSpec& spec) {
  CheckEnum("activation.kind", spec.activation.kind, ActivationKind::kIdentity, "ActivationKind");
  CheckEnum("weights", spec.weights, WeightFormat::kMxInt4, "WeightFormat");
  CheckEnum("shared.weights", spec.shared.weights, WeightFormat::kMxInt4, "WeightFormat");
  CheckEnum("activations", spec.activations, ActivationFormat::kNvFp4PerToken, "ActivationFormat");
  CheckEnum("local.kind", spec.local.kind, ExpertMap::Kind::kTable, "ExpertMap::Kind");
}

// `may_be_infinite`: an infinite limit is no clamp; infinite factors only make NaN.
void CheckPerExpert(const char* name, const PerExpert& value, int num_local_experts,
                    bool may_be_infinite) {
  HOPYARD_CHECK(value.each.empty() || static_cast<int>(value.each.size()) == num_local_experts,
                kInvalidArgument)
      << name << " has " << value.each.size() << " values; wanted one per local expert ("
      << num_local_experts << ") or none";
  const auto check = [&](float x, int expert) {
    HOPYARD_CHECK(may_be_infinite ? !std::isnan(x) : std::isfinite(x), kInvalidArgument)
        << name << " is " << x
        << (expert < 0 ? std::string() : " for local expert " + std::to_string(expert))
        << "; wanted a finite number" << (may_be_infinite ? " or infinity (no clamp)" : "");
  };
  check(value.all, -1);
  for (int e = 0; e < static_cast<int>(value.each.size()); ++e) {
    check(value.each[static_cast<size_t>(e)], e);
  }
}

void CheckActivation(const Activation& activation, int num_local_experts) {
  CheckPerExpert("activation.alpha", activation.alpha, num_local_experts, false);
  CheckPerExpert("activation.beta", activation.beta, num_local_experts, false);
  CheckPerExpert("activation.limit", activation.limit, num_local_experts, true);
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
    HOPYARD_CHECK(local.offset == 0 && (local.count == 0 || local.count == spec.num_experts),
                  kInvalidArgument)
        << "local.offset=" << local.offset << " and local.count=" << local.count
        << ", but local.kind is kAll; wanted both 0, or kind kRange for a part of the experts";
    return;
  }
  HOPYARD_CHECK(local.count >= 1 && local.count <= kMaxExperts, kInvalidArgument)
      << "local.count=" << local.count << "; wanted 1 .. " << kMaxExperts
      << ", the experts that this rank holds";
  if (local.kind == ExpertMap::Kind::kRange) {
    HOPYARD_CHECK(local.offset >= 0 && local.offset <= spec.num_experts - local.count,
                  kInvalidArgument)
        << "local.offset=" << local.offset << " with local.count=" << local.count
        << "; local experts [offset, offset + count) must lie within the " << spec.num_experts
        << " experts";
  }
}

std::string NameOf(const Device& device) {
  return device.kind == DeviceKind::kCpu ? "the CPU" : "cuda:" + std::to_string(device.index);
}

// Where a tensor is. Only for a message: the hot call allocates no strings.
std::string WhereIs(const TensorView& tensor) {
  return tensor.device.kind == DeviceKind::kCpu ? "in host memory"
                                                : "a CUDA tensor (" + NameOf(tensor.device) + ')';
}

void CheckDevice(const Place& place, const TensorView& tensor, const char* name) {
  const bool on_host = tensor.device.kind == DeviceKind::kCpu;
  if (place.device.kind == DeviceKind::kCpu) {
    HOPYARD_CHECK(on_host, kInvalidArgument)
        << name << " is " << WhereIs(tensor) << "; wanted host memory, " << place.whose
        << " device is the CPU: copy it to the host";
    return;
  }
  HOPYARD_CHECK((on_host && place.or_host) || tensor.device == place.device, kInvalidArgument)
      << name << " is " << WhereIs(tensor) << "; wanted memory of " << NameOf(place.device)
      << (place.or_host ? " or of the host" : "") << ", " << place.whose
      << " device: copy it there";
}

void CheckShared(const MoeSpec& spec) {
  HOPYARD_CHECK(spec.shared.count >= 0 && spec.shared.count <= kMaxTopK - spec.top_k,
                kInvalidArgument)
      << "shared.count=" << spec.shared.count << " with top_k=" << spec.top_k << "; wanted 0 .. "
      << kMaxTopK - spec.top_k << ", at most " << kMaxTopK << " slots a token in all";
  HOPYARD_CHECK(std::isfinite(spec.shared.weight), kInvalidArgument)
      << "shared.weight=" << spec.shared.weight << "; wanted a finite number";
}

}  // namespace

std::string ShapeString(const TensorView& tensor) {
  if (!HasRank(tensor)) {
    return "of " + std::to_string(tensor.ndim) + " dimensions";
  }
  return ListString(tensor.shape, tensor.ndim);
}

void Place::CheckMemory(const TensorView& tensor, const char* name) const {
  HOPYARD_CHECK(HasRank(tensor) && ElementsFit(tensor), kInvalidArgument)
      << name << " has shape " << ShapeString(tensor) << "; wanted at most " << TensorView::kMaxDims
      << " dimensions, none negative, and fewer than 2^60 elements";
  CheckDevice(*this, tensor, name);
  HOPYARD_CHECK(tensor.data != nullptr || tensor.numel() == 0, kInvalidArgument)
      << name << " has a null pointer, but shape " << ShapeString(tensor)
      << "; wanted allocated memory";
  const auto size = static_cast<uintptr_t>(SizeOf(tensor.dtype));
  HOPYARD_CHECK(size > 0, kInvalidArgument)
      << name << " has dtype " << static_cast<int>(tensor.dtype)
      << ", which is not a DType; wanted 0 .. " << static_cast<int>(DType::kFloat64);
  HOPYARD_CHECK(reinterpret_cast<uintptr_t>(tensor.data) % size == 0, kInvalidArgument)
      << name << " at " << tensor.data << " is not aligned; wanted a multiple of the " << size
      << " bytes of " << ToString(tensor.dtype) << ": copy it to aligned memory";
}

void CheckTensor(const TensorView& tensor, const TensorRule& rule) {
  Place{}.CheckTensor(tensor, rule);
}

std::vector<float> Place::Read(const TensorView& tensor, int64_t count) const {
  std::vector<float> values(static_cast<size_t>(count));
  if (tensor.device.kind == DeviceKind::kCpu) {
    std::copy_n(tensor.as<const float>(), count, values.begin());
  } else {
    read(values.data(), tensor.data, count * SizeOf(DType::kFloat32));
  }
  return values;
}

void Place::CheckTensor(const TensorView& tensor, const TensorRule& rule) const {
  HOPYARD_CHECK(tensor.defined(), kInvalidArgument)
      << rule.name << " is missing; wanted " << DTypesString(rule) << ' ' << ShapeString(rule);
  const bool dtype_ok =
      std::find(rule.dtypes.begin(), rule.dtypes.end(), tensor.dtype) != rule.dtypes.end();
  HOPYARD_CHECK(dtype_ok, kInvalidArgument)
      << rule.name << " is " << ToString(tensor.dtype) << "; wanted " << DTypesString(rule);
  HOPYARD_CHECK(HasShape(tensor, rule), kInvalidArgument)
      << rule.name << " has shape " << ShapeString(tensor) << "; wanted " << ShapeString(rule);
  CheckMemory(tensor, rule.name);
  HOPYARD_CHECK(tensor.numel() == 0 || tensor.is_contiguous(), kInvalidArgument)
      << rule.name << " is not contiguous: shape " << ShapeString(tensor) << " has strides "
      << ListString(tensor.strides, tensor.ndim) << ", wanted "
      << ListString(RowMajorStrides(tensor), tensor.ndim) << "; copy it to row-major memory";
}

void ValidateSpec(const MoeSpec& spec) {
  HOPYARD_CHECK(spec.struct_size == sizeof(MoeSpec), kInvalidArgument)
      << "MoeSpec.struct_size=" << spec.struct_size << "; this library knows " << sizeof(MoeSpec)
      << ": compile against its headers";
  HOPYARD_CHECK(spec.hidden_size > 0 && spec.hidden_size < kMaxSize, kInvalidArgument)
      << "hidden_size=" << spec.hidden_size << "; wanted 1 .. " << kMaxSize - 1;
  HOPYARD_CHECK(spec.intermediate_size > 0 && spec.intermediate_size < kMaxSize, kInvalidArgument)
      << "intermediate_size=" << spec.intermediate_size << "; wanted 1 .. " << kMaxSize - 1;
  CheckEnums(spec);
  ValidateRule(spec.routing, spec.num_experts, spec.top_k);
  CheckLocal(spec);
  CheckShared(spec);
  CheckActivation(spec.activation, spec.num_local_experts());
}

std::string UnsupportedReason(const MoeSpec& spec) {
  std::ostringstream reason;
  const auto pair = [&](WeightFormat weights) {
    if (!formats::IsSupportedPair(weights, spec.activations)) {
      reason << ToString(weights) << " weights with " << ToString(spec.activations)
             << " activations are not a supported pair; use bf16 activations, or see the "
                "support table of README.md";
      return false;
    }
    return true;
  };
  if (!pair(spec.weights) || (spec.shared.count > 0 && !pair(spec.shared.weights))) {
    return reason.str();
  }
  const auto packed = [&](WeightFormat weights) {
    const int per_byte = formats::RuleOf(weights).codes_per_byte;
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
