// SPDX-License-Identifier: Apache-2.0
// Every instruction set's row operations equal the scalar definition bit for bit; and the checks
// that say so reject kernels with planted faults.
#include "formats/row_kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "formats/scales.h"
#include "tests/rejects.h"

namespace hopyard::formats {
namespace {

// Random rows per kernel; HOPYARD_TEST_SCALE=small takes a tenth.
int Rounds() {
  const char* scale = std::getenv("HOPYARD_TEST_SCALE");
  return scale != nullptr && std::string(scale) == "small" ? 3000 : 30000;
}

// Any NaN equals any NaN: which one a product yields is not part of a format.
bool SameBits(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) ||
         std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
}

constexpr int64_t kGuard = 64;
constexpr uint8_t kGuardByte = 0xA5;

// An output array followed by guard elements that must stay as they were.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n) : n_(n), data_(static_cast<size_t>(n + kGuard)) {
    std::memset(data_.data(), kGuardByte, data_.size() * sizeof(T));
  }
  T* data() { return data_.data(); }
  [[nodiscard]] const T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }
  [[nodiscard]] bool GuardIntact() const {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data_.data() + n_);
    return std::all_of(bytes, bytes + kGuard * static_cast<int64_t>(sizeof(T)),
                       [](uint8_t b) { return b == kGuardByte; });
  }
  [[nodiscard]] int64_t size() const { return n_; }

 private:
  int64_t n_;
  std::vector<T> data_;
};

template <class T>
void ExpectSame(const Guarded<T>& got, const Guarded<T>& wanted, const char* what) {
  ASSERT_TRUE(got.GuardIntact()) << what << " wrote past its end";
  for (int64_t i = 0; i < got.size(); ++i) {
    if constexpr (std::is_same_v<T, float>) {
      ASSERT_TRUE(SameBits(got[i], wanted[i]))
          << what << " [" << i << "] " << got[i] << " wanted " << wanted[i];
    } else {
      ASSERT_EQ(got[i], wanted[i]) << what << " [" << i << "]";
    }
  }
}

// Compares a table of kernels with the scalar one.
class RowKernelChecks {
 public:
  RowKernelChecks(const RowKernels& kernels, int rounds) : vector_(&kernels), rounds_(rounds) {}

  void MaxAbsBits();
  void EveryHalfAndBf16Code();
  void EncodesHalfAndBf16();
  void EveryFp8Code();
  void Fp8TiesAndNeighbours();
  void Fp8Scaled();
  void EncodesBlocks();
  void DecodesBlocks();
  void RoundRowIsEncodeThenDecode();

 private:
  // A row whose elements are of one magnitude, of many, sparse, or hold NaN and infinities.
  std::vector<float> RandomRow(int64_t n) {
    std::vector<float> row(static_cast<size_t>(n));
    const int kind = static_cast<int>(random_() % 8);
    const int exponent = static_cast<int>(random_() % 261) - 140;
    for (float& x : row) {
      const auto bits = static_cast<uint32_t>(random_());
      const float mantissa = 1.0F + static_cast<float>(bits & 0x7FFFFFU) * 0x1p-23F;
      const float sign = (bits >> 31) != 0 ? -1.0F : 1.0F;
      const int spread = kind < 4 ? static_cast<int>(random_() % 12) : 0;
      x = sign * static_cast<float>(std::ldexp(mantissa, exponent - spread));
      if (kind == 5) {
        x = std::bit_cast<float>(bits);  // anything, NaN and infinities too
      } else if (kind == 6) {
        x = sign *
            static_cast<float>(std::ldexp(mantissa, static_cast<int>(random_() % 261) - 140));
      } else if (kind == 7 && random_() % 4 != 0) {
        x = sign * 0.0F;
      } else if (kind == 4) {
        // Multiples of a small power of two: ties abound.
        x = sign * static_cast<float>(bits % 64) * static_cast<float>(std::ldexp(1.0, exponent));
      }
    }
    if (random_() % 64 == 0) {
      row[random_() % row.size()] = std::array{
          std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
          -std::numeric_limits<float>::infinity()}[random_() % 3];
    }
    return row;
  }

