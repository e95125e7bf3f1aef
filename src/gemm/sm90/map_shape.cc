// SPDX-License-Identifier: Apache-2.0
#include "gemm/sm90/map_shape.h"

#include <sstream>

#include "formats/format_rules.h"
#include "gemm/sm90/config.h"

namespace hopyard::gemm::sm90 {
namespace {

// The copy engine wants every stride and address to be a multiple of this.
constexpr int64_t kCopyBytes = 16;
constexpr int64_t kKBlockBytes = 128;  // kBlockKMajor: bytes of K per block

// Rows of one block of a shuffle, and the distance in memory of rows that follow each other in
// order within it: old = inner * r + b is stored at 8 * b + r (formats::StoredPosition).
int64_t ShuffleBlock(RowMap map) {
  return map == RowMap::kShuffled128 ? 32 : 16;
}

bool IsPacked(WeightFormat format) {
  return formats::RuleOf(format).codes_per_byte == 2;
}

// Fills the three row dimensions; `row` is the distance of stored rows.
void SetRows(const MapShape& shape, int64_t row, MapDims& dims) {
  if (shape.row_map == RowMap::kNatural) {
    dims.begin += shape.position_begin * row;
    dims.size[1] = shape.rows;
    dims.stride[1] = shape.position_step * row;
    dims.box[1] = kTileRows;
    for (const size_t d : {size_t{2}, size_t{3}}) {
      dims.size[d] = 1;
      dims.stride[d] = kCopyBytes;
      dims.box[d] = 1;
    }
    return;
  }
  const int64_t block = ShuffleBlock(shape.row_map);
  const int64_t inner = block / 8;  // rows of order that go 8 stored rows apart
  const int64_t step = shape.position_step;
  const int64_t begin = shape.position_begin;
  // Step 2 (gate and up alternate) takes every other of the inner rows.
  dims.begin += (begin / block * block + begin % block % inner * 8) * row;
  dims.size[1] = inner / step;
  dims.stride[1] = dims.size[1] == 1 ? kCopyBytes : 8 * step * row;
  dims.box[1] = dims.size[1];
  dims.size[2] = 8;
  dims.stride[2] = row;
  dims.box[2] = 8;
  dims.row_unit = static_cast<int>(block / step);
  dims.size[3] = shape.rows / dims.row_unit;
  dims.stride[3] = block * row;
  dims.box[3] = kTileRows / dims.row_unit;
}

// MN-major: dimension 0 walks the part's rows (of both parts, where gate and up alternate),
// dimension 1 walks K.
void SetColumns(const MapShape& shape, MapDims& dims) {
  const bool alternate = shape.position_step == 2;
  dims.begin += alternate ? 0 : shape.position_begin * dims.element_bytes;
  dims.size = {alternate ? 2 * shape.rows : shape.rows, shape.cols, 1, 1, shape.experts};
  dims.stride = {dims.element_bytes, shape.value_stride, kCopyBytes, kCopyBytes,
                 shape.experts == 1 ? kCopyBytes : shape.expert_stride};
  dims.box = {kTileRows, BlockK(Family::kBf16), 1, 1, 1};
  dims.swizzled = true;
}

}  // namespace

MapDims DimsOf(const MapShape& shape) {
  MapDims dims;
  dims.begin = static_cast<const uint8_t*>(shape.values);
  dims.element_bytes = shape.format == WeightFormat::kBf16 ? 2 : 1;
  const int64_t per_byte = IsPacked(shape.format) ? 2 : 1;
  const int64_t row_bytes = shape.cols * dims.element_bytes / per_byte;
  const bool block_major = shape.major == MajorOrder::kBlockKMajor;
  dims.size[0] = (block_major ? kKBlockBytes : row_bytes) / dims.element_bytes;
  dims.stride[0] = dims.element_bytes;
  dims.box[0] = (IsPacked(shape.format) ? 64 : 128) / dims.element_bytes;
  if (shape.major == MajorOrder::kMnMajor) {
    SetColumns(shape, dims);
    return dims;
  }
  SetRows(shape, block_major ? kKBlockBytes : shape.value_stride, dims);
  dims.size[4] = block_major ? (row_bytes + kKBlockBytes - 1) / kKBlockBytes : shape.experts;
  dims.stride[4] = block_major          ? shape.value_stride
                   : shape.experts == 1 ? kCopyBytes
                                        : shape.expert_stride;
  dims.box[4] = 1;
  dims.swizzled = shape.swizzled;
  return dims;
}

bool IsSwizzled(WeightFormat weights, const RowFormat& x) {
  return weights == WeightFormat::kBf16 || (x.dtype == DType::kE4m3 && !IsPacked(weights));
}

bool HasWholeLines(const MapShape& shape) {
  constexpr int64_t kLine = 128;
  return shape.value_stride % kLine == 0;
}

int RowUnitOf(const MapShape& shape) {
  return DimsOf(shape).row_unit;
}

std::string MapProblem(const MapShape& shape) {
  std::ostringstream out;
  const auto address = reinterpret_cast<uintptr_t>(shape.values);
  const bool mn_major = shape.major == MajorOrder::kMnMajor;
  if (mn_major && shape.row_map != RowMap::kNatural) {
    out << "is MN-major and shuffled; the Hopper kernels read MN-major weights in natural order: "
           "undo the row map";
  } else if (mn_major && shape.position_step == 1 && shape.position_begin * 2 % kCopyBytes != 0) {
    out << "is MN-major and begins at column " << shape.position_begin
        << "; wanted a multiple of 8 (the copy engine's 16 bytes): pad gate, or store gate and up "
           "apart";
  } else if (shape.value_stride % kCopyBytes != 0) {
    out << "has rows " << shape.value_stride
        << " bytes apart; wanted a multiple of 16 (the copy"
           " engine's): pad the rows";
  } else if (address % kCopyBytes != 0) {
    out << "begins at " << shape.values << "; wanted an address that is a multiple of 16";
  } else if (shape.experts > 1 && shape.expert_stride % kCopyBytes != 0) {
    out << "has experts " << shape.expert_stride << " bytes apart; wanted a multiple of 16";
  } else if (shape.row_map != RowMap::kNatural &&
             (shape.rows % (ShuffleBlock(shape.row_map) / shape.position_step) != 0 ||
              (shape.position_step == 1 &&
               shape.position_begin % ShuffleBlock(shape.row_map) != 0))) {
    out << "is shuffled in blocks of " << ShuffleBlock(shape.row_map) << " rows, which "
        << shape.rows << " rows from " << shape.position_begin << " on do not fill";
  }
  return out.str();
}

}  // namespace hopyard::gemm::sm90
