// SPDX-License-Identifier: Apache-2.0
// From accumulators (features x tokens, see device/sm90/wgmma.cuh) to rows in memory: scales, bias,
// LoRA delta, activation, transposition through shared memory, wide stores of valid rows and
// features only.
#pragma once

#include <cstdint>

#include "device/sm90/mbarrier.cuh"
#include "device/sm90/numbers.cuh"
#include "gemm/sm90/device_float.cuh"
#include "gemm/sm90/epilogue_rounded.cuh"
#include "gemm/sm90/mainloop.cuh"
#include "gemm/sm90/output.cuh"
#include "gemm/sm90/pipeline.cuh"
#include "gemm/sm90/weight_scales.cuh"

namespace hopyard::gemm::sm90 {

// ---- sums -> true values

// The factor of a tile's token `n` and slot: everything that scales a whole row.
template <class Row>
__device__ __forceinline__ float TokenFactor(const GroupedGemmArgs& args,
                                             const OutputTile<Row>& tile, int n) {
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

// Row of the LoRA delta of the tile's token `n`, or -1 where it has none.
template <class Row>
__device__ __forceinline__ int32_t DeltaRow(const GroupedGemmArgs& args,
                                            const OutputTile<Row>& tile, int n) {
  if (n >= tile.num_rows) {
    return -1;
  }
  const int32_t slot = args.row_to_slot[tile.row_begin + n];
  const int32_t within = slot % args.slots_per_token;
  return within < args.delta_slots ? slot / args.slots_per_token * args.delta_slots + within : -1;
}

__device__ __forceinline__ bool HasFactors(const GroupedGemmArgs& args) {
  return args.x_token_scales != nullptr || args.slot_weights != nullptr;
}

// Ones, once before the first tile: most layers have no factors.
template <class Row>
__device__ __forceinline__ void ClearFactors(const OutputTile<Row>& tile) {
  const auto n = static_cast<uint32_t>(threadIdx.x) % 128;
  if (n < Row::kConfig.tokens) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(tile.factors() + 4U * n), "f"(1.0F) : "memory");
  }
  tile.Barrier();
}

// Puts what belongs to the tile's tokens into shared memory. The warpgroup meets at a barrier
// before it is read.
template <class Row>
__device__ __forceinline__ void StageFactors(const GroupedGemmArgs& args,
                                             const OutputTile<Row>& tile) {
  if (!HasFactors(args) && args.delta == nullptr) {
    return;
  }
  const int n = static_cast<int>(threadIdx.x) % 128;
  // The tile before has been read out.
  tile.Barrier();
  if (n < Row::kConfig.tokens) {
    const float factor = TokenFactor(args, tile, n);
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(tile.factors() + 4U * static_cast<uint32_t>(n)),
                 "f"(factor)
                 : "memory");
    if (args.delta != nullptr) {
      const int32_t row = DeltaRow(args, tile, n);
      asm volatile(
          "st.shared.s32 [%0], %1;" ::"r"(tile.delta_rows() + 4U * static_cast<uint32_t>(n)),
          "r"(row)
          : "memory");
    }
  }
  tile.Barrier();
}

// What scales a weight row, and its bias.
struct RowTerms {
  float factor;
  float bias;
};

template <class Row>
__device__ __forceinline__ RowTerms TermsOf(const GroupedGemmArgs& args,
                                            const OutputTile<Row>& tile, const WeightRow& at) {
  const MatrixArgs& matrix = *at.matrix;
  const ExpertPointers* const pointers = matrix.pointers + tile.expert;
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
    const uint32_t exponent = pointers->row_exponents[at.row];
    terms.factor = __uint_as_float(exponent == 0 ? 0x00400000U : exponent << 23);
  }
  if (args.weights == WeightFormat::kFp8PerChannel) {
    terms.factor = static_cast<const float*>(pointers->scales)[stored * matrix.scale_stride];
  }
  if (matrix.has_global_scale) {
    terms.factor = __fmul_rn(terms.factor, *pointers->global_scale);
  }
  if (args.x_scale != nullptr) {
    terms.factor = __fmul_rn(terms.factor, args.x_scale[tile.expert * args.x_scale_stride]);
  }
  if (matrix.has_bias) {
    terms.bias =
        matrix.bias_dtype == DType::kBf16
            ? hopyard::sm90::WidenBf16(static_cast<const uint16_t*>(pointers->bias)[stored])
            : static_cast<const float*>(pointers->bias)[stored];
  }
  // Kept as they are: what they came from needs more registers.
  asm volatile("" : "+f"(terms.factor), "+f"(terms.bias));
  return terms;
}

