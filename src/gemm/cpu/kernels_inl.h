// SPDX-License-Identifier: Apache-2.0
// The micro-kernels, written once against a vector type V (vec_*.h); each instruction set's
// translation unit instantiates them for its own V, so no code leaks between the sets.
#pragma once

#include "gemm/activation.h"
#include "gemm/cpu/dot.h"

namespace hopyard::gemm::cpu {

template <class V, Code kCode>
inline V LoadStep(const char* codes) {
  if constexpr (kCode == Code::kF32) {
    return V::Load(static_cast<const float*>(static_cast<const void*>(codes)));
  } else if constexpr (kCode == Code::kBf16) {
    return V::LoadBf16(codes);
  } else if constexpr (kCode == Code::kE4m3) {
    return V::LoadE4m3(codes);
  } else if constexpr (kCode == Code::kE2m1) {
    return V::LoadE2m1(codes);
  } else {
    return V::LoadInt4(codes);
  }
}

// Bytes of 16 codes.
template <Code kCode>
inline constexpr int kStepBytes = kCode == Code::kF32    ? 64
                                  : kCode == Code::kBf16 ? 32
                                  : kCode == Code::kE4m3 ? 16
                                                         : 8;

// The last, partial step of a row: its codes copied behind zeros so that nothing outside is read.
// Like everything here that may not be inlined it names V: no instruction set lends its code to
// another.
template <class V, Code kCode>
struct TailStep {
  alignas(64) char codes[kStepBytes<kCode>];

  TailStep(const char* row, int64_t k) {
    const int64_t full = k / kLanes;
    const int64_t bytes =
        ((k % kLanes) * kStepBytes<kCode> + kLanes - 1) / kLanes;  // 4-bit codes: k is even
    for (int i = 0; i < kStepBytes<kCode>; ++i) {
      codes[i] = i < bytes ? row[full * kStepBytes<kCode> + i] : '\0';
    }
  }
};

template <class V, Code kCode, int kR, int kC>
struct Tile {
  V acc[kR][kC];

  Tile() {
    for (int r = 0; r < kR; ++r) {
      for (int c = 0; c < kC; ++c) {
        acc[r][c] = V::Zero();
      }
    }
  }

