// SPDX-License-Identifier: Apache-2.0
// The public functions about devices: the CPU here, GPUs by the backend.
#include <cstdlib>
#include <cstring>

#include "hopyard/device.h"

#include "core/error.h"
#include "core/shape.h"
#include "plan/backend_sm90.h"
#include "plan/routing_layout.h"

namespace hopyard {
namespace {

std::shared_ptr<void> AllocateOnHost(int64_t bytes) {
  const auto size = static_cast<size_t>(RoundUp(bytes, kWorkspaceAlignment));
  void* const data = std::aligned_alloc(static_cast<size_t>(kWorkspaceAlignment), size);
  HOPYARD_CHECK(data != nullptr, kOutOfMemory)
      << "the host has no " << bytes << " bytes left; free some of its memory";
  std::memset(data, 0, size);
  return {data, std::free};
}

}  // namespace

std::string WhyUnsupported(const GpuInfo& gpu) {
  if (gpu.compute_major == 9 && gpu.compute_minor == 0) {
    return {};
  }
  return "the GPU, " + gpu.name + ", has compute capability " + std::to_string(gpu.compute_major) +
         '.' + std::to_string(gpu.compute_minor) +
         "; wanted 9.0 (H100, H200), for which the kernels are compiled, or the CPU";
}

int CountGpus() {
  const sm90::Backend* const backend = sm90::FindBackend();
  return backend == nullptr ? 0 : backend->CountGpus();
}

GpuInfo GpuInfoOf(int index) {
  const int count = CountGpus();
  HOPYARD_CHECK(index >= 0 && index < count, kInvalidArgument)
      << "index=" << index << "; " << count << " GPUs are visible, wanted one of 0 .. " << count - 1
      << (sm90::FindBackend() == nullptr ? " (this build has no CUDA backend)" : "");
  return sm90::NeedBackend().GpuInfoOf(index);
}

DeviceMemory::DeviceMemory(Device device, int64_t bytes) : bytes_(bytes), device_(device) {
  HOPYARD_CHECK(bytes >= 0, kInvalidArgument) << "bytes=" << bytes << "; wanted 0 or more";
  if (bytes == 0) {
    return;
  }
  memory_ = device.kind == DeviceKind::kCpu ? AllocateOnHost(bytes)
                                            : sm90::NeedBackend().Allocate(device.index, bytes);
}

void CopyBytes(void* to, const void* from, int64_t bytes, Device device) {
  if (bytes == 0) {
    return;
  }
  if (device.kind == DeviceKind::kCpu) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  } else {
    sm90::NeedBackend().Copy(device.index, to, from, bytes);
  }
}

void Synchronize(Device device, Stream stream) {
  if (device.kind != DeviceKind::kCpu) {
    sm90::NeedBackend().Synchronize(device.index, stream.handle);
  }
}

}  // namespace hopyard
