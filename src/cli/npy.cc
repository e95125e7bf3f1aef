// SPDX-License-Identifier: Apache-2.0
#include "cli/npy.h"

#include <array>
#include <cstring>
#include <fstream>
#include <limits>
#include <string_view>

#include "core/error.h"

namespace hopyard::cli {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr size_t kMaxHeader = 1 << 16;
constexpr int64_t kMaxElements = int64_t{1} << 48;

// Strict reader of the header's dictionary:
// {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
class HeaderParser {
 public:
  HeaderParser(const std::string& path, std::string_view text) : path_(path), text_(text) {}

  NpyArray Parse() {
    NpyArray array;
    bool seen_descr = false;
    bool seen_order = false;
    bool seen_shape = false;
    Expect('{');
    while (!Take('}')) {
      const std::string_view key = String();
      Expect(':');
      if (key == "descr" && !seen_descr) {
        array.dtype = Type(String());
        seen_descr = true;
      } else if (key == "fortran_order" && !seen_order) {
        Check(Word() == "False", "fortran_order must be False; save numpy.ascontiguousarray(x)");
        seen_order = true;
      } else if (key == "shape" && !seen_shape) {
        array.shape = Shape();
        seen_shape = true;
      } else {
        Check(false, "unknown or repeated key");
      }
      (void)Take(',');
    }
    Check(seen_descr && seen_order && seen_shape, "descr, fortran_order and shape are needed");
    SkipSpace();
    Check(at_ == text_.size(), "text after the dictionary");
    return array;
  }

 private:
  void Check(bool ok, std::string_view problem) const {
    HOPYARD_CHECK(ok, kInvalidArgument)
        << path_ << ": bad .npy header at byte " << at_ << ": " << problem;
  }

  void SkipSpace() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) {
      ++at_;
    }
  }

  bool Take(char c) {
    SkipSpace();
    if (at_ < text_.size() && text_[at_] == c) {
      ++at_;
      return true;
    }
    return false;
  }

  void Expect(char c) { Check(Take(c), std::string("wanted '") + c + "'"); }

  std::string_view String() {
    Expect('\'');
    const size_t begin = at_;
    const size_t end = text_.find('\'', begin);
    Check(end != std::string_view::npos, "unterminated string");
    at_ = end + 1;
    return text_.substr(begin, end - begin);
  }

  std::string_view Word() {
    SkipSpace();
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] >= 'A' && text_[at_] <= 'z') {
      ++at_;
    }
    return text_.substr(begin, at_ - begin);
  }

  int64_t Number() {
    SkipSpace();
    const size_t begin = at_;
    int64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      value = value * 10 + (text_[at_] - '0');
      Check(value <= kMaxElements, "dimension too large");
      ++at_;
    }
    Check(at_ > begin, "wanted a number");
    return value;
  }

  std::vector<int64_t> Shape() {
    std::vector<int64_t> shape;
    Expect('(');
    while (!Take(')')) {
      shape.push_back(Number());
      Check(shape.size() <= static_cast<size_t>(TensorView::kMaxDims), "more than 4 dimensions");
      if (!Take(',')) {
        Expect(')');
        break;
      }
    }
    Check(!shape.empty(), "a scalar; wanted 1 to 4 dimensions");
    return shape;
  }

  DType Type(std::string_view descr) const {
    if (descr == "<f4") {
      return DType::kFloat32;
    }
    if (descr == "<f2") {
      return DType::kFp16;
    }
    if (descr == "<i2") {
      return DType::kInt16;
    }
    if (descr == "<i4") {
      return DType::kInt32;
    }
    Check(descr == "<i8", "dtype '" + std::string(descr) + "'; wanted <f4, <f2, <i2, <i4 or <i8");
    return DType::kInt64;
  }

  const std::string& path_;
  std::string_view text_;
  size_t at_ = 0;
};

int64_t CheckedBytes(const std::string& path, const NpyArray& array) {
  int64_t elements = 1;
  for (const int64_t extent : array.shape) {
    HOPYARD_CHECK(extent == 0 || elements <= kMaxElements / extent, kInvalidArgument)
        << path << ": the shape has more than 2^48 elements";
    elements *= extent;
  }
  return elements * SizeOf(array.dtype);
}

size_t ReadHeaderSize(const std::string& path, std::ifstream& file) {
  std::array<unsigned char, 8> start{};
  file.read(reinterpret_cast<char*>(start.data()), start.size());
  HOPYARD_CHECK(file && std::memcmp(start.data(), kMagic.data(), kMagic.size()) == 0,
                kInvalidArgument)
      << path << ": not a .npy file";
  const int major = start[6];
  HOPYARD_CHECK(major >= 1 && major <= 3, kInvalidArgument)
      << path << ": .npy version " << major << "; wanted 1, 2 or 3";
  std::array<unsigned char, 4> size{};
  file.read(reinterpret_cast<char*>(size.data()), major == 1 ? 2 : 4);
  const size_t bytes = size[0] | static_cast<size_t>(size[1]) << 8 |
                       static_cast<size_t>(size[2]) << 16 | static_cast<size_t>(size[3]) << 24;
  HOPYARD_CHECK(file && bytes <= kMaxHeader, kInvalidArgument)
      << path << ": .npy header of " << bytes << " bytes; wanted at most " << kMaxHeader;
  return bytes;
}

}  // namespace

TensorView NpyArray::View() const {
  switch (shape.size()) {
    case 1:
      return TensorView::Contiguous(data.data(), dtype, {shape[0]});
    case 2:
      return TensorView::Contiguous(data.data(), dtype, {shape[0], shape[1]});
    case 3:
      return TensorView::Contiguous(data.data(), dtype, {shape[0], shape[1], shape[2]});
    default:
      return TensorView::Contiguous(data.data(), dtype, {shape[0], shape[1], shape[2], shape[3]});
  }
}

NpyArray ReadNpy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  HOPYARD_CHECK(file.good(), kInvalidArgument) << path << ": cannot be opened";
  const size_t header_bytes = ReadHeaderSize(path, file);
  std::string header(header_bytes, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  HOPYARD_CHECK(file.good(), kInvalidArgument) << path << ": the file ends inside its header";
  NpyArray array = HeaderParser(path, header).Parse();
  const int64_t wanted = CheckedBytes(path, array);
  const auto begin = static_cast<int64_t>(file.tellg());
  file.seekg(0, std::ios::end);
  const int64_t got = static_cast<int64_t>(file.tellg()) - begin;
  HOPYARD_CHECK(got == wanted, kInvalidArgument)
      << path << ": " << got << " bytes of data; the header's shape and dtype need " << wanted;
  array.data.resize(static_cast<size_t>(wanted));
  file.seekg(begin);
  file.read(array.data.data(), wanted);
  HOPYARD_CHECK(file.good(), kInvalidArgument) << path << ": reading failed";
  return array;
}

}  // namespace hopyard::cli
