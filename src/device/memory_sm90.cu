// SPDX-License-Identifier: Apache-2.0
#include <utility>

#include "device/cuda_check.h"
#include "device/memory.h"

namespace hopyard::device {

int Count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  HOPYARD_CUDA(status);
  return count;
}

GpuInfo InfoOf(int index) {
  const CurrentDevice current(index);
  cudaDeviceProp properties{};
  HOPYARD_CUDA(cudaGetDeviceProperties(&properties, index));
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  HOPYARD_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  GpuInfo info;
  info.name = properties.name;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.memory_bytes = static_cast<int64_t>(total_bytes);
  info.free_bytes = static_cast<int64_t>(free_bytes);
  info.l2_bytes = properties.l2CacheSize;
  return info;
}

GpuInfo ModelOf(int index) {
  cudaDeviceProp properties{};
  HOPYARD_CUDA(cudaGetDeviceProperties(&properties, index));
  GpuInfo info;
  info.name = properties.name;
  info.multiprocessors = properties.multiProcessorCount;
  return info;
}

CurrentDevice::CurrentDevice(int index) {
  HOPYARD_CUDA(cudaGetDevice(&previous_));
  if (previous_ != index) {
    HOPYARD_CUDA(cudaSetDevice(index));
    changed_ = true;
  }
}

CurrentDevice::~CurrentDevice() {
  if (changed_) {
    // It was current before: a failure here is one of the device, and the next call reports it.
    static_cast<void>(cudaSetDevice(previous_));
  }
}

Buffer::Buffer(int64_t bytes) {
  if (bytes == 0) {
    return;
  }
  const cudaError_t status = cudaMalloc(&memory_, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    // Not a lasting error of the device: later calls must not find it.
    static_cast<void>(cudaGetLastError());
  }
  HOPYARD_CHECK(status != cudaErrorMemoryAllocation, kOutOfMemory)
      << "the device has no " << bytes << " bytes left; free some of its memory";
  HOPYARD_CUDA(status);
}

Buffer::Buffer(Buffer&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(memory_, other.memory_);
  return *this;
}

Buffer::~Buffer() {
  // At exit the driver may be gone already, and the memory with it.
  static_cast<void>(cudaFree(memory_));
}

void Copy(void* to, const void* from, int64_t bytes) {
  HOPYARD_CUDA(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault));
  // A small copy from pageable memory may return before it has arrived.
  HOPYARD_CUDA(cudaStreamSynchronize(nullptr));
}

void CopyAsync(void* to, const void* from, int64_t bytes, void* stream) {
  HOPYARD_CUDA(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault,
                               static_cast<cudaStream_t>(stream)));
}

void Zero(void* data, int64_t bytes) {
  HOPYARD_CUDA(cudaMemset(data, 0, static_cast<size_t>(bytes)));
  HOPYARD_CUDA(cudaStreamSynchronize(nullptr));
}

void Synchronize(void* stream) {
  HOPYARD_CUDA(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

void SynchronizeDevice() {
  HOPYARD_CUDA(cudaDeviceSynchronize());
}

}  // namespace hopyard::device
