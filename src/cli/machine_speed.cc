// SPDX-License-Identifier: Apache-2.0
// Measured ceilings: memory read bandwidth and FP32 multiply-add rate.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "cli/machine.h"
#include "core/host_memory.h"
#include "core/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hopyard::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kReadBytes = int64_t{1} << 30;
constexpr int64_t kMinReadBytes = int64_t{64} << 20;
constexpr int64_t kReadChunk = int64_t{1} << 20;
constexpr int kReadPasses = 4;
// Four streams per thread hide more latency than one: a plain loop reads 6 to 17 % less.
constexpr int kStreams = 4;
constexpr int kLine = 64;
constexpr int64_t kPrefetchAhead = 2048;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

uint64_t ReadChunk(const char* data) {
  constexpr int64_t kStreamBytes = kReadChunk / kStreams;
  uint64_t sum[kStreams * 2] = {};
  for (int64_t i = 0; i < kStreamBytes; i += kLine) {
    for (int s = 0; s < kStreams; ++s) {
      const char* line = data + s * kStreamBytes + i;
      __builtin_prefetch(line + kPrefetchAhead);
      uint64_t words[kLine / sizeof(uint64_t)];
      std::memcpy(words, line, sizeof(words));
      for (int w = 0; w < kLine / static_cast<int>(sizeof(uint64_t)); ++w) {
        sum[s * 2 + w % 2] ^= words[w];
      }
    }
  }
  uint64_t total = 0;
  for (const uint64_t value : sum) {
    total ^= value;
  }
  return total;
}

// Enough independent accumulators to cover latency 4 at two instructions a cycle.
constexpr int kAccumulators = 12;
constexpr int64_t kFmaRounds = 200'000;

// Each returns the multiply-adds of one call times two, per lane; `sink` keeps the work alive.
double FmaScalar(float* sink) {
  constexpr int kLanes = 4;
  float acc[kAccumulators][kLanes] = {};
  for (int64_t i = 0; i < kFmaRounds; ++i) {
    for (auto& lanes : acc) {
      for (float& lane : lanes) {
        lane = lane * 0.999F + 0.5F;
      }
    }
  }
  for (auto& lanes : acc) {
    *sink += lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
  return 2.0 * kLanes * kAccumulators * static_cast<double>(kFmaRounds);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double FmaAvx2(float* sink) {
  __m256 acc[kAccumulators];
  for (auto& a : acc) {
    a = _mm256_set1_ps(*sink);
  }
  const __m256 scale = _mm256_set1_ps(0.999F);
  const __m256 offset = _mm256_set1_ps(0.5F);
  for (int64_t i = 0; i < kFmaRounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) {
      a = _mm256_fmadd_ps(a, scale, offset);
    }
  }
  for (const auto& a : acc) {
    *sink += _mm256_cvtss_f32(a);
  }
  return 2.0 * 8 * kAccumulators * static_cast<double>(kFmaRounds);
}

__attribute__((target("avx512f"))) double FmaAvx512(float* sink) {
  __m512 acc[kAccumulators];
  for (auto& a : acc) {
    a = _mm512_set1_ps(*sink);
  }
  const __m512 scale = _mm512_set1_ps(0.999F);
  const __m512 offset = _mm512_set1_ps(0.5F);
  for (int64_t i = 0; i < kFmaRounds; ++i) {
#pragma GCC unroll 12
    for (auto& a : acc) {
      a = _mm512_fmadd_ps(a, scale, offset);
    }
  }
  for (const auto& a : acc) {
    *sink += _mm512_cvtss_f32(a);
  }
  return 2.0 * 16 * kAccumulators * static_cast<double>(kFmaRounds);
}
#endif

double FmaOnce(Isa isa, float* sink) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) {
    return FmaAvx512(sink);
  }
  if (isa == Isa::kAvx2) {
    return FmaAvx2(sink);
  }
#else
  (void)isa;
#endif
  return FmaScalar(sink);
}

}  // namespace

ReadBandwidth::ReadBandwidth(int threads)
    : threads_(threads),
      buffer_(std::clamp(AvailableMemory() / 8, kMinReadBytes, kReadBytes) / kReadChunk *
              kReadChunk) {
  // Written once: untouched pages would all map to one zero page.
  ParallelFor(0, buffer_.bytes() / kReadChunk, 8, threads_, [&](int64_t chunk, int /*thread*/) {
    std::memset(buffer_.as<char>() + chunk * kReadChunk, static_cast<int>(chunk & 0x7F),
                static_cast<size_t>(kReadChunk));
  });
}

double ReadBandwidth::Measure() {
  std::vector<uint64_t> sums(static_cast<size_t>(threads_) * 8);
  double best = 0.0;
  for (int pass = 0; pass < kReadPasses; ++pass) {
    const auto start = Clock::now();
    ParallelFor(0, buffer_.bytes() / kReadChunk, 1, threads_, [&](int64_t chunk, int thread) {
      sums[static_cast<size_t>(thread) * 8] ^= ReadChunk(buffer_.as<char>() + chunk * kReadChunk);
    });
    const double gbps = static_cast<double>(buffer_.bytes()) / SecondsSince(start) * 1e-9;
    best = std::max(best, gbps);
  }
  // Keeps the reads alive without a visible effect.
  volatile uint64_t keep = sums[0];
  (void)keep;
  return best;
}

double MeasurePeakGflops(Isa isa, int threads) {
  constexpr int kPasses = 5;
  std::vector<float> sinks(static_cast<size_t>(threads) * 16, 0.25F);
  std::vector<double> flops(static_cast<size_t>(threads));
  double best = 0.0;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = Clock::now();
    ParallelFor(0, threads, 1, threads, [&](int64_t i, int /*thread*/) {
      flops[static_cast<size_t>(i)] = FmaOnce(isa, &sinks[static_cast<size_t>(i) * 16]);
    });
    best = std::max(best, flops[0] * threads / SecondsSince(start) * 1e-9);
  }
  volatile float keep = sinks[0];
  (void)keep;
  return best;
}

}  // namespace hopyard::cli
