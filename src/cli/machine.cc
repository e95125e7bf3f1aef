// SPDX-License-Identifier: Apache-2.0
#include "cli/machine.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string_view>
#include <thread>

#include <unistd.h>

#include "cli/console.h"
#include "core/error.h"
#include "core/parallel.h"

namespace hopyard::cli {
namespace {

// Value behind "key:" of /proc/meminfo; empty when absent.
std::string MemoryValue(std::string_view key) {
  std::ifstream file("/proc/meminfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(':');
    if (colon != std::string::npos && line.compare(0, key.size(), key) == 0) {
      const size_t begin = line.find_first_not_of(" \t", colon + 1);
      return begin == std::string::npos ? "" : line.substr(begin);
    }
  }
  return "";
}

int64_t ProcKilobytes(std::string_view key) {
  const std::string value = MemoryValue(key);
  return value.empty() ? 0 : std::strtoll(value.c_str(), nullptr, 10) * 1024;
}

// A number in a control-group file; "max" and absent files mean no limit.
int64_t GroupValue(const std::string& name, int64_t otherwise) {
  std::ifstream file("/sys/fs/cgroup/" + name);
  int64_t value = 0;
  return file >> value ? value : otherwise;
}

// sysconf reports 0 for caches on some virtual machines; sysfs then knows.
int64_t LastLevelCache() {
  int64_t largest = 0;
  std::error_code error;
  const std::filesystem::path folder = "/sys/devices/system/cpu/cpu0/cache";
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    std::ifstream file(entry.path() / "size");
    int64_t value = 0;
    char unit = 'K';
    if (file >> value >> unit) {
      largest = std::max(largest, value * (unit == 'M' ? int64_t{1} << 20 : int64_t{1} << 10));
    }
  }
#if defined(_SC_LEVEL3_CACHE_SIZE)
  largest = std::max<int64_t>(largest, sysconf(_SC_LEVEL3_CACHE_SIZE));
#endif
  return largest;
}

}  // namespace

Machine DescribeMachine() {
  Machine machine;
  machine.cpu_model = CpuModel();
  machine.logical_cpus = static_cast<int>(std::thread::hardware_concurrency());
  machine.threads = MaxThreads();
  machine.memory_bytes = ProcKilobytes("MemTotal");
  machine.memory_available_bytes = AvailableMemory();
  machine.last_level_cache_bytes = LastLevelCache();
  return machine;
}

int64_t AvailableMemory() {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  const int64_t reported = ProcKilobytes("MemAvailable");
  const int64_t limit = GroupValue("memory.max", kNoLimit);
  const int64_t free =
      limit == kNoLimit ? kNoLimit : std::max<int64_t>(limit - GroupValue("memory.current", 0), 0);
  return std::min(reported > 0 ? reported : kNoLimit, free);
}

void CheckMemory(const std::string& what, int64_t need, const std::string& remedy) {
  const int64_t have = AvailableMemory();
  HOPYARD_CHECK(need <= have, kOutOfMemory)
      << what << " need " << HumanBytes(need) << " of memory, " << HumanBytes(have)
      << " are available; " << remedy;
}

}  // namespace hopyard::cli
