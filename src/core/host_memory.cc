// SPDX-License-Identifier: Apache-2.0
#include "core/host_memory.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include <unistd.h>

namespace hopyard {
namespace {

// A number in a control-group file; "max" and absent files mean no limit.
int64_t GroupValue(const std::string& name, int64_t otherwise) {
  std::ifstream file("/sys/fs/cgroup/" + name);
  int64_t value = 0;
  return file >> value ? value : otherwise;
}

// MemAvailable of the kernel; 0 where it has none.
int64_t ReportedMemory() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  int64_t kilobytes = 0;
  std::string rest;
  while (file >> key >> kilobytes && std::getline(file, rest)) {
    if (key == "MemAvailable:") {
      return kilobytes * 1024;
    }
  }
  return 0;
}

}  // namespace

int64_t AvailableMemory() {
  constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
  const int64_t reported = ReportedMemory();
  const int64_t limit = GroupValue("memory.max", kNoLimit);
  const int64_t free =
      limit == kNoLimit ? kNoLimit : std::max<int64_t>(limit - GroupValue("memory.current", 0), 0);
  return std::min(reported > 0 ? reported : kNoLimit, free);
}

// sysconf reports 0 for caches on some virtual machines; sysfs then knows.
int64_t LastLevelCacheBytes() {
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

}  // namespace hopyard
