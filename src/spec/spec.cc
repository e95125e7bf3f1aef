// SPDX-License-Identifier: Apache-2.0
#include "hopyard/spec.h"

#include <array>
#include <sstream>
#include <utility>

#include "core/error.h"

namespace hopyard {
namespace {

template <class Enum, size_t kCount>
using Names = std::array<std::pair<Enum, std::string_view>, kCount>;

constexpr Names<ActivationKind, 8> kActivationNames = {{
    {ActivationKind::kSwiGlu, "swiglu"},
    {ActivationKind::kGeGlu, "geglu"},
    {ActivationKind::kGeGluTanh, "geglu_tanh"},
    {ActivationKind::kSiTu, "situ"},
    {ActivationKind::kRelu2, "relu2"},
    {ActivationKind::kSilu, "silu"},
    {ActivationKind::kGelu, "gelu"},
    {ActivationKind::kIdentity, "identity"},
}};

constexpr Names<WeightFormat, 8> kWeightNames = {{
    {WeightFormat::kBf16, "bf16"},
    {WeightFormat::kFp8Block128, "fp8_block128"},
    {WeightFormat::kFp8PerTensor, "fp8_per_tensor"},
    {WeightFormat::kFp8PerChannel, "fp8_per_channel"},
    {WeightFormat::kMxFp8, "mxfp8"},
    {WeightFormat::kNvFp4, "nvfp4"},
    {WeightFormat::kMxFp4, "mxfp4"},
    {WeightFormat::kMxInt4, "mxint4"},
}};

constexpr Names<ActivationFormat, 7> kActivationFormatNames = {{
    {ActivationFormat::kBf16, "bf16"},
    {ActivationFormat::kFp8Block128, "fp8_block128"},
    {ActivationFormat::kFp8PerTensor, "fp8_per_tensor"},
    {ActivationFormat::kFp8PerToken, "fp8_per_token"},
    {ActivationFormat::kMxFp8, "mxfp8"},
    {ActivationFormat::kNvFp4, "nvfp4"},
    {ActivationFormat::kNvFp4PerToken, "nvfp4_per_token"},
}};

template <class Enum, size_t kCount>
std::string_view NameOf(const Names<Enum, kCount>& names, Enum value) {
  for (const auto& [key, name] : names) {
    if (key == value) {
      return name;
    }
  }
  return "?";
}

template <class Enum, size_t kCount>
Enum Parse(const Names<Enum, kCount>& names, std::string_view what, std::string_view text) {
  std::ostringstream known;
  for (const auto& [key, name] : names) {
    if (name == text) {
      return key;
    }
    known << (known.tellp() > 0 ? ", " : "") << name;
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << what << " '" << text << "' is not known; wanted one of " << known.str();
  return names[0].first;
}

void PrintPerExpert(std::ostream& out, std::string_view name, const PerExpert& value, float usual) {
  if (!value.each.empty()) {
    out << ' ' << name << "=per-expert";
  } else if (value.all != usual) {
    out << ' ' << name << '=' << value.all;
  }
}

}  // namespace

std::string_view ToString(ActivationKind kind) {
  return NameOf(kActivationNames, kind);
}
std::string_view ToString(WeightFormat format) {
  return NameOf(kWeightNames, format);
}
std::string_view ToString(ActivationFormat format) {
  return NameOf(kActivationFormatNames, format);
}
ActivationKind ParseActivationKind(std::string_view name) {
  return Parse(kActivationNames, "activation", name);
}
WeightFormat ParseWeightFormat(std::string_view name) {
  return Parse(kWeightNames, "weight format", name);
}
ActivationFormat ParseActivationFormat(std::string_view name) {
  return Parse(kActivationFormatNames, "activation format", name);
}

std::string ToString(const MoeSpec& spec) {
  std::ostringstream out;
  out << "moe hidden=" << spec.hidden_size << " intermediate=" << spec.intermediate_size
      << " experts=" << spec.num_experts << " top_k=" << spec.top_k
      << " weights=" << ToString(spec.weights) << " activations=" << ToString(spec.activations)
      << " activation=" << ToString(spec.activation.kind);
  PrintPerExpert(out, "alpha", spec.activation.alpha, 1.0F);
  PrintPerExpert(out, "beta", spec.activation.beta, 0.0F);
  PrintPerExpert(out, "limit", spec.activation.limit, std::numeric_limits<float>::infinity());
  out << " routing={" << ToString(spec.routing) << '}';
  if (spec.local.kind == ExpertMap::Kind::kRange) {
    out << " local=[" << spec.local.offset << ',' << spec.local.offset + spec.local.count << ')';
  } else if (spec.local.kind == ExpertMap::Kind::kTable) {
    out << " local=table(" << spec.local.count << " slots)";
  }
  if (spec.shared.count > 0) {
    out << " shared=" << spec.shared.count << '(' << ToString(spec.shared.weights) << ", weight "
        << (spec.shared.per_token_weight ? "per token" : std::to_string(spec.shared.weight)) << ')';
  }
  if (spec.router_weight_on_input) {
    out << " router_weight_on_input";
  }
  return out.str();
}

}  // namespace hopyard
