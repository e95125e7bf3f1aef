// SPDX-License-Identifier: Apache-2.0
#include "gemm/cpu/dot.h"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "core/shape.h"
#include "formats/codes.h"
#include "gemm/activation.h"
#include "gemm/cpu/vec_scalar.h"

namespace hopyard::gemm::cpu {
namespace {

std::vector<Isa> Isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= BestIsa()) {
      isas.push_back(isa);
    }
  }
  return isas;
}

float Decode(Code code, const std::vector<uint8_t>& bytes, int64_t k) {
  const auto at = [&](int64_t i) { return bytes[static_cast<size_t>(i)]; };
  switch (code) {
    case Code::kF32:
      return std::bit_cast<float>(
          static_cast<uint32_t>(at(4 * k) | at(4 * k + 1) << 8 | at(4 * k + 2) << 16 |
                                static_cast<uint32_t>(at(4 * k + 3)) << 24));
    case Code::kBf16:
      return formats::DecodeBf16(static_cast<uint16_t>(at(2 * k) | at(2 * k + 1) << 8));
    case Code::kE4m3:
      return formats::DecodeE4m3(at(k));
    case Code::kE2m1:
      return formats::DecodeE2m1(static_cast<uint8_t>((at(k / 2) >> (4 * (k % 2))) & 15));
    case Code::kInt4:
      return formats::DecodeInt4(static_cast<uint8_t>((at(k / 2) >> (4 * (k % 2))) & 15));
  }
  return 0.0F;
}

int64_t CodeBytes(Code code, int64_t k) {
  const int64_t half_bytes[] = {8, 4, 2, 1, 1};
  return CeilDiv(k * half_bytes[static_cast<int>(code)], 2);
}

struct Case {
  Code code;
  int64_t k;
  int rows;
  int tokens;
  int block;   // weights per scale
  int origin;  // of the row within its first block
};

// The definition at the top of dot.h, written out once more.
float Definition(const Case& c, const std::vector<uint8_t>& row, const RowRef& ref,
                 const std::vector<float>& x) {
  float lane[kLanes] = {};
  for (int64_t i = 0; i < c.k; ++i) {
    float w = Decode(c.code, row, i);
    if (c.code != Code::kF32 && c.code != Code::kBf16) {
      w *= ref.scales[(i + c.origin) / c.block];
    }
    lane[i % kLanes] = std::fma(w, x[static_cast<size_t>(i)], lane[i % kLanes]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lane[i] += lane[i + half];
    }
  }
  return lane[0] * ref.scale;
}

class DotTest : public testing::TestWithParam<Case> {};

