// SPDX-License-Identifier: Apache-2.0
// Directories, configurations, indices and layers that do not hold together: kind and message.
#include <string>
#include <utility>
#include <vector>

#include "tests/checkpoint_support.h"

namespace hopyard::checkpoint_test {
namespace {

constexpr ErrorKind kInvalid = ErrorKind::kInvalidArgument;
constexpr ErrorKind kUnsupported = ErrorKind::kUnsupported;
constexpr int64_t kE = 2;
constexpr int64_t kH = 32;
constexpr int64_t kI = 32;
const char* const kModule = "model.layers.0.mlp";

std::string In(const std::string& name) {
  return std::string(kModule) + "." + name;
}

CheckpointBuilder Qwen3() {
  CheckpointBuilder builder;
  builder.config = {{"model_type", "qwen3_moe"},   {"hidden_size", kH},
                    {"moe_intermediate_size", kI}, {"num_hidden_layers", 2},
                    {"num_experts_per_tok", 1},    {"num_experts", kE},
                    {"hidden_act", "silu"},        {"mlp_only_layers", {1}}};
  builder.Add(In("gate.weight"), "BF16", {kE, kH});
  for (const std::string e : {"0", "1"}) {
    builder.Add(In("experts." + e + ".gate_proj.weight"), "BF16", {kI, kH});
    builder.Add(In("experts." + e + ".up_proj.weight"), "BF16", {kI, kH});
    builder.Add(In("experts." + e + ".down_proj.weight"), "BF16", {kH, kI});
  }
  return builder;
}

CheckpointBuilder DeepSeek() {
  CheckpointBuilder builder = Qwen3();
  builder.config.erase("num_experts");
  builder.config.update(
      {{"model_type", "deepseek_v3"}, {"n_routed_experts", kE}, {"n_shared_experts", 1}});
  builder.Add(In("gate.e_score_correction_bias"), "F32", {kE});
  builder.Add(In("shared_experts.gate_proj.weight"), "BF16", {kI, kH});
  builder.Add(In("shared_experts.up_proj.weight"), "BF16", {kI, kH});
  builder.Add(In("shared_experts.down_proj.weight"), "BF16", {kH, kI});
  return builder;
}

CheckpointBuilder GptOss() {
  CheckpointBuilder builder;
  builder.config = {{"model_type", "gpt_oss"},
                    {"hidden_size", kH},
                    {"intermediate_size", kI},
                    {"num_hidden_layers", 1},
                    {"num_experts_per_tok", 1},
                    {"num_local_experts", kE},
                    {"quantization_config", {{"quant_method", "mxfp4"}}}};
  builder.Add(In("router.weight"), "BF16", {kE, kH});
  builder.Add(In("router.bias"), "BF16", {kE});
  builder.Add(In("experts.gate_up_proj_blocks"), "U8", {kE, 2 * kI, kH / 32, 16});
  builder.Add(In("experts.gate_up_proj_scales"), "U8", {kE, 2 * kI, kH / 32});
  builder.Add(In("experts.gate_up_proj_bias"), "BF16", {kE, 2 * kI});
  builder.Add(In("experts.down_proj_blocks"), "U8", {kE, kH, kI / 32, 16});
  builder.Add(In("experts.down_proj_scales"), "U8", {kE, kH, kI / 32});
  builder.Add(In("experts.down_proj_bias"), "BF16", {kE, kH});
  return builder;
}

void ExpectOpenError(const CheckpointBuilder& builder, ErrorKind kind,
                     const std::vector<std::string>& parts) {
  const TemporaryDirectory directory;
  builder.Save(directory);
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kind, parts);
}

void ExpectLayerError(const CheckpointBuilder& builder, ErrorKind kind,
                      const std::vector<std::string>& parts, int layer = 0) {
  const TemporaryDirectory directory;
  builder.Save(directory);
  const Checkpoint checkpoint = Checkpoint::Open(directory.path());
  ExpectError([&] { (void)checkpoint.Layer(layer); }, kind, parts);
}

TEST(CheckpointErrors, TheBuildersThemselvesLoad) {
  for (const CheckpointBuilder& builder : {Qwen3(), DeepSeek(), GptOss()}) {
    const TemporaryDirectory directory;
    builder.Save(directory);
    EXPECT_NO_THROW((void)Checkpoint::Open(directory.path()).Layer(0));
  }
}

struct ConfigCase {
  std::string name;
  CheckpointBuilder (*builder)();
  Json change;
  ErrorKind kind;
  std::vector<std::string> message;
};

std::vector<ConfigCase> IntegerCases() {
  return {
      {"TextForInteger",
       Qwen3,
       {{"hidden_size", "32"}},
       kInvalid,
       {"config.json: field 'hidden_size' is \"32\" (string)", "an integer in [1, 4194304]"}},
      {"FloatForInteger", Qwen3, {{"hidden_size", 32.0}}, kInvalid, {"'hidden_size' is 32.0"}},
      {"ArrayForInteger", Qwen3, {{"hidden_size", {1, 2}}}, kInvalid, {"an array of 2 elements"}},
      {"BooleanForInteger", Qwen3, {{"num_experts", true}}, kInvalid, {"'num_experts' is true"}},
      {"Zero", Qwen3, {{"hidden_size", 0}}, kInvalid, {"'hidden_size' is 0"}},
      {"Negative", Qwen3, {{"moe_intermediate_size", -32}}, kInvalid, {"is -32"}},
      {"TooWide", Qwen3, {{"hidden_size", int64_t{1} << 40}}, kInvalid, {"1099511627776"}},
      {"Over63Bits",
       Qwen3,
       {{"hidden_size", 18446744073709551615U}},
       kInvalid,
       {"18446744073709551615"}},
      {"Missing", Qwen3, {{"hidden_size", nullptr}}, kInvalid, {"'hidden_size' is missing"}},
      {"TooManyExperts", Qwen3, {{"num_experts", 2049}}, kInvalid, {"2049", "[1, 2048]"}},
      {"TopKOverExperts", Qwen3, {{"num_experts_per_tok", 3}}, kInvalid, {"is 3", "[1, 2]"}},
      {"TwoNamesDiffer",
       Qwen3,
       {{"num_local_experts", 8}},
       kInvalid,
       {"'num_experts' is 2", "num_local_experts is 8"}},
      {"TooManyLayers", Qwen3, {{"num_hidden_layers", 10001}}, kInvalid, {"10001", "10000"}},
  };
}

std::vector<ConfigCase> OtherFieldCases() {
  return {
      {"LayerListText",
       Qwen3,
       {{"mlp_only_layers", "x"}},
       kInvalid,
       {"'mlp_only_layers' is \"x\"", "an array of integers"}},
      {"LayerListElement",
       Qwen3,
       {{"mlp_only_layers", {0, -1}}},
       kInvalid,
       {"'mlp_only_layers'[1] is -1"}},
      {"BooleanText",
       Qwen3,
       {{"norm_topk_prob", "yes"}},
       kInvalid,
       {"'norm_topk_prob' is \"yes\"", "true or false"}},
      {"ZeroStep", Qwen3, {{"decoder_sparse_step", 0}}, kInvalid, {"'decoder_sparse_step' is 0"}},
      {"ActivationNumber", Qwen3, {{"hidden_act", 3}}, kInvalid, {"'hidden_act' is 3", "a string"}},
      {"ActivationName",
       Qwen3,
       {{"hidden_act", "relu6"}},
       kUnsupported,
       {"'hidden_act' is 'relu6'", "gelu_pytorch_tanh"}},
      {"ModelType",
       Qwen3,
       {{"model_type", "bert"}},
       kUnsupported,
       {"'model_type' is 'bert'",
        "known are mixtral, qwen3_moe, deepseek_v3, gpt_oss, llama4, llama4_text, glm4_moe"}},
      {"NoModelType", Qwen3, {{"model_type", nullptr}}, kInvalid, {"'model_type' is missing"}},
      {"TextConfigNumber",
       Qwen3,
       {{"text_config", 1}},
       kInvalid,
       {"'text_config' is 1", "an object"}},
      {"TextConfigField",
       Qwen3,
       {{"text_config", {{"num_hidden_layers", "2"}}}},
       kInvalid,
       {"'text_config.num_hidden_layers' is \"2\""}},
  };
}

std::vector<ConfigCase> RoutingCases() {
  return {
      {"GroupsDoNotDivide",
       DeepSeek,
       {{"n_routed_experts", 5}, {"n_group", 2}},
       kInvalid,
       {"'n_group' is 2", "divisor of n_routed_experts, 5"}},
      {"TopGroups",
       DeepSeek,
       {{"n_group", 2}, {"topk_group", 3}},
       kInvalid,
       {"'topk_group' is 3", "[1, 2]"}},
      {"TopKOverGroups",
       DeepSeek,
       {{"n_group", 2}, {"topk_group", 1}, {"num_experts_per_tok", 2}},
       kInvalid,
       {"'num_experts_per_tok' is 2", "hold 1 experts"}},
      {"ScalingText", DeepSeek, {{"routed_scaling_factor", "2.5"}}, kInvalid, {"a finite number"}},
      {"ScalingHuge", DeepSeek, {{"routed_scaling_factor", 1e300}}, kInvalid, {"a finite number"}},
      {"ScalingZero", DeepSeek, {{"routed_scaling_factor", 0}}, kInvalid, {"positive"}},
      {"ScoringFunc",
       DeepSeek,
       {{"scoring_func", "softmax"}},
       kUnsupported,
       {"'scoring_func' is 'softmax'", "'sigmoid' is supported"}},
      {"TopKMethod", DeepSeek, {{"topk_method", "greedy"}}, kUnsupported, {"'greedy'"}},
      {"LayerFrequency",
       DeepSeek,
       {{"moe_layer_freq", 2}},
       kUnsupported,
       {"'moe_layer_freq' is 2"}},
      {"TooManyShared",
       DeepSeek,
       {{"n_shared_experts", 65}},
       kInvalid,
       {"'n_shared_experts' is 65"}},
      {"Limit", GptOss, {{"swiglu_limit", -7.0}}, kInvalid, {"'swiglu_limit' is -7"}},
      {"GptOssActivation",
       GptOss,
       {{"hidden_act", "gelu"}},
       kUnsupported,
       {"'hidden_act'", "'gelu'"}},
  };
}

std::vector<ConfigCase> QuantizationCases() {
  const Json fp8 = {{"quant_method", "fp8"}, {"weight_block_size", {128, 128}}};
  const auto quantized = [&](const Json& change) {
    Json config = fp8;
    config.update(change);
    return Json{{"quantization_config", config}};
  };
  return {
      {"QuantMethod",
       Qwen3,
       {{"quantization_config", {{"quant_method", "awq"}}}},
       kUnsupported,
       {"'quantization_config.quant_method' is 'awq'", "fp8", "mxfp4"}},
      {"QuantNoMethod",
       Qwen3,
       {{"quantization_config", Json::object()}},
       kInvalid,
       {"'quantization_config.quant_method' is missing"}},
      {"BlockSize",
       Qwen3,
       quantized({{"weight_block_size", {64, 128}}}),
       kUnsupported,
       {"'quantization_config.weight_block_size' is [64, 128]", "[128, 128]"}},
      {"NoBlockSize",
       Qwen3,
       quantized({{"weight_block_size", nullptr}}),
       kUnsupported,
       {"weight_block_size' is absent"}},
      {"StaticActivations",
       Qwen3,
       quantized({{"activation_scheme", "static"}}),
       kUnsupported,
       {"activation_scheme' is 'static'"}},
  };
}

class BadConfig : public ::testing::TestWithParam<ConfigCase> {};

TEST_P(BadConfig, IsRefusedByField) {
  const ConfigCase& c = GetParam();
  CheckpointBuilder builder = c.builder();
  builder.config.update(c.change);
  ExpectOpenError(builder, c.kind, c.message);
}

std::string CaseName(const ::testing::TestParamInfo<ConfigCase>& param) {
  return param.param.name;
}
INSTANTIATE_TEST_SUITE_P(Integers, BadConfig, ::testing::ValuesIn(IntegerCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(OtherFields, BadConfig, ::testing::ValuesIn(OtherFieldCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Routing, BadConfig, ::testing::ValuesIn(RoutingCases()), CaseName);
INSTANTIATE_TEST_SUITE_P(Quantization, BadConfig, ::testing::ValuesIn(QuantizationCases()),
                         CaseName);

TEST(CheckpointErrors, Llama4Layers) {
  CheckpointBuilder builder = GptOss();
  builder.config["model_type"] = "llama4_text";
  builder.config["moe_layers"] = {0, 1};
  ExpectOpenError(builder, kInvalid, {"'moe_layers'[1] is 1", "[0, 0]"});
  builder.config["moe_layers"] = {0, 0};
  ExpectOpenError(builder, kInvalid, {"'moe_layers' names a layer twice"});
}

TEST(CheckpointErrors, ConfigThatIsNoObject) {
  const TemporaryDirectory directory;
  Qwen3().Save(directory);
  const auto expect = [&](const std::string& text, const std::vector<std::string>& parts) {
    directory.Write("config.json", text);
    ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid, parts);
  };
  expect("", {"config.json: has 0 bytes"});
  expect("[]", {"holds array; an object is wanted"});
  expect("{", {"is not JSON at byte"});
  expect("{} x", {"is not JSON at byte"});
  expect("{\"a\": 1e999}", {"is not JSON at byte"});
  expect("{\"a\": NaN}", {"is not JSON at byte"});
  expect(R"({"model_type":"mixtral","model_type":"gpt_oss"})", {"the key 'model_type' twice"});
  expect("{\"a\":" + std::string(1'000'000, '['), {"nested deeper than 32 levels"});
  std::string objects;
  for (int i = 0; i < 100'000; ++i) {
    objects += "{\"a\":";
  }
  expect(objects, {"nested deeper than 32 levels"});
  std::filesystem::resize_file(directory / "config.json", (16U << 20) + 1);
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid,
              {"has 16777217 bytes; 1 to 16777216 are allowed"});
  std::filesystem::remove(directory / "config.json");
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid,
              {"config.json: cannot be opened", "No such file"});
}

TEST(CheckpointErrors, DirectoryWithoutTensors) {
  const TemporaryDirectory directory;
  directory.Write("config.json", Qwen3().config.dump());
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid,
              {directory.path(), "neither model.safetensors nor model.safetensors.index.json"});
}

