// SPDX-License-Identifier: Apache-2.0
// From accumulators (features x tokens, see device/sm90/wgmma.cuh) to rows in memory: scales, bias,
// LoRA delta, activation, transposition through shared memory, wide stores of valid rows and
// features only.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/numbers.cuh"
#include "gemm/sm90/device_float.cuh"
#include "gemm/sm90/mainloop.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/weight_scales.cuh"

namespace hopyard::gemm::sm90 {

// Where a consumer's 64 features of a tile of tokens go.
struct OutputTile {
  int expert;
  int64_t row_begin;
  int num_rows;
  int64_t feature_begin;
  int consumer;
  uint32_t staging;
  uint32_t factors;  // one per token
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

// --- sums -> true values
// --------------------------------------------------------------------------

// The factor of a tile's token `n` and slot: everything that scales a whole row.
__device__ __forceinline__ float TokenFactor(const GroupedGemmArgs& args, const OutputTile& tile,
                                             int n) {
  if (n >= tile.num_rows) {
    return 0.0F;
  }
  const int64_t row = tile.row_begin + n;
  float factor = 1.0F;
  if (args.x_token_scales != nullptr) {
    factor = args.x_token_scales[args.row_to_source != nullptr ? args.row_to_source[row] : row];
  }
  if (args.slot_weights != nullptr) {
    factor = __fmul_rn(factor, args.slot_weights[args.row_to_slot[row]]);
  }
  return factor;
}

// Puts the factors of the tile's tokens into shared memory. The warpgroup meets at a barrier before
// they are read.
template <int kTokens>
__device__ __forceinline__ void StageFactors(const GroupedGemmArgs& args, const OutputTile& tile) {
  const int n = static_cast<int>(threadIdx.x) % 128;
  // The tile before has been read out.
  hopyard::sm90::NamedBarrier(1 + tile.consumer, 128);
  if (n < kTokens) {
    const float factor = TokenFactor(args, tile, n);
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(tile.factors + 4U * static_cast<uint32_t>(n)),
                 "f"(factor)
                 : "memory");
  }
  hopyard::sm90::NamedBarrier(1 + tile.consumer, 128);
}

// What scales a weight row, and its bias.
struct RowTerms {
  float factor;
  float bias;
};

template <class Row>
__device__ __forceinline__ RowTerms TermsOf(const GroupedGemmArgs& args, const OutputTile& tile,
                                            const WeightRow& at) {
  const MatrixArgs& matrix = *at.matrix;
  const ExpertPointers pointers = matrix.pointers[tile.expert];
  RowTerms terms{1.0F, 0.0F};
  if (at.row >= matrix.rows) {
    return terms;
  }
  const int64_t stored = StoredRow(matrix, at.row);
  if constexpr (Row::kConfig.family == Family::kNvFp4AsBf16) {
    terms.factor = kNvFp4RowFactor;
  }
  if constexpr (Row::kConfig.family == Family::kMxFp4AsFp8) {
    // 2^(b - 127); 2^-127 is subnormal.
    const uint32_t exponent = pointers.row_exponents[at.row];
    terms.factor = __uint_as_float(exponent == 0 ? 0x00400000U : exponent << 23);
  }
  if (args.weights == WeightFormat::kFp8PerChannel) {
    terms.factor = static_cast<const float*>(pointers.scales)[stored * matrix.scale_stride];
  }
  if (pointers.global_scale != nullptr) {
    terms.factor = __fmul_rn(terms.factor, *pointers.global_scale);
  }
  if (args.x_scale != nullptr) {
    terms.factor = __fmul_rn(terms.factor, args.x_scale[tile.expert * args.x_scale_stride]);
  }
  if (pointers.bias != nullptr) {
    terms.bias = matrix.bias_dtype == DType::kBf16
                     ? hopyard::sm90::WidenBf16(static_cast<const uint16_t*>(pointers.bias)[stored])
                     : static_cast<const float*>(pointers.bias)[stored];
  }
  return terms;
}

// First row of this thread in a tile; the other one is 8 further.
__device__ __forceinline__ int64_t ThreadFeature(const OutputTile& tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  return tile.feature_begin + 16 * warp + lane / 4;
}

// The LoRA delta of `part` (0 up or the only one, 1 gate) of the tile's token n and feature row h.
__device__ __forceinline__ float DeltaAt(const GroupedGemmArgs& args, const OutputTile& tile,
                                         int part, int h, int n) {
  const int64_t feature = ThreadFeature(tile) + 8 * h;
  if (n >= tile.num_rows || feature >= args.features) {
    return 0.0F;
  }
  const int32_t slot = args.row_to_slot[tile.row_begin + n];
  const int within = slot % args.slots_per_token;
  if (within >= args.delta_slots) {
    return 0.0F;
  }
  const int64_t row = int64_t{slot / args.slots_per_token} * args.delta_slots + within;
  const int parts = args.gated_delta != 0 ? 2 : 1;
  return hopyard::sm90::WidenBf16(args.delta[(row * parts + part) * args.features + feature]);
}

// The scales and biases of a thread's rows in one tile of sums.
struct TileTerms {
  RowTerms row[2];

