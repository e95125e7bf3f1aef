// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/family.h"

#include <algorithm>
#include <array>
#include <string_view>

#include <nlohmann/json.hpp>

#include "checkpoint/json_file.h"
#include "checkpoint/text.h"
#include "core/error.h"

namespace hopyard::checkpoint {
namespace {

// Beyond these a field is a mistake, not a model.
constexpr IntRange kWidths{1, int64_t{1} << 22};
constexpr IntRange kExperts{1, kMaxExperts};
constexpr IntRange kLayers{1, 10'000};
constexpr IntRange kLayerIds{0, 9'999};
constexpr IntRange kShared{0, 64};

ActivationKind ReadActivation(const FieldReader& fields) {
  const std::string name = fields.StringOr("hidden_act", "silu");
  if (name == "silu" || name == "swish") {
    return ActivationKind::kSwiGlu;
  }
  if (name == "gelu") {
    return ActivationKind::kGeGlu;
  }
  HOPYARD_CHECK(name == "gelu_pytorch_tanh", kUnsupported)
      << fields.Where("hidden_act") << " is '" << Printable(name)
      << "'; silu, gelu and gelu_pytorch_tanh are supported";
  return ActivationKind::kGeGluTanh;
}

// The first present of two names of one field; both present must agree.
int64_t ReadAlias(const FieldReader& fields, const std::string& name, const std::string& alias,
                  IntRange range) {
  if (!fields.Has(alias)) {
    return fields.Int(name, range);
  }
  const int64_t value = fields.Int(alias, range);
  HOPYARD_CHECK(!fields.Has(name) || fields.Int(name, range) == value, kInvalidArgument)
      << fields.Where(name) << " is " << fields.Int(name, range) << ", but " << alias << " is "
      << value << "; the same number is wanted";
  return value;
}

// Fields that all families share, by the names of their experts' width and number.
void ReadCommon(const FieldReader& fields, const std::string& width, const std::string& experts,
                Family* family) {
  MoeSpec& spec = family->spec;
  family->num_layers = static_cast<int>(fields.Int("num_hidden_layers", kLayers));
  spec.hidden_size = fields.Int("hidden_size", kWidths);
  spec.intermediate_size = fields.Int(width, kWidths);
  spec.num_experts = static_cast<int>(
      experts == "num_local_experts" ? fields.Int(experts, kExperts)
                                     : ReadAlias(fields, experts, "num_local_experts", kExperts));
  spec.top_k = static_cast<int>(
      fields.Int("num_experts_per_tok", {1, std::min<int64_t>(kMaxTopK, spec.num_experts)}));
  spec.activation.kind = ReadActivation(fields);
}

void AllLayersFrom(int first, Family* family) {
  for (int layer = first; layer < family->num_layers; ++layer) {
    family->moe_layers.push_back(layer);
  }
}

void ReadMixtral(const FieldReader& fields, Family* family) {
  ReadCommon(fields, "intermediate_size", "num_local_experts", family);
  family->spec.routing = RoutingRule::Renormalize();
  family->names = {{"block_sparse_moe", "mlp"}, "gate", ""};
  AllLayersFrom(0, family);
}

void ReadQwen3(const FieldReader& fields, Family* family) {
  ReadCommon(fields, "moe_intermediate_size", "num_experts", family);
  family->spec.routing =
      fields.BoolOr("norm_topk_prob", false) ? RoutingRule::Renormalize() : RoutingRule::Default();
  family->names = {{"mlp"}, "gate", ""};
  const auto step = static_cast<int>(fields.IntOr("decoder_sparse_step", {1, kLayers.high}, 1));
  const std::vector<int64_t> dense = fields.Has("mlp_only_layers")
                                         ? fields.Ints("mlp_only_layers", kLayerIds)
                                         : std::vector<int64_t>{};
  for (int layer = step - 1; layer < family->num_layers; layer += step) {
    if (std::find(dense.begin(), dense.end(), layer) == dense.end()) {
      family->moe_layers.push_back(layer);
    }
  }
}

// A field whose only supported value is known; absent means that value.
void WantString(const FieldReader& fields, const std::string& name, const std::string& wanted) {
  const std::string value = fields.StringOr(name, wanted);
  HOPYARD_CHECK(value == wanted, kUnsupported)
      << fields.Where(name) << " is '" << Printable(value) << "'; '" << wanted << "' is supported";
}

// DeepSeek-V3 and GLM-4.5: sigmoid scores with a selection bias, groups, shared experts.
void ReadDeepSeek(const FieldReader& fields, Family* family) {
  ReadCommon(fields, "moe_intermediate_size", "n_routed_experts", family);
  WantString(fields, "scoring_func", "sigmoid");
  WantString(fields, "topk_method", "noaux_tc");
  const int64_t frequency = fields.IntOr("moe_layer_freq", {1, kLayers.high}, 1);
  HOPYARD_CHECK(frequency == 1, kUnsupported)
      << fields.Where("moe_layer_freq") << " is " << frequency << "; 1 is supported";
  MoeSpec& spec = family->spec;
  const int64_t groups = fields.IntOr("n_group", {1, spec.num_experts}, 1);
  const int64_t top_groups = fields.IntOr("topk_group", {1, groups}, 1);
  HOPYARD_CHECK(spec.num_experts % groups == 0, kInvalidArgument)
      << fields.Where("n_group") << " is " << groups << "; a divisor of n_routed_experts, "
      << spec.num_experts << ", is wanted";
  HOPYARD_CHECK(spec.top_k <= spec.num_experts / groups * top_groups, kInvalidArgument)
      << fields.Where("num_experts_per_tok") << " is " << spec.top_k << "; the " << top_groups
      << " selected groups hold " << spec.num_experts / groups * top_groups << " experts";
  const float scaling = fields.FloatOr("routed_scaling_factor", 1.0F);
  HOPYARD_CHECK(scaling > 0.0F, kInvalidArgument) << fields.Where("routed_scaling_factor") << " is "
                                                  << scaling << "; a positive number is wanted";
  spec.routing =
      RoutingRule::DeepSeekV3(static_cast<int>(groups), static_cast<int>(top_groups), scaling);
  if (!fields.BoolOr("norm_topk_prob", true)) {
    spec.routing.renormalise = Renormalise::kNone;
  }
  spec.shared.count = static_cast<int>(fields.IntOr("n_shared_experts", kShared, 0));
  family->selection_bias = true;
  family->names = {{"mlp"}, "gate", "shared_experts"};
  AllLayersFrom(static_cast<int>(fields.IntOr("first_k_dense_replace", {0, family->num_layers}, 0)),
                family);
}

void ReadGptOss(const FieldReader& fields, Family* family) {
  ReadCommon(fields, "intermediate_size", "num_local_experts", family);
  WantString(fields, "hidden_act", "silu");
  MoeSpec& spec = family->spec;
  spec.routing = RoutingRule::Renormalize();
  const float alpha = fields.FloatOr("swiglu_alpha", 1.702F);
  const float limit = fields.FloatOr("swiglu_limit", 7.0F);
  HOPYARD_CHECK(limit > 0.0F, kInvalidArgument)
      << fields.Where("swiglu_limit") << " is " << limit << "; a positive number is wanted";
  spec.activation.alpha.all = alpha;
  spec.activation.beta.all = 1.0F;
  spec.activation.limit.all = limit;
  family->names = {{"mlp"}, "router", ""};
  family->router_bias = true;
  family->expert_bias = true;
  family->experts_are_mn_major = true;
  family->row_order = RowOrder::kInterleavedGateUp;
  AllLayersFrom(0, family);
}

void ReadLlama4(const FieldReader& fields, Family* family) {
  ReadCommon(fields, "intermediate_size", "num_local_experts", family);
  MoeSpec& spec = family->spec;
  spec.routing = RoutingRule::Llama4();
  spec.router_weight_on_input = true;
  spec.shared.count = 1;
  family->names = {{"feed_forward"}, "router", "shared_expert"};
  family->experts_are_mn_major = true;
  if (fields.Has("moe_layers")) {
    for (const int64_t layer : fields.Ints("moe_layers", {0, family->num_layers - 1})) {
      family->moe_layers.push_back(static_cast<int>(layer));
    }
    std::sort(family->moe_layers.begin(), family->moe_layers.end());
    HOPYARD_CHECK(std::adjacent_find(family->moe_layers.begin(), family->moe_layers.end()) ==
                      family->moe_layers.end(),
                  kInvalidArgument)
        << fields.Where("moe_layers") << " names a layer twice";
    return;
  }
  const auto step =
      static_cast<int>(fields.IntOr("interleave_moe_layer_step", {1, kLayers.high}, 1));
  for (int layer = step - 1; layer < family->num_layers; layer += step) {
    family->moe_layers.push_back(layer);
  }
}

void ReadQuantization(const FieldReader& fields, Family* family) {
  if (!fields.Has("quantization_config")) {
    return;
  }
  const FieldReader quantization = fields.Object("quantization_config");
  const std::string method = quantization.String("quant_method");
  if (method == "mxfp4") {
    family->mxfp4 = true;
    return;
  }
  HOPYARD_CHECK(method == "fp8", kUnsupported)
      << quantization.Where("quant_method") << " is '" << Printable(method)
      << "'; fp8 (128 x 128 blocks) and mxfp4 are supported";
  HOPYARD_CHECK(quantization.Has("weight_block_size"), kUnsupported)
      << quantization.Where("weight_block_size") << " is absent; [128, 128] is supported";
  const std::vector<int64_t> block = quantization.Ints("weight_block_size", kWidths);
  HOPYARD_CHECK(block == std::vector<int64_t>({128, 128}), kUnsupported)
      << quantization.Where("weight_block_size") << " is " << ShapeText(block)
      << "; [128, 128] is supported";
  WantString(quantization, "activation_scheme", "dynamic");
  family->fp8_block = true;
}

struct KnownFamily {
  std::string_view model_type;
  void (*read)(const FieldReader&, Family*);
};
constexpr std::array<KnownFamily, 7> kFamilies = {{{"mixtral", ReadMixtral},
                                                   {"qwen3_moe", ReadQwen3},
                                                   {"deepseek_v3", ReadDeepSeek},
                                                   {"gpt_oss", ReadGptOss},
                                                   {"llama4", ReadLlama4},
                                                   {"llama4_text", ReadLlama4},
                                                   {"glm4_moe", ReadDeepSeek}}};

}  // namespace

Family ReadFamily(const nlohmann::json& config, const std::string& file) {
  const FieldReader fields(config, file);
  Family family;
  family.model_type = fields.String("model_type");
  const auto* known = std::find_if(kFamilies.begin(), kFamilies.end(), [&](const KnownFamily& f) {
    return f.model_type == family.model_type;
  });
  if (known == kFamilies.end()) {
    std::string names;
    for (const KnownFamily& each : kFamilies) {
      names += (names.empty() ? "" : ", ") + std::string(each.model_type);
    }
    HOPYARD_CHECK(false, kUnsupported) << fields.Where("model_type") << " is '"
                                       << Printable(family.model_type) << "'; known are " << names;
  }
  // A multimodal configuration keeps the language model's fields in an object of their own.
  known->read(fields.Has("text_config") ? fields.Object("text_config") : fields, &family);
  ReadQuantization(fields, &family);
  return family;
}

}  // namespace hopyard::checkpoint