  // Even; every length up to a few vectors, and longer ones.
  int64_t RandomLength() {
    return 2 * static_cast<int64_t>(1 + random_() % (random_() % 4 == 0 ? 600 : 40));
  }

  float RandomScale() {
    const float mantissa = 1.0F + static_cast<float>(random_() % 0x800000U) * 0x1p-23F;
    return static_cast<float>(std::ldexp(mantissa, static_cast<int>(random_() % 240) - 126));
  }

  std::vector<uint8_t> RandomBytes(int64_t n) {
    std::vector<uint8_t> bytes(static_cast<size_t>(n));
    std::generate(bytes.begin(), bytes.end(), [&] { return static_cast<uint8_t>(random_()); });
    return bytes;
  }

  // Runs `call(kernels, out)` for both tables and compares what they wrote.
  template <class T, class Call>
  void Compare(int64_t n, const char* what, Call call) {
    Guarded<T> wanted(n);
    Guarded<T> got(n);
    call(scalar_, wanted.data());
    call(*vector_, got.data());
    ExpectSame(got, wanted, what);
  }

  const RowKernels& scalar_ = KernelsFor(Isa::kScalar);
  const RowKernels* vector_;
  int rounds_;
  std::mt19937_64 random_{20240607};
};

void RowKernelChecks::MaxAbsBits() {
  for (int round = 0; round < rounds_; ++round) {
    const auto row = RandomRow(RandomLength());
    const auto n = static_cast<int64_t>(row.size());
    ASSERT_EQ(vector_->max_abs_bits(row.data(), n), scalar_.max_abs_bits(row.data(), n));
    ASSERT_EQ(vector_->max_abs_bits(row.data() + 1, n - 1),
              scalar_.max_abs_bits(row.data() + 1, n - 1));
  }
  EXPECT_EQ(vector_->max_abs_bits(nullptr, 0), 0U);
}

void RowKernelChecks::EveryHalfAndBf16Code() {
  std::vector<uint16_t> codes(65536);
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint16_t>(i);
  }
  Compare<float>(65536, "bf16_to_float", [&](const RowKernels& k, float* out) {
    k.bf16_to_float(codes.data(), out, 65536);
  });
  Compare<float>(65536, "fp16_to_float", [&](const RowKernels& k, float* out) {
    k.fp16_to_float(codes.data(), out, 65536);
  });
}

void RowKernelChecks::EncodesHalfAndBf16() {
  for (int round = 0; round < rounds_; ++round) {
    const int64_t n = RandomLength() - round % 2;
    const auto row = RandomRow(n);
    Compare<uint16_t>(n, "float_to_bf16", [&](const RowKernels& k, uint16_t* out) {
      k.float_to_bf16(row.data(), out, n);
    });
    Compare<uint16_t>(n, "float_to_fp16", [&](const RowKernels& k, uint16_t* out) {
      k.float_to_fp16(row.data(), out, n);
    });
    Compare<float>(n, "round_bf16",
                   [&](const RowKernels& k, float* out) { k.round_bf16(row.data(), out, n); });
  }
}

void RowKernelChecks::EveryFp8Code() {
  std::vector<uint8_t> codes(256);
  for (size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<uint8_t>(i);
  }
  for (const float scale : {1.0F, 0x1p-127F, 0x1p100F, 0.3F, std::numeric_limits<float>::min(),
                            std::numeric_limits<float>::quiet_NaN()}) {
    Compare<float>(256, "decode_fp8", [&](const RowKernels& k, float* out) {
      k.decode_fp8(codes.data(), out, 256, scale);
    });
  }
}

