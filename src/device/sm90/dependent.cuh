// SPDX-License-Identifier: Apache-2.0
// The two halves of programmatic dependent launch (PTX ISA, griddepcontrol). Both do nothing where
// the kernel, or the one behind it, was launched in the ordinary way (device/queue.h).
#pragma once

namespace hopyard::sm90 {

// The kernel behind this one may be scheduled once every block has come here or ended. As early as
// can be, ahead of all results: whoever is scheduled so waits, in AwaitPredecessors, until this
// kernel has ended and its memory has been flushed. Until then it only holds room that no block of
// this kernel wants, since all of them are resident or done.
__device__ __forceinline__ void ReleaseDependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the kernels ahead have ended and all they wrote can be seen. Every thread of every kernel
// calls it, before any access of memory that a kernel writes, and also where it has nothing to do:
// only so does the end of one kernel imply that those before it have ended, which is what lets the
// third of them overwrite what the first one reads.
__device__ __forceinline__ void AwaitPredecessors() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// For kernels with nothing to prepare: their first statement.
__device__ __forceinline__ void TakeTurn() {
  ReleaseDependents();
  AwaitPredecessors();
}

}  // namespace hopyard::sm90
