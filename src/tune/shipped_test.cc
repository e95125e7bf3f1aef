// SPDX-License-Identifier: Apache-2.0
// The tables that come with the library: whole, for this library's kernels, and as it writes them.
#include "tune/shipped.h"

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "bench/shapes.h"
#include "tests/temporary_directory.h"
#include "tune/lookup.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

// Tests run in the root of the sources.
TEST(ShippedTables, AreTheFilesOfTheirFolder) {
  std::set<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator("src/tune/tables")) {
    if (entry.path().extension() == ".json") {
      files.insert(entry.path().filename().string());
    }
  }
  std::set<std::string> shipped;
  for (const ShippedFile& file : ShippedFiles()) {
    const std::string name(file.name);
    shipped.insert(name);
    EXPECT_EQ(file.text, BytesOf("src/tune/tables/" + name)) << name;
  }
  EXPECT_EQ(shipped, files);
}

TEST(ShippedTables, AreAsTheLibraryWritesThem) {
  ASSERT_EQ(ShippedTables().size(), ShippedFiles().size());
  const test::TemporaryDirectory directory;
  for (const ShippedFile& file : ShippedFiles()) {
    const std::string path = directory / std::string(file.name);
    directory.Write(std::string(file.name), std::string(file.text));
    TuningTable::Load(path).Save(path);
    EXPECT_EQ(BytesOf(path), file.text) << file.name;
  }
}

TEST(ShippedTables, AreOfOneMachineEach) {
  std::set<std::string> devices;
  for (const auto& table : ShippedTables()) {
    EXPECT_TRUE(devices.insert(table->machine().device).second) << table->machine().device;
    EXPECT_FALSE(table->layers().empty()) << table->machine().device;
  }
}

// The layers of the named models as integrations state them: routed experts, whatever is said of
// shared ones that are not there.
TEST(ShippedTables, HaveTheLayersOfNamedModels) {
  struct Layer {
    const char* model;
    WeightFormat weights;
    ActivationFormat activations;
  };
  constexpr Layer kLayers[] = {
      {"qwen3-30b-a3b", WeightFormat::kBf16, ActivationFormat::kBf16},
      {"qwen3-30b-a3b", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"qwen3-30b-a3b", WeightFormat::kMxFp4, ActivationFormat::kBf16},
      {"qwen3-30b-a3b", WeightFormat::kMxFp4, ActivationFormat::kFp8Block128},
      {"qwen3-30b-a3b", WeightFormat::kNvFp4, ActivationFormat::kBf16},
      {"qwen3-30b-a3b", WeightFormat::kNvFp4, ActivationFormat::kNvFp4},
      {"qwen3-235b-a22b", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"gpt-oss-20b", WeightFormat::kMxFp4, ActivationFormat::kBf16},
      {"gpt-oss-20b", WeightFormat::kMxFp4, ActivationFormat::kFp8Block128},
      {"gpt-oss-120b", WeightFormat::kMxFp4, ActivationFormat::kBf16},
      {"gpt-oss-120b", WeightFormat::kMxFp4, ActivationFormat::kFp8Block128},
      {"gpt-oss-120b", WeightFormat::kMxFp4, ActivationFormat::kMxFp8},
      {"deepseek-v3", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"deepseek-v3", WeightFormat::kNvFp4, ActivationFormat::kBf16},
      {"deepseek-v3-ep8", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"kimi-k2", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"glm-4.5", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"minimax-m2", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"mixtral-8x7b", WeightFormat::kBf16, ActivationFormat::kBf16},
      {"mixtral-8x7b", WeightFormat::kFp8Block128, ActivationFormat::kFp8Block128},
      {"llama-4-scout", WeightFormat::kFp8PerTensor, ActivationFormat::kFp8PerTensor},
  };
  for (const auto& table : ShippedTables()) {
    for (const Layer& layer : kLayers) {
      MoeSpec spec = bench::FindShape(layer.model)->spec;
      spec.weights = layer.weights;
      spec.activations = layer.activations;
      for (const WeightFormat shared : {WeightFormat::kBf16, layer.weights}) {
        spec.shared = {0, false, 1.0F, shared};
        const TunedLayer* const found = table->FindFor(KeyOf(spec, {}));
        ASSERT_NE(found, nullptr) << table->machine().device << ' ' << ToString(KeyOf(spec, {}));
        EXPECT_GE(found->ranges.back().last, 8192) << ToString(found->key);
        EXPECT_TRUE(found->faults.empty()) << ToString(found->key);
      }
    }
  }
}

// The first plan of a process, with no table of its own, is tuned. A GPU that is not there is an
// H100.
TEST(ShippedTables, ServePlansThatNameNoTable) {
  const MoeSpec& spec = bench::FindShape("qwen3-30b-a3b")->spec;
  PlanOptions options;
  const Tuned tuned = FindTuned(spec, {DeviceKind::kCuda, 1000}, options);
  EXPECT_TRUE(tuned.found);
  EXPECT_EQ(tuned.remark, "");
  const TuningMachine machine = MachineOf({DeviceKind::kCuda, 1000});
  for (const auto& table : ShippedTables()) {
    if (table->machine().device == machine.device) {
      ASSERT_NE(table->Find(KeyOf(spec, options)), nullptr);
      EXPECT_EQ(tuned.ranges, table->Find(KeyOf(spec, options))->ranges);
    }
  }
  options.untuned = true;
  EXPECT_FALSE(FindTuned(spec, {DeviceKind::kCuda, 1000}, options).found);
}

}  // namespace
}  // namespace hopyard::tune::testing
