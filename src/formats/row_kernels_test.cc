// SPDX-License-Identifier: Apache-2.0
// Every instruction set's row operations equal the scalar definition bit for bit.
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
#include <vector>

#include <gtest/gtest.h>

#include "formats/scales.h"

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

class RowKernelsTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (GetParam() > BestIsa()) {
      GTEST_SKIP() << "this machine runs at most " << ToString(BestIsa());
    }
    vector_ = &KernelsFor(GetParam());
  }

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
  const RowKernels* vector_ = nullptr;
  std::mt19937_64 random_{20240607};
};

TEST_P(RowKernelsTest, MaxAbsBits) {
  for (int round = 0; round < Rounds(); ++round) {
    const auto row = RandomRow(RandomLength());
    const auto n = static_cast<int64_t>(row.size());
    ASSERT_EQ(vector_->max_abs_bits(row.data(), n), scalar_.max_abs_bits(row.data(), n));
    ASSERT_EQ(vector_->max_abs_bits(row.data() + 1, n - 1),
              scalar_.max_abs_bits(row.data() + 1, n - 1));
  }
  EXPECT_EQ(vector_->max_abs_bits(nullptr, 0), 0U);
}

TEST_P(RowKernelsTest, EveryHalfAndBf16Code) {
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

TEST_P(RowKernelsTest, EncodesHalfAndBf16) {
  for (int round = 0; round < Rounds(); ++round) {
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

TEST_P(RowKernelsTest, EveryFp8Code) {
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
TEST_P(RowKernelsTest, Fp8TiesAndNeighbours) {
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

TEST_P(RowKernelsTest, Fp8Scaled) {
  for (int round = 0; round < Rounds(); ++round) {
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

TEST_P(RowKernelsTest, EncodesBlocks) {
  for (int round = 0; round < Rounds(); ++round) {
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

TEST_P(RowKernelsTest, DecodesBlocks) {
  for (int round = 0; round < Rounds(); ++round) {
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

TEST_P(RowKernelsTest, RoundRowIsEncodeThenDecode) {
  for (int round = 0; round < Rounds(); ++round) {
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

std::string IsaName(const testing::TestParamInfo<Isa>& info) {
  return std::string(ToString(info.param));
}

INSTANTIATE_TEST_SUITE_P(Isas, RowKernelsTest, testing::Values(Isa::kAvx2, Isa::kAvx512), IsaName);

}  // namespace
}  // namespace hopyard::formats
