// SPDX-License-Identifier: Apache-2.0
// From accumulators (features x tokens, see device/sm90/wgmma.cuh) to rows in memory: scales, bias,
// LoRA delta, activation, transposition through shared memory, wide stores of valid rows and
// features only.
#pragma once

#include <cstdint>
#include <type_traits>

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

template <class Row>
__device__ __forceinline__ bool HasFactors(const GroupedGemmArgs& args) {
  return !Row::kPlain && (args.x_token_scales != nullptr || args.slot_weights != nullptr);
}
template <class Row>
__device__ __forceinline__ bool HasDelta(const GroupedGemmArgs& args) {
  return !Row::kPlain && args.delta != nullptr;
}

// Plain kernels would read ones; those with four blocks a multiprocessor do, since ptxas spills a
// word without (mxfp4_fp8_m128n16_s4, CUDA 13.0).
template <class Row>
inline constexpr bool kReadsFactors = !Row::kPlain || Row::kConfig.blocks == 4;

// Ones, once before the first tile: most layers have no factors.
template <class Row>
__device__ __forceinline__ void ClearFactors(const OutputTile<Row>& tile) {
  if constexpr (kReadsFactors<Row>) {
    const auto n = static_cast<uint32_t>(threadIdx.x) % 128;
    if (n < Row::kConfig.tokens) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(tile.factors() + 4U * n), "f"(1.0F) : "memory");
    }
    tile.Barrier();
  }
}