// Every e4m3 and e2m1 midpoint and its neighbours, which random values would seldom hit.
void RowKernelChecks::Fp8TiesAndNeighbours() {
  std::vector<float> row;
  for (uint8_t code = 0; code < 0x7E; ++code) {
    const std::array<uint8_t, 2> pair = {code, static_cast<uint8_t>(code + 1)};
    std::array<float, 2> values{};
    scalar_.decode_fp8(pair.data(), values.data(), 2, 1.0F);
    const float middle = (values[0] + values[1]) / 2.0F;
    for (const float x :
         {values[0], middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 500.0F)}) {
      row.push_back(x);
      row.push_back(-x);
    }
  }
  const auto n = static_cast<int64_t>(row.size());
  Compare<uint8_t>(n, "encode_fp8_multiply", [&](const RowKernels& k, uint8_t* out) {
    k.encode_fp8_multiply(row.data(), out, n, 1.0F);
  });
  Compare<float>(n, "round_fp8",
                 [&](const RowKernels& k, float* out) { k.round_fp8(row.data(), out, n, 1.0F); });
}

void RowKernelChecks::Fp8Scaled() {
  for (int round = 0; round < rounds_; ++round) {
    const int64_t n = RandomLength() - round % 2;
    const auto row = RandomRow(n);
    float scale = RandomScale();
    if (round % 2 == 0) {
      const uint32_t bits = scalar_.max_abs_bits(row.data(), n);
      scale = bits < kNonFiniteBits ? Fp8BlockDivisor(bits) : 1.0F;
    }
    Compare<uint8_t>(n, "encode_fp8_divide", [&](const RowKernels& k, uint8_t* out) {
      k.encode_fp8_divide(row.data(), out, n, scale);
    });
    Compare<uint8_t>(n, "encode_fp8_multiply", [&](const RowKernels& k, uint8_t* out) {
      k.encode_fp8_multiply(row.data(), out, n, 1.0F / scale);
    });
    Compare<float>(n, "round_fp8", [&](const RowKernels& k, float* out) {
      k.round_fp8(row.data(), out, n, scale);
    });
  }
}

void RowKernelChecks::EncodesBlocks() {
  for (int round = 0; round < rounds_; ++round) {
    const int64_t n = RandomLength();
    const auto row = RandomRow(n);
    const float g =
        round % 3 == 0 ? RandomScale() : NvFp4Multiplier(scalar_.max_abs_bits(row.data(), n));
    std::vector<uint8_t> sink(static_cast<size_t>(n));
    std::vector<uint16_t> wide_sink(static_cast<size_t>(n));
    Compare<uint8_t>(n - round % 2, "mxfp8 codes", [&](const RowKernels& k, uint8_t* out) {
      k.encode_mxfp8(row.data(), out, sink.data(), n - round % 2);
    });
    Compare<uint8_t>(n / 2, "mxfp4 codes", [&](const RowKernels& k, uint8_t* out) {
      k.encode_mxfp4(row.data(), out, sink.data(), n);
    });
    Compare<uint8_t>(n / 2, "nvfp4 codes", [&](const RowKernels& k, uint8_t* out) {
      k.encode_nvfp4(row.data(), out, sink.data(), n, g);
    });
    Compare<uint8_t>(n / 2, "mxint4 codes", [&](const RowKernels& k, uint8_t* out) {
      k.encode_mxint4(row.data(), out, wide_sink.data(), n);
    });
    const int64_t blocks = (n + 31) / 32;
    Compare<uint8_t>(blocks, "mxfp8 scales", [&](const RowKernels& k, uint8_t* out) {
      k.encode_mxfp8(row.data(), sink.data(), out, n);
    });
    Compare<uint8_t>(blocks, "mxfp4 scales", [&](const RowKernels& k, uint8_t* out) {
      k.encode_mxfp4(row.data(), sink.data(), out, n);
    });
    Compare<uint8_t>((n + 15) / 16, "nvfp4 scales", [&](const RowKernels& k, uint8_t* out) {
      k.encode_nvfp4(row.data(), sink.data(), out, n, g);
    });
    Compare<uint16_t>(blocks, "mxint4 scales", [&](const RowKernels& k, uint16_t* out) {
      k.encode_mxint4(row.data(), sink.data(), out, n);
    });
  }
}