TEST(CheckpointErrors, OneCorruptFileRefusesTheWholeCheckpoint) {
  const TemporaryDirectory directory;
  Qwen3().Save(directory, 2);
  std::filesystem::resize_file(directory / "model-2.safetensors",
                               std::filesystem::file_size(directory / "model-2.safetensors") - 1);
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid,
              {"model-2.safetensors: tensor '", "is it truncated?"});
}

TEST(CheckpointErrors, TensorInTwoFilesWithoutIndex) {
  const TemporaryDirectory directory;
  Qwen3().Save(directory);
  std::filesystem::rename(directory / "model.safetensors", directory / "a.safetensors");
  std::filesystem::copy(directory / "a.safetensors", directory / "b.safetensors");
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid,
              {"is both in ", "a.safetensors and in ", "b.safetensors"});
}

TEST(CheckpointErrors, Index) {
  const TemporaryDirectory directory;
  const CheckpointBuilder builder = Qwen3();
  builder.Save(directory, 2);
  // A file that a traversal could reach.
  const TemporaryDirectory outside;
  builder.Save(outside);
  const auto expect = [&](const Json& index, const std::vector<std::string>& parts) {
    directory.Write("model.safetensors.index.json", index.dump());
    ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid, parts);
  };
  const auto expect_shard = [&](const std::string& shard) {
    expect({{"weight_map", {{In("gate.weight"), shard}}}},
           {"weight_map puts tensor '" + In("gate.weight") + "' into '", "in the same directory"});
  };
  const std::string name = std::filesystem::path(outside.path()).filename().string();
  expect_shard("../" + name + "/model.safetensors");
  expect_shard(outside / "model.safetensors");
  expect_shard("./model-1.safetensors");
  expect_shard("sub/model.safetensors");
  expect_shard("..\\model.safetensors");
  expect_shard("..safetensors");
  expect_shard(".hidden.safetensors");
  expect_shard("");
  expect_shard(".safetensors");
  expect_shard("config.json");
  expect_shard(std::string("model-1.safetensors\0.safetensors", 32));
  expect(Json::object(), {"'weight_map' is missing"});
  expect({{"weight_map", 3}}, {"'weight_map' is number"});
  expect({{"weight_map", {{"a", 3}}}}, {"weight_map['a'] is number", "a file name"});
  expect({{"weight_map", {{"a", "model-9.safetensors"}}}},
         {"model-9.safetensors: cannot be opened"});
  expect({{"weight_map", {{"no.such", "model-1.safetensors"}}}},
         {"tensor 'no.such' into model-1.safetensors, which does not hold it"});
  directory.Write("model.safetensors.index.json",
                  R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})");
  ExpectError([&] { (void)Checkpoint::Open(directory.path()); }, kInvalid, {"the key 'a' twice"});
}