// Puts what belongs to the tile's tokens into shared memory. The warpgroup meets at a barrier
// before it is read.
template <class Row>
__device__ __forceinline__ void StageFactors(const GroupedGemmArgs& args,
                                             const OutputTile<Row>& tile) {
  if (!HasFactors<Row>(args) && !HasDelta<Row>(args)) {
    return;
  }
  const int n = static_cast<int>(hopyard::sm90::ThreadHere()) % 128;
  // The tile before has been read out.
  tile.Barrier();
  if (n < Row::kConfig.tokens) {
    const float factor = TokenFactor(args, tile, n);
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(tile.factors() + 4U * static_cast<uint32_t>(n)),
                 "f"(factor)
                 : "memory");
    if (HasDelta<Row>(args)) {
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
  // Of weights that are not decoded, plain kernels know scales of whole matrices and tensors alone.
  constexpr bool kOfRows = !Row::kPlain || IsDecoded(Row::kConfig.family);
  RowTerms terms{1.0F, 0.0F};
  if (at.row >= matrix.rows) {
    return terms;
  }
  const int64_t stored = kOfRows ? StoredRow<Row>(matrix, at.row) : 0;
  if constexpr (Row::kConfig.family == Family::kNvFp4AsBf16) {
    terms.factor = kNvFp4RowFactor;
  }
  if constexpr (HasRowExponents(Row::kConfig.family)) {
    // 2^(b - 127); 0 is subnormal and 255 NaN, both by the top mantissa bit.
    const uint32_t exponent = pointers->row_exponents[at.row];
    terms.factor =
        __uint_as_float(exponent << 23 | (exponent == 0 || exponent == 255 ? 0x00400000U : 0U));
  }
  if (!Row::kPlain && args.weights == WeightFormat::kFp8PerChannel) {
    terms.factor = static_cast<const float*>(pointers->scales)[stored * matrix.scale_stride];
  }
  if (matrix.has_global_scale) {
    terms.factor = __fmul_rn(terms.factor, *pointers->global_scale);
  }
  if ((!Row::kPlain || PlainKnowsTensorScale(Row::kConfig)) && args.x_scale != nullptr) {
    terms.factor = __fmul_rn(terms.factor, args.x_scale[tile.expert * args.x_scale_stride]);
  }
  if (kOfRows && matrix.has_bias) {
    terms.bias =
        matrix.bias_dtype == DType::kBf16
            ? hopyard::sm90::WidenBf16(static_cast<const uint16_t*>(pointers->bias)[stored])
            : static_cast<const float*>(pointers->bias)[stored];
  }
  // Kept as they are: what they came from needs more registers.
  asm volatile("" : "+f"(terms.factor), "+f"(terms.bias));
  return terms;
}

// The LoRA delta of `part` (0 up or the only one, 1 gate), row `row` of it.
template <class Row>
__device__ __forceinline__ float DeltaAt(const GroupedGemmArgs& args, int part, int64_t feature,
                                         int32_t row) {
  if (row < 0 || feature >= args.features) {
    return 0.0F;
  }
  const int64_t at = Row::kConfig.gated ? int64_t{row} * 2 + part : int64_t{row};
  return hopyard::sm90::WidenBf16(args.delta[at * args.features + feature]);
}

// Where a thread's sums s[4 * j + 2 * h + i] belong: weights as M, to feature row h and token
// 8 * j + 2 * (lane % 4) + i of the tile; tokens as M, to token row h and that feature.

// Weights as M: the scales and biases of a thread's rows in one tile of sums.
template <class Row>
struct FeatureTerms {
  RowTerms row[2];

  __device__ __forceinline__ FeatureTerms(const GroupedGemmArgs& args, const OutputTile<Row>& tile,
                                          int half) {
    // ThreadRow counts from the consumer's first feature.
    const int64_t first =
        Row::kConfig.gated ? tile.feature_begin : tile.feature_begin - half * kTileRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = TermsOf<Row>(args, tile, ThreadRow<Row>(args, first, half, h));
    }
  }
  __device__ __forceinline__ static float2 TokenFactors(const OutputTile<Row>& tile, int j) {
    if constexpr (!kReadsFactors<Row>) {
      return {1.0F, 1.0F};
    } else {
      return LoadPair(tile.factors() + 8U * (threadIdx.x % 4) + 32U * static_cast<uint32_t>(j));
    }
  }
  // Sums i = 0 and 1, with both factors applied; `tokens` = TokenFactors(tile, j).
  __device__ __forceinline__ float2 Of(int h, int /*j*/, float first, float second,
                                       float2 tokens) const {
    return {__fmaf_rn(__fmul_rn(first, row[h].factor), tokens.x, row[h].bias),
            __fmaf_rn(__fmul_rn(second, row[h].factor), tokens.y, row[h].bias)};
  }
  __device__ __forceinline__ static float2 Delta(const GroupedGemmArgs& args,
                                                 const OutputTile<Row>& tile, int part, int j,
                                                 int h) {
    const float2 rows =
        LoadPair(tile.delta_rows() + 8U * (threadIdx.x % 4) + 32U * static_cast<uint32_t>(j));
    const int64_t feature =
        tile.feature_begin + FeatureOfRow(Row::kConfig.interleaved, FirstRowOfThread() + 8 * h);
    return {DeltaAt<Row>(args, part, feature, __float_as_int(rows.x)),
            DeltaAt<Row>(args, part, feature, __float_as_int(rows.y))};
  }
};

// Whether any weight row has a factor or a bias. Kernels with tokens as M read none of the formats
// that always have.
template <class Row>
__device__ __forceinline__ bool HasTerms(const GroupedGemmArgs& args) {
  const bool bias = args.first.has_bias || (Row::kConfig.gated && args.second.has_bias);
  const bool of_rows = !Row::kPlain && (args.weights == WeightFormat::kFp8PerChannel || bias);
  return of_rows || args.first.has_global_scale ||
         (Row::kConfig.gated && args.second.has_global_scale) || args.x_scale != nullptr;
}

// Tokens as M: those of all weight rows lie in shared memory, those of `half` in 128 of them.
template <class Row>
struct TokenTerms {
  uint32_t terms;  // of this thread's first feature; 0: none has a factor or a bias
  float token[2];