void RowKernelChecks::DecodesBlocks() {
  for (int round = 0; round < rounds_; ++round) {
    const int64_t n = RandomLength();
    const auto codes = RandomBytes(n);
    const auto scales = RandomBytes(2 * n);
    std::vector<uint16_t> bf16_scales(static_cast<size_t>(n));
    std::memcpy(bf16_scales.data(), scales.data(), scales.size());
    const float global = RandomScale();
    Compare<float>(n, "decode_mxfp8", [&](const RowKernels& k, float* out) {
      k.decode_mxfp8(codes.data(), scales.data(), out, n);
    });
    Compare<float>(n, "decode_mxfp4", [&](const RowKernels& k, float* out) {
      k.decode_mxfp4(codes.data(), scales.data(), out, n);
    });
    Compare<float>(n, "decode_nvfp4", [&](const RowKernels& k, float* out) {
      k.decode_nvfp4(codes.data(), scales.data(), out, n, global);
    });
    Compare<float>(n, "decode_mxint4", [&](const RowKernels& k, float* out) {
      k.decode_mxint4(codes.data(), bf16_scales.data(), out, n);
    });
  }
}

void RowKernelChecks::RoundRowIsEncodeThenDecode() {
  for (int round = 0; round < rounds_; ++round) {
    const int64_t n = RandomLength() - round % 2;
    const auto row = RandomRow(n);
    const float scale = round % 3 == 0 ? 0.0F : RandomScale();
    for (const Format format : {Format::kBf16, Format::kFp8PerTensor, Format::kFp8PerRow,
                                Format::kFp8Block1x128, Format::kMxFp8, Format::kNvFp4}) {
      const float s = format == Format::kFp8PerTensor && scale == 0.0F ? 0.5F : scale;
      Compare<float>(n, ToString(format).data(), [&](const RowKernels& k, float* out) {
        RoundRowWith(k, format, row.data(), out, n, s);
      });
      // In place gives the same.
      Compare<float>(n, ToString(format).data(), [&](const RowKernels& k, float* out) {
        std::copy(row.begin(), row.end(), out);
        RoundRowWith(k, format, out, out, n, s);
      });
    }
    // The definition itself: what is stored, decoded.
    const int64_t even = n - n % 2;
    std::vector<uint8_t> codes(static_cast<size_t>(n));
    std::vector<uint8_t> scales(static_cast<size_t>(n));
    const float g = scale > 0.0F ? NvFp4MultiplierOf(scale)
                                 : NvFp4Multiplier(scalar_.max_abs_bits(row.data(), even));
    const float global = scale > 0.0F ? scale : 1.0F / g;
    Guarded<float> decoded(even);
    Guarded<float> rounded(even);
    scalar_.encode_nvfp4(row.data(), codes.data(), scales.data(), even, g);
    scalar_.decode_nvfp4(codes.data(), scales.data(), decoded.data(), even, global);
    RoundRowWith(*vector_, Format::kNvFp4, row.data(), rounded.data(), even, scale);
    ExpectSame(rounded, decoded, "nvfp4 stored and decoded");
    scalar_.encode_mxfp8(row.data(), codes.data(), scales.data(), even);
    scalar_.decode_mxfp8(codes.data(), scales.data(), decoded.data(), even);
    RoundRowWith(*vector_, Format::kMxFp8, row.data(), rounded.data(), even, scale);
    ExpectSame(rounded, decoded, "mxfp8 stored and decoded");
  }
}

using Check = void (RowKernelChecks::*)();

struct NamedCheck {
  const char* name;
  Check check;
};

