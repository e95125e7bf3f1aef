// SPDX-License-Identifier: Apache-2.0
// What a program without CUDA of its own needs of a GPU: which there are, memory, copies, waiting.
// Memory of any other allocator serves the library as well.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "hopyard/tensor.h"

namespace hopyard {

struct GpuInfo {
  std::string name;
  int compute_major = 0;
  int compute_minor = 0;
  int multiprocessors = 0;
  int64_t memory_bytes = 0;
  int64_t free_bytes = 0;
  int64_t l2_bytes = 0;
};

// Why the kernels of this library do not run on the GPU, which are compiled for compute capability
// 9.0 alone (H100, H200); empty where they do. Weights there are an Error{kUnsupported} with it.
[[nodiscard]] std::string WhyUnsupported(const GpuInfo& gpu);

// GPUs that the driver shows; 0 without a driver, and in a build without CUDA.
[[nodiscard]] int CountGpus();
// Error{kInvalidArgument} where index is not in 0 .. CountGpus() - 1.
[[nodiscard]] GpuInfo GpuInfoOf(int index);

// Zeroed memory of a device, 256-byte aligned, freed with the last copy of the object.
// Error{kOutOfMemory} where there is not enough; Error{kUnsupported} for a GPU in a build without
// CUDA, here and in every function below.
class DeviceMemory {
 public:
  DeviceMemory() = default;  // no memory
  DeviceMemory(Device device, int64_t bytes);

  [[nodiscard]] void* data() const { return memory_.get(); }
  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] Device device() const { return device_; }

 private:
  std::shared_ptr<void> memory_;
  int64_t bytes_ = 0;
  Device device_;
};

// Copies between memory of `device` and the host, either way, or within either; returns when the
// bytes have arrived. Work that was enqueued before on the legacy default stream is done first.
void CopyBytes(void* to, const void* from, int64_t bytes, Device device);
// Waits until everything that was enqueued on the stream has been done. Nothing to wait for on a
// CPU.
void Synchronize(Device device, Stream stream = {});

}  // namespace hopyard
