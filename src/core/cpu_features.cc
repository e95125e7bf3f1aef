// SPDX-License-Identifier: Apache-2.0
#include "core/cpu_features.h"

#include <cstdlib>
#include <fstream>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "core/error.h"

namespace hopyard {
namespace {

#if defined(__x86_64__)
// Not all compilers' __builtin_cpu_supports know "f16c". What AVX2 needs of the operating system
// covers it.
bool HasF16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

Isa DetectIsa() {
#if defined(__x86_64__)
  // The builtin also checks that the operating system saves the wider registers.
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 && HasF16c();
  const bool avx512 =
      __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
      __builtin_cpu_supports("avx512vl") != 0 && __builtin_cpu_supports("avx512dq") != 0;
  if (avx2 && avx512) {
    return Isa::kAvx512;
  }
  if (avx2) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

Isa ChooseIsa() {
  const Isa detected = DetectIsa();
  // NOLINTNEXTLINE(concurrency-mt-unsafe): read once, behind a function-local static.
  const char* wanted = std::getenv("HOPYARD_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return detected;
  }
  const std::string name = wanted;
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (name == ToString(isa)) {
      HOPYARD_CHECK(isa <= detected, kUnsupported)
          << "HOPYARD_CPU_ISA=" << name << ", but this machine runs at most " << ToString(detected)
          << "; unset the variable";
      return isa;
    }
  }
  HOPYARD_CHECK(false, kInvalidArgument)
      << "HOPYARD_CPU_ISA=" << name << "; wanted scalar, avx2 or avx512";
  return detected;
}

}  // namespace

std::string_view ToString(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "?";
}

Isa BestIsa() {
  static const Isa isa = ChooseIsa();
  return isa;
}

namespace {

std::string ReadCpuModel() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    const size_t colon = line.find(':');
    if (colon != std::string::npos && line.rfind("model name", 0) == 0) {
      const size_t begin = line.find_first_not_of(" \t", colon + 1);
      return begin == std::string::npos ? "unknown" : line.substr(begin);
    }
  }
  return "unknown";
}

}  // namespace

std::string CpuModel() {
  static const std::string model = ReadCpuModel();
  return model;
}

}  // namespace hopyard
