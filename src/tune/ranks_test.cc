// SPDX-License-Identifier: Apache-2.0
// Ranks of one job that share a file: one measures, the others wait for what it wrote. Their times
// differ, their tables must not.
#include <chrono>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "tests/temporary_directory.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

using test::TemporaryDirectory;

constexpr int kRanks = 4;
constexpr int kLayers = 3;
constexpr double kSeconds = 60.0;

// What this rank would measure: noise chooses among two kernels that are equally fast.
TunedLayer MeasuredBy(int rank, int number) {
  Random random(static_cast<uint64_t>(100 * rank + number));
  TunedLayer layer = ALayer(number);
  for (TunedRange& range : layer.ranges) {
    range.us *= 1.0 + 0.01 * std::normal_distribution<double>()(random);
    range.tactic = random() % 2 == 0 ? "tactic_a" : "tactic_b";
  }
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
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
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

std::string BytesOf(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

// The tables of all ranks, each of which is a process.
std::vector<std::string> Run(const Job& job, const TemporaryDirectory& directory) {
  std::vector<pid_t> children;
  for (int rank = 0; rank < kRanks; ++rank) {
    const pid_t child = ::fork();
    if (child == 0) {
      int status = 1;
      try {
        directory.Write("rank" + std::to_string(rank), TableOfRank(job, rank).ToJson());
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
  const std::vector<std::string> tables = Run(job, directory);
  EXPECT_EQ(TuningTable::FromJson(tables[0]).layers().size(), static_cast<size_t>(kLayers));
  for (const std::string& table : tables) {
    EXPECT_EQ(table, tables[0]);
  }
  EXPECT_EQ(BytesOf(job.path), tables[0]);
}

TEST(Ranks, MeasureDifferently) {
  EXPECT_FALSE(MeasuredBy(0, 0) == MeasuredBy(1, 0));
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
