// SPDX-License-Identifier: Apache-2.0
// Device memory for GPU tests: poisoned with 0xFF, guarded on both sides, freed at the end.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <gtest/gtest.h>

#include <cuda_runtime_api.h>

#include "device/cuda_check.h"

namespace hopyard::test {

// True with a Hopper GPU. GPU tests begin with HOPYARD_NEEDS_GPU(): skipped without one, never
// passed.
inline bool HasHopper() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    return false;
  }
  cudaDeviceProp properties{};
  HOPYARD_CUDA(cudaGetDeviceProperties(&properties, 0));
  return properties.major == 9;
}

#define HOPYARD_NEEDS_GPU()               \
  if (!::hopyard::test::HasHopper()) {    \
    GTEST_SKIP() << "no Hopper GPU here"; \
  }                                       \
  static_assert(true, "a statement, so that a semicolon follows")

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t count) : count_(count) {
    HOPYARD_CUDA(cudaMalloc(&memory_, static_cast<size_t>(bytes() + 2 * kGuard)));
    HOPYARD_CUDA(cudaMemset(memory_, 0xFF, static_cast<size_t>(bytes() + 2 * kGuard)));
    // It may return before it is done, and tests use streams that do not wait for this one.
    HOPYARD_CUDA(cudaDeviceSynchronize());
  }
  explicit DeviceArray(const std::vector<T>& values)
      : DeviceArray(static_cast<int64_t>(values.size())) {
    HOPYARD_CUDA(
        cudaMemcpy(get(), values.data(), static_cast<size_t>(bytes()), cudaMemcpyHostToDevice));
    // Small copies may return before they have arrived, too.
    HOPYARD_CUDA(cudaDeviceSynchronize());
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(memory_); }

  [[nodiscard]] T* get() const {
    return static_cast<T*>(static_cast<void*>(static_cast<uint8_t*>(memory_) + kGuard));
  }
  // Once more, before whatever runs next on the stream that waits for all others.
  void Poison() const { HOPYARD_CUDA(cudaMemsetAsync(get(), 0xFF, static_cast<size_t>(bytes()))); }
  // Waits for the device; throws what a kernel did wrong.
  [[nodiscard]] std::vector<T> Download() const {
    HOPYARD_CUDA(cudaDeviceSynchronize());
    std::vector<T> values(static_cast<size_t>(count_));
    HOPYARD_CUDA(
        cudaMemcpy(values.data(), get(), static_cast<size_t>(bytes()), cudaMemcpyDeviceToHost));
    return values;
  }
  [[nodiscard]] bool GuardsIntact() const {
    HOPYARD_CUDA(cudaDeviceSynchronize());
    std::vector<uint8_t> guards(static_cast<size_t>(2 * kGuard));
    const auto* const begin = static_cast<const uint8_t*>(memory_);
    HOPYARD_CUDA(
        cudaMemcpy(guards.data(), begin, static_cast<size_t>(kGuard), cudaMemcpyDeviceToHost));
    HOPYARD_CUDA(cudaMemcpy(guards.data() + kGuard, begin + kGuard + bytes(),
                            static_cast<size_t>(kGuard), cudaMemcpyDeviceToHost));
    return std::all_of(guards.begin(), guards.end(), [](uint8_t byte) { return byte == 0xFF; });
  }

 private:
  static constexpr int64_t kGuard = 256;

  [[nodiscard]] int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }

  int64_t count_;
  void* memory_ = nullptr;
};

}  // namespace hopyard::test
