// SPDX-License-Identifier: Apache-2.0
// The safetensors format: an 8-byte little-endian header length, a JSON header
// {name: {dtype, shape, data_offsets}}, then the data. Everything here is untrusted input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "hopyard/checkpoint.h"
#include "hopyard/tensor.h"

#include "checkpoint/mapped_file.h"

namespace hopyard::checkpoint {

inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference implementation's cap
inline constexpr size_t kMaxStoredDims = 32;
inline constexpr std::string_view kMetadataKey = "__metadata__";

// An element type of the format. `view` is absent for those that no TensorView can carry.
struct StoredDtype {
  std::string_view name;  // "BF16"
  uint64_t bits = 0;
  std::optional<DType> view;
};
[[nodiscard]] const StoredDtype* FindStoredDtype(std::string_view name);  // null: unknown
[[nodiscard]] std::string StoredDtypeNames();                             // "BOOL, F4, ..."

// Bytes of a tensor; absent where the product overflows or 4-bit and 6-bit elements do not fill
// whole bytes. Extents are non-negative.
[[nodiscard]] std::optional<uint64_t> StoredBytes(const StoredDtype& dtype,
                                                  const std::vector<int64_t>& shape);

struct StoredTensor {
  std::string name;
  const StoredDtype* dtype = nullptr;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // bytes from the start of the data section
  uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<StoredTensor> tensors;  // sorted by name, names unique
  uint64_t data_begin = 0;            // from the start of the file
};

// Checks the whole header of a file of `size` bytes: every tensor lies inside the data section, no
// two overlap, and together they cover it. Throws Error{kInvalidArgument} naming `file` and tensor.
// Reads no byte of the data section.
[[nodiscard]] SafetensorsHeader ParseSafetensors(const void* data, size_t size,
                                                 std::string_view file);

// View of a checked tensor of the file at `data`. The format does not promise alignment: a tensor
// whose elements are not naturally aligned in memory is refused (kUnsupported) rather than copied,
// so that a view is always of the mapped file; so are dtypes and ranks that TensorView lacks.
[[nodiscard]] TensorView ViewOf(const StoredTensor& tensor, const SafetensorsHeader& header,
                                const void* data, std::string_view file);

}  // namespace hopyard::checkpoint

namespace hopyard {

struct SafetensorsFile::Impl {
  explicit Impl(const std::string& path)
      : map(path), header(checkpoint::ParseSafetensors(map.data(), map.size(), path)) {}

  checkpoint::MappedFile map;
  checkpoint::SafetensorsHeader header;
};

}  // namespace hopyard
