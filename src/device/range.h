// SPDX-License-Identifier: Apache-2.0
// Names on a profiler's timeline for what a call enqueues.
#pragma once

namespace hopyard::device {

// Before the first range, and outside of calls that must not wait or read the environment: finds
// the profiler, once per process.
void PrepareRanges();

// A range of the domain "hopyard" (NVTX) on this thread, from construction to destruction. Without
// a profiler it costs a comparison.
class Range {
 public:
  explicit Range(const char* name);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace hopyard::device
