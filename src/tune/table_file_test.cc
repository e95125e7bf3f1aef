// SPDX-License-Identifier: Apache-2.0
// Files that several threads and processes read and write, and that a kill may interrupt.
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "tests/temporary_directory.h"
#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

using test::TemporaryDirectory;

TuningTable TableOf(const std::vector<int>& numbers) {
  TuningTable table(AMachine());
  for (const int number : numbers) {
    table.Put(ALayer(number));
  }
  return table;
}

// A child process that runs `work` and reports whether it threw.
pid_t InAnotherProcess(const std::function<void()>& work) {
  const pid_t child = ::fork();
  if (child != 0) {
    return child;
  }
  int status = 0;
  try {
    work();
  } catch (const std::exception&) {
    status = 1;
  }
  ::_exit(status);
}

int ExitOf(pid_t child) {
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(TableFile, SaveAndLoad) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  TableOf({1, 2}).Save(path);
  EXPECT_EQ(TuningTable::Load(path), TableOf({1, 2}));
  EXPECT_EQ(BytesOf(path), TableOf({1, 2}).ToJson());
  TuningTable::Load(path).Save(path);
  EXPECT_EQ(BytesOf(path), TableOf({1, 2}).ToJson());
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST(TableFile, SaveMergesAndItsOwnLayersWin) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  TableOf({1, 2}).Save(path);
  TuningTable other = TableOf({3});
  TunedLayer layer = ALayer(2);
  layer.routing = "recorded";
  other.Put(layer);
  other.Save(path);
  const TuningTable read = TuningTable::Load(path);
  EXPECT_EQ(read.layers().size(), 3U);
  EXPECT_EQ(*read.Find(layer.key), layer);
  EXPECT_EQ(*read.Find(ALayer(1).key), ALayer(1));
}

TEST(TableFile, SaveGoesThroughLinks) {
  const TemporaryDirectory directory;
  TableOf({1}).Save(directory / "table.json");
  std::filesystem::create_symlink("table.json", directory / "link.json");
  TableOf({2}).Save(directory / "link.json");
  EXPECT_TRUE(std::filesystem::is_symlink(directory / "link.json"));
  EXPECT_EQ(TuningTable::Load(directory / "table.json"), TableOf({1, 2}));
}

// A file that is no table of this machine is refused and stays as it is.
TEST(TableFile, SaveLeavesOtherFilesAlone) {
  const TemporaryDirectory directory;
  TuningMachine elsewhere = AMachine();
  elsewhere.device = "Another processor";
  const struct {
    std::string bytes;
    std::vector<std::string> parts;
  } cases[] = {
      {"", {"is not JSON at byte"}},
      {"{\"weights\": [1, 2", {"is not JSON"}},
      {"{\"model\": 1}", {"'format' is missing"}},
      {R"({"format": "hopyard tuning table", "version": 9})", {"version 9", "newer library"}},
      {TuningTable(elsewhere).ToJson(),
       {"holds measurements of Another processor", "A processor, 8 threads", "another file"}},
  };
  const std::string path = directory / "table.json";
  for (const auto& c : cases) {
    directory.Write("table.json", c.bytes);
    std::vector<std::string> parts = c.parts;
    parts.push_back(path);
    ExpectError(ErrorKind::kInvalidArgument, parts, [&] { TableOf({1}).Save(path); });
    EXPECT_EQ(BytesOf(path), c.bytes);
    EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  }
}

TEST(TableFile, LoadNamesTheFile) {
  const TemporaryDirectory directory;
  ExpectError(ErrorKind::kInvalidArgument, {directory / "none.json", "No such file"},
              [&] { std::ignore = TuningTable::Load(directory / "none.json"); });
  ExpectError(ErrorKind::kInvalidArgument, {directory.path(), "is not a regular file"},
              [&] { std::ignore = TuningTable::Load(directory.path()); });
  directory.Write("noise.json",
                  "\x7F"
                  "ELF");
  ExpectError(ErrorKind::kInvalidArgument, {directory / "noise.json", "is not JSON at byte 1"},
              [&] { std::ignore = TuningTable::Load(directory / "noise.json"); });
}

TEST(TableFile, SaveNamesThePathAndTheRemedy) {
  const TemporaryDirectory directory;
  const std::vector<std::string> remedy = {"cannot be written",
                                           "a directory that this process may write to"};
  directory.Write("file", "");
  for (const std::string name : {"file/table.json", "absent/table.json"}) {
    std::vector<std::string> parts = remedy;
    parts.push_back(directory / name);
    ExpectError(ErrorKind::kInvalidArgument, parts, [&] { TableOf({1}).Save(directory / name); });
  }
}

// For root nothing is read-only: it becomes nobody meanwhile.
class AsNobody {
 public:
  AsNobody() : before_(::geteuid()) {
    if (before_ == 0) {
      EXPECT_EQ(::seteuid(kNobody), 0);
    }
  }
  ~AsNobody() { EXPECT_EQ(::seteuid(before_), 0); }
  AsNobody(const AsNobody&) = delete;
  AsNobody& operator=(const AsNobody&) = delete;

 private:
  static constexpr uid_t kNobody = 65534;
  uid_t before_;
};

