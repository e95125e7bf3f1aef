// SPDX-License-Identifier: Apache-2.0
// What the GPU benchmarks share: buffers, random values, the machine's ceilings, timing by graphs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iostream>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <cuda_runtime_api.h>

#include "bench/shapes.h"
#include "device/cuda_check.h"

namespace hopyard::bench {

// Measured ceilings (cold read in one kernel: launch + bytes / rate; products at 8192^3).
struct Ceilings {
  double launch_us = 1.7;
  double bytes_per_us = 3.16e6;
  double flops_per_us = 711e6;
  double fp8_flops_per_us = 1320e6;
};

inline Ceilings CeilingsOf(const std::string& gpu) {
  if (gpu.find("H200") != std::string::npos) {
    return {1.7, 4.7e6, 693e6, 1330e6};
  }
  return {};
}

template <class T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t count) {
    HOPYARD_CUDA(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)));
  }
  explicit DeviceBuffer(const std::vector<T>& values)
      : DeviceBuffer(static_cast<int64_t>(values.size())) {
    HOPYARD_CUDA(
        cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  [[nodiscard]] T* get() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
};

// Random BF16 values in about -2 .. 2, repeated from a block of 2^22: the bits matter to the power
// that products draw, not to the time of a copy.
inline void FillRandom(uint16_t* device, int64_t count) {
  constexpr int64_t kBlock = 1 << 22;
  std::mt19937 random(3);
  std::vector<uint16_t> values(static_cast<size_t>(std::min(count, kBlock)));
  for (uint16_t& value : values) {
    const auto bits = static_cast<uint16_t>(random());
    value = static_cast<uint16_t>((bits & 0x80FFU) | 0x3F00U);
  }
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t part = std::min(kBlock, count - begin);
    HOPYARD_CUDA(cudaMemcpy(device + begin, values.data(), static_cast<size_t>(2 * part),
                            cudaMemcpyHostToDevice));
  }
}

// A captured graph of `calls` calls: run(i, stream) enqueues call i.
class TimedGraph {
 public:
  template <class Run>
  TimedGraph(int calls, Run&& run) : calls_(calls) {
    HOPYARD_CUDA(cudaStreamCreate(&stream_));
    run(0, stream_);
    HOPYARD_CUDA(cudaStreamSynchronize(stream_));
    cudaGraph_t graph = nullptr;
    HOPYARD_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) {
      run(i, stream_);
    }
    HOPYARD_CUDA(cudaStreamEndCapture(stream_, &graph));
    HOPYARD_CUDA(cudaGraphInstantiate(&exec_, graph, 0));
    HOPYARD_CUDA(cudaGraphDestroy(graph));
    HOPYARD_CUDA(cudaEventCreate(&start_));
    HOPYARD_CUDA(cudaEventCreate(&stop_));
  }
  TimedGraph(const TimedGraph&) = delete;
  TimedGraph& operator=(const TimedGraph&) = delete;
  ~TimedGraph() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaGraphExecDestroy(exec_);
    cudaStreamDestroy(stream_);
  }

  // Microseconds of one call in one replay.
  [[nodiscard]] double Replay() {
    HOPYARD_CUDA(cudaEventRecord(start_, stream_));
    HOPYARD_CUDA(cudaGraphLaunch(exec_, stream_));
    HOPYARD_CUDA(cudaEventRecord(stop_, stream_));
    HOPYARD_CUDA(cudaEventSynchronize(stop_));
    float milliseconds = 0.0F;
    HOPYARD_CUDA(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return 1e3 * double{milliseconds} / calls_;
  }

 private:
  int calls_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
};

// Microseconds of one call, sorted over the replays of a graph that holds `calls` of them.
template <class Run>
std::vector<double> TimeInGraph(int calls, Run&& run) {
  constexpr int kReplays = 15;
  TimedGraph graph(calls, run);
  std::vector<double> times;
  for (int replay = 0; replay < kReplays + 2; ++replay) {
    const double us = graph.Replay();
    if (replay >= 2) {
      times.push_back(us);
    }
  }
  std::sort(times.begin(), times.end());
  return times;
}

struct Machine {
  std::string gpu;
  std::string commit;
  Ceilings ceilings;
};

// Its ceilings for products of operands of this type.
inline Machine MachineFor(Machine machine, DType operands) {
  if (operands == DType::kE4m3) {
    machine.ceilings.flops_per_us = machine.ceilings.fp8_flops_per_us;
  }
  return machine;
}

// What one case measured.
struct CaseResult {
  std::string_view model;
  int64_t tokens = 0;
  double bytes = 0.0;
  double flops = 0.0;
  std::string tactic;
  std::vector<double> times;  // sorted, microseconds
};

// One JSON line; `extra` fields follow.
inline void PrintCase(const Machine& machine, const CaseResult& result,
                      const nlohmann::ordered_json& extra = nlohmann::ordered_json::object()) {
  const std::vector<double>& times = result.times;
  const double median = times[times.size() / 2];
  const double floor_us =
      std::max(machine.ceilings.launch_us + result.bytes / machine.ceilings.bytes_per_us,
               result.flops / machine.ceilings.flops_per_us);
  nlohmann::ordered_json line = {{"gpu", machine.gpu},
                                 {"commit", machine.commit},
                                 {"model", result.model},
                                 {"weights", "bf16"},
                                 {"activations", "bf16"},
                                 {"tokens", result.tokens},
                                 {"routing", "uniform"},
                                 {"median_us", median},
                                 {"p10_us", times[times.size() / 10]},
                                 {"p90_us", times[times.size() * 9 / 10]},
                                 {"floor_us", floor_us},
                                 {"of_floor", floor_us / median},
                                 {"tflops", result.flops / median * 1e-6},
                                 {"tactic", result.tactic},
                                 {"graph", true},
                                 {"cold_l2", true}};
  line.update(extra);
  std::cout << line.dump() << std::endl;
}

inline Machine DescribeMachine(const std::string& commit) {
  cudaDeviceProp properties{};
  HOPYARD_CUDA(cudaGetDeviceProperties(&properties, 0));
  return {properties.name, commit, CeilingsOf(properties.name)};
}

// main of a benchmark: `run(machine, shape)` for every model of the command line COMMIT MODEL ...
template <class Run>
int BenchModels(int argc, char** argv, Run&& run) {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0] << " COMMIT MODEL ...; models: " << ShapeNames() << '\n';
    return 2;
  }
  try {
    const Machine machine = DescribeMachine(argv[1]);
    for (int i = 2; i < argc; ++i) {
      const ModelShape* shape = FindShape(argv[i]);
      HOPYARD_CHECK(shape != nullptr, kInvalidArgument)
          << "no model " << argv[i] << "; known: " << ShapeNames();
      run(machine, *shape);
    }
    return 0;
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
}

}  // namespace hopyard::bench