// First row of this thread in a tile; the other one is 8 further.
template <class Row>
__device__ __forceinline__ int64_t ThreadFeature(const OutputTile<Row>& tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  return tile.feature_begin + 16 * warp + lane / 4;
}

// The LoRA delta of `part` (0 up or the only one, 1 gate) in row `row` of feature row h.
template <class Row>
__device__ __forceinline__ float DeltaAt(const GroupedGemmArgs& args, const OutputTile<Row>& tile,
                                         int part, int h, int32_t row) {
  const int64_t feature = ThreadFeature(tile) + 8 * h;
  if (row < 0 || feature >= args.features) {
    return 0.0F;
  }
  const int64_t at = Row::kConfig.gated ? int64_t{row} * 2 + part : int64_t{row};
  return hopyard::sm90::WidenBf16(args.delta[at * args.features + feature]);
}

// The scales and biases of a thread's rows in one tile of sums.
struct TileTerms {
  RowTerms row[2];

  // Sums of two neighbouring tokens, with both factors applied.
  __device__ __forceinline__ float2 Of(int h, float first, float second, float2 tokens) const {
    return {__fmaf_rn(__fmul_rn(first, row[h].factor), tokens.x, row[h].bias),
            __fmaf_rn(__fmul_rn(second, row[h].factor), tokens.y, row[h].bias)};
  }
};
template <class Row>
__device__ __forceinline__ TileTerms TermsOf(const GroupedGemmArgs& args,
                                             const OutputTile<Row>& tile, int half) {
  // ThreadRow counts from the consumer's first feature.
  const int64_t first =
      Row::kConfig.gated ? tile.feature_begin : tile.feature_begin - half * kTileRows;
  return {{TermsOf<Row>(args, tile, ThreadRow<Row>(args, first, half, 0)),
           TermsOf<Row>(args, tile, ThreadRow<Row>(args, first, half, 1))}};
}

// Factors of this thread's tokens 8 * j + 2 * (lane % 4) and the next.
template <class Row>
__device__ __forceinline__ float2 TokenFactors(const OutputTile<Row>& tile, int j) {
  return LoadPair(tile.factors() + 8U * (threadIdx.x % 4) + 32U * static_cast<uint32_t>(j));
}

// values + delta of tokens 8 * j + 2 * (lane % 4) and the next, for layers that have one.
template <class Row>
__device__ __forceinline__ float2 WithDelta(const GroupedGemmArgs& args,
                                            const OutputTile<Row>& tile, int part, int j, int h,
                                            float2 values) {
  if (args.delta == nullptr) {
    return values;
  }
  const float2 rows =
      LoadPair(tile.delta_rows() + 8U * (threadIdx.x % 4) + 32U * static_cast<uint32_t>(j));
  return {__fadd_rn(values.x, DeltaAt(args, tile, part, h, __float_as_int(rows.x))),
          __fadd_rn(values.y, DeltaAt(args, tile, part, h, __float_as_int(rows.y)))};
}

// ---- activation

template <ActivationKind kKind>
struct GatedFormula {
  const activation::Parameters& parameters;

  __device__ __forceinline__ float operator()(float gate, float up) const {
    return activation::Gated(kKind, parameters, DeviceFloat{gate}, DeviceFloat{up}).v;
  }
};

__device__ __forceinline__ activation::Parameters ParametersOf(const GroupedGemmArgs& args,
                                                               int expert) {
  activation::Parameters parameters;
  parameters.alpha = args.alpha != nullptr ? args.alpha[expert] : 1.0F;
  parameters.beta = args.beta != nullptr ? args.beta[expert] : 0.0F;
  parameters.limit = args.limit != nullptr ? args.limit[expert] : INFINITY;
  return parameters;
}

