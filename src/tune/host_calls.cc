// SPDX-License-Identifier: Apache-2.0
#include "tune/host_calls.h"

#include <atomic>
#include <chrono>
#include <utility>

#include "core/parallel.h"

namespace hopyard::tune {
namespace {

constexpr int64_t kFlushChunk = 1 << 18;
constexpr int64_t kCacheLine = 64;

class CallsInTurn : public device::TimedCalls {
 public:
  CallsInTurn(std::vector<device::Call> calls, const device::Flush& flush)
      : calls_(std::move(calls)), flush_(flush), num_threads_(MaxThreads()) {}

  double Run() override {
    using Clock = std::chrono::steady_clock;
    double sum = 0.0;
    for (const device::Call& call : calls_) {
      ReadFlush();
      const Clock::time_point begin = Clock::now();
      call(nullptr);
      sum += std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
    }
    return sum / static_cast<double>(calls_.size());
  }

 private:
  void ReadFlush() {
    const auto* const bytes = static_cast<const unsigned char*>(flush_.data);
    ParallelFor(0, flush_.bytes / kFlushChunk, 1, num_threads_, [&](int64_t chunk, int /*thread*/) {
      unsigned read = 0;
      for (int64_t i = chunk * kFlushChunk; i < (chunk + 1) * kFlushChunk; i += kCacheLine) {
        read += bytes[i];
      }
      // Keeps the reads alive.
      read_.fetch_add(read, std::memory_order_relaxed);
    });
  }

  std::vector<device::Call> calls_;
  device::Flush flush_;
  int num_threads_;
  std::atomic<unsigned> read_{0};
};

}  // namespace

std::unique_ptr<device::TimedCalls> HostCalls(std::vector<device::Call> calls,
                                              const device::Flush& flush) {
  return std::make_unique<CallsInTurn>(std::move(calls), flush);
}

}  // namespace hopyard::tune