  // Sums of two neighbouring tokens, with both factors applied.
  __device__ __forceinline__ float2 Of(int h, float first, float second, float2 tokens) const {
    return {__fadd_rn(__fmul_rn(__fmul_rn(first, row[h].factor), tokens.x), row[h].bias),
            __fadd_rn(__fmul_rn(__fmul_rn(second, row[h].factor), tokens.y), row[h].bias)};
  }
};
template <class Row>
__device__ __forceinline__ TileTerms TermsOf(const GroupedGemmArgs& args, const OutputTile& tile,
                                             int half) {
  // ThreadRow counts from the consumer's first feature.
  const int64_t first =
      Row::kConfig.gated ? tile.feature_begin : tile.feature_begin - half * kTileRows;
  return {{TermsOf<Row>(args, tile, ThreadRow<Row>(args, first, half, 0)),
           TermsOf<Row>(args, tile, ThreadRow<Row>(args, first, half, 1))}};
}

// Factors of this thread's tokens 8 * j + 2 * (lane % 4) and the next.
__device__ __forceinline__ float2 TokenFactors(const OutputTile& tile, int j) {
  return LoadPair(tile.factors + 8U * (threadIdx.x % 4) + 32U * static_cast<uint32_t>(j));
}

// values + delta of tokens 8 * j + 2 * (lane % 4) and the next, for layers that have one.
__device__ __forceinline__ float2 WithDelta(const GroupedGemmArgs& args, const OutputTile& tile,
                                            int part, int j, int h, float2 values) {
  if (args.delta == nullptr) {
    return values;
  }
  const int n = 8 * j + 2 * static_cast<int>(threadIdx.x % 4);
  return {__fadd_rn(values.x, DeltaAt(args, tile, part, h, n)),
          __fadd_rn(values.y, DeltaAt(args, tile, part, h, n + 1))};
}

// --- activation
// -----------------------------------------------------------------------------------

template <ActivationKind kKind>
struct GatedFormula {
  const activation::Parameters& parameters;

  __device__ __forceinline__ float operator()(float gate, float up) const {
    return activation::Gated(kKind, parameters, DeviceFloat{gate}, DeviceFloat{up}).v;
  }
};

// Calls store(formula(gate, up)) with the layer's activation: one copy of what follows per kind,
// for a switch inside would cost registers in all of them.
template <class Store>
__device__ __forceinline__ void WithGatedFormula(const GroupedGemmArgs& args, int expert,
                                                 Store&& store) {
  activation::Parameters parameters;
  parameters.alpha = args.alpha != nullptr ? args.alpha[expert] : 1.0F;
  parameters.beta = args.beta != nullptr ? args.beta[expert] : 0.0F;
  parameters.limit = args.limit != nullptr ? args.limit[expert] : INFINITY;
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

// --- BF16 rows
// ------------------------------------------------------------------------------------

struct RowsOut {
  uint16_t* out;
  int64_t pitch;
  int64_t features;  // that are written: whole groups of 128 where an order asks for it
};

// Token n, feature r of a staged tile: rows of 128 bytes whose 16-byte pieces are exchanged by n,
// so that neither the writes nor the reads below meet in a bank.
__device__ __forceinline__ uint32_t StagedAt(int n, int r) {
  return static_cast<uint32_t>(n * 128 + (((r / 8) ^ (n % 8)) << 4) + (r % 8) * 2);
}

__device__ __forceinline__ uint4 LoadPiece(uint32_t shared) {
  uint4 values;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
               : "r"(shared)
               : "memory");
  return values;
}
__device__ __forceinline__ uint32_t LoadHalf(uint32_t shared) {
  uint16_t value = 0;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(shared) : "memory");
  return value;
}

// Writes the staged tile [num_rows][64] of this warpgroup.
__device__ inline void StoreNatural(const RowsOut& rows, const OutputTile& tile) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int piece = thread % 8;
  const int64_t feature = tile.feature_begin + piece * 8;
  const int64_t left = rows.features - feature;
  const bool whole =
      left >= 8 && rows.pitch % 8 == 0 && reinterpret_cast<uintptr_t>(rows.out) % 16 == 0;
  for (int n = thread / 8; n < tile.num_rows && left > 0; n += 16) {
    const uint4 values = LoadPiece(tile.staging + StagedAt(n, piece * 8));
    uint16_t* const target = rows.out + (tile.row_begin + n) * rows.pitch + feature;
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

// The same in KOrder::kBf16Decoded: half a group of 128, which holds 4 neighbours of every 8. Piece
// p = 4 j + 2 c + i of k_order.h has codes (q, h) = (0, 0), (0, 1), (1, 0), (1, 1) of the half.
__device__ inline void StoreOrdered(const RowsOut& rows, const OutputTile& tile) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int piece = thread % 16;
  const int first = piece / 4 * 8 + piece / 2 % 2 * 2 + piece % 2;
  const int64_t group = tile.feature_begin / kKGroup * kKGroup;
  const int64_t at = group + piece * 8 + (tile.feature_begin - group) / 16;
  if (tile.feature_begin >= rows.features) {
    return;
  }
  for (int n = thread / 16; n < tile.num_rows; n += 8) {
    const auto code = [&](int f) { return LoadHalf(tile.staging + StagedAt(n, first + f)); };
    const uint2 values{code(0) | code(4) << 16, code(32) | code(36) << 16};
    *static_cast<uint2*>(static_cast<void*>(rows.out + (tile.row_begin + n) * rows.pitch + at)) =
        values;
  }
}

