// SPDX-License-Identifier: Apache-2.0
// Tables as files, which other processes read and write at the same time.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hopyard/hopyard.h"
#include "hopyard/tune.h"

#include "checkpoint/mapped_file.h"
#include "checkpoint/text.h"
#include "core/error.h"
#include "core/file_descriptor.h"
#include "tune/machine.h"
#include "tune/table_json.h"

namespace hopyard {
namespace {

using checkpoint::Printable;

// How long a writer waits for another one, which holds the lock for milliseconds.
constexpr double kLockSeconds = 60.0;

// Calls done() until it is true, ever less often; false after `seconds`.
template <class Done>
bool WaitUntil(double seconds, Done&& done) {
  using Clock = std::chrono::steady_clock;
  constexpr auto kLongestPause = std::chrono::milliseconds(50);
  const auto begin = Clock::now();
  auto pause = std::chrono::milliseconds(1);
  while (!done()) {
    if (std::chrono::duration<double>(Clock::now() - begin).count() >= seconds) {
      return false;
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, kLongestPause);
  }
  return true;
}

std::string NotWritten(const std::string& path, const std::string& what) {
  return Printable(path) + ": the tuning table cannot be written (" + what + ": " +
         SystemErrorText() +
         "); save to a file in a directory that this process may write to, the tables in use are "
         "only read";
}

// Held by one writer of a file at a time, of all threads and processes.
class WriterLock {
 public:
  explicit WriterLock(const std::string& path)
      : file_(::open((path + ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    HOPYARD_CHECK(file_.get() >= 0, kInvalidArgument) << NotWritten(path, "its lock file");
    int status = 0;
    const bool free = WaitUntil(kLockSeconds, [&] {
      status = ::flock(file_.get(), LOCK_EX | LOCK_NB);
      return status == 0 || (errno != EWOULDBLOCK && errno != EINTR);
    });
    HOPYARD_CHECK(free, kTimeout) << Printable(path) << ".lock: another process has held it for "
                                  << kLockSeconds << " s; end that process";
    HOPYARD_CHECK(status == 0, kInvalidArgument) << NotWritten(path, "locking it");
  }

 private:
  FileDescriptor file_;
};

bool WriteAll(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(file, bytes.data(), bytes.size());
    if (count < 0 && errno != EINTR) {
      return false;
    }
    bytes.remove_prefix(static_cast<size_t>(std::max<ssize_t>(count, 0)));
  }
  return true;
}

// In one step for all readers, and whole after a loss of power. Under the lock.
void Replace(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  try {
    const FileDescriptor file(
        ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    HOPYARD_CHECK(file.get() >= 0 && WriteAll(file.get(), bytes) && ::fsync(file.get()) == 0,
                  kInvalidArgument)
        << NotWritten(path, "its copy " + Printable(temporary));
    HOPYARD_CHECK(std::rename(temporary.c_str(), path.c_str()) == 0, kInvalidArgument)
        << NotWritten(path, "replacing it");
  } catch (const Error&) {
    ::unlink(temporary.c_str());
    throw;
  }
  const std::string parent = std::filesystem::path(path).parent_path().string();
  const FileDescriptor directory(
      ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  // The file is replaced; file systems that cannot flush a directory say so and need not.
  static_cast<void>(::fsync(directory.get()));
}

// Replacing a link would leave its target as it was.
std::string BehindLinks(const std::string& path) {
  std::error_code error;
  const std::filesystem::path target = std::filesystem::canonical(path, error);
  return error ? path : target.string();
}

// Tells versions of a file apart: each Save makes a new file.
using FileVersion = std::tuple<dev_t, ino_t, off_t, time_t, int64_t>;

std::optional<FileVersion> VersionOf(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    return std::nullopt;
  }
  return FileVersion{status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec,
                     status.st_mtim.tv_nsec};
}

}  // namespace

TuningTable TuningTable::Load(const std::string& path) {
  const checkpoint::MappedFile file(path);
  return tune::ParseTable(
      {static_cast<const char*>(static_cast<const void*>(file.data())), file.size()}, path);
}

void TuningTable::Save(const std::string& path) const {
  const std::string target = BehindLinks(path);
  const WriterLock lock(target);
  if (!VersionOf(target)) {
    Replace(target, ToJson());
    return;
  }
  TuningTable merged = Load(target);
  HOPYARD_CHECK(merged.machine() == machine_, kInvalidArgument)
      << Printable(path) << ": holds measurements of " << tune::Describe(merged.machine())
      << "; these are of " << tune::Describe(machine_) << ": save them to another file";
  merged.Merge(*this);
  HOPYARD_CHECK(::faccessat(AT_FDCWD, target.c_str(), W_OK, AT_EACCESS) == 0, kInvalidArgument)
      << NotWritten(path, "it is read-only");
  Replace(target, merged.ToJson());
}

TunedLayer WaitForTuning(const std::string& path, const TuningKey& key, double seconds) {
  HOPYARD_CHECK(seconds >= 0.0, kInvalidArgument)
      << "seconds=" << seconds << "; wanted 0 or more, how long to wait";
  std::optional<FileVersion> seen;
  std::optional<TunedLayer> layer;
  bool other_library = false;
  const bool found = WaitUntil(seconds, [&] {
    const std::optional<FileVersion> version = VersionOf(path);
    if (version && version != seen) {
      seen = version;
      const TuningTable table = TuningTable::Load(path);
      // What an older library measured is what its process will measure anew.
      other_library = table.machine().library != HOPYARD_VERSION;
      const TunedLayer* const there = other_library ? nullptr : table.Find(key);
      layer = there == nullptr ? std::nullopt : std::optional<TunedLayer>(*there);
    }
    return layer.has_value();
  });
  HOPYARD_CHECK(found, kTimeout)
      << Printable(path) << ": has no measurements of this layer after " << seconds
      << " s; see whether the process that writes them still runs, or wait longer (layer: "
      << ToString(key)
      << (!seen           ? "; the file does not exist)"
          : other_library ? "; the file is of another version of Hopyard)"
                          : ")");
  return *layer;
}

}  // namespace hopyard
