// SPDX-License-Identifier: Apache-2.0
// HOPYARD_TUNING_FILE, which a process reads once: each test is a process of its own.
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>

#include <sys/wait.h>
#include <unistd.h>

#include "plan/plan_impl.h"
#include "tests/layer.h"
#include "tests/temporary_directory.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

using test::MiniSpec;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Runs a test's body in a process that has made no plan yet; its expectations count.
void InANewProcess(const std::function<void()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    body();
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

PlanOptions Options() {
  PlanOptions options;
  options.max_tokens = 8;
  options.num_threads = 1;
  return options;
}

void SaveScalarTable(const std::string& path) {
  TunedLayer layer;
  layer.key = KeyOf(MiniSpec(), Options());
  layer.ranges = {{8, 8, "cpu_scalar_bf16", 1.0, "cpu_scalar_bf16", 1.0, 0.0}};
  TuningTable table(MachineOf(Device{}, 1));
  table.Put(layer);
  table.Save(path);
}

bool PlansAreScalar() {
  const Plan plan = MakePlan(MiniSpec(), Device{}, Options());
  return plan.impl().isas == std::vector<IsaRange>{{8, Isa::kScalar}} &&
         plan.Explain().ToString().find("tuned: 1.0 us") != std::string::npos;
}

class TuningEnvironment : public ::testing::Test {
 protected:
  static void Name(const std::string& path) {
    ASSERT_EQ(setenv("HOPYARD_TUNING_FILE", path.c_str(), 1), 0);
  }
  test::TemporaryDirectory directory_;
};

TEST_F(TuningEnvironment, NamesAFileThatPlansLookInto) {
  SaveScalarTable(directory_ / "table.json");
  InANewProcess([&] {
    Name(directory_ / "table.json");
    EXPECT_TRUE(PlansAreScalar());
    // Read once: what happens to the file or the variable later does not matter.
    EXPECT_EQ(::unlink((directory_ / "table.json").c_str()), 0);
    Name("elsewhere.json");
    EXPECT_TRUE(PlansAreScalar());
    // It belongs to the process, not to UseTuning.
    ForgetTuning();
    EXPECT_TRUE(PlansAreScalar());
    EXPECT_EQ(GetTuningStats().hits, 3);
    EXPECT_THAT(GetTuningStats().ignored, ::testing::IsEmpty());
  });
}

TEST_F(TuningEnvironment, AFileThatCannotBeReadIsReportedNotThrown) {
  directory_.Write("broken.json", "{\"format\": ");
  for (const auto& [name, fault] :
       {std::pair{"broken.json", "is not JSON"}, {"absent.json", "No such file"}}) {
    InANewProcess([&, name = std::string(name), fault = std::string(fault)] {
      Name(directory_ / name);
      for (int i = 0; i < 2; ++i) {
        EXPECT_FALSE(PlansAreScalar());
      }
      EXPECT_THAT(GetTuningStats().ignored,
                  ElementsAre(::testing::AllOf(
                      HasSubstr("HOPYARD_TUNING_FILE=" + (directory_ / name)), HasSubstr(fault))));
      ResetTuningStats();
      EXPECT_FALSE(PlansAreScalar());
      EXPECT_EQ(GetTuningStats().ignored.size(), 1U);
    });
  }
}

TEST_F(TuningEnvironment, GoesBehindUseTuning) {
  SaveScalarTable(directory_ / "table.json");
  InANewProcess([&] {
    Name(directory_ / "table.json");
    TuningTable table = TuningTable::Load(directory_ / "table.json");
    TunedLayer layer = table.layers()[0];
    layer.ranges[0].us = 2.0;
    table.Put(layer);
    UseTuning(table);
    EXPECT_FALSE(PlansAreScalar());
    ForgetTuning();
    EXPECT_TRUE(PlansAreScalar());
  });
}

TEST_F(TuningEnvironment, EmptyMeansNone) {
  InANewProcess([&] {
    Name("");
    EXPECT_FALSE(PlansAreScalar());
    EXPECT_THAT(GetTuningStats().ignored, ::testing::IsEmpty());
  });
}

}  // namespace
}  // namespace hopyard::tune::testing