TEST(CheckpointErrors, LayerNumbers) {
  ExpectLayerError(Qwen3(), kInvalid, {"layer 1 is dense"}, 1);
  ExpectLayerError(Qwen3(), kInvalid, {"layer 2 does not exist; the model has 2 layers", "0 to 0"},
                   2);
  ExpectLayerError(Qwen3(), kInvalid, {"layer -1 does not exist"}, -1);
}

TEST(CheckpointErrors, MissingTensorsAreNamed) {
  const std::vector<std::pair<CheckpointBuilder, std::vector<std::string>>> cases = {
      {Qwen3(),
       {"experts.1.gate_proj.weight", "experts.1.up_proj.weight", "experts.0.down_proj.weight"}},
      {DeepSeek(),
       {"gate.e_score_correction_bias", "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"}},
      {GptOss(),
       {"router.bias", "experts.gate_up_proj_scales", "experts.down_proj_blocks",
        "experts.down_proj_scales", "experts.gate_up_proj_bias", "experts.down_proj_bias"}}};
  for (const auto& [complete, names] : cases) {
    for (const std::string& name : names) {
      CheckpointBuilder builder = complete;
      builder.Remove(In(name));
      ExpectLayerError(builder, kInvalid, {"has no tensor '" + In(name) + "'"});
    }
  }
  CheckpointBuilder builder = Qwen3();
  builder.Remove(In("gate.weight"));
  ExpectLayerError(builder, kInvalid,
                   {"layer 0 has no router: no tensor '" + In("gate.weight") + "'", "qwen3_moe"});
  builder = GptOss();
  builder.Remove(In("experts.gate_up_proj_blocks"));
  ExpectLayerError(builder, kInvalid, {"has no experts of '" + std::string(kModule) + "'"});
}

