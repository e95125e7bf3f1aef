// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "device/cuda_check.h"
#include "gemm/sm90/kernel.cuh"

namespace hopyard::gemm::sm90 {
namespace {

#define HOPYARD_GEMM_CONFIG(name, ...)                       \
  struct name {                                              \
    static constexpr GemmConfig kConfig{__VA_ARGS__};        \
    static_assert(IsValid(kConfig), "a row nobody can run"); \
  };
#include "gemm/sm90/configs.def"
#undef HOPYARD_GEMM_CONFIG

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

// [experts][rows][k] as boxes of 64 rows x 64 values in the 128-byte swizzle; what lies outside
// reads as zero.
CUtensorMap WeightMap(const GroupedGemmArgs& args) {
  HOPYARD_CHECK(args.row_stride % 8 == 0 && args.expert_stride % 8 == 0 &&
                    reinterpret_cast<uintptr_t>(args.weights) % 16 == 0,
                kInvalidArgument)
      << "weights with row stride " << args.row_stride << " and expert stride "
      << args.expert_stride << " elements at " << args.weights
      << "; the copy engine wants multiples of 16 bytes";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(args.k), static_cast<cuuint64_t>(args.rows),
                              static_cast<cuuint64_t>(args.experts)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * args.row_stride),
                                static_cast<cuuint64_t>(2 * args.expert_stride)};
  const cuuint32_t box[] = {kBlockK, kTileRows, 1};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map{};
  const CUresult status = FindEncoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(args.weights), sizes, strides,
      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  HOPYARD_CHECK(status == CUDA_SUCCESS, kCuda)
      << "cuTensorMapEncodeTiled returned " << static_cast<int>(status);
  return map;
}

template <class Row>
void Launch(const GroupedGemmArgs& args, cudaStream_t stream) {
  constexpr GemmConfig kConfig = Row::kConfig;
  const KernelArgs kernel_args{WeightMap(args), args};
  // Once per kernel and process; the attribute holds from then on.
  static const bool prepared = [] {
    HOPYARD_CUDA(cudaFuncSetAttribute(GroupedGemmKernel<Row>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      SharedBytes(Row::kConfig)));
    return true;
  }();
  static_cast<void>(prepared);
  int device = 0;
  int processors = 0;
  HOPYARD_CUDA(cudaGetDevice(&device));
  HOPYARD_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks =
      (args.features + FeaturesPerBlock(kConfig) - 1) / FeaturesPerBlock(kConfig) * args.max_tiles;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(processors, blocks));
  GroupedGemmKernel<Row>
      <<<grid, ThreadsPerBlock(kConfig), SharedBytes(kConfig), stream>>>(kernel_args);
  HOPYARD_CUDA(cudaGetLastError());
}

struct Entry {
  KernelInfo info;
  void (*launch)(const GroupedGemmArgs&, cudaStream_t);
};

#define HOPYARD_GEMM_CONFIG(name, ...)                                                       \
  Entry{{#name, name::kConfig.tokens, FeaturesPerBlock(name::kConfig), name::kConfig.gated}, \
        &Launch<name>},
constexpr Entry kEntries[] = {
#include "gemm/sm90/configs.def"
};
#undef HOPYARD_GEMM_CONFIG

}  // namespace

int NumKernels() {
  return static_cast<int>(std::size(kEntries));
}

KernelInfo KernelAt(int index) {
  return kEntries[index].info;
}

void RunGroupedGemm(int index, const GroupedGemmArgs& args, void* stream) {
  if (args.max_tiles > 0) {
    kEntries[index].launch(args, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace hopyard::gemm::sm90
