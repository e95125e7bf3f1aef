// SPDX-License-Identifier: Apache-2.0
#include "cli/machine.h"

#include <fstream>
#include <string_view>
#include <thread>

#include "cli/console.h"
#include "core/error.h"
#include "core/host_memory.h"
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

}  // namespace

Machine DescribeMachine() {
  Machine machine;
  machine.cpu_model = CpuModel();
  machine.logical_cpus = static_cast<int>(std::thread::hardware_concurrency());
  machine.threads = MaxThreads();
  machine.memory_bytes = ProcKilobytes("MemTotal");
  machine.memory_available_bytes = AvailableMemory();
  machine.last_level_cache_bytes = LastLevelCacheBytes();
  return machine;
}

void CheckMemory(const std::string& what, int64_t need, const std::string& remedy) {
  const int64_t have = AvailableMemory();
  HOPYARD_CHECK(need <= have, kOutOfMemory)
      << what << " need " << HumanBytes(need) << " of memory, " << HumanBytes(have)
      << " are available; " << remedy;
}

}  // namespace hopyard::cli
