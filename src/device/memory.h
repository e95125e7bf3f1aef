// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime as host code without CUDA headers uses it. All throw Error{kCuda} (no memory:
// kOutOfMemory) in CUDA's own words. Only in builds with the Hopper backend.
#pragma once

#include <cstdint>

#include "hopyard/device.h"

namespace hopyard::device {

// 0 where the driver shows none, or there is no driver.
[[nodiscard]] int Count();
[[nodiscard]] GpuInfo InfoOf(int index);
// Its name and multiprocessors alone: takes none of the device's memory, as InfoOf does.
[[nodiscard]] GpuInfo ModelOf(int index);

// Makes `index` the current device; the caller's comes back at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index);
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice();

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Memory of the device that is current at construction; null where no bytes are asked for.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
};

// Waits until the bytes have arrived. Either pointer may be host or device memory; work that was
// enqueued before on the legacy default stream is done first.
void Copy(void* to, const void* from, int64_t bytes);
// In stream order; `from` must stay as it is until then.
void CopyAsync(void* to, const void* from, int64_t bytes, void* stream);
void Synchronize(void* stream);
// Waits until the bytes are zero.
void Zero(void* data, int64_t bytes);
// Waits for everything that any stream of the current device holds.
void SynchronizeDevice();

}  // namespace hopyard::device