TEST_P(DotTest, EveryIsaEqualsTheDefinitionBitForBit) {
  const Case c = GetParam();
  std::mt19937 rng(static_cast<unsigned>(c.k * 131 + c.rows * 17 + c.tokens));
  std::normal_distribution<float> normal;
  const int64_t padded = RoundUp(c.k, kLanes);
  std::vector<std::vector<uint8_t>> codes;
  std::vector<std::vector<float>> scales;
  std::vector<RowRef> rows;
  for (int r = 0; r < c.rows; ++r) {
    std::vector<uint8_t> row(static_cast<size_t>(CodeBytes(c.code, c.k)));
    for (int64_t i = 0; i < c.k; ++i) {
      const float v = normal(rng);
      const auto bits = std::bit_cast<uint32_t>(v);
      const auto at = static_cast<size_t>(i);
      if (c.code == Code::kF32) {
        for (size_t b = 0; b < 4; ++b) {
          row[4 * at + b] = static_cast<uint8_t>(bits >> (8 * b));
        }
      } else if (c.code == Code::kBf16) {
        row[2 * at] = static_cast<uint8_t>(bits >> 16);
        row[2 * at + 1] = static_cast<uint8_t>(bits >> 24);
      } else if (c.code == Code::kE4m3) {
        row[at] = formats::EncodeE4m3(100.0F * v);
      } else {
        row[at / 2] = static_cast<uint8_t>(rng());
      }
    }
    codes.push_back(row);
    std::vector<float> blocks;
    for (int64_t b = 0; b < CeilDiv(c.origin + c.k, c.block); ++b) {
      blocks.push_back(std::exp2(normal(rng)));
    }
    scales.push_back(blocks);
  }
  for (int r = 0; r < c.rows; ++r) {
    const auto at = static_cast<size_t>(r);
    rows.push_back({codes[at].data(), scales[at].data(), 1.0F + 0.25F * static_cast<float>(r)});
  }
  std::vector<std::vector<float>> x;
  std::vector<const float*> pointers;
  for (int t = 0; t < c.tokens; ++t) {
    std::vector<float> row(static_cast<size_t>(padded), 0.0F);
    for (int64_t i = 0; i < c.k; ++i) {
      row[static_cast<size_t>(i)] = normal(rng);
    }
    x.push_back(row);
  }
  for (const auto& row : x) {
    pointers.push_back(row.data());
  }
  for (const Isa isa : Isas()) {
    std::vector<float> panel(static_cast<size_t>(kRowGroup * padded), NAN);
    std::vector<float> out(static_cast<size_t>(c.tokens * 5), NAN);
    DotArgs args;
    args.rows = rows.data();
    args.num_rows = c.rows;
    args.x = pointers.data();
    args.num_tokens = c.tokens;
    args.k = c.k;
    args.blocks.shift = std::countr_zero(static_cast<unsigned>(c.block / kLanes));
    args.blocks.first_step = c.origin / kLanes;
    args.out = out.data();
    args.out_stride = 5;
    args.panel = panel.data();
    Kernels(isa).dot[static_cast<int>(c.code)](args);
    for (int t = 0; t < c.tokens; ++t) {
      for (int r = 0; r < c.rows; ++r) {
        const auto at = static_cast<size_t>(r);
        const float want = Definition(c, codes[at], rows[at], x[static_cast<size_t>(t)]);
        EXPECT_EQ(std::bit_cast<uint32_t>(out[static_cast<size_t>(t * 5 + r)]),
                  std::bit_cast<uint32_t>(want))
            << ToString(isa) << " token " << t << " row " << r;
      }
      EXPECT_TRUE(std::isnan(out[static_cast<size_t>(t * 5 + 4)])) << "wrote beyond its rows";
    }
  }
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const Code code : {Code::kF32, Code::kBf16, Code::kE4m3, Code::kE2m1, Code::kInt4}) {
    for (const int64_t k : {2, 16, 40, 64, 96, 192, 704, 1858}) {
      for (const int tokens : {1, 2, 5, 6, 7, 13, 40}) {
        const int block = kLanes << (tokens % 4);  // 16, 32, 64 or 128 weights
        const int origin = kLanes * (static_cast<int>(k / 2 + tokens) % (block / kLanes));
        cases.push_back(
            {code, k, 1 + static_cast<int>(k + tokens) % kRowGroup, tokens, block, origin});
      }
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(AllCodes, DotTest, testing::ValuesIn(Cases()));

TEST(DotTest, EveryE4m3CodeIsDecodedExactly) {
  for (const Isa isa : Isas()) {
    for (int code = 0; code < 256; ++code) {
      const std::vector<uint8_t> row(16, static_cast<uint8_t>(code));
      std::vector<float> x(16, 0.0F);
      x[3] = 1.0F;
      const float* pointer = x.data();
      const float one = 1.0F;
      const RowRef ref{row.data(), &one, 1.0F};
      float out = 0.0F;
      DotArgs args;
      args.rows = &ref;
      args.num_rows = 1;
      args.x = &pointer;
      args.num_tokens = 1;
      args.k = 16;
      args.out = &out;
      args.out_stride = 1;
      Kernels(isa).dot[static_cast<int>(Code::kE4m3)](args);
      const float want = formats::DecodeE4m3(static_cast<uint8_t>(code));
      if (std::isnan(want)) {
        EXPECT_TRUE(std::isnan(out)) << code;
      } else {
        EXPECT_EQ(out, want) << ToString(isa) << " code " << code;
      }
    }
  }
}

TEST(GatherTest, SixteenColumnsBecomeRowsAndNothingElseIsTouched) {
  for (const Isa isa : Isas()) {
    for (const int64_t k : {1, 7, 8, 21, 64}) {
      for (const auto& [step, offset] : {std::pair(1, 0), std::pair(2, 0), std::pair(2, 1)}) {
        // Exactly the columns of one block: a read beyond the matrix is one beyond the vector.
        const int64_t columns = int64_t{kFeatureBlock} * step;
        std::vector<uint16_t> source(static_cast<size_t>(k * columns));
        for (size_t i = 0; i < source.size(); ++i) {
          source[i] = static_cast<uint16_t>(i + 1);
        }
        std::vector<uint16_t> out(static_cast<size_t>(kFeatureBlock * (k + 1)), 0xFFFF);
        GatherArgs args;
        args.source = static_cast<const uint8_t*>(static_cast<const void*>(source.data() + offset));
        args.stride = columns * 2;
        args.step = step;
        args.offset = offset;
        args.k = k;
        args.out = out.data();
        args.pitch = k + 1;
        Kernels(isa).gather(args);
        for (int64_t c = 0; c < kFeatureBlock; ++c) {
          for (int64_t i = 0; i <= k; ++i) {
            const int64_t want = i < k ? i * columns + c * step + offset + 1 : 0xFFFF;
            ASSERT_EQ(out[static_cast<size_t>(c * (k + 1) + i)], want) << c << ' ' << i;
          }
        }
      }
    }
  }
}

// Own formulas in double; the library's come from src/gemm/activation.h.
double Expected(ActivationKind kind, double gate, double up, double alpha, double beta,
                double limit) {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  const auto phi = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  const double g = std::min(gate, limit);
  const double u = std::clamp(up, -limit, limit);
  switch (kind) {
    case ActivationKind::kSwiGlu:
      return (u + beta) * g * sigmoid(alpha * g);
    case ActivationKind::kGeGlu:
      return up * gate * phi(gate);
    case ActivationKind::kGeGluTanh:
      return up * 0.5 * gate *
             (1.0 + std::tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)));
    case ActivationKind::kSiTu:
      return beta * std::tanh(u / beta) * alpha * std::tanh(g / alpha) * sigmoid(g);
    case ActivationKind::kRelu2:
      return gate > 0 ? gate * gate : 0.0;
    case ActivationKind::kSilu:
      return gate * sigmoid(gate);
    case ActivationKind::kGelu:
      return gate * phi(gate);
    case ActivationKind::kIdentity:
      return gate;
  }
  return 0.0;
}

