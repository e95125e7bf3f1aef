// SPDX-License-Identifier: Apache-2.0
// Ranks of one job that share a file: one measures, the others wait for what it wrote. Their times
// differ, their tables must not.
#include <chrono>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "tests/layer.h"
#include "tests/temporary_directory.h"
#include "tune/fake_lab.h"
#include "tune/tune_testing.h"
#include "tune/tuner.h"

namespace hopyard::tune::testing {
namespace {

using test::TemporaryDirectory;

constexpr int kRanks = 4;
constexpr int kLayers = 3;
constexpr double kSeconds = 60.0;

// What this rank measures of a layer of two kernels for each GEMM that are nearly as fast: noise
// chooses.
TunedLayer MeasuredBy(int rank, int number) {
  FakeLab lab;
  lab.noise = 0.05;
  lab.seed = 100 * static_cast<uint64_t>(rank) + static_cast<uint64_t>(number) + 1;
  lab.time = [](const std::string& kernel, int64_t /*tokens*/, int /*kind*/) {
    return kernel == "a" || kernel == "x" ? 50.0 : 49.0;
  };
  TuneOptions options;
  options.tokens = {1, 8, 64};
  TunerResult result = Tuner(&lab, options.tokens, options).Run();
  TunedLayer layer;
  layer.key = ALayer(number).key;
  layer.ranges = std::move(result.ranges);
  layer.faults = std::move(result.faults);
  layer.routing = "uniform";
  return layer;
}

struct Job {
  std::string path;
  int slow = -1;       // a rank that comes late
  int warm = -1;       // a rank that has tuned these layers before, for itself
  bool saved = false;  // the file is there from an earlier job
};

// The first rank measures what the file lacks, as docs/tuning.md tells to.
TuningTable TableOfRank(const Job& job, int rank) {
  if (rank == job.slow) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  TuningTable table(AMachine());
  for (int i = 0; i < kLayers; ++i) {
    if (rank == job.warm) {
      table.Put(MeasuredBy(rank, i));
    }
  }
  for (int i = 0; i < kLayers; ++i) {
    if (rank == 0 && !job.saved) {
      TuningTable measured(AMachine());
      measured.Put(MeasuredBy(rank, i));
      measured.Save(job.path);
    }
    table.Put(WaitForTuning(job.path, ALayer(i).key, kSeconds));
  }
  return table;
}

// The tables of all ranks, each of which is a process.
std::vector<std::string> RunRanks(const std::function<TuningTable(int rank)>& table_of,
                                  const TemporaryDirectory& directory) {
  std::vector<pid_t> children;
  for (int rank = 0; rank < kRanks; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      int status = 1;
      try {
        directory.Write("rank" + std::to_string(rank), table_of(rank).ToJson());
        status = 0;
      } catch (const Error&) {
        status = 2;
      }
      ::_exit(status);
    }
    children.push_back(child);
  }
  std::vector<std::string> tables;
  for (int rank = 0; rank < kRanks; ++rank) {
    int status = 0;
    EXPECT_EQ(::waitpid(children[static_cast<size_t>(rank)], &status, 0),
              children[static_cast<size_t>(rank)]);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "rank " << rank;
    tables.push_back(BytesOf(directory / ("rank" + std::to_string(rank))));
  }
  return tables;
}

void ExpectOneTable(const Job& job, const TemporaryDirectory& directory) {
  const std::vector<std::string> tables =
      RunRanks([&](int rank) { return TableOfRank(job, rank); }, directory);
  EXPECT_EQ(TuningTable::FromJson(tables[0]).layers().size(), static_cast<size_t>(kLayers));
  for (const std::string& table : tables) {
    EXPECT_EQ(table, tables[0]);
  }
  EXPECT_EQ(BytesOf(job.path), tables[0]);
}

TEST(Ranks, MeasureDifferently) {
  for (int rank = 1; rank < kRanks; ++rank) {
    EXPECT_FALSE(MeasuredBy(0, 0) == MeasuredBy(rank, 0));
  }
}

// The same with a layer of the CPU and its clock.
TuningTable TableOfRealRank(const std::string& path, int rank) {
  const test::TestLayer layer(test::MiniSpec());
  PlanOptions options;
  options.max_tokens = 16;
  options.num_threads = 1;  // this process is a fork
  const Plan plan = MakePlan(layer.spec(), Device{}, options);
  if (rank == 0) {
    TuneOptions tuning;
    tuning.tokens = {2, 16};
    tuning.max_seconds = 2.0;
    Tune(plan, layer.weights(), tuning).Save(path);
  }
  const TunedLayer tuned = WaitForTuning(path, KeyOf(layer.spec(), plan.options()), kSeconds);
  TuningTable table(MachineOf(Device{}, options.num_threads));
  table.Put(tuned);
  return table;
}

TEST(Ranks, HaveOneTableOfARealLayer) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  const std::vector<std::string> tables =
      RunRanks([&](int rank) { return TableOfRealRank(path, rank); }, directory);
  const TuningTable table = TuningTable::FromJson(tables[0]);
  ASSERT_EQ(table.layers().size(), 1U);
  EXPECT_FALSE(table.layers()[0].ranges.empty());
  for (const std::string& other : tables) {
    EXPECT_EQ(other, tables[0]);
  }
}

TEST(Ranks, HaveOneTable) {
  for (int slow = -1; slow < kRanks; ++slow) {
    for (int warm = -1; warm < kRanks; ++warm) {
      SCOPED_TRACE(::testing::Message() << "slow " << slow << ", warm " << warm);
      const TemporaryDirectory directory;
      ExpectOneTable({directory / "table.json", slow, warm, false}, directory);
    }
  }
}

TEST(Ranks, TakeWhatAnEarlierJobSaved) {
  const TemporaryDirectory directory;
  const Job job = {directory / "table.json", 1, 2, true};
  TuningTable table(AMachine());
  for (int i = 0; i < kLayers; ++i) {
    table.Put(MeasuredBy(7, i));
  }
  table.Save(job.path);
  ExpectOneTable(job, directory);
  EXPECT_EQ(BytesOf(job.path), table.ToJson());
}

}  // namespace
}  // namespace hopyard::tune::testing