  __device__ __forceinline__ TokenTerms(const GroupedGemmArgs& args, const OutputTile<Row>& tile,
                                        int half)
      : terms(HasTerms<Row>(args) ? tile.terms() + 16U * (hopyard::sm90::ThreadHere() % 4) +
                                        static_cast<uint32_t>(half * 2 * kTileRows * 8)
                                  : 0U) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      token[h] = Row::kPlain
                     ? 1.0F
                     : LoadOne(tile.factors() + 4U * static_cast<uint32_t>(TokenOfThread(h)));
    }
  }
  // Token row h in the tile.
  __device__ __forceinline__ static int TokenOfThread(int h) {
    return OutputTile<Row>::consumer() * kTileRows + FirstRowOfThread() + 8 * h;
  }
  __device__ __forceinline__ static float2 TokenFactors(const OutputTile<Row>& /*tile*/,
                                                        int /*j*/) {
    return {};
  }
  __device__ __forceinline__ float2 Of(int h, int j, float first, float second,
                                       float2 /*tokens*/) const {
    float4 both{1.0F, 0.0F, 1.0F, 0.0F};
    if (terms != 0) {
      both = LoadFour(terms + 64U * static_cast<uint32_t>(j));
    }
    return {__fmaf_rn(__fmul_rn(first, both.x), token[h], both.y),
            __fmaf_rn(__fmul_rn(second, both.z), token[h], both.w)};
  }
  __device__ __forceinline__ static float2 Delta(const GroupedGemmArgs& args,
                                                 const OutputTile<Row>& tile, int part, int j,
                                                 int h) {
    const int32_t row =
        __float_as_int(LoadOne(tile.delta_rows() + 4U * static_cast<uint32_t>(TokenOfThread(h))));
    // The tile's features are the consumer's 64; the sums belong to 128.
    const int64_t feature = tile.feature_begin - OutputTile<Row>::consumer() * kTileRows + 8 * j +
                            static_cast<int>(hopyard::sm90::ThreadHere()) % 4 * 2;
    return {DeltaAt<Row>(args, part, feature, row), DeltaAt<Row>(args, part, feature + 1, row)};
  }
};

template <class Row>
using Terms =
    typename std::conditional<Row::kConfig.tokens_are_m, TokenTerms<Row>, FeatureTerms<Row>>::type;

