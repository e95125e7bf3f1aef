// SPDX-License-Identifier: Apache-2.0
// Packing on the host: every byte of codes and scales has one place, as the header says, what fills
// up units stays zero, and a slice that is written into packed memory is what packing gives.
#include "gemm/packed_order.h"

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
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

// A unit by the words of the header, counted out here.
class Unit {
 public:
  Unit(const Problem& problem, const Matrices& matrices, int64_t unit, int64_t group)
      : problem_(problem), matrices_(matrices), unit_(unit), group_(group) {}

  [[nodiscard]] uint8_t CodeAt(int64_t i) const {
    const int64_t half = i / 4096;
    const int64_t tile = i % 4096 / 2048;
    const int64_t entry = i % 2048 / 32;
    const int64_t byte = group_ * 64 + half * 32 + i % 32;
    const int64_t row = RowOf(tile, half == 0 ? entry : entry ^ 2);
    return row < problem_.rows && byte < matrices_.code_cols()
               ? matrices_.code(MatrixOf(tile), row, byte)
               : uint8_t{0};
  }
  [[nodiscard]] uint8_t ScaleAt(int64_t i) const {
    const int64_t entry = i % 512 / 16;
    const int64_t row = RowOf(i % 16 / 8, entry / 8 * 16 + entry % 8 + i % 8 / 4 * 8);
    const int64_t block = group_ * (128 / matrices_.rule().scale_block) + i / 512 * 4 + i % 4;
    return row < problem_.rows && block < matrices_.scale_cols()
               ? matrices_.scale(MatrixOf(i % 16 / 8), row, block)
               : uint8_t{0};
  }

 private:
  [[nodiscard]] int MatrixOf(int64_t tile) const {
    return problem_.paired ? static_cast<int>(tile) : 0;
  }
  [[nodiscard]] int64_t RowOf(int64_t tile, int64_t row) const {
    return problem_.paired ? unit_ * 64 + row : unit_ * 128 + tile * 64 + row;
  }

  const Problem& problem_;
  const Matrices& matrices_;
  int64_t unit_;
  int64_t group_;
};

std::vector<uint8_t> ByTheHeader(const Problem& problem, const Matrices& matrices, size_t size) {
  const int64_t scales = 128 * (128 / matrices.rule().scale_block);
  const int64_t groups = CeilDiv(problem.cols, 128);
  const int64_t units = static_cast<int64_t>(size) / (8192 + scales) / groups;
  std::vector<uint8_t> bytes;
  bytes.reserve(size);
  for (int64_t at = 0; at < units * groups; ++at) {
    const Unit unit(problem, matrices, at / groups, at % groups);
    for (int64_t i = 0; i < scales; ++i) {
      bytes.push_back(unit.ScaleAt(i));
    }
    for (int64_t i = 0; i < 8192; ++i) {
      bytes.push_back(unit.CodeAt(i));
    }
  }
  return bytes;
}

TEST(PackedOrder, EveryByteIsWhereTheHeaderSays) {
  for (const Problem& problem : Problems()) {
    Matrices matrices(problem);
    const std::vector<uint8_t> packed = matrices.Packed();
    EXPECT_TRUE(packed == ByTheHeader(problem, matrices, packed.size()))
        << problem.rows << " x " << problem.cols << ", paired " << problem.paired;
  }
}

// Bytes of matrix m that are not where packing left them.
int64_t CountLost(const Problem& problem, const Matrices& matrices, int m, uint8_t* packed) {
  const PackedOrder order = matrices.Order(m, packed);
  int64_t lost = 0;
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t byte = 0; byte < matrices.code_cols(); ++byte) {
      lost += *PackedCode(order, row, byte) == matrices.code(m, row, byte) ? 0 : 1;
    }
    for (int64_t block = 0; block < matrices.scale_cols(); ++block) {
      lost += *PackedScale(order, row, block) == matrices.scale(m, row, block) ? 0 : 1;
    }
  }
  return lost;
}

// Codes and scales come back from where packing left them.
TEST(PackedOrder, IsReversible) {
  for (const Problem& problem : Problems()) {
    Matrices matrices(problem);
    std::vector<uint8_t> packed = matrices.Packed();
    for (int m = 0; m < matrices.count(); ++m) {
      EXPECT_EQ(CountLost(problem, matrices, m, packed.data()), 0);
    }
  }
}

// Writes 7 rows and 160 columns of matrix m of `fresh` at a time, codes and scales.
void WriteSlices(const Problem& problem, const Matrices& fresh, int m, const MatrixRef& target) {
  constexpr int64_t kRows = 7;
  constexpr int64_t kCols = 160;
  const int64_t block = fresh.rule().scale_block;
  for (int64_t row = 0; row < problem.rows; row += kRows) {
    for (int64_t col = 0; col < problem.cols; col += kCols) {
      const int64_t cols = std::min(kCols, problem.cols - col);
      SliceWrite write;
      write.target = target;
      write.rule = fresh.rule();
      write.row_begin = row;
      write.col_begin = col;
      write.rows = std::min(kRows, problem.rows - row);
      write.size = 1;
      write.col_stride = 1;
      write.cols = CeilDiv(cols, 2);
      write.source = fresh.codes(m) + row * fresh.code_cols() + col / 2;
      write.row_stride = fresh.code_cols();
      WriteSliceCpu(write);
      write.part = SlicePart::kScales;
      write.cols = CeilDiv(cols, block);
      write.source = fresh.scales(m) + row * fresh.scale_cols() + col / block;
      write.row_stride = fresh.scale_cols();
      WriteSliceCpu(write);
    }
  }
}

TEST(PackedOrder, SlicesThatAreWrittenEqualPacking) {
  for (const Problem& problem : Problems()) {
    Matrices old(problem, 5);
    Matrices fresh(problem, 6);
    std::vector<uint8_t> packed = old.Packed();
    const std::vector<uint8_t> wanted = fresh.Packed();
    EXPECT_FALSE(packed == wanted);
    for (int m = 0; m < fresh.count(); ++m) {
      MatrixRef target = old.Ref(m);
      target.packed = old.Order(m, packed.data());
      WriteSlices(problem, fresh, m, target);
    }
    EXPECT_TRUE(packed == wanted);
  }
}

}  // namespace
}  // namespace hopyard::gemm
