// SPDX-License-Identifier: Apache-2.0
// The tables that come with the library: whole, for this library's kernels, and as it writes them.
#include "tune/shipped.h"

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "tests/temporary_directory.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

std::string BytesOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

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

}  // namespace
}  // namespace hopyard::tune::testing
