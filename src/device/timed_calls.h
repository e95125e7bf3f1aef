// SPDX-License-Identifier: Apache-2.0
// Calls that are timed again and again, each with cold caches.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace hopyard::device {

class TimedCalls {
 public:
  TimedCalls() = default;
  TimedCalls(const TimedCalls&) = delete;
  TimedCalls& operator=(const TimedCalls&) = delete;
  virtual ~TimedCalls() = default;

  // Runs all calls once, waits for them, and gives the mean of their times in microseconds.
  virtual double Run() = 0;
};

using Call = std::function<void(void* stream)>;

// Memory that is read before every call, outside its time, so that the caches hold nothing of it;
// no bytes: nothing is read. It must stay where it is.
struct Flush {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// Calls on a GPU: a CUDA graph of them, launched on `stream`, with events around each. The calls
// are captured on a stream of their own, so that nothing else gets into the graph and a thread that
// captures beside this one is not disturbed. Throws what a call throws. Of the current device; only
// in builds with the Hopper backend.
[[nodiscard]] std::unique_ptr<TimedCalls> CaptureCalls(void* stream, const std::vector<Call>& calls,
                                                       const Flush& flush);

// Whether the stream is being captured, or cannot be asked because another capture forbids it.
[[nodiscard]] bool IsCapturing(void* stream);
// Forgets the last error and waits for the current device. False where the error stays: then
// nothing runs on it in this process.
[[nodiscard]] bool Recover();

}  // namespace hopyard::device
