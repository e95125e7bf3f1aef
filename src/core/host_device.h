// SPDX-License-Identifier: Apache-2.0
// For the few definitions that host and device share.
#pragma once

#if defined(__CUDACC__)
#define HOPYARD_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a translation unit compiled for AVX must not leave copies that others link to.
#define HOPYARD_HOST_DEVICE inline __attribute__((always_inline))
#endif