// Calls store(formula(gate, up)) with the layer's activation: one copy of what follows per kind,
// for a switch inside would cost registers in all of them.
template <class Store>
__device__ __forceinline__ void WithGatedFormula(const GroupedGemmArgs& args,
                                                 const activation::Parameters& parameters,
                                                 Store&& store) {
  switch (args.activation) {
    case ActivationKind::kSwiGlu:
      return store(SwiGlu(parameters));
    case ActivationKind::kGeGlu:
      return store(GatedFormula<ActivationKind::kGeGlu>{parameters});
    case ActivationKind::kGeGluTanh:
      return store(GatedFormula<ActivationKind::kGeGluTanh>{parameters});
    default:
      return store(GatedFormula<ActivationKind::kSiTu>{parameters});
  }
}

// ---- staging

// Packs and stages tokens 16 * chunk .. + 15 of a warp's 16 features: `values(pair, h)` gives
// tokens 16 * chunk + 8 * pair + 2 * (lane % 4) and the next of feature row h. A pair of
// accumulators is two tokens of one feature: two groups of 8 tokens and both halves of the 16
// features are four matrices [features][tokens], stored as [tokens][features].
template <class Row, class Values>
__device__ __forceinline__ void StageChunk(const OutputTile<Row>& tile, int chunk,
                                           Values&& values) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32;
  uint32_t words[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float2 pair = values(m / 2, m % 2);
    words[m] = PackBf16(pair.x, pair.y);
  }
  // Matrix m: tokens 16 * chunk + 8 * (m / 2) .., features 16 * warp + 8 * (m % 2) ..
  const int matrix = lane / 8;
  const int n = 8 * (matrix / 2) + lane % 8;
  const int r = 16 * warp + 8 * (matrix % 2);
  StoreTransposed(tile.staging() + StagedAt(n, r) + 2048U * static_cast<uint32_t>(chunk), words);
}

// What nearly every layer wants, a few instructions a value: values(at, j, h) takes sums `at` and
// `at` + 1, tokens 8 * j + 2 * (lane % 4) and the next of feature row h.
template <class Row, class Values>
__device__ __forceinline__ void StageDirectly(const OutputTile<Row>& tile, Values&& values) {
  // What was staged before has been read out.
  tile.Barrier();
#pragma unroll
  for (int chunk = 0; chunk < Row::kConfig.tokens / 16; ++chunk) {
    if (16 * chunk >= tile.num_rows) {
      break;
    }
    StageChunk(tile, chunk, [&](int pair, int h) {
      return values(8 * chunk + 4 * pair + 2 * h, 2 * chunk + pair, h);
    });
  }
}

// Sums of 16 tokens: s[4 * (j % 2) + 2 * h + i] is feature row h, token 8 * j + 2 * (lane % 4) + i.
struct SixteenTokens {
  float s[8];
};

// Tokens 16 * chunk .. + 15. Registers have no index at run time: the values are moved.
template <int kCount>
__device__ __forceinline__ SixteenTokens Select(const float (&sums)[kCount], int chunk) {
  SixteenTokens out;
#pragma unroll
  for (int c = 0; c < kCount / 8; ++c) {
    if (c == 0 || chunk == c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out.s[i] = sums[8 * c + i];
      }
    }
  }
  return out;
}

// The same for long formulas: one piece of code for all chunks, which unrolled would be 100 KiB.
// `chunk_values(chunk)` gives a function of (pair, h).
template <class Row, class ChunkValues>
__device__ __forceinline__ void StageInLoop(const OutputTile<Row>& tile,
                                            ChunkValues&& chunk_values) {
  tile.Barrier();
#pragma unroll 1
  for (int chunk = 0; 16 * chunk < tile.num_rows; ++chunk) {
    StageChunk(tile, chunk, chunk_values(chunk));
  }
}

