// SPDX-License-Identifier: Apache-2.0
// Packing on the host: every byte of codes and scales has one place, as the header says, what fills
// up units stays zero, and a slice that is written into packed memory is what packing gives.
#include "gemm/packed_order.h"

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/shape.h"
#include "formats/format_rules.h"
#include "gemm/slice_write.h"

namespace hopyard::gemm {
namespace {

struct Problem {
  WeightFormat format = WeightFormat::kMxFp4;
  int64_t rows = 0;
  int64_t cols = 0;
  bool paired = false;
};

// Gate and up, or one matrix, of an expert: bytes that are not zero.
class Matrices {
 public:
  explicit Matrices(const Problem& problem, uint32_t seed = 5)
      : problem_(problem), rule_(formats::RuleOf(problem.format)) {
    std::mt19937 random(seed);
    for (int m = 0; m < count(); ++m) {
      for (auto* bytes : {&codes_[m], &scales_[m]}) {
        bytes->resize(
            static_cast<size_t>(problem.rows * (bytes == &codes_[m] ? code_cols() : scale_cols())));
        for (uint8_t& byte : *bytes) {
          byte = static_cast<uint8_t>(1 + random() % 255);
        }
      }
    }
  }
  [[nodiscard]] int count() const { return problem_.paired ? 2 : 1; }
  [[nodiscard]] int64_t code_cols() const { return CeilDiv(problem_.cols, 2); }
  [[nodiscard]] int64_t scale_cols() const { return CeilDiv(problem_.cols, rule_.scale_block); }
  [[nodiscard]] uint8_t code(int m, int64_t row, int64_t byte) const {
    return codes_[m][static_cast<size_t>(row * code_cols() + byte)];
  }
  [[nodiscard]] uint8_t scale(int m, int64_t row, int64_t block) const {
    return scales_[m][static_cast<size_t>(row * scale_cols() + block)];
  }
  [[nodiscard]] const uint8_t* codes(int m) const { return codes_[m].data(); }
  [[nodiscard]] const uint8_t* scales(int m) const { return scales_[m].data(); }
  [[nodiscard]] MatrixRef Ref(int m) {
    MatrixRef ref;
    ref.format = problem_.format;
    ref.values = codes_[m].data();
    ref.value_stride = code_cols();
    ref.scales = scales_[m].data();
    ref.scale_stride = scale_cols();
    ref.rows = problem_.rows;
    ref.cols = problem_.cols;
    return ref;
  }
  [[nodiscard]] PackedOrder Order(int m, uint8_t* base) const {
    PackedOrder order;
    order.base = base;
    order.groups = CeilDiv(problem_.cols, 128);
    order.scale_bytes = static_cast<int32_t>(128 / rule_.scale_block);
    order.paired = problem_.paired;
    order.second = m == 1;
    return order;
  }
  [[nodiscard]] std::vector<uint8_t> Packed() {
    std::vector<uint8_t> packed(
        static_cast<size_t>(PackedExpertBytes(Order(0, nullptr), problem_.rows)));
    for (int m = 0; m < count(); ++m) {
      PackCpu({Ref(m), rule_, Order(m, packed.data())});
    }
    return packed;
  }
  [[nodiscard]] const formats::WeightFormatRule& rule() const { return rule_; }

