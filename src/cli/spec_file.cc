// SPDX-License-Identifier: Apache-2.0
#include "cli/spec_file.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "checkpoint/json_file.h"
#include "core/error.h"

namespace hopyard::cli {
namespace {

using checkpoint::FieldReader;
using nlohmann::json;
using Keys = std::vector<std::string_view>;

constexpr uint64_t kMaxSpecBytes = 1U << 20;
constexpr checkpoint::IntRange kInt = {0, std::numeric_limits<int32_t>::max()};
constexpr checkpoint::IntRange kSize = {0, std::numeric_limits<int64_t>::max()};

// An object of the file: its fields, and the object itself for what FieldReader does not read.
struct Section {
  const json& object;
  FieldReader fields;

  [[nodiscard]] bool Has(const std::string& key) const { return fields.Has(key); }
  [[nodiscard]] bool HasObject(const std::string& key) const {
    return Has(key) && object.at(key).is_object();
  }
  [[nodiscard]] Section Sub(const std::string& key) const {
    FieldReader reader = fields.Object(key);
    return {object.at(key), reader};
  }
  [[nodiscard]] int IntOr(const std::string& key, int fallback) const {
    return static_cast<int>(fields.IntOr(key, kInt, fallback));
  }
};

void CheckKeys(const Section& section, const Keys& known, const std::string& owner) {
  for (const auto& [key, value] : section.object.items()) {
    const bool found = std::find(known.begin(), known.end(), key) != known.end();
    std::string list;
    for (const std::string_view name : known) {
      list += (list.empty() ? "" : ", ") + std::string(name);
    }
    HOPYARD_CHECK(found, kInvalidArgument)
        << section.fields.Where(key) << " is not known; " << owner << " has " << list;
  }
}

// parse(text of the key), its refusal beginning with file and key.
template <class Parse>
auto Named(const Section& section, const std::string& key, Parse parse) {
  const std::string text = section.fields.String(key);
  try {
    return parse(text);
  } catch (const Error& error) {
    throw Error(error.kind(), section.fields.Where(key) + ": " + error.message());
  }
}

// A number for all experts, or an array of one per local expert.
PerExpert ReadPerExpert(const Section& section, const std::string& key, const PerExpert& fallback) {
  if (!section.Has(key) || !section.object.at(key).is_array()) {
    return {section.fields.FloatOr(key, fallback.all), {}};
  }
  PerExpert value = fallback;
  for (const json& number : section.object.at(key)) {
    HOPYARD_CHECK(
        number.is_number() && std::abs(number.get<double>()) <= std::numeric_limits<float>::max(),
        kInvalidArgument)
        << section.fields.Where(key) << " holds " << number.type_name() << " at "
        << value.each.size() << "; finite numbers are wanted";
    value.each.push_back(number.get<float>());
  }
  return value;
}

Activation ReadActivation(const Section& spec) {
  Activation activation;
  if (!spec.HasObject("activation")) {
    activation.kind = Named(spec, "activation", ParseActivationKind);
    return activation;
  }
  const Section section = spec.Sub("activation");
  CheckKeys(section, {"kind", "alpha", "beta", "limit"}, "activation");
  if (section.Has("kind")) {
    activation.kind = Named(section, "kind", ParseActivationKind);
  }
  activation.alpha = ReadPerExpert(section, "alpha", activation.alpha);
  activation.beta = ReadPerExpert(section, "beta", activation.beta);
  activation.limit = ReadPerExpert(section, "limit", activation.limit);
  return activation;
}

struct Method {
  std::string_view name;
  RoutingRule (*make)(const Section& parameters);
  Keys keys;
};

const std::vector<Method>& Methods() {
  static const std::vector<Method> methods = {
      {"Default", [](const Section&) { return RoutingRule::Default(); }, {"method"}},
      {"Renormalize", [](const Section&) { return RoutingRule::Renormalize(); }, {"method"}},
      {"RenormalizeNaive",
       [](const Section&) { return RoutingRule::RenormalizeNaive(); },
       {"method"}},
      {"DeepSeekV3",
       [](const Section& s) {
         return RoutingRule::DeepSeekV3(s.IntOr("num_groups", 1), s.IntOr("top_groups", 1),
                                        s.fields.FloatOr("scaling_factor", 1.0F));
       },
       {"method", "num_groups", "top_groups", "scaling_factor"}},
      {"MiniMax2",
       [](const Section& s) {
         return RoutingRule::MiniMax2(s.fields.FloatOr("scaling_factor", 1.0F));
       },
       {"method", "scaling_factor"}},
      {"Llama4", [](const Section&) { return RoutingRule::Llama4(); }, {"method"}},
      {"TopKSigmoid", [](const Section&) { return RoutingRule::TopKSigmoid(); }, {"method"}},
      {"TopK", [](const Section&) { return RoutingRule::TopK(); }, {"method"}},
      {"SigmoidRenorm",
       [](const Section& s) {
         return RoutingRule::SigmoidRenorm(s.fields.BoolOr("norm_topk_prob", true));
       },
       {"method", "norm_topk_prob"}},
      {"Sigmoid", [](const Section&) { return RoutingRule::Sigmoid(); }, {"method"}},
      {"SqrtSoftplus",
       [](const Section& s) {
         return RoutingRule::SqrtSoftplus(s.fields.FloatOr("scaling_factor", 1.0F));
       },
       {"method", "scaling_factor"}},
  };
  return methods;
}

RoutingRule ReadRouting(const Section& spec) {
  const json none = json::object();
  const bool object = spec.HasObject("routing");
  const Section section =
      object ? spec.Sub("routing") : Section{none, FieldReader(none, std::string())};
  const Section& named = object ? section : spec;
  const std::string key = object ? "method" : "routing";
  const std::string name = named.fields.String(key);
  std::string known;
  for (const Method& method : Methods()) {
    if (method.name == name) {
      CheckKeys(section, method.keys, "routing method " + name);
      return method.make(section);
    }
    known += (known.empty() ? "" : ", ") + std::string(method.name);
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << named.fields.Where(key) << " is '" << name << "'; wanted one of " << known;
  return {};
}

ExpertMap ReadLocal(const Section& section) {
  CheckKeys(section, {"kind", "offset", "count"}, "local");
  ExpertMap local;
  const std::string kind = section.fields.String("kind");
  HOPYARD_CHECK(kind == "all" || kind == "range" || kind == "table", kInvalidArgument)
      << section.fields.Where("kind") << " is '" << kind << "'; wanted all, range or table";
  local.kind = kind == "all"     ? ExpertMap::Kind::kAll
               : kind == "range" ? ExpertMap::Kind::kRange
                                 : ExpertMap::Kind::kTable;
  local.offset = section.IntOr("offset", 0);
  local.count = section.IntOr("count", 0);
  return local;
}

SharedExperts ReadShared(const Section& section) {
  CheckKeys(section, {"count", "per_token_weight", "weight", "weights"}, "shared");
  SharedExperts shared;
  shared.count = section.IntOr("count", 0);
  shared.per_token_weight = section.fields.BoolOr("per_token_weight", false);
  shared.weight = section.fields.FloatOr("weight", shared.weight);
  if (section.Has("weights")) {
    shared.weights = Named(section, "weights", ParseWeightFormat);
  }
  return shared;
}

}  // namespace

MoeSpec ReadSpecFile(const std::string& path) {
  const json document = checkpoint::ReadJsonObject(path, kMaxSpecBytes);
  const Section section{document, FieldReader(document, path)};
  CheckKeys(section,
            {"hidden_size", "intermediate_size", "num_experts", "top_k", "routing", "activation",
             "weights", "activations", "local", "shared", "router_weight_on_input"},
            "a spec");
  MoeSpec spec;
  spec.hidden_size = section.fields.Int("hidden_size", kSize);
  spec.intermediate_size = section.fields.Int("intermediate_size", kSize);
  spec.num_experts = static_cast<int>(section.fields.Int("num_experts", kInt));
  spec.top_k = static_cast<int>(section.fields.Int("top_k", kInt));
  if (section.Has("routing")) {
    spec.routing = ReadRouting(section);
  }
  if (section.Has("activation")) {
    spec.activation = ReadActivation(section);
  }
  if (section.Has("weights")) {
    spec.weights = Named(section, "weights", ParseWeightFormat);
  }
  if (section.Has("activations")) {
    spec.activations = Named(section, "activations", ParseActivationFormat);
  }
  if (section.Has("local")) {
    spec.local = ReadLocal(section.Sub("local"));
  }
  if (section.Has("shared")) {
    spec.shared = ReadShared(section.Sub("shared"));
  }
  spec.router_weight_on_input = section.fields.BoolOr("router_weight_on_input", false);
  return spec;
}

}  // namespace hopyard::cli
