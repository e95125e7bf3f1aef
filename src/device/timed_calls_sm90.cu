// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>

#include "device/launch.cuh"
#include "device/memory.h"
#include "device/timed_calls.h"

namespace hopyard::device {
namespace {

constexpr unsigned kFlushThreads = 512;
constexpr int64_t kFlushBlocks = 528;  // four for each multiprocessor of an H100

struct FlushArgs {
  const uint4* data = nullptr;
  int64_t count = 0;
  uint4* sink = nullptr;
};

// Reads, and does not write: dirty lines would go back to memory during the call that is timed.
__global__ void FlushKernel(const FlushArgs args) {
  uint32_t sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count;
       i += step) {
    const uint4 value = args.data[i];
    sum |= value.x | value.y | value.z | value.w;
  }
  // The memory holds zeros: this keeps the reads alive and never happens.
  if (sum != 0) {
    *args.sink = uint4{sum, sum, sum, sum};
  }
}

class Events {
 public:
  explicit Events(size_t count) : events_(count, nullptr) {
    for (cudaEvent_t& event : events_) {
      const cudaError_t status = cudaEventCreate(&event);
      if (status != cudaSuccess) {
        Destroy();
      }
      HOPYARD_CUDA(status);
    }
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
  ~Events() { Destroy(); }

  [[nodiscard]] cudaEvent_t at(size_t i) const { return events_[i]; }

 private:
  // After a failure of the device these fail as well, and have been reported.
  void Destroy() {
    for (cudaEvent_t& event : events_) {
      if (event != nullptr) {
        static_cast<void>(cudaEventDestroy(event));
        event = nullptr;
      }
    }
  }

  std::vector<cudaEvent_t> events_;
};

// A stream that is captured from construction on, until Finish or the end of its life.
class Capture {
 public:
  Capture() {
    HOPYARD_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    const cudaError_t status = cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess) {
      static_cast<void>(cudaStreamDestroy(stream_));
    }
    HOPYARD_CUDA(status);
    capturing_ = true;
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() {
    if (capturing_) {
      cudaGraph_t broken = nullptr;
      static_cast<void>(cudaStreamEndCapture(stream_, &broken));
      if (broken != nullptr) {
        static_cast<void>(cudaGraphDestroy(broken));
      }
    }
    static_cast<void>(cudaStreamDestroy(stream_));
  }

  [[nodiscard]] cudaStream_t stream() const { return stream_; }
  [[nodiscard]] cudaGraphExec_t Finish() {
    cudaGraph_t graph = nullptr;
    capturing_ = false;
    HOPYARD_CUDA(cudaStreamEndCapture(stream_, &graph));
    cudaGraphExec_t exec = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    HOPYARD_CUDA(status);
    return exec;
  }

 private:
  cudaStream_t stream_ = nullptr;
  bool capturing_ = false;
};

int CurrentIndex() {
  int index = 0;
  HOPYARD_CUDA(cudaGetDevice(&index));
  return index;
}

class GraphCalls : public TimedCalls {
 public:
  GraphCalls(void* stream, const std::vector<Call>& calls, const Flush& flush)
      : stream_(static_cast<cudaStream_t>(stream)),
        device_(CurrentIndex()),
        count_(calls.size()),
        apart_(flush.bytes > 0),
        events_(2 * calls.size()) {
    Capture capture;
    const Queue queue(capture.stream());
    for (size_t i = 0; i < count_; ++i) {
      if (flush.bytes > 0) {
        const FlushArgs args{static_cast<const uint4*>(flush.data),
                             flush.bytes / static_cast<int64_t>(sizeof(uint4)),
                             static_cast<uint4*>(const_cast<void*>(flush.data))};
        Launch(queue, {static_cast<unsigned>(kFlushBlocks), kFlushThreads}, FlushKernel, args);
      }
      if (apart_ || i == 0) {
        Record(2 * i, capture.stream());
      }
      calls[i](capture.stream());
      if (apart_ || i + 1 == count_) {
        Record(2 * i + 1, capture.stream());
      }
    }
    exec_ = capture.Finish();
  }
  GraphCalls(const GraphCalls&) = delete;
  GraphCalls& operator=(const GraphCalls&) = delete;
  ~GraphCalls() override { static_cast<void>(cudaGraphExecDestroy(exec_)); }

  double Run() override {
    // A null stream is the current device's.
    const CurrentDevice current(device_);
    HOPYARD_CUDA(cudaGraphLaunch(exec_, stream_));
    HOPYARD_CUDA(cudaStreamSynchronize(stream_));
    double sum = 0.0;
    for (size_t i = 0; apart_ && i < count_; ++i) {
      sum += Microseconds(2 * i, 2 * i + 1);
    }
    return (apart_ ? sum : Microseconds(0, 2 * count_ - 1)) / static_cast<double>(count_);
  }

 private:
  // A node of the graph, so that every replay takes the time anew.
  void Record(size_t event, cudaStream_t stream) const {
    HOPYARD_CUDA(cudaEventRecordWithFlags(events_.at(event), stream, cudaEventRecordExternal));
  }
  [[nodiscard]] double Microseconds(size_t from, size_t to) const {
    float milliseconds = 0.0F;
    HOPYARD_CUDA(cudaEventElapsedTime(&milliseconds, events_.at(from), events_.at(to)));
    return 1e3 * double{milliseconds};
  }

  cudaStream_t stream_;
  int device_;
  size_t count_;
  // Calls that nothing lies between are timed together, as they run in a model. With an event and
  // an emptied cache ahead of each a call of one token took 54 us instead of 44 (H100, BF16,
  // 2026-11-22), and kernels were not slowed down equally.
  bool apart_;
  Events events_;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace

std::unique_ptr<TimedCalls> CaptureCalls(void* stream, const std::vector<Call>& calls,
                                         const Flush& flush) {
  return std::make_unique<GraphCalls>(stream, calls, flush);
}

bool IsCapturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t asked = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (asked == cudaErrorStreamCaptureImplicit) {
    static_cast<void>(cudaGetLastError());
    return true;
  }
  HOPYARD_CUDA(asked);
  return status != cudaStreamCaptureStatusNone;
}

bool Recover() {
  static_cast<void>(cudaGetLastError());
  const bool works = cudaDeviceSynchronize() == cudaSuccess;
  static_cast<void>(cudaGetLastError());
  return works;
}

}  // namespace hopyard::device
