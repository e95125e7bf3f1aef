// SPDX-License-Identifier: Apache-2.0
// How checkpoint matrices look to the copy engine, and which it cannot read.
#include "gemm/sm90/map_shape.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace hopyard::gemm::sm90 {
namespace {

using Five = std::array<int64_t, 5>;

const uint8_t* Memory() {
  static const std::vector<uint8_t> bytes(size_t{3} * 28800);
  return bytes.data();
}

// Rows 100 .. 199 of 3 experts' BF16 [200, 72].
MapShape UpOf(MajorOrder major) {
  MapShape shape;
  shape.values = Memory();
  shape.experts = 3;
  shape.rows = 100;
  shape.cols = 72;
  shape.position_begin = 100;
  shape.major = major;
  shape.value_stride = major == MajorOrder::kMnMajor ? 400 : 144;
  shape.expert_stride = 28800;
  return shape;
}

TEST(MapShape, KMajorRowsBeginWithThePart) {
  const MapShape shape = UpOf(MajorOrder::kKMajor);
  ASSERT_EQ(MapProblem(shape), "");
  const MapDims dims = DimsOf(shape);
  EXPECT_EQ(dims.begin, Memory() + int64_t{100} * 144);
  EXPECT_EQ(dims.size, (Five{72, 100, 1, 1, 3}));
  EXPECT_EQ(dims.stride, (Five{2, 144, 16, 16, 28800}));
  EXPECT_EQ(dims.box, (Five{64, 64, 1, 1, 1}));
}

TEST(MapShape, RowsOfWholeLinesBeginWithOne) {
  for (const MajorOrder major : {MajorOrder::kKMajor, MajorOrder::kMnMajor}) {
    MapShape shape = UpOf(major);
    for (const auto& [stride, whole] : std::vector<std::pair<int64_t, bool>>{
             {144, false}, {384, true}, {1440, false}, {2048, true}}) {
      shape.value_stride = stride;
      EXPECT_EQ(HasWholeLines(shape), whole) << stride;
    }
  }
}

TEST(MapShape, MnMajorRowsBeginWithThePart) {
  MapShape shape = UpOf(MajorOrder::kMnMajor);
  shape.position_begin = 104;
  shape.rows = 96;
  ASSERT_EQ(MapProblem(shape), "");
  const MapDims dims = DimsOf(shape);
  EXPECT_EQ(dims.begin, Memory() + 208);
  EXPECT_EQ(dims.size, (Five{96, 72, 1, 1, 3}));
  EXPECT_EQ(dims.stride, (Five{2, 400, 16, 16, 28800}));
  EXPECT_EQ(dims.box, (Five{64, 64, 1, 1, 1}));
  EXPECT_TRUE(dims.swizzled);
  EXPECT_EQ(dims.row_unit, 1);
}

// Where gate and up alternate, one map is of both.
TEST(MapShape, AlternateColumnsAreMappedTogether) {
  MapShape shape = UpOf(MajorOrder::kMnMajor);
  shape.position_step = 2;
  for (const int64_t begin : {0, 1}) {
    shape.position_begin = begin;
    ASSERT_EQ(MapProblem(shape), "");
    EXPECT_EQ(DimsOf(shape).begin, Memory());
    EXPECT_EQ(DimsOf(shape).size, (Five{200, 72, 1, 1, 3}));
  }
}

TEST(MapShape, ProblemsAreNamedWithTheRemedy) {
  MapShape shape = UpOf(MajorOrder::kMnMajor);
  shape.row_map = RowMap::kShuffled128;
  EXPECT_EQ(MapProblem(shape),
            "is MN-major and shuffled; the Hopper kernels read MN-major weights in natural order: "
            "undo the row map");
  EXPECT_EQ(MapProblem(UpOf(MajorOrder::kMnMajor)),
            "is MN-major and begins at column 100; wanted a multiple of 8 (the copy engine's 16 "
            "bytes): pad gate, or store gate and up apart");
  shape = UpOf(MajorOrder::kKMajor);
  shape.value_stride = 404;
  EXPECT_EQ(MapProblem(shape),
            "has rows 404 bytes apart; wanted a multiple of 16 (the copy engine's): pad the rows");
}

}  // namespace
}  // namespace hopyard::gemm::sm90