// What `values(j, h)` gives for tokens 8 * j + 2 * (lane % 4) and the next of feature row h:
// staged, then written to all that ask for it. A pair of accumulators is two tokens of one feature:
// two groups of 8 tokens and both halves of a warp's 16 features are four matrices
// [features][tokens], stored as [tokens][features].
template <int kTokens, class Values>
__device__ __forceinline__ void Store(const GroupedGemmArgs& args, const OutputTile& tile,
                                      Values&& values) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  const int barrier = 1 + tile.consumer;
  // What was staged before has been read out.
  hopyard::sm90::NamedBarrier(barrier, 128);
#pragma unroll
  for (int j = 0; j < kTokens / 8; j += 2) {
    uint32_t words[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float2 pair = values(j + m / 2, m % 2);
      words[m] = PackBf16(pair.x, pair.y);
    }
    // Matrix m: tokens 8 * (j + m / 2) .., features 16 * warp + 8 * (m % 2) ..
    const int matrix = lane / 8;
    const int n = 8 * (j + matrix / 2) + lane % 8;
    const int r = 16 * warp + 8 * (matrix % 2);
    StoreTransposed(tile.staging + StagedAt(n, r), words);
  }
  hopyard::sm90::NamedBarrier(barrier, 128);
  if (args.activation_out != nullptr) {
    StoreNatural({args.activation_out, args.features, args.features}, tile);
  }
  auto* const out = static_cast<uint16_t*>(args.out);
  if (args.out_format.order == KOrder::kNatural) {
    StoreNatural({out, args.out_pitch, args.features}, tile);
  } else {
    StoreOrdered({out, args.out_pitch, (args.features + kKGroup - 1) / kKGroup * kKGroup}, tile);
  }
}

// --- a consumer's two tiles ----------------------------------------------------------------------

template <class Row>
__device__ __forceinline__ void StoreGated(const GroupedGemmArgs& args, const OutputTile& tile,
                                           float (&gate)[kSums<Row>], float (&up)[kSums<Row>]) {
  constexpr int kTokens = Row::kConfig.tokens;
  const TileTerms gate_terms = TermsOf<Row>(args, tile, 0);
  const TileTerms up_terms = TermsOf<Row>(args, tile, 1);
  WithGatedFormula(args, tile.expert, [&](auto&& formula) {
    Store<kTokens>(args, tile, [&](int j, int h) {
      const int at = 4 * j + 2 * h;
      const float2 tokens = TokenFactors(tile, j);
      const float2 g =
          WithDelta(args, tile, 1, j, h, gate_terms.Of(h, gate[at], gate[at + 1], tokens));
      const float2 u = WithDelta(args, tile, 0, j, h, up_terms.Of(h, up[at], up[at + 1], tokens));
      return float2{formula(g.x, u.x), formula(g.y, u.y)};
    });
  });
}

template <class Row>
__device__ __forceinline__ void StorePlain(const GroupedGemmArgs& args, const OutputTile& tile,
                                           int half, float (&sums)[kSums<Row>]) {
  constexpr int kTokens = Row::kConfig.tokens;
  const TileTerms terms = TermsOf<Row>(args, tile, half);
  const auto value = [&](int j, int h) {
    const int at = 4 * j + 2 * h;
    return WithDelta(args, tile, 0, j, h,
                     terms.Of(h, sums[at], sums[at + 1], TokenFactors(tile, j)));
  };
  if (args.activation == ActivationKind::kIdentity) {
    return Store<kTokens>(args, tile, value);
  }
  Store<kTokens>(args, tile, [&](int j, int h) {
    const float2 x = value(j, h);
    return float2{activation::Plain(args.activation, DeviceFloat{x.x}).v,
                  activation::Plain(args.activation, DeviceFloat{x.y}).v};
  });
}

template <class Row>
__device__ void StoreTile(const GroupedGemmArgs& args, OutputTile tile,
                          float (&acc)[2][kSums<Row>]) {
  StageFactors<Row::kConfig.tokens>(args, tile);
  if constexpr (Row::kConfig.gated) {
    StoreGated<Row>(args, tile, acc[0], acc[1]);
  } else {
    StorePlain<Row>(args, tile, 0, acc[0]);
    tile.feature_begin += kTileRows;
    StorePlain<Row>(args, tile, 1, acc[1]);
  }
}

}  // namespace hopyard::gemm::sm90