  // One step of 16: `codes[r]` points at the row's codes of the step, `block` names its scale.
  inline void Step(const char* const* codes, const float* const* scales, int64_t block,
                   const float* const* x, int64_t step) {
    V w[kR];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      w[r] = LoadStep<V, kCode>(codes[r]);
      if constexpr (HasBlockScales(kCode)) {
        w[r] = w[r] * V::Set(scales[r][block]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kC; ++c) {
      const V xv = V::Load(x[c] + step * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        acc[r][c] = V::Fma(w[r], xv, acc[r][c]);
      }
    }
  }
};

// Adds the partial step at the end of each row, one row at a time.
template <class V, Code kCode, int kR, int kC>
void AddTail(const RowRef* rows, const float* const* x, const DotArgs& args,
             Tile<V, kCode, kR, kC>& tile) {
  const int64_t step = args.k / kLanes;
  for (int r = 0; r < kR; ++r) {
    const TailStep<V, kCode> tail(static_cast<const char*>(rows[r].codes), args.k);
    const char* codes = tail.codes;
    Tile<V, kCode, 1, kC> one;
    for (int c = 0; c < kC; ++c) {
      one.acc[0][c] = tile.acc[r][c];
    }
    one.Step(&codes, &rows[r].scales, args.blocks.At(step), x, step);
    for (int c = 0; c < kC; ++c) {
      tile.acc[r][c] = one.acc[0][c];
    }
  }
}

// Once per cache line of each row; FP32 panels are in the cache already. Always inlined: g++ 12
// takes a function that only prefetches for one without effect and deletes the call.
template <class V, Code kCode, int kR>
[[gnu::always_inline]] inline void Prefetch(const char* const* codes, int64_t step,
                                            int64_t bytes_ahead) {
  if (kCode != Code::kF32 && (step & (64 / kStepBytes<kCode> - 1)) == 0) {
    for (int r = 0; r < kR; ++r) {
      __builtin_prefetch(codes[r] + bytes_ahead);
    }
  }
}

template <class V, Code kCode, int kR, int kC>
void DotTile(const RowRef* rows, const float* const* x, const DotArgs& args, float* out) {
  Tile<V, kCode, kR, kC> tile;
  const char* codes[kR];
  const float* scales[kR];
  for (int r = 0; r < kR; ++r) {
    codes[r] = static_cast<const char*>(rows[r].codes);
    scales[r] = rows[r].scales;
  }
  const ScaleBlocks blocks = args.blocks;
  const int64_t full = args.k / kLanes;
  for (int64_t step = 0; step < full; ++step) {
    Prefetch<V, kCode, kR>(codes, step, args.prefetch_bytes);
    tile.Step(codes, scales, blocks.At(step), x, step);
    for (int r = 0; r < kR; ++r) {
      codes[r] += kStepBytes<kCode>;
    }
  }
  if (args.k % kLanes != 0) {
    AddTail(rows, x, args, tile);
  }
  for (int r = 0; r < kR; ++r) {
    for (int c = 0; c < kC; ++c) {
      out[c * args.out_stride + r] = tile.acc[r][c].Sum() * rows[r].scale;
    }
  }
}

// Token tiles of kC, then one tile of what is left.
template <class V, Code kCode, int kR, int kC>
void DotTokens(const RowRef* rows, const float* const* x, int num_tokens, const DotArgs& args,
               float* out) {
  int t = 0;
  for (; t + kC <= num_tokens; t += kC) {
    DotTile<V, kCode, kR, kC>(rows, x + t, args, out + t * args.out_stride);
  }
  if constexpr (kC > 1) {
    if (t < num_tokens) {
      DotTokens<V, kCode, kR, kC - 1>(rows, x + t, num_tokens - t, args, out + t * args.out_stride);
    }
  }
}

// Decodes a row group into FP32, zero beyond k: many tokens then share one decoding.
template <class V, Code kCode>
void DecodePanel(const DotArgs& args, int64_t padded, RowRef* decoded) {
  const int64_t full = args.k / kLanes;
  for (int r = 0; r < args.num_rows; ++r) {
    const RowRef& row = args.rows[r];
    const auto* codes = static_cast<const char*>(row.codes);
    float* out = args.panel + r * padded;
    const auto store = [&](const char* step_codes, int64_t step) {
      V w = LoadStep<V, kCode>(step_codes);
      if constexpr (HasBlockScales(kCode)) {
        w = w * V::Set(row.scales[args.blocks.At(step)]);
      }
      w.Store(out + step * kLanes);
    };
    for (int64_t step = 0; step < full; ++step) {
      const char* at = codes + step * kStepBytes<kCode>;
      Prefetch<V, kCode, 1>(&at, step, args.prefetch_bytes);
      store(at, step);
    }
    if (args.k % kLanes != 0) {
      const TailStep<V, kCode> tail(codes, args.k);
      store(tail.codes, full);
    }
    decoded[r] = RowRef{out, nullptr, row.scale};
  }
}

template <class V, Code kCode, int kR>
void DotRows(const RowRef* rows, const DotArgs& args, float* out) {
  DotTokens<V, kCode, kR, V::kTokens>(rows, args.x, args.num_tokens, args, out);
}

template <class V, Code kCode>
void DotAll(const RowRef* rows, int num_rows, const DotArgs& args) {
  int r = 0;
  for (; r + V::kRows <= num_rows; r += V::kRows) {
    DotRows<V, kCode, V::kRows>(rows + r, args, args.out + r);
  }
  for (; r < num_rows; ++r) {
    DotRows<V, kCode, 1>(rows + r, args, args.out + r);
  }
}

template <class V, Code kCode>
void Dot(const DotArgs& args) {
  if constexpr (kCode != Code::kF32) {
    // Beyond two register tiles of tokens, decoding once and reading FP32 is cheaper.
    if (args.num_tokens > 2 * V::kTokens) {
      RowRef decoded[kRowGroup];
      DotArgs padded = args;
      padded.k = (args.k + kLanes - 1) / kLanes * kLanes;
      DecodePanel<V, kCode>(args, padded.k, decoded);
      DotAll<V, Code::kF32>(decoded, args.num_rows, padded);
      return;
    }
  }
  DotAll<V, kCode>(args.rows, args.num_rows, args);
}

template <class V>
void Activate(const ActivateArgs& args) {
  const V x = V::Load(args.gate);
  if (IsGated(args.kind)) {
    activation::Gated(args.kind, {args.alpha, args.beta, args.limit}, x, V::Load(args.up))
        .Store(args.out);
  } else {
    activation::Plain(args.kind, x).Store(args.out);
  }
}

// Whole blocks of 8 k by the vector, the rest one by one.
template <class V>
void Gather(const GatherArgs& args) {
  int64_t k = 0;
  if constexpr (V::kGathers) {
    for (; k + 8 <= args.k; k += 8) {
      V::Gather8(args.source + k * args.stride, args, args.out + k);
    }
  }
  for (; k < args.k; ++k) {
    for (int64_t c = 0; c < kFeatureBlock; ++c) {
      __builtin_memcpy(args.out + c * args.pitch + k,
                       args.source + k * args.stride + c * args.step * int64_t{sizeof(uint16_t)},
                       sizeof(uint16_t));
    }
  }
}

template <class V>
constexpr KernelTable MakeTable() {
  return {{&Dot<V, Code::kF32>, &Dot<V, Code::kBf16>, &Dot<V, Code::kE4m3>, &Dot<V, Code::kE2m1>,
           &Dot<V, Code::kInt4>},
          &Activate<V>,
          &Gather<V>};
}

}  // namespace hopyard::gemm::cpu