TEST(TableFile, ReadOnlyFilesAndDirectoriesStayAsTheyAre) {
  using std::filesystem::perms;
  const AsNobody nobody;
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  TableOf({1}).Save(path);
  std::filesystem::permissions(path, perms::owner_read);
  ExpectError(ErrorKind::kInvalidArgument, {path, "it is read-only"},
              [&] { TableOf({2}).Save(path); });
  std::filesystem::permissions(directory.path(), perms::owner_read | perms::owner_exec);
  for (const char* name : {"table.json", "new.json"}) {
    ExpectError(ErrorKind::kInvalidArgument, {directory / name, "Permission denied"},
                [&] { TableOf({2}).Save(directory / name); });
  }
  EXPECT_EQ(TuningTable::Load(path), TableOf({1}));
  std::filesystem::permissions(directory.path(), perms::owner_all);
}

constexpr int kWriters = 4;
constexpr int kLayersEach = 12;

// Each layer by a Save of its own.
void SaveOneByOne(const std::string& path, int writer) {
  for (int i = 0; i < kLayersEach; ++i) {
    TableOf({writer * kLayersEach + i}).Save(path);
  }
}

TuningTable TableOfAllWriters() {
  std::vector<int> numbers;
  for (int i = 0; i < kWriters * kLayersEach; ++i) {
    numbers.push_back(i);
  }
  return TableOf(numbers);
}

TEST(TableFile, NothingIsLostBetweenProcesses) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  std::vector<pid_t> children;
  for (int writer = 0; writer < kWriters; ++writer) {
    children.push_back(InAnotherProcess([&] { SaveOneByOne(path, writer); }));
  }
  for (const pid_t child : children) {
    EXPECT_EQ(ExitOf(child), 0);
  }
  EXPECT_EQ(TuningTable::Load(path), TableOfAllWriters());
}

TEST(TableFile, NothingIsLostBetweenThreads) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  std::vector<std::thread> threads;
  threads.reserve(kWriters);
  for (int writer = 0; writer < kWriters; ++writer) {
    threads.emplace_back([&, writer] { SaveOneByOne(path, writer); });
  }
  // Whatever is there meanwhile is a table.
  while (!std::filesystem::exists(path)) {
    std::this_thread::yield();
  }
  size_t layers = 0;
  while (layers < TableOfAllWriters().layers().size()) {
    const size_t now = TuningTable::Load(path).layers().size();
    EXPECT_GE(now, layers);
    layers = now;
    if (::testing::Test::HasFailure()) {
      break;
    }
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(TuningTable::Load(path), TableOfAllWriters());
}

// A writer killed at any moment leaves a table with all that was saved before, and no lock.
TEST(TableFile, KillDuringWrite) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  TableOf({0}).Save(path);
  Random random(8);  // NOLINT(bugprone-random-generator-seed)
  size_t layers = 1;
  int interrupted = 0;
  for (int round = 0; round < 40; ++round) {
    const pid_t child = InAnotherProcess([&] {
      for (int i = 1;; ++i) {
        TableOf({1000 * (round + 1) + i}).Save(path);
      }
    });
    // Not before it has saved once; then at any moment of some further saves.
    while (TuningTable::Load(path).layers().size() == layers) {
      std::this_thread::yield();
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 10000));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    EXPECT_EQ(ExitOf(child), -1) << "the writer has failed";
    const TuningTable read = TuningTable::Load(path);
    EXPECT_GT(read.layers().size(), layers);
    EXPECT_NE(read.Find(ALayer(0).key), nullptr);
    layers = read.layers().size();
    interrupted += std::filesystem::exists(path + ".tmp") ? 1 : 0;
  }
  RecordProperty("interrupted", interrupted);  // kills that left half a copy behind
  TableOf({1}).Save(path);
  EXPECT_EQ(TuningTable::Load(path).layers().size(), layers + 1);
}

TEST(WaitForTuning, ReturnsALayerThatIsThere) {
  const TemporaryDirectory directory;
  TableOf({1, 2}).Save(directory / "table.json");
  EXPECT_EQ(WaitForTuning(directory / "table.json", ALayer(2).key, 0.0), ALayer(2));
}

TEST(WaitForTuning, SeesWhatAnotherProcessWrites) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  const pid_t child = InAnotherProcess([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    TableOf({1}).Save(path);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    TableOf({2}).Save(path);
  });
  EXPECT_EQ(WaitForTuning(path, ALayer(2).key, 60.0), ALayer(2));
  EXPECT_EQ(ExitOf(child), 0);
}

TEST(WaitForTuning, EndsInTime) {
  const TemporaryDirectory directory;
  const std::string path = directory / "table.json";
  const auto wait = [&](double seconds) {
    return [&, seconds] { std::ignore = WaitForTuning(path, ALayer(2).key, seconds); };
  };
  const auto begin = std::chrono::steady_clock::now();
  ExpectError(ErrorKind::kTimeout, {path, "0.1 s", "does not exist", "hidden_size=66"}, wait(0.1));
  TableOf({1}).Save(path);
  ExpectError(ErrorKind::kTimeout, {path, "no measurements of this layer"}, wait(0.05));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(150));
  TuningMachine old = AMachine();
  old.library = "0.0.1";
  TuningTable outdated(old);
  outdated.Put(ALayer(2));
  outdated.Save(directory / "old.json");
  ExpectError(ErrorKind::kTimeout, {"old.json", "the file is of another version of Hopyard"},
              [&] { std::ignore = WaitForTuning(directory / "old.json", ALayer(2).key, 0.05); });
  ExpectError(ErrorKind::kInvalidArgument, {"seconds=-1"}, wait(-1.0));
  directory.Write("table.json", "{");
  ExpectError(ErrorKind::kInvalidArgument, {path, "is not JSON"}, wait(60.0));
}

}  // namespace
}  // namespace hopyard::tune::testing