// Writes the staged features to all that ask for them.
template <class Row>
__device__ __forceinline__ void WriteStaged(const GroupedGemmArgs& args, OutputTile<Row> tile) {
  tile.Barrier();
  // Addresses are computed here and not among the sums, which need the registers.
  asm volatile(""
               : "+l"(tile.row_begin), "+l"(tile.feature_begin), "+r"(tile.num_rows),
                 "+r"(tile.base));
  if (args.activation_out != nullptr) {
    StoreNatural({args.activation_out, args.features, args.features}, tile);
  }
  if constexpr (RoundsRows(Row::kConfig)) {
    if (args.out_format.format != Format::kBf16) {
      return StoreRounded<Row>(args, tile);
    }
  }
  auto* const out = static_cast<uint16_t*>(args.out);
  if (args.out_format.order == KOrder::kNatural) {
    StoreNatural({out, args.out_pitch, args.features}, tile);
  } else {
    StoreOrdered({out, args.out_pitch, (args.features + kKGroup - 1) / kKGroup * kKGroup}, tile);
  }
}

// ---- a consumer's two tiles

template <class Row>
__device__ __forceinline__ void StoreGated(const GroupedGemmArgs& args, const OutputTile<Row>& tile,
                                           float (&gate)[kSums<Row>], float (&up)[kSums<Row>]) {
  const TileTerms gate_terms = TermsOf<Row>(args, tile, 0);
  const TileTerms up_terms = TermsOf<Row>(args, tile, 1);
  const activation::Parameters parameters = ParametersOf(args, tile.expert);
  if (args.activation == ActivationKind::kSwiGlu && args.delta == nullptr) {
    const SwiGlu formula(parameters);
    StageDirectly(tile, [&](int at, int j, int h) {
      const float2 tokens = TokenFactors(tile, j);
      const float2 g = gate_terms.Of(h, gate[at], gate[at + 1], tokens);
      const float2 u = up_terms.Of(h, up[at], up[at + 1], tokens);
      return float2{formula(g.x, u.x), formula(g.y, u.y)};
    });
  } else {
    WithGatedFormula(args, parameters, [&](auto&& formula) {
      StageInLoop(tile, [&](int chunk) {
        return [&, chunk, gates = Select(gate, chunk), ups = Select(up, chunk)](int pair, int h) {
          const int at = 4 * pair + 2 * h;
          const int j = 2 * chunk + pair;
          const float2 tokens = TokenFactors(tile, j);
          const float2 g = WithDelta(args, tile, 1, j, h,
                                     gate_terms.Of(h, gates.s[at], gates.s[at + 1], tokens));
          const float2 u =
              WithDelta(args, tile, 0, j, h, up_terms.Of(h, ups.s[at], ups.s[at + 1], tokens));
          return float2{formula(g.x, u.x), formula(g.y, u.y)};
        };
      });
    });
  }
  WriteStaged<Row>(args, tile);
}

template <class Row>
__device__ __forceinline__ void StorePlain(const GroupedGemmArgs& args, const OutputTile<Row>& tile,
                                           int half, float (&sums)[kSums<Row>]) {
  const TileTerms terms = TermsOf<Row>(args, tile, half);
  if (args.activation == ActivationKind::kIdentity && args.delta == nullptr) {
    StageDirectly(tile, [&](int at, int j, int h) {
      return terms.Of(h, sums[at], sums[at + 1], TokenFactors(tile, j));
    });
  } else {
    StageInLoop(tile, [&](int chunk) {
      return [&, chunk, values = Select(sums, chunk)](int pair, int h) {
        const int at = 4 * pair + 2 * h;
        const int j = 2 * chunk + pair;
        const float2 x =
            WithDelta(args, tile, 0, j, h,
                      terms.Of(h, values.s[at], values.s[at + 1], TokenFactors(tile, j)));
        return float2{activation::Plain(args.activation, DeviceFloat{x.x}).v,
                      activation::Plain(args.activation, DeviceFloat{x.y}).v};
      };
    });
  }
  WriteStaged<Row>(args, tile);
}

template <class Row>
__device__ void StoreTile(const GroupedGemmArgs& args, OutputTile<Row> tile,
                          float (&acc)[2][kSums<Row>]) {
  StageFactors<Row>(args, tile);
  if constexpr (Row::kConfig.gated) {
    StoreGated<Row>(args, tile, acc[0], acc[1]);
  } else {
    StorePlain<Row>(args, tile, 0, acc[0]);
    tile.feature_begin += kTileRows;
    StorePlain<Row>(args, tile, 1, acc[1]);
  }
}

}  // namespace hopyard::gemm::sm90