constexpr NamedCheck kChecks[] = {
    {"MaxAbsBits", &RowKernelChecks::MaxAbsBits},
    {"EveryHalfAndBf16Code", &RowKernelChecks::EveryHalfAndBf16Code},
    {"EncodesHalfAndBf16", &RowKernelChecks::EncodesHalfAndBf16},
    {"EveryFp8Code", &RowKernelChecks::EveryFp8Code},
    {"Fp8TiesAndNeighbours", &RowKernelChecks::Fp8TiesAndNeighbours},
    {"Fp8Scaled", &RowKernelChecks::Fp8Scaled},
    {"EncodesBlocks", &RowKernelChecks::EncodesBlocks},
    {"DecodesBlocks", &RowKernelChecks::DecodesBlocks},
    {"RoundRowIsEncodeThenDecode", &RowKernelChecks::RoundRowIsEncodeThenDecode},
};

class RowKernelsTest : public testing::TestWithParam<std::tuple<Isa, NamedCheck>> {};

TEST_P(RowKernelsTest, EqualsTheScalarDefinition) {
  const auto& [isa, named] = GetParam();
  if (isa > BestIsa()) {
    GTEST_SKIP() << "this machine runs at most " << ToString(BestIsa());
  }
  RowKernelChecks checks(KernelsFor(isa), Rounds());
  (checks.*named.check)();
}

