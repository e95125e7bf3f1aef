// SPDX-License-Identifier: Apache-2.0
// Where kernels are enqueued, and how they follow each other.
#pragma once

namespace hopyard::device {

struct Queue {
  void* stream = nullptr;  // cudaStream_t
  // Programmatic dependent launch: a kernel's blocks may be scheduled before the kernel ahead of it
  // has ended, and wait on the device until it has. Every kernel enqueued so begins as
  // device/sm90/dependent.cuh says. The results are the same.
  bool overlap = false;

  // NOLINTNEXTLINE(google-explicit-constructor): a stream is a queue whose launches do not overlap.
  Queue(void* cuda_stream) : stream(cuda_stream) {}
  Queue(void* cuda_stream, bool overlaps) : stream(cuda_stream), overlap(overlaps) {}
};

}  // namespace hopyard::device