constexpr ActivationKind kKinds[] = {ActivationKind::kSwiGlu,    ActivationKind::kGeGlu,
                                     ActivationKind::kGeGluTanh, ActivationKind::kSiTu,
                                     ActivationKind::kRelu2,     ActivationKind::kSilu,
                                     ActivationKind::kGelu,      ActivationKind::kIdentity};

// One vector of inputs through every instruction set, against the formulas and each other.
void CheckActivation(ActivationKind kind, const float* gate, const float* up, float limit) {
  float first[16];
  for (const Isa isa : Isas()) {
    float out[16];
    Kernels(isa).activate({kind, 1.702F, 1.0F, limit, gate, up, out});
    for (int l = 0; l < 16; ++l) {
      const double want = Expected(kind, gate[l], up[l], 1.702, 1.0, limit);
      ASSERT_NEAR(out[l], want, 1e-6 * std::abs(want) + 2e-7 * std::abs(double{gate[l]} * up[l]))
          << ToString(kind) << " gate " << gate[l] << " up " << up[l];
      first[l] = isa == Isa::kScalar ? out[l] : first[l];
      ASSERT_EQ(std::bit_cast<uint32_t>(out[l]), std::bit_cast<uint32_t>(first[l]));
    }
  }
}

TEST(ActivateTest, EveryKindIsWithinFp32RoundingOnEveryIsaAndBitEqual) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal(0.0F, 4.0F);
  constexpr float kSpreads[] = {1e-3F, 10.0F, 1.0F, 1.0F};
  for (int i = 0; i < 16000; ++i) {
    float gate[16];
    float up[16];
    for (int l = 0; l < 16; ++l) {
      gate[l] = kSpreads[l % 4] * normal(rng);
      up[l] = normal(rng);
    }
    CheckActivation(kKinds[i % 8], gate, up,
                    i % 16 < 8 ? 7.0F : std::numeric_limits<float>::infinity());
  }
}

TEST(ActivateTest, NanStaysNanAndInfinitiesSaturate) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Isa isa : Isas()) {
    for (const auto kind : {ActivationKind::kSwiGlu, ActivationKind::kGeGlu,
                            ActivationKind::kGeGluTanh, ActivationKind::kSiTu}) {
      float gate[16];
      float up[16];
      float out[16];
      for (int l = 0; l < 16; ++l) {
        gate[l] = l % 2 == 0 ? nan : 1.0F;
        up[l] = l % 2 == 0 ? 1.0F : nan;
      }
      Kernels(isa).activate({kind, 1.0F, 1.0F, 7.0F, gate, up, out});
      for (const float value : out) {
        EXPECT_TRUE(std::isnan(value)) << ToString(kind) << ' ' << ToString(isa);
      }
      for (int l = 0; l < 16; ++l) {
        gate[l] = -300.0F;
        up[l] = 1.0F;
      }
      Kernels(isa).activate({kind, 1.0F, 1.0F, 400.0F, gate, up, out});
      EXPECT_NEAR(out[0], 0.0F, 1e-30F) << ToString(kind);
    }
  }
}

}  // namespace
}  // namespace hopyard::gemm::cpu
