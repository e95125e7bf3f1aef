// SPDX-License-Identifier: Apache-2.0
// Each model family: spec, views and values of a layer, in the published and in the fused layout.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "hopyard/weights.h"

#include "spec/validate.h"
#include "tests/checkpoint_support.h"

namespace hopyard::checkpoint_test {
namespace {

using ::testing::ElementsAre;

constexpr int64_t kE = 4;   // experts
constexpr int64_t kH = 64;  // hidden
constexpr int64_t kI = 32;  // intermediate

std::string Name(const std::string& module, int64_t expert, const std::string& part) {
  return module + ".experts." + std::to_string(expert) + '.' + part + ".weight";
}

void AddExperts(const std::string& module, const std::vector<std::string>& parts,
                CheckpointBuilder* builder) {
  for (int64_t e = 0; e < kE; ++e) {
    builder->Add(Name(module, e, parts[0]), "BF16", {kI, kH});
    builder->Add(Name(module, e, parts[1]), "BF16", {kI, kH});
    builder->Add(Name(module, e, parts[2]), "BF16", {kH, kI});
  }
}

// Every element of a 2-D view equals the stored one at offset + row * row_step + col.
void ExpectMatrix(const CheckpointBuilder& builder, const std::string& name, const TensorView& view,
                  int64_t offset, int64_t row_step) {
  ASSERT_EQ(view.ndim, 2);
  for (int64_t row = 0; row < view.shape[0]; ++row) {
    for (int64_t col = 0; col < view.shape[1]; ++col) {
      ASSERT_EQ(At(view, {row, col}), builder.Value(name, offset + row * row_step + col))
          << name << " row " << row << " column " << col;
    }
  }
}

void ExpectSame(const CheckpointBuilder& builder, const std::string& name, const TensorView& view) {
  for (int64_t i = 0; i < view.numel(); ++i) {
    ASSERT_TRUE(view.is_contiguous());
    const uint8_t* element = view.as<const uint8_t>() + i * SizeOf(view.dtype);
    ASSERT_EQ(Decode(view.dtype, element), builder.Value(name, i)) << name << " element " << i;
  }
}

CheckpointLayer Load(const CheckpointBuilder& builder, int layer, int shards = 1) {
  const TemporaryDirectory directory;
  builder.Save(directory, shards);
  CheckpointLayer loaded = Checkpoint::Open(directory.path()).Layer(layer);
  // The files are gone and the Checkpoint with them: `owner` alone keeps the views valid.
  spec::ValidateWeights(loaded.spec, loaded.weights);
  EXPECT_TRUE(loaded.weights.read_only);
  EXPECT_NE(loaded.weights.owner, nullptr);
  return loaded;
}

Json Common(const std::string& type) {
  return {{"model_type", type},       {"hidden_size", kH},       {"num_hidden_layers", 2},
          {"num_experts_per_tok", 2}, {"num_local_experts", kE}, {"hidden_act", "silu"}};
}

CheckpointBuilder Mixtral() {
  CheckpointBuilder builder;
  builder.config = Common("mixtral");
  builder.config["intermediate_size"] = kI;
  for (const std::string layer : {"0", "1"}) {
    const std::string module = "model.layers." + layer + ".block_sparse_moe";
    builder.Add(module + ".gate.weight", "BF16", {kE, kH});
    AddExperts(module, {"w1", "w3", "w2"}, &builder);
  }
  return builder;
}

void ExpectSeparate(const CheckpointBuilder& builder, const std::string& module,
                    const std::vector<std::string>& parts, const ExpertMatrices& experts) {
  ASSERT_EQ(experts.gate.values_per_expert.size(), static_cast<size_t>(kE));
  EXPECT_FALSE(experts.gemm1.defined());
  for (int64_t e = 0; e < kE; ++e) {
    const auto at = static_cast<size_t>(e);
    ExpectMatrix(builder, Name(module, e, parts[0]), experts.gate.values_per_expert[at], 0, kH);
    ExpectMatrix(builder, Name(module, e, parts[1]), experts.up.values_per_expert[at], 0, kH);
    ExpectMatrix(builder, Name(module, e, parts[2]), experts.gemm2.values_per_expert[at], 0, kI);
  }
}

class MixtralShards : public ::testing::TestWithParam<int> {};

TEST_P(MixtralShards, PublishedExperts) {
  const CheckpointBuilder builder = Mixtral();
  const CheckpointLayer layer = Load(builder, 1, GetParam());
  EXPECT_EQ(layer.name, "model.layers.1.block_sparse_moe");
  MoeSpec want;
  want.hidden_size = kH;
  want.intermediate_size = kI;
  want.num_experts = kE;
  want.top_k = 2;
  want.routing = RoutingRule::Renormalize();
  EXPECT_EQ(layer.spec, want);
  EXPECT_EQ(layer.router_weight.dtype, DType::kBf16);
  ExpectSame(builder, layer.name + ".gate.weight", layer.router_weight);
  EXPECT_FALSE(layer.router_bias.defined());
  EXPECT_FALSE(layer.routing_bias.defined());
  ExpectSeparate(builder, layer.name, {"w1", "w3", "w2"}, layer.weights.routed);
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, MixtralShards, ::testing::Values(1, 2, 5));

TEST(Checkpoint, ListsItsLayersAndTensors) {
  const TemporaryDirectory directory;
  const CheckpointBuilder builder = Mixtral();
  builder.Save(directory, 3);
  const Checkpoint checkpoint = Checkpoint::Open(directory.path());
  EXPECT_EQ(checkpoint.model_type(), "mixtral");
  EXPECT_THAT(checkpoint.moe_layers(), ElementsAre(0, 1));
  EXPECT_EQ(checkpoint.tensor_names().size(), 2U * (1 + 3 * kE));
  const std::vector<std::string> names = checkpoint.tensor_names();
  EXPECT_TRUE(std::is_sorted(names.begin(), names.end()));
  const std::string name = "model.layers.0.block_sparse_moe.gate.weight";
  ExpectSame(builder, name, checkpoint.Tensor(name));
}

TEST(Checkpoint, FilesWithoutAnIndexAreAllRead) {
  const TemporaryDirectory directory;
  const CheckpointBuilder builder = Mixtral();
  builder.Save(directory, 2);
  std::filesystem::remove(directory / "model.safetensors.index.json");
  const CheckpointLayer layer = Checkpoint::Open(directory.path()).Layer(0);
  ExpectSeparate(builder, layer.name, {"w1", "w3", "w2"}, layer.weights.routed);
}

TEST(Checkpoint, MixtralFusedExperts) {
  CheckpointBuilder builder;
  builder.config = Common("mixtral");
  builder.config["intermediate_size"] = kI;
  const std::string module = "model.layers.0.mlp";
  builder.Add(module + ".gate.weight", "F32", {kE, kH});
  builder.Add(module + ".experts.gate_up_proj", "BF16", {kE, 2 * kI, kH});
  builder.Add(module + ".experts.down_proj", "BF16", {kE, kH, kI});
  const CheckpointLayer layer = Load(builder, 0);
  EXPECT_EQ(layer.name, module);
  EXPECT_EQ(layer.router_weight.dtype, DType::kFloat32);
  const ExpertMatrices& experts = layer.weights.routed;
  EXPECT_EQ(experts.row_order, RowOrder::kGateUp);
  EXPECT_EQ(experts.gemm1.major, MajorOrder::kKMajor);
  EXPECT_THAT(Shape(experts.gemm1.values), ElementsAre(kE, 2 * kI, kH));
  ExpectSame(builder, module + ".experts.gate_up_proj", experts.gemm1.values);
  ExpectSame(builder, module + ".experts.down_proj", experts.gemm2.values);
}

CheckpointBuilder Qwen3(const Json& changes) {
  CheckpointBuilder builder;
  builder.config = Common("qwen3_moe");
  builder.config.erase("num_local_experts");
  builder.config["num_experts"] = kE;
  builder.config["moe_intermediate_size"] = kI;
  builder.config["intermediate_size"] = 3 * kI;
  builder.config["num_hidden_layers"] = 6;
  builder.config.update(changes);
  const std::string module = "model.layers.3.mlp";
  builder.Add(module + ".gate.weight", "BF16", {kE, kH});
  AddExperts(module, {"gate_proj", "up_proj", "down_proj"}, &builder);
  return builder;
}

TEST(Checkpoint, Qwen3NormalisationAndSeparateExperts) {
  const CheckpointBuilder normalised = Qwen3({{"norm_topk_prob", true}});
  const CheckpointLayer layer = Load(normalised, 3);
  EXPECT_EQ(layer.spec.routing, RoutingRule::Renormalize());
  EXPECT_EQ(layer.spec.intermediate_size, kI);
  ExpectSeparate(normalised, "model.layers.3.mlp", {"gate_proj", "up_proj", "down_proj"},
                 layer.weights.routed);
  EXPECT_EQ(Load(Qwen3({{"norm_topk_prob", false}}), 3).spec.routing, RoutingRule::Default());
}

TEST(Checkpoint, Qwen3DenseLayers) {
  const TemporaryDirectory directory;
  const auto layers = [&](const Json& changes) {
    Qwen3(changes).Save(directory);
    return Checkpoint::Open(directory.path()).moe_layers();
  };
  EXPECT_THAT(layers(Json::object()), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(layers({{"decoder_sparse_step", 2}}), ElementsAre(1, 3, 5));
  EXPECT_THAT(layers({{"decoder_sparse_step", 2}, {"mlp_only_layers", {3}}}), ElementsAre(1, 5));
  EXPECT_THAT(layers({{"mlp_only_layers", {0, 5, 77}}}), ElementsAre(1, 2, 3, 4));
}

TEST(Checkpoint, ActivationsByName) {
  const auto kind = [](const char* name) {
    return Load(Qwen3({{"hidden_act", name}}), 3).spec.activation.kind;
  };
  EXPECT_EQ(kind("silu"), ActivationKind::kSwiGlu);
  EXPECT_EQ(kind("gelu"), ActivationKind::kGeGlu);
  EXPECT_EQ(kind("gelu_pytorch_tanh"), ActivationKind::kGeGluTanh);
}

TEST(Checkpoint, LanguageModelPrefixes) {
  for (const std::string prefix : {"model.", "language_model.model.", "model.language_model."}) {
    CheckpointBuilder builder;
    builder.config = Qwen3(Json::object()).config;
    const std::string module = prefix + "layers.2.mlp";
    builder.Add(module + ".gate.weight", "BF16", {kE, kH});
    AddExperts(module, {"gate_proj", "up_proj", "down_proj"}, &builder);
    EXPECT_EQ(Load(builder, 2).name, module);
  }
}

CheckpointBuilder DeepSeek(const std::string& type, int64_t shared) {
  CheckpointBuilder builder;
  builder.config = Common(type);
  builder.config.erase("num_local_experts");
  builder.config.update({{"n_routed_experts", kE},
                         {"moe_intermediate_size", kI},
                         {"n_group", 2},
                         {"topk_group", 1},
                         {"routed_scaling_factor", 2.5},
                         {"norm_topk_prob", true},
                         {"first_k_dense_replace", 1},
                         {"n_shared_experts", shared}});
  const std::string module = "model.layers.1.mlp";
  builder.Add(module + ".gate.weight", "BF16", {kE, kH});
  builder.Add(module + ".gate.e_score_correction_bias", "F32", {kE});
  AddExperts(module, {"gate_proj", "up_proj", "down_proj"}, &builder);
  if (shared > 0) {
    builder.Add(module + ".shared_experts.gate_proj.weight", "BF16", {shared * kI, kH});
    builder.Add(module + ".shared_experts.up_proj.weight", "BF16", {shared * kI, kH});
    builder.Add(module + ".shared_experts.down_proj.weight", "BF16", {kH, shared * kI});
  }
  return builder;
}

struct SharedCase {
  std::string type;
  int64_t shared;
};
class SharedExpertsOf : public ::testing::TestWithParam<SharedCase> {};

TEST_P(SharedExpertsOf, AreSlicesOfOneMatrix) {
  const auto [type, shared] = GetParam();
  const CheckpointBuilder builder = DeepSeek(type, shared);
  const CheckpointLayer layer = Load(builder, 1);
  EXPECT_EQ(layer.spec.routing, RoutingRule::DeepSeekV3(2, 1, 2.5F));
  EXPECT_EQ(layer.spec.shared.count, shared);
  EXPECT_EQ(layer.spec.shared.weight, 1.0F);
  EXPECT_EQ(layer.routing_bias.dtype, DType::kFloat32);
  ExpectSame(builder, layer.name + ".gate.e_score_correction_bias", layer.routing_bias);
  ExpectSeparate(builder, layer.name, {"gate_proj", "up_proj", "down_proj"}, layer.weights.routed);
  const std::string prefix = layer.name + ".shared_experts.";
  const ExpertMatrices& matrices = layer.weights.shared;
  ASSERT_EQ(matrices.gemm2.values_per_expert.size(), static_cast<size_t>(shared));
  for (int64_t s = 0; s < shared; ++s) {
    const auto at = static_cast<size_t>(s);
    ExpectMatrix(builder, prefix + "gate_proj.weight", matrices.gate.values_per_expert[at],
                 s * kI * kH, kH);
    ExpectMatrix(builder, prefix + "up_proj.weight", matrices.up.values_per_expert[at], s * kI * kH,
                 kH);
    const TensorView& down = matrices.gemm2.values_per_expert[at];
    EXPECT_THAT(Shape(down), ElementsAre(kH, kI));
    ExpectMatrix(builder, prefix + "down_proj.weight", down, s * kI, shared * kI);
  }
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, SharedExpertsOf,
                         ::testing::Values(SharedCase{"deepseek_v3", 0},
                                           SharedCase{"deepseek_v3", 1},
                                           SharedCase{"deepseek_v3", 3}, SharedCase{"glm4_moe", 1},
                                           SharedCase{"glm4_moe", 2}));

TEST(Checkpoint, DeepSeekRoutingFields) {
  CheckpointBuilder builder = DeepSeek("deepseek_v3", 1);
  builder.config["norm_topk_prob"] = false;
  RoutingRule rule = RoutingRule::DeepSeekV3(2, 1, 2.5F);
  rule.renormalise = Renormalise::kNone;
  EXPECT_EQ(Load(builder, 1).spec.routing, rule);
  // Absent groups mean one group.
  builder.config.erase("n_group");
  builder.config["topk_group"] = nullptr;
  EXPECT_EQ(Load(builder, 1).spec.routing.num_groups, 1);
  const TemporaryDirectory directory;
  builder.Save(directory);
  EXPECT_THAT(Checkpoint::Open(directory.path()).moe_layers(), ElementsAre(1));
}

// FP8: widths that leave partial 128 x 128 blocks, and one that splits shared experts.
constexpr int64_t kFp8H = 192;
constexpr int64_t kFp8I = 256;

CheckpointBuilder DeepSeekFp8(const std::string& scale_dtype, int64_t shared) {
  CheckpointBuilder builder;
  builder.config = DeepSeek("deepseek_v3", shared).config;
  builder.config["hidden_size"] = kFp8H;
  builder.config["moe_intermediate_size"] = kFp8I;
  builder.config["quantization_config"] = {{"quant_method", "fp8"},
                                           {"fmt", "e4m3"},
                                           {"activation_scheme", "dynamic"},
                                           {"weight_block_size", {128, 128}}};
  const auto add = [&](const std::string& name, int64_t rows, int64_t cols) {
    builder.Add(name + ".weight", "F8_E4M3", {rows, cols});
    builder.Add(name + ".weight_scale_inv", scale_dtype, {(rows + 127) / 128, (cols + 127) / 128});
  };
  const std::string module = "model.layers.1.mlp";
  builder.Add(module + ".gate.weight", "BF16", {kE, kFp8H});
  builder.Add(module + ".gate.e_score_correction_bias", "F32", {kE});
  for (int64_t e = 0; e < kE; ++e) {
    const std::string expert = module + ".experts." + std::to_string(e) + '.';
    add(expert + "gate_proj", kFp8I, kFp8H);
    add(expert + "up_proj", kFp8I, kFp8H);
    add(expert + "down_proj", kFp8H, kFp8I);
  }
  add(module + ".shared_experts.gate_proj", shared * kFp8I, kFp8H);
  add(module + ".shared_experts.up_proj", shared * kFp8I, kFp8H);
  add(module + ".shared_experts.down_proj", kFp8H, shared * kFp8I);
  return builder;
}

class Fp8Scales : public ::testing::TestWithParam<std::string> {};

TEST_P(Fp8Scales, AreReadAsFloat) {
  const CheckpointBuilder builder = DeepSeekFp8(GetParam(), 2);
  const CheckpointLayer layer = Load(builder, 1);
  EXPECT_EQ(layer.spec.weights, WeightFormat::kFp8Block128);
  EXPECT_EQ(layer.spec.activations, ActivationFormat::kFp8Block128);
  EXPECT_EQ(layer.spec.shared.weights, WeightFormat::kFp8Block128);
  const auto scale = [&](const std::string& name, int64_t index) {
    const float stored = builder.Value(name, index);
    return GetParam() == "F8_E8M0" ? std::ldexp(1.0F, static_cast<int>(stored) - 127) : stored;
  };
  const std::string up = layer.name + ".experts.2.up_proj.weight";
  ExpectMatrix(builder, up, layer.weights.routed.up.values_per_expert[2], 0, kFp8H);
  const TensorView& scales = layer.weights.routed.up.scales_per_expert[2];
  EXPECT_EQ(scales.dtype, DType::kFloat32);
  EXPECT_THAT(Shape(scales), ElementsAre(2, 2));
  EXPECT_EQ(At(scales, {1, 0}), scale(up + "_scale_inv", 2));
  // Shared expert 1: rows 256 .. 511 of gate, columns 256 .. 511 of down.
  const std::string gate = layer.name + ".shared_experts.gate_proj.weight_scale_inv";
  const std::string down = layer.name + ".shared_experts.down_proj.weight_scale_inv";
  const ExpertMatrices& shared = layer.weights.shared;
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t col = 0; col < 2; ++col) {
      EXPECT_EQ(At(shared.gate.scales_per_expert[1], {row, col}), scale(gate, (2 + row) * 2 + col));
      EXPECT_EQ(At(shared.gemm2.scales_per_expert[1], {row, col}), scale(down, row * 4 + 2 + col));
    }
  }
  ExpectMatrix(builder, layer.name + ".shared_experts.down_proj.weight",
               shared.gemm2.values_per_expert[1], kFp8I, 2 * kFp8I);
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, Fp8Scales, ::testing::Values("F32", "BF16", "F8_E8M0"),
                         [](const auto& param) { return param.param; });

TEST(Checkpoint, Fp8FusedExpertsAndBf16SharedExpert) {
  CheckpointBuilder builder;
  builder.config = DeepSeekFp8("F32", 1).config;
  const std::string module = "model.layers.1.mlp";
  builder.Add(module + ".gate.weight", "BF16", {kE, kFp8H});
  builder.Add(module + ".gate.e_score_correction_bias", "F32", {kE});
  builder.Add(module + ".experts.gate_up_proj", "F8_E4M3", {kE, 2 * kFp8I, kFp8H});
  builder.Add(module + ".experts.gate_up_proj_scale_inv", "F32", {kE, 4, 2});
  builder.Add(module + ".experts.down_proj", "F8_E4M3", {kE, kFp8H, kFp8I});
  builder.Add(module + ".experts.down_proj_scale_inv", "F32", {kE, 2, 2});
  builder.Add(module + ".shared_experts.gate_proj.weight", "BF16", {kFp8I, kFp8H});
  builder.Add(module + ".shared_experts.up_proj.weight", "BF16", {kFp8I, kFp8H});
  builder.Add(module + ".shared_experts.down_proj.weight", "BF16", {kFp8H, kFp8I});
  const CheckpointLayer layer = Load(builder, 1);
  EXPECT_EQ(layer.spec.weights, WeightFormat::kFp8Block128);
  EXPECT_EQ(layer.spec.shared.weights, WeightFormat::kBf16);
  ExpectSame(builder, module + ".experts.gate_up_proj", layer.weights.routed.gemm1.values);
  ExpectSame(builder, module + ".experts.down_proj_scale_inv", layer.weights.routed.gemm2.scales);
}

CheckpointBuilder GptOss(bool mxfp4) {
  CheckpointBuilder builder;
  builder.config = Common("gpt_oss");
  builder.config["intermediate_size"] = kI;
  builder.config["swiglu_limit"] = 7.0;
  const std::string module = "model.layers.0.mlp";
  builder.Add(module + ".router.weight", "BF16", {kE, kH});
  builder.Add(module + ".router.bias", "BF16", {kE});
  builder.Add(module + ".experts.gate_up_proj_bias", "BF16", {kE, 2 * kI});
  builder.Add(module + ".experts.down_proj_bias", "BF16", {kE, kH});
  if (mxfp4) {
    builder.config["quantization_config"] = {{"quant_method", "mxfp4"}};
    builder.Add(module + ".experts.gate_up_proj_blocks", "U8", {kE, 2 * kI, kH / 32, 16});
    builder.Add(module + ".experts.gate_up_proj_scales", "U8", {kE, 2 * kI, kH / 32});
    builder.Add(module + ".experts.down_proj_blocks", "U8", {kE, kH, kI / 32, 16});
    builder.Add(module + ".experts.down_proj_scales", "U8", {kE, kH, kI / 32});
  } else {
    builder.Add(module + ".experts.gate_up_proj", "BF16", {kE, kH, 2 * kI});
    builder.Add(module + ".experts.down_proj", "BF16", {kE, kI, kH});
  }
  return builder;
}

void ExpectGptOss(const CheckpointBuilder& builder, const CheckpointLayer& layer) {
  EXPECT_EQ(layer.spec.routing, RoutingRule::Renormalize());
  EXPECT_EQ(layer.spec.activation.kind, ActivationKind::kSwiGlu);
  EXPECT_EQ(layer.spec.activation.alpha.all, 1.702F);
  EXPECT_EQ(layer.spec.activation.beta.all, 1.0F);
  EXPECT_EQ(layer.spec.activation.limit.all, 7.0F);
  EXPECT_EQ(layer.spec.activations, ActivationFormat::kBf16);
  EXPECT_EQ(layer.weights.routed.row_order, RowOrder::kInterleavedGateUp);
  ExpectSame(builder, layer.name + ".router.weight", layer.router_weight);
  ExpectSame(builder, layer.name + ".router.bias", layer.router_bias);
  const ExpertMatrices& experts = layer.weights.routed;
  ExpectSame(builder, layer.name + ".experts.gate_up_proj_bias", experts.gemm1.bias);
  ExpectSame(builder, layer.name + ".experts.down_proj_bias", experts.gemm2.bias);
}

TEST(Checkpoint, GptOssMxFp4) {
  const CheckpointBuilder builder = GptOss(true);
  const CheckpointLayer layer = Load(builder, 0, 2);
  ExpectGptOss(builder, layer);
  EXPECT_EQ(layer.spec.weights, WeightFormat::kMxFp4);
  const ExpertMatrices& experts = layer.weights.routed;
  EXPECT_THAT(Shape(experts.gemm1.values), ElementsAre(kE, 2 * kI, kH / 2));
  EXPECT_THAT(Shape(experts.gemm2.values), ElementsAre(kE, kH, kI / 2));
  EXPECT_EQ(experts.gemm1.scales.dtype, DType::kE8m0);
  ExpectSame(builder, layer.name + ".experts.gate_up_proj_blocks", experts.gemm1.values);
  ExpectSame(builder, layer.name + ".experts.gate_up_proj_scales", experts.gemm1.scales);
  ExpectSame(builder, layer.name + ".experts.down_proj_blocks", experts.gemm2.values);
  ExpectSame(builder, layer.name + ".experts.down_proj_scales", experts.gemm2.scales);
}

TEST(Checkpoint, GptOssBf16IsMnMajor) {
  const CheckpointBuilder builder = GptOss(false);
  const CheckpointLayer layer = Load(builder, 0);
  ExpectGptOss(builder, layer);
  EXPECT_EQ(layer.spec.weights, WeightFormat::kBf16);
  const ExpertMatrices& experts = layer.weights.routed;
  EXPECT_EQ(experts.gemm1.major, MajorOrder::kMnMajor);
  EXPECT_EQ(experts.gemm2.major, MajorOrder::kMnMajor);
  EXPECT_THAT(Shape(experts.gemm1.values), ElementsAre(kE, kH, 2 * kI));
  EXPECT_THAT(Shape(experts.gemm2.values), ElementsAre(kE, kI, kH));
  ExpectSame(builder, layer.name + ".experts.gate_up_proj", experts.gemm1.values);
}

CheckpointBuilder Llama4(const std::string& prefix, int layer) {
  CheckpointBuilder builder;
  builder.config = Common("llama4_text");
  builder.config["intermediate_size"] = kI;
  builder.config["intermediate_size_mlp"] = 3 * kI;
  builder.config["num_experts_per_tok"] = 1;
  builder.config["num_hidden_layers"] = 4;
  const std::string module = prefix + "layers." + std::to_string(layer) + ".feed_forward";
  builder.Add(module + ".router.weight", "BF16", {kE, kH});
  builder.Add(module + ".experts.gate_up_proj", "BF16", {kE, kH, 2 * kI});
  builder.Add(module + ".experts.down_proj", "BF16", {kE, kI, kH});
  builder.Add(module + ".shared_expert.gate_proj.weight", "BF16", {kI, kH});
  builder.Add(module + ".shared_expert.up_proj.weight", "BF16", {kI, kH});
  builder.Add(module + ".shared_expert.down_proj.weight", "BF16", {kH, kI});
  return builder;
}

TEST(Checkpoint, Llama4TextAndMultimodal) {
  for (const bool multimodal : {false, true}) {
    CheckpointBuilder builder = Llama4(multimodal ? "language_model.model." : "model.", 1);
    if (multimodal) {
      builder.config = {{"model_type", "llama4"}, {"text_config", builder.config}};
    }
    const CheckpointLayer layer = Load(builder, 1);
    EXPECT_EQ(layer.spec.routing, RoutingRule::Llama4());
    EXPECT_TRUE(layer.spec.router_weight_on_input);
    EXPECT_EQ(layer.spec.top_k, 1);
    EXPECT_EQ(layer.spec.shared.count, 1);
    const ExpertMatrices& experts = layer.weights.routed;
    EXPECT_EQ(experts.row_order, RowOrder::kGateUp);
    EXPECT_EQ(experts.gemm1.major, MajorOrder::kMnMajor);
    ExpectSame(builder, layer.name + ".experts.down_proj", experts.gemm2.values);
    ExpectMatrix(builder, layer.name + ".shared_expert.down_proj.weight",
                 layer.weights.shared.gemm2.values_per_expert[0], 0, kI);
  }
}

TEST(Checkpoint, Llama4DenseLayers) {
  const TemporaryDirectory directory;
  const auto layers = [&](const Json& changes) {
    CheckpointBuilder builder = Llama4("model.", 1);
    builder.config.update(changes);
    builder.Save(directory);
    return Checkpoint::Open(directory.path()).moe_layers();
  };
  EXPECT_THAT(layers(Json::object()), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(layers({{"interleave_moe_layer_step", 2}}), ElementsAre(1, 3));
  EXPECT_THAT(layers({{"moe_layers", nullptr}, {"interleave_moe_layer_step", 3}}), ElementsAre(2));
  EXPECT_THAT(layers({{"moe_layers", {3, 1}}, {"interleave_moe_layer_step", 3}}),
              ElementsAre(1, 3));
}

}  // namespace
}  // namespace hopyard::checkpoint_test