TEST(CheckpointErrors, ShapesAndDtypesNameFileTensorGotAndWanted) {
  CheckpointBuilder builder = Qwen3();
  builder.Add(In("gate.weight"), "BF16", {kE, kH - 1});
  ExpectLayerError(builder, kInvalid,
                   {"model.safetensors: tensor '" + In("gate.weight") +
                        "' has shape [2, 31]; "
                        "[2, 32] is wanted",
                    "2 experts, hidden size 32, intermediate size 32"});
  builder = Qwen3();
  builder.Add(In("experts.1.down_proj.weight"), "BF16", {kH, kI, 1});
  ExpectLayerError(builder, kInvalid, {In("experts.1.down_proj.weight"), "[32, 32, 1]; [32, 32]"});
  builder = Qwen3();
  builder.Add(In("gate.weight"), "U8", {kE, kH});
  ExpectLayerError(builder, kInvalid, {"has dtype u8; f32 or bf16 is wanted"});
  builder = Qwen3();
  builder.Add(In("experts.1.up_proj.weight"), "F16", {kI, kH});
  ExpectLayerError(builder, kInvalid, {In("experts.1.up_proj.weight"), "f16; bf16 is wanted"});
  for (const std::string dtype : {"F16", "F32"}) {
    builder = Qwen3();
    builder.Add(In("experts.0.gate_proj.weight"), dtype, {kI, kH});
    ExpectLayerError(builder, kUnsupported,
                     {In("experts.0.gate_proj.weight"), "save the model in bf16"});
  }
  builder = GptOss();
  builder.Add(In("experts.gate_up_proj_blocks"), "U8", {kE, 2 * kI, kH / 2});
  ExpectLayerError(builder, kInvalid, {"[2, 64, 16]; [2, 64, 1, 16]"});
  builder = GptOss();
  builder.Add(In("experts.down_proj_bias"), "U8", {kE, kH});
  ExpectLayerError(builder, kInvalid, {"down_proj_bias' has dtype u8"});
}

