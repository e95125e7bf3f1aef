// SPDX-License-Identifier: Apache-2.0
// From accumulators (features x tokens, see device/sm90/wgmma.cuh) to BF16 rows in memory: bias,
// activation, transposition through shared memory, 16-byte stores of valid rows and features only.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/numbers.cuh"
#include "gemm/activation.h"
#include "gemm/sm90/config.h"
#include "gemm/sm90/grouped_gemm_sm90.h"

namespace hopyard::gemm::sm90 {

// One float with the operations that gemm/activation.h asks for.
struct DeviceFloat {
  float v;

  static __device__ __forceinline__ DeviceFloat Zero() { return {0.0F}; }
  static __device__ __forceinline__ DeviceFloat Set(float x) { return {x}; }
  static __device__ __forceinline__ DeviceFloat Fma(DeviceFloat a, DeviceFloat b, DeviceFloat c) {
    return {__fmaf_rn(a.v, b.v, c.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator+(DeviceFloat a, DeviceFloat b) {
    return {__fadd_rn(a.v, b.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator-(DeviceFloat a, DeviceFloat b) {
    return {__fsub_rn(a.v, b.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator*(DeviceFloat a, DeviceFloat b) {
    return {__fmul_rn(a.v, b.v)};
  }
  friend __device__ __forceinline__ DeviceFloat operator/(DeviceFloat a, DeviceFloat b) {
    return {__fdiv_rn(a.v, b.v)};
  }
  // The second operand where they do not compare (NaN), as x86 does.
  static __device__ __forceinline__ DeviceFloat Min(DeviceFloat a, DeviceFloat b) {
    return a.v < b.v ? a : b;
  }
  static __device__ __forceinline__ DeviceFloat Max(DeviceFloat a, DeviceFloat b) {
    return a.v > b.v ? a : b;
  }
  static __device__ __forceinline__ DeviceFloat Abs(DeviceFloat a) { return {fabsf(a.v)}; }
  static __device__ __forceinline__ DeviceFloat CopySign(DeviceFloat a, DeviceFloat b) {
    return {copysignf(a.v, b.v)};
  }
  static __device__ __forceinline__ DeviceFloat Less(DeviceFloat a, DeviceFloat b, DeviceFloat x,
                                                     DeviceFloat y) {
    return a.v < b.v ? x : y;
  }
  static __device__ __forceinline__ DeviceFloat Round(DeviceFloat a) { return {rintf(a.v)}; }
  // 2^n for integral n in -126 .. 127.
  static __device__ __forceinline__ DeviceFloat Exp2(DeviceFloat n) {
    return {__int_as_float((__float2int_rn(n.v) + 127) << 23)};
  }
};

// Where a consumer's 64 features of a tile of tokens go.
struct OutputTile {
  int expert;
  int64_t row_begin;
  int num_rows;
  int64_t feature_begin;
  int consumer;
};

// Two BF16 values, the first in the low half; round to nearest even.
__device__ __forceinline__ uint32_t PackBf16(float first, float second) {
  uint32_t bits = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// Four 8x8 matrices of 16-bit values, transposed on the way: lane 8 * m + i names row i of matrix
// m.
__device__ __forceinline__ void StoreTransposed(uint32_t shared, const uint32_t (&values)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
      : "memory");
}

__device__ __forceinline__ float BiasAt(const GroupedGemmArgs& args, int expert, int64_t row) {
  if (args.bias == nullptr || row >= args.rows) {
    return 0.0F;
  }
  const int64_t at = expert * args.rows + row;
  if (args.bias_dtype == DType::kBf16) {
    return hopyard::sm90::WidenBf16(static_cast<const uint16_t*>(args.bias)[at]);
  }
  return static_cast<const float*>(args.bias)[at];
}

// Token n, feature r of a staged tile: rows of 128 bytes whose 16-byte pieces are exchanged by n,
// so that neither the writes nor the reads below meet in a bank.
__device__ __forceinline__ int StagedAt(int n, int r) {
  return n * 128 + (((r / 8) ^ (n % 8)) << 4) + (r % 8) * 2;
}

__device__ __forceinline__ uint4 LoadPiece(uint32_t shared) {
  uint4 values;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
               : "r"(shared)
               : "memory");
  return values;
}

// Writes the staged tile [num_rows][64] of this warpgroup.
__device__ inline void StoreStaged(const GroupedGemmArgs& args, const OutputTile& tile,
                                   uint32_t staging) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int piece = thread % 8;
  const int64_t feature = tile.feature_begin + piece * 8;
  const int64_t left = args.features - feature;
  const bool whole =
      left >= 8 && args.out_pitch % 8 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  for (int n = thread / 8; n < tile.num_rows && left > 0; n += 16) {
    const uint4 values = LoadPiece(staging + static_cast<uint32_t>(StagedAt(n, piece * 8)));
    uint16_t* const target = args.out + (tile.row_begin + n) * args.out_pitch + feature;
    if (whole) {
      *static_cast<uint4*>(static_cast<void*>(target)) = values;
    } else {
      const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < left) {
          target[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
        }
      }
    }
  }
}

// value(h, index) is the result of accumulator `index`, whose feature is row 8 * h + ... of the
// tile. A pair of accumulators is two tokens of one feature: two groups of 8 tokens and both halves
// of a warp's 16 features are four matrices [features][tokens], stored as [tokens][features].
template <int kTokens, class Value>
__device__ __forceinline__ void StageAndStore(const GroupedGemmArgs& args, const OutputTile& tile,
                                              uint32_t staging, Value&& value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  const int barrier = 1 + tile.consumer;
  // The tile before has been read out.
  hopyard::sm90::NamedBarrier(barrier, 128);
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    uint32_t values[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int index = 4 * (j + m / 2) + 2 * (m % 2);
      values[m] = PackBf16(value(m % 2, index), value(m % 2, index + 1));
    }
    // Matrix m: tokens 8 * (j + m / 2) .., features 16 * warp + 8 * (m % 2) ..
    const int matrix = lane / 8;
    const int n = 8 * (j + matrix / 2) + lane % 8;
    const int r = 16 * warp + 8 * (matrix % 2);
    StoreTransposed(staging + static_cast<uint32_t>(StagedAt(n, r)), values);
  }
  hopyard::sm90::NamedBarrier(barrier, 128);
  StoreStaged(args, tile, staging);
}

// First feature of this thread in the tile; the other one is 8 further.
__device__ __forceinline__ int64_t ThreadFeature(const OutputTile& tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  return tile.feature_begin + 16 * warp + lane / 4;
}

// activation::Gated's SwiGLU with the fast exponential and division (2 ulp), far inside the BF16
// rounding that follows. The minimum and maximum return NaN's other operand, so NaN is put back.
__device__ __forceinline__ float SwiGlu(const activation::Parameters& p, float gate, float up) {
  const float g = gate != gate ? gate : fminf(gate, p.limit);
  const float u = up != up ? up : fmaxf(-p.limit, fminf(up, p.limit));
  return (u + p.beta) * __fdividef(g, 1.0F + __expf(-p.alpha * g));
}

template <ActivationKind kKind>
struct GatedFormula {
  const activation::Parameters& parameters;

  __device__ __forceinline__ float operator()(float gate, float up) const {
    return activation::Gated(kKind, parameters, DeviceFloat{gate}, DeviceFloat{up}).v;
  }
};

template <int kTokens>
__device__ void StoreGated(const GroupedGemmArgs& args, const OutputTile& tile,
                           const float (&gate)[kTokens / 2], const float (&up)[kTokens / 2],
                           uint32_t staging) {
  activation::Parameters parameters;
  parameters.alpha = args.alpha != nullptr ? args.alpha[tile.expert] : 1.0F;
  parameters.beta = args.beta != nullptr ? args.beta[tile.expert] : 0.0F;
  parameters.limit = args.limit != nullptr ? args.limit[tile.expert] : INFINITY;
  float gate_bias[2];
  float up_bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t feature = ThreadFeature(tile) + 8 * h;
    const bool real = feature < args.features;
    gate_bias[h] = real ? BiasAt(args, tile.expert, args.gate_begin + feature) : 0.0F;
    up_bias[h] = real ? BiasAt(args, tile.expert, args.up_begin + feature) : 0.0F;
  }
  const auto store = [&](auto&& formula) {
    StageAndStore<kTokens>(args, tile, staging, [&](int h, int index) {
      return formula(__fadd_rn(gate[index], gate_bias[h]), __fadd_rn(up[index], up_bias[h]));
    });
  };
  // One loop per kind: a switch inside would cost registers in all of them.
  switch (args.activation) {
    case ActivationKind::kSwiGlu:
      return store([&](float g, float u) { return SwiGlu(parameters, g, u); });
    case ActivationKind::kGeGlu:
      return store(GatedFormula<ActivationKind::kGeGlu>{parameters});
    case ActivationKind::kGeGluTanh:
      return store(GatedFormula<ActivationKind::kGeGluTanh>{parameters});
    default:
      return store(GatedFormula<ActivationKind::kSiTu>{parameters});
  }
}

template <int kTokens>
__device__ void StorePlain(const GroupedGemmArgs& args, const OutputTile& tile,
                           const float (&acc)[kTokens / 2], uint32_t staging) {
  float bias[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    bias[h] = BiasAt(args, tile.expert, ThreadFeature(tile) + 8 * h);
  }
  if (args.activation == ActivationKind::kIdentity) {
    StageAndStore<kTokens>(args, tile, staging,
                           [&](int h, int index) { return __fadd_rn(acc[index], bias[h]); });
    return;
  }
  StageAndStore<kTokens>(args, tile, staging, [&](int h, int index) {
    const DeviceFloat x{__fadd_rn(acc[index], bias[h])};
    return activation::Plain(args.activation, x).v;
  });
}

}  // namespace hopyard::gemm::sm90