// values + delta, for layers that have one.
template <class Row>
__device__ __forceinline__ float2 WithDelta(const GroupedGemmArgs& args,
                                            const OutputTile<Row>& tile, int part, int j, int h,
                                            float2 values) {
  if (!HasDelta<Row>(args)) {
    return values;
  }
  const float2 delta = Terms<Row>::Delta(args, tile, part, j, h);
  return {__fadd_rn(values.x, delta.x), __fadd_rn(values.y, delta.y)};
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

// Packs and stages 16 sums of a thread's N, s[8 * chunk] .. + 7: `values(pair, h)` gives those of
// j = 2 * chunk + pair. They are four matrices of 8x8: two groups of 8 along N and both halves of
// the 16 rows of a warp along M; staged are [tokens][features].
template <class Row, class Values>
__device__ __forceinline__ void StageChunk(const OutputTile<Row>& tile, int chunk,
                                           Values&& values) {
  const auto thread = static_cast<int>(hopyard::sm90::ThreadHere());
  const int lane = thread % 32;
  const int warp = thread % 128 / 32;
  uint32_t words[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float2 pair = values(m / 2, m % 2);
    words[m] = PackBf16(pair.x, pair.y);
  }
  // Row lane % 8 of matrix lane / 8.
  const int m = 16 * warp + 8 * (lane / 8 % 2);
  const int n = 8 * (lane / 16);
  if constexpr (Row::kConfig.tokens_are_m) {
    const int token = OutputTile<Row>::consumer() * kTileRows + m + lane % 8;
    StoreMatrices(tile.staging(chunk / 4) + StagedAt(token, chunk % 4 * 16 + n), words);
  } else {
    StoreTransposed(
        tile.staging() + StagedAt(n + lane % 8, m) + 2048U * static_cast<uint32_t>(chunk), words);
  }
}

// Chunks that hold tokens of the tile.
template <class Row>
__device__ __forceinline__ int Chunks(const OutputTile<Row>& tile) {
  return Row::kConfig.tokens_are_m ? kSums<Row> / 8 : (tile.num_rows + 15) / 16;
}

// What nearly every layer wants, a few instructions a value: values(at, j, h) takes sums `at` and
// `at` + 1.
template <class Row, class Values>
__device__ __forceinline__ void StageDirectly(const OutputTile<Row>& tile, Values&& values) {
  // What was staged before has been read out.
  tile.Barrier();
#pragma unroll
  for (int chunk = 0; chunk < kSums<Row> / 8; ++chunk) {
    if (chunk >= Chunks(tile)) {
      break;
    }
    StageChunk(tile, chunk, [&](int pair, int h) {
      return values(8 * chunk + 4 * pair + 2 * h, 2 * chunk + pair, h);
    });
  }
}

// The sums of a chunk, s[4 * (j % 2) + 2 * h + i].
struct ChunkSums {
  float s[8];
};

// Registers have no index at run time: the values are moved.
template <int kCount>
__device__ __forceinline__ ChunkSums Select(const float (&sums)[kCount], int chunk) {
  ChunkSums out;
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
  for (int chunk = 0; chunk < Chunks(tile); ++chunk) {
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
                 "+r"(tile.base), "+r"(tile.staged), "+r"(tile.expert));
  if (!Row::kPlain && args.activation_out != nullptr) {
    StoreNatural({args.activation_out, args.features, args.features}, tile);
  }
  if constexpr (RoundsRows(Row::kConfig)) {
    if (args.out_format.format != Format::kBf16) {
      return StoreRounded<Row>(args, tile);
    }
  }
  auto* const out = static_cast<uint16_t*>(args.out);
  if (Row::kConfig.interleaved || !args.out_format.fills_groups()) {
    StoreNatural({out, args.out_pitch, args.features}, tile);
  } else if constexpr (!Row::kConfig.interleaved) {
    StoreOrdered({out, args.out_pitch, (args.features + kKGroup - 1) / kKGroup * kKGroup}, tile);
  }
}

// ---- a consumer's two tiles

struct GateAndUp {
  float2 gate;
  float2 up;
};
// Of the same sums of both tiles. Interleaved: gate and up are alternate rows of each, which lanes
// 4 apart hold; an even row's lane gives the second tile's for the first tile's of its neighbour.
template <class Row>
__device__ __forceinline__ GateAndUp Paired(const GroupedGemmArgs& args, float2 first,
                                            float2 second) {
  if constexpr (!Row::kConfig.interleaved) {
    return {first, second};
  }
  const bool odd = hopyard::sm90::ThreadHere() / 4 % 2 == 1;
  const float2 sent = odd ? first : second;
  const float2 got = {__shfl_xor_sync(hopyard::sm90::kAllLanes, sent.x, 4),
                      __shfl_xor_sync(hopyard::sm90::kAllLanes, sent.y, 4)};
  const float2 even_row = odd ? got : first;
  const float2 odd_row = odd ? second : got;
  return args.first.position_begin == 0 ? GateAndUp{even_row, odd_row}
                                        : GateAndUp{odd_row, even_row};
}

template <class Row>
__device__ __forceinline__ void StoreGated(const GroupedGemmArgs& args, const OutputTile<Row>& tile,
                                           float (&gate)[kSums<Row>], float (&up)[kSums<Row>]) {
  const Terms<Row> gate_terms(args, tile, 0);
  const Terms<Row> up_terms(args, tile, 1);
  const activation::Parameters parameters = ParametersOf(args, tile.expert);
  if (Row::kPlain || (args.activation == ActivationKind::kSwiGlu && args.delta == nullptr)) {
    const SwiGlu formula(parameters);
    StageDirectly(tile, [&](int at, int j, int h) {
      const float2 tokens = Terms<Row>::TokenFactors(tile, j);
      const GateAndUp sums = Paired<Row>(args, {gate[at], gate[at + 1]}, {up[at], up[at + 1]});
      const float2 g = gate_terms.Of(h, j, sums.gate.x, sums.gate.y, tokens);
      const float2 u = up_terms.Of(h, j, sums.up.x, sums.up.y, tokens);
      return float2{formula(g.x, u.x), formula(g.y, u.y)};
    });
  } else if constexpr (!Row::kPlain) {
    WithGatedFormula(args, parameters, [&](auto&& formula) {
      StageInLoop(tile, [&](int chunk) {
        return [&, chunk, gates = Select(gate, chunk), ups = Select(up, chunk)](int pair, int h) {
          const int at = 4 * pair + 2 * h;
          const int j = 2 * chunk + pair;
          const float2 tokens = Terms<Row>::TokenFactors(tile, j);
          const GateAndUp sums =
              Paired<Row>(args, {gates.s[at], gates.s[at + 1]}, {ups.s[at], ups.s[at + 1]});
          const float2 g =
              WithDelta(args, tile, 1, j, h, gate_terms.Of(h, j, sums.gate.x, sums.gate.y, tokens));
          const float2 u =
              WithDelta(args, tile, 0, j, h, up_terms.Of(h, j, sums.up.x, sums.up.y, tokens));
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
  const Terms<Row> terms(args, tile, half);
  if (Row::kPlain || (args.activation == ActivationKind::kIdentity && args.delta == nullptr)) {
    StageDirectly(tile, [&](int at, int j, int h) {
      return terms.Of(h, j, sums[at], sums[at + 1], Terms<Row>::TokenFactors(tile, j));
    });
  } else if constexpr (!Row::kPlain) {
    StageInLoop(tile, [&](int chunk) {
      return [&, chunk, values = Select(sums, chunk)](int pair, int h) {
        const int at = 4 * pair + 2 * h;
        const int j = 2 * chunk + pair;
        const float2 x = WithDelta(
            args, tile, 0, j, h,
            terms.Of(h, j, values.s[at], values.s[at + 1], Terms<Row>::TokenFactors(tile, j)));
        return float2{activation::Plain(args.activation, DeviceFloat{x.x}).v,
                      activation::Plain(args.activation, DeviceFloat{x.y}).v};
      };
    });
  }
  WriteStaged<Row>(args, tile);
}

// Tokens as M: fills the table of the block's weight rows, one a thread.
template <class Row>
__device__ __forceinline__ void StageTerms(const GroupedGemmArgs& args,
                                           const OutputTile<Row>& tile) {
  if (!HasTerms<Row>(args)) {
    return;
  }
  const int row = static_cast<int>(hopyard::sm90::ThreadHere()) - 128;
  const MatrixArgs* matrix = &args.first;
  int64_t feature = tile.feature_begin - OutputTile<Row>::consumer() * kTileRows + row;
  if (Row::kConfig.gated && row >= 2 * kTileRows) {
    matrix = &args.second;
    feature -= 2 * kTileRows;
  }
  const RowTerms terms = TermsOf<Row>(args, tile, {matrix, feature});
  // The tile before has been read out.
  tile.Barrier();
  asm volatile(
      "st.shared.v2.f32 [%0], {%1, %2};" ::"r"(tile.terms() + 8U * static_cast<uint32_t>(row)),
      "f"(terms.factor), "f"(terms.bias)
      : "memory");
  tile.Barrier();
}

// tile.feature_begin: the first of this consumer's 64 features, or of the first 64 where it has
// more.
template <class Row>
__device__ void StoreTile(const GroupedGemmArgs& args, OutputTile<Row> tile,
                          float (&acc)[2][kSums<Row>]) {
  StageFactors<Row>(args, tile);
  if constexpr (Row::kConfig.tokens_are_m) {
    StageTerms<Row>(args, tile);
  }
  if constexpr (Row::kConfig.gated) {
    StoreGated<Row>(args, tile, acc[0], acc[1]);
  } else {
    StorePlain<Row>(args, tile, 0, acc[0]);
    tile.feature_begin += Row::kConfig.tokens_are_m ? 2 * kTileRows : kTileRows;
    StorePlain<Row>(args, tile, 1, acc[1]);
  }
}

}  // namespace hopyard::gemm::sm90