TEST(CheckpointErrors, ExpertsThatContradictTheConfiguration) {
  CheckpointBuilder builder = Qwen3();
  builder.Add(In("experts.2.gate_proj.weight"), "BF16", {kI, kH});
  ExpectLayerError(builder, kInvalid, {In("experts.2.gate_proj.weight"), "there are 2 experts"});
  builder = Qwen3();
  builder.Add(In("experts.gate_up_proj"), "BF16", {kE, 2 * kI, kH});
  ExpectLayerError(builder, kInvalid, {"in more than one form"});
  builder = GptOss();
  builder.config.erase("quantization_config");
  ExpectLayerError(builder, kInvalid, {"MXFP4 blocks", "'mxfp4'"});
  builder = GptOss();
  builder.config["hidden_size"] = 48;
  builder.Add(In("router.weight"), "BF16", {kE, 48});
  ExpectLayerError(builder, kInvalid, {"hidden size 48", "multiples of 32"});
  builder = GptOss();
  builder.Remove(In("experts.gate_up_proj_blocks"));
  builder.Add(In("experts.0.gate_proj.weight"), "BF16", {kI, kH});
  ExpectLayerError(builder, kUnsupported, {"separate experts", "gpt_oss"});
  builder = GptOss();
  builder.Remove(In("experts.gate_up_proj_blocks"));
  builder.config["quantization_config"] = {{"quant_method", "fp8"},
                                           {"weight_block_size", {128, 128}}};
  builder.Add(In("experts.gate_up_proj"), "F8_E4M3", {kE, kH, 2 * kI});
  ExpectLayerError(builder, kUnsupported, {"dtype e4m3", "supported in bf16"});
}