 private:
  Problem problem_;
  formats::WeightFormatRule rule_;
  std::vector<uint8_t> codes_[2];
  std::vector<uint8_t> scales_[2];
};

std::vector<Problem> Problems() {
  std::vector<Problem> problems;
  for (const WeightFormat format : {WeightFormat::kMxFp4, WeightFormat::kNvFp4}) {
    for (const bool paired : {false, true}) {
      for (const auto& [rows, cols] :
           {std::pair<int64_t, int64_t>{256, 256}, {70, 320}, {1, 16}, {130, 2880}, {64, 100}}) {
        problems.push_back({format, rows, cols, paired});
      }
    }
  }
  return problems;
}

TEST(PackedOrder, SizesAreOfWholeUnits) {
  PackedOrder order;
  order.groups = 3;
  order.scale_bytes = 4;
  EXPECT_EQ(PackedUnitBytes(4), 8192 + 512);
  EXPECT_EQ(PackedUnitBytes(8), 8192 + 1024);
  EXPECT_EQ(PackedExpertBytes(order, 256), 2 * 3 * 8704);
  EXPECT_EQ(PackedExpertBytes(order, 257), 4 * 3 * 8704);  // an even number of units
  EXPECT_EQ(PackedExpertBytes(order, 1), 2 * 3 * 8704);
  order.paired = true;
  EXPECT_EQ(PackedExpertBytes(order, 128), 2 * 3 * 8704);
  EXPECT_EQ(PackedExpertBytes(order, 129), 4 * 3 * 8704);
}

// By the words of the header, counted out here.
TEST(PackedOrder, EveryByteIsWhereTheHeaderSays) {
  for (const Problem& problem : Problems()) {
    SCOPED_TRACE(std::to_string(problem.rows) + " x " + std::to_string(problem.cols));
    Matrices matrices(problem);
    const std::vector<uint8_t> packed = matrices.Packed();
    const int64_t scale_bytes = 128 / matrices.rule().scale_block;
    const int64_t groups = CeilDiv(problem.cols, 128);
    const int64_t unit_bytes = PackedUnitBytes(static_cast<int32_t>(scale_bytes));
    const int64_t units = static_cast<int64_t>(packed.size()) / unit_bytes / groups;
    int64_t at = 0;
    const auto expect = [&](int64_t tile, int64_t row_in_tile, int64_t unit, auto&& value) {
      const int m = problem.paired ? static_cast<int>(tile) : 0;
      const int64_t row =
          problem.paired ? unit * 64 + row_in_tile : unit * 128 + tile * 64 + row_in_tile;
      const uint8_t wanted = row < problem.rows ? value(m, row) : 0;
      ASSERT_EQ(packed[static_cast<size_t>(at)], wanted) << "byte " << at;
      ++at;
    };
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t i = 0; i < 2 * 64 * 64; ++i) {
          const int64_t byte = group * 64 + i % 64;
          expect(i / 4096, i % 4096 / 64, unit, [&](int m, int64_t row) {
            return byte < matrices.code_cols() ? matrices.code(m, row, byte) : uint8_t{0};
          });
        }
        for (int64_t i = 0; i < 128 * scale_bytes; ++i) {
          const int64_t entry = i % 512 / 16;
          const int64_t row = entry / 8 * 16 + entry % 8 + i % 8 / 4 * 8;
          const int64_t block = group * scale_bytes + i / 512 * 4 + i % 4;
          expect(i % 16 / 8, row, unit, [&](int m, int64_t natural) {
            return block < matrices.scale_cols() ? matrices.scale(m, natural, block) : uint8_t{0};
          });
        }
      }
    }
    ASSERT_EQ(at, static_cast<int64_t>(packed.size()));
  }
}

// Codes and scales come back from where packing left them: nothing is lost.
TEST(PackedOrder, IsReversible) {
  for (const Problem& problem : Problems()) {
    Matrices matrices(problem);
    std::vector<uint8_t> packed = matrices.Packed();
    for (int m = 0; m < matrices.count(); ++m) {
      const PackedOrder order = matrices.Order(m, packed.data());
      for (int64_t row = 0; row < problem.rows; ++row) {
        for (int64_t byte = 0; byte < matrices.code_cols(); ++byte) {
          ASSERT_EQ(*PackedCode(order, row, byte), matrices.code(m, row, byte));
        }
        for (int64_t block = 0; block < matrices.scale_cols(); ++block) {
          ASSERT_EQ(*PackedScale(order, row, block), matrices.scale(m, row, block));
        }
      }
    }
  }
}

TEST(PackedOrder, SlicesThatAreWrittenEqualPacking) {
  for (const Problem& problem : Problems()) {
    Matrices old(problem, 5);
    Matrices fresh(problem, 6);
    std::vector<uint8_t> packed = old.Packed();
    const std::vector<uint8_t> wanted = fresh.Packed();
    EXPECT_NE(packed, wanted);
    for (int m = 0; m < fresh.count(); ++m) {
      for (int64_t row = 0; row < problem.rows; row += 7) {
        for (int64_t col = 0; col < problem.cols; col += 160) {
          SliceWrite write;
          write.target = old.Ref(m);
          write.target.packed = old.Order(m, packed.data());
          write.rule = fresh.rule();
          write.row_begin = row;
          write.col_begin = col;
          write.rows = std::min<int64_t>(7, problem.rows - row);
          write.size = 1;
          write.col_stride = 1;
          const int64_t cols = std::min<int64_t>(160, problem.cols - col);
          write.cols = CeilDiv(cols, 2);
          write.source = fresh.codes(m) + row * fresh.code_cols() + col / 2;
          write.row_stride = fresh.code_cols();
          WriteSliceCpu(write);
          write.part = SlicePart::kScales;
          write.cols = CeilDiv(cols, fresh.rule().scale_block);
          write.source =
              fresh.scales(m) + row * fresh.scale_cols() + col / fresh.rule().scale_block;
          write.row_stride = fresh.scale_cols();
          WriteSliceCpu(write);
        }
      }
    }
    EXPECT_EQ(packed, wanted);
  }
}

}  // namespace
}  // namespace hopyard::gemm
