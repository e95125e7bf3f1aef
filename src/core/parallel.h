// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hopyard {

// Number of threads a parallel region would get now; at least 1.
inline int MaxThreads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls fn(i, thread) for i in [begin, end) on up to `num_threads` threads, thread in
// [0, num_threads). `grain` iterations are handed out at a time, in order. fn must make every
// result independent of which thread computes it. fn must not throw in the hot call; elsewhere the
// first exception is rethrown after the loop.
template <class Fn>
void ParallelFor(int64_t begin, int64_t end, int64_t grain, int num_threads, Fn&& fn) {
  if (end <= begin) {
    return;
  }
  if (num_threads <= 1 || end - begin <= grain) {
    for (int64_t i = begin; i < end; ++i) {
      fn(i, 0);
    }
    return;
  }
#if defined(_OPENMP)
  std::exception_ptr first_error;
  std::mutex error_mutex;
#pragma omp parallel for schedule(dynamic, grain) num_threads(num_threads)
  for (int64_t i = begin; i < end; ++i) {
    try {
      fn(i, omp_get_thread_num());
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!first_error) {
        first_error = std::current_exception();
      }
    }
  }
  if (first_error) {
    std::rethrow_exception(first_error);
  }
#else
  for (int64_t i = begin; i < end; ++i) {
    fn(i, 0);
  }
#endif
}

}  // namespace hopyard