TEST(CheckpointErrors, Fp8) {
  CheckpointBuilder builder = DeepSeek();
  const std::string gate = In("experts.0.gate_proj.weight");
  builder.Add(gate, "F8_E4M3", {kI, kH});
  ExpectLayerError(builder, kInvalid, {gate, "e4m3", "quant_method 'fp8'"});
  builder.config["quantization_config"] = {{"quant_method", "fp8"},
                                           {"weight_block_size", {128, 128}}};
  ExpectLayerError(builder, kInvalid, {"has no tensor '" + gate + "_scale_inv'"});
  builder.Add(gate + "_scale_inv", "F32", {1, 2});
  ExpectLayerError(builder, kInvalid, {gate + "_scale_inv", "[1, 2]; [1, 1]"});
  builder.Add(gate + "_scale_inv", "U8", {1, 1});
  ExpectLayerError(builder, kInvalid, {"u8; f32 or bf16 or e8m0"});
  builder.Add(gate + "_scale_inv", "F32", {1, 1});
  // Experts of one layer share a format.
  ExpectLayerError(builder, kInvalid, {In("experts.0.up_proj.weight"), "bf16; e4m3 is wanted"});
}

TEST(CheckpointErrors, Fp8SharedExpertsThatShareAScaleBlock) {
  CheckpointBuilder builder = DeepSeek();
  builder.config["n_shared_experts"] = 2;
  builder.config["quantization_config"] = {{"quant_method", "fp8"},
                                           {"weight_block_size", {128, 128}}};
  builder.Add(In("shared_experts.gate_proj.weight"), "F8_E4M3", {2 * kI, kH});
  ExpectLayerError(builder, kUnsupported, {"2 FP8 experts of width 32", "multiple of 128"});
}

TEST(CheckpointErrors, MisalignedTensorOfALayer) {
  const TemporaryDirectory directory;
  const CheckpointBuilder builder = Qwen3();
  builder.Save(directory);
  const std::string name = In("gate.weight");
  std::string header = R"({"pad":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},")" + name +
                       R"(":{"dtype":"BF16","shape":[2,32],"data_offsets":[1,129]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  directory.Write("model.safetensors", RawFile(header, std::string(129, 'x')));
  const Checkpoint checkpoint = Checkpoint::Open(directory.path());
  ExpectError([&] { (void)checkpoint.Layer(0); }, kUnsupported,
              {"model.safetensors: tensor '" + name + "'", "not a multiple of 2"});
}

}  // namespace
}  // namespace hopyard::checkpoint_test
