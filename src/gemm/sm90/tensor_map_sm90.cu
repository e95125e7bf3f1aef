// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <cstring>

#include <cuda.h>

#include "device/cuda_check.h"
#include "gemm/sm90/config.h"
#include "gemm/sm90/map_shape.h"

namespace hopyard::gemm::sm90 {
namespace {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                 const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, found once: the library links no libcuda.
EncodeTiled FindEncoder() {
  static const EncodeTiled encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    HOPYARD_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                  cudaEnableDefault, &found));
    HOPYARD_CHECK(found == cudaDriverEntryPointSuccess, kCuda)
        << "the driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed";
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return encoder;
}

}  // namespace

// What lies outside the sizes reads as zero.
TensorMap MakeTensorMap(const MapShape& shape) {
  const MapDims dims = DimsOf(shape);
  cuuint64_t sizes[5];
  cuuint64_t strides[4];
  cuuint32_t box[5];
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  for (size_t d = 0; d < 5; ++d) {
    sizes[d] = static_cast<cuuint64_t>(dims.size[d]);
    box[d] = static_cast<cuuint32_t>(dims.box[d]);
    if (d > 0) {
      strides[d - 1] = static_cast<cuuint64_t>(dims.stride[d]);
    }
  }
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  CUtensorMap map;
  const CUresult status = FindEncoder()(
      &map,
      dims.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 5,
      const_cast<uint8_t*>(dims.begin), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      dims.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  HOPYARD_CHECK(status == CUDA_SUCCESS, kCuda)
      << "cuTensorMapEncodeTiled returned " << static_cast<int>(status);
  TensorMap result;
  std::memcpy(result.words, &map, sizeof(result.words));
  return result;
}

}  // namespace hopyard::gemm::sm90
