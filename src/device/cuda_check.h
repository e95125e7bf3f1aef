// SPDX-License-Identifier: Apache-2.0
// HOPYARD_CUDA(call): throws Error{kCuda} with the call's text and CUDA's own words. For .cu files
// and GPU tests only.
#pragma once

#include <cuda_runtime_api.h>

#include "core/error.h"

#define HOPYARD_CUDA(call)                                                                   \
  if (const cudaError_t hopyard_status = (call); hopyard_status == cudaSuccess) [[likely]] { \
  } else                                                                                     \
    ::hopyard::detail::ErrorStream(::hopyard::ErrorKind::kCuda).stream()                     \
        << #call << ": " << cudaGetErrorString(hopyard_status)