std::string CheckName(const testing::TestParamInfo<RowKernelsTest::ParamType>& info) {
  return std::string(ToString(std::get<Isa>(info.param))) + "_" +
         std::get<NamedCheck>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(Isas, RowKernelsTest,
                         testing::Combine(testing::Values(Isa::kAvx2, Isa::kAvx512),
                                          testing::ValuesIn(kChecks)),
                         CheckName);

// ---- The test of the test ----------------------------------------------------------------------

const RowKernels& Right() {
  return KernelsFor(Isa::kScalar);
}

std::vector<float> AwayFromZero(const float* in, int64_t n) {
  std::vector<float> out(in, in + n);
  for (float& x : out) {
    x = x == 0.0F || !std::isfinite(x) ? x : std::nextafter(x, x > 0.0F ? HUGE_VALF : -HUGE_VALF);
  }
  return out;
}

std::vector<uint8_t> FromTheNextBlock(const uint8_t* scales, int64_t blocks) {
  std::vector<uint8_t> moved(scales, scales + blocks);
  std::rotate(moved.begin(), moved.begin() + (blocks > 1 ? 1 : 0), moved.end());
  return moved;
}

struct Fault {
  const char* name;
  Check finder;
  void (*plant)(RowKernels*);
};

const Fault kFaults[] = {
    {"AFlippedMxFp4CodeBit", &RowKernelChecks::EncodesBlocks,
     [](RowKernels* k) {
       k->encode_mxfp4 = [](const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
         Right().encode_mxfp4(in, codes, scales, n);
         codes[n / 4] ^= 0x10;
       };
     }},
    {"AFlippedMxInt4CodeBitInTheLastByte", &RowKernelChecks::EncodesBlocks,
     [](RowKernels* k) {
       k->encode_mxint4 = [](const float* in, uint8_t* codes, uint16_t* scales, int64_t n) {
         Right().encode_mxint4(in, codes, scales, n);
         codes[n / 2 - 1] ^= 0x01;
       };
     }},
    {"TheMxFp8ScaleOfTheNextBlock", &RowKernelChecks::EncodesBlocks,
     [](RowKernels* k) {
       k->encode_mxfp8 = [](const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
         Right().encode_mxfp8(in, codes, scales, n);
         std::ranges::copy(FromTheNextBlock(scales, (n + 31) / 32), scales);
       };
     }},
    {"NvFp4DecodedByTheNextBlocksScale", &RowKernelChecks::DecodesBlocks,
     [](RowKernels* k) {
       k->decode_nvfp4 = [](const uint8_t* codes, const uint8_t* scales, float* out, int64_t n,
                            float global) {
         const auto moved = FromTheNextBlock(scales, (n + 15) / 16);
         Right().decode_nvfp4(codes, moved.data(), out, n, global);
       };
     }},
    {"NvFp4WithoutItsGlobalScale", &RowKernelChecks::DecodesBlocks,
     [](RowKernels* k) {
       k->decode_nvfp4 = [](const uint8_t* codes, const uint8_t* scales, float* out, int64_t n,
                            float) { Right().decode_nvfp4(codes, scales, out, n, 1.0F); };
     }},
    {"SwappedMxFp4Nibbles", &RowKernelChecks::DecodesBlocks,
     [](RowKernels* k) {
       k->decode_mxfp4 = [](const uint8_t* codes, const uint8_t* scales, float* out, int64_t n) {
         Right().decode_mxfp4(codes, scales, out, n);
         std::swap(out[0], out[1]);
       };
     }},
    {"Fp8TiesAwayFromZero", &RowKernelChecks::Fp8TiesAndNeighbours,
     [](RowKernels* k) {
       k->encode_fp8_multiply = [](const float* in, uint8_t* codes, int64_t n, float multiplier) {
         Right().encode_fp8_multiply(AwayFromZero(in, n).data(), codes, n, multiplier);
       };
     }},
    {"Fp4TiesAwayFromZero", &RowKernelChecks::EncodesBlocks,
     [](RowKernels* k) {
       k->encode_mxfp4 = [](const float* in, uint8_t* codes, uint8_t* scales, int64_t n) {
         std::vector<uint8_t> unused(static_cast<size_t>(n));
         Right().encode_mxfp4(AwayFromZero(in, n).data(), codes, unused.data(), n);
         Right().encode_mxfp4(in, unused.data(), scales, n);
       };
     }},
    {"Bf16Truncated", &RowKernelChecks::EncodesHalfAndBf16,
     [](RowKernels* k) {
       k->float_to_bf16 = [](const float* in, uint16_t* out, int64_t n) {
         for (int64_t i = 0; i < n; ++i) {
           out[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(in[i]) >> 16);
         }
       };
     }},
    {"OneWriteTooMany", &RowKernelChecks::Fp8Scaled,
     [](RowKernels* k) {
       k->encode_fp8_divide = [](const float* in, uint8_t* codes, int64_t n, float divisor) {
         Right().encode_fp8_divide(in, codes, n, divisor);
         codes[n] = 0;
       };
     }},
    {"TheLastElementForgotten", &RowKernelChecks::MaxAbsBits,
     [](RowKernels* k) {
       k->max_abs_bits = [](const float* in, int64_t n) {
         return Right().max_abs_bits(in, n > 0 ? n - 1 : 0);
       };
     }},
    {"OneCodeDecodedWrongly", &RowKernelChecks::EveryFp8Code,
     [](RowKernels* k) {
       k->decode_fp8 = [](const uint8_t* codes, float* out, int64_t n, float scale) {
         Right().decode_fp8(codes, out, n, scale);
         for (int64_t i = 0; i < n; ++i) {
           out[i] = codes[i] == 0x81 ? -out[i] : out[i];
         }
       };
     }},
    {"RoundingThatSkipsARow", &RowKernelChecks::RoundRowIsEncodeThenDecode,
     [](RowKernels* k) {
       k->round_nvfp4 = [](const float* in, float* out, int64_t n, float, float) {
         std::copy(in, in + n, out);
       };
     }},
};

TEST(RowKernelChecks, AcceptTheRightKernelsAndRejectEveryFault) {
  constexpr int kRounds = 60;
  for (const Fault& fault : kFaults) {
    const auto rejects = [&](const RowKernels& kernels) {
      return hopyard::test::Rejects([&] {
        RowKernelChecks checks(kernels, kRounds);
        (checks.*fault.finder)();
      });
    };
    RowKernels kernels = Right();
    EXPECT_FALSE(rejects(kernels)) << fault.name;
    fault.plant(&kernels);
    EXPECT_TRUE(rejects(kernels)) << fault.name;
  }
}

}  // namespace
}  // namespace hopyard::formats
