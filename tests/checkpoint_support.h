// SPDX-License-Identifier: Apache-2.0
// Builders of tiny checkpoint directories for the checkpoint tests.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "hopyard/checkpoint.h"
#include "hopyard/error.h"

#include "formats/codes.h"
#include "tests/temporary_directory.h"

namespace hopyard::checkpoint_test {

using Json = nlohmann::ordered_json;

using test::TemporaryDirectory;

// Bytes of a safetensors file with this header text, whatever it says.
inline std::string RawFile(const std::string& header, const std::string& data) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) {
    bytes[i] = static_cast<char>((static_cast<uint64_t>(header.size()) >> (8 * i)) & 0xFFU);
  }
  return bytes + header + data;
}

inline int64_t ElementBytes(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {{"BF16", 2},    {"F16", 2},     {"F32", 4},
                                                       {"F64", 8},     {"U8", 1},      {"I64", 8},
                                                       {"F8_E4M3", 1}, {"F8_E8M0", 1}, {"BOOL", 1}};
  return sizes.at(dtype);
}

// Tensors with bytes that differ everywhere, and a config.json.
// NOLINTNEXTLINE(bugprone-exception-escape): the implicit move of ordered_json only looks throwing.
class CheckpointBuilder {
 public:
  Json config;

  // Element i of the n-th tensor is a small distinct number in float dtypes, a distinct byte
  // otherwise.
  void Add(const std::string& name, const std::string& dtype, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t extent : shape) {
      count *= extent;
    }
    std::vector<uint8_t> bytes(static_cast<size_t>(count * ElementBytes(dtype)));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t seed = 37 * static_cast<int64_t>(order_.size()) + i;
      if (dtype == "BF16") {
        const uint16_t code = formats::EncodeBf16(static_cast<float>(seed % 255 - 127));
        std::memcpy(&bytes[static_cast<size_t>(2 * i)], &code, 2);
      } else if (dtype == "F32") {
        const auto value = static_cast<float>(seed % 1023) + 0.5F;
        std::memcpy(&bytes[static_cast<size_t>(4 * i)], &value, 4);
      } else {
        bytes[static_cast<size_t>(i * ElementBytes(dtype))] = static_cast<uint8_t>(seed % 126);
      }
    }
    Put(name, dtype, std::move(shape), std::move(bytes));
  }

  void Put(const std::string& name, const std::string& dtype, std::vector<int64_t> shape,
           std::vector<uint8_t> bytes) {
    if (!tensors_.contains(name)) {
      order_.push_back(name);
    }
    tensors_[name] = {dtype, std::move(shape), std::move(bytes)};
  }
  void Remove(const std::string& name) {
    tensors_.erase(name);
    std::erase(order_, name);
  }

  // One model.safetensors, or shards of alternating tensors with an index.
  void Save(const TemporaryDirectory& directory, int shards = 1) const {
    directory.Write("config.json", config.dump());
    if (shards == 1) {
      WriteSafetensors(directory / "model.safetensors", Named(0, 1));
      return;
    }
    Json map = Json::object();
    for (int shard = 0; shard < shards; ++shard) {
      const std::string name = "model-" + std::to_string(shard + 1) + ".safetensors";
      const std::vector<NamedTensor> tensors =
          Named(static_cast<size_t>(shard), static_cast<size_t>(shards));
      WriteSafetensors(directory / name, tensors);
      for (const NamedTensor& tensor : tensors) {
        map[tensor.name] = name;
      }
    }
    directory.Write("model.safetensors.index.json", Json{{"weight_map", map}}.dump());
  }

  // Value of element `index` (row-major) as a number.
  [[nodiscard]] float Value(const std::string& name, int64_t index) const;

 private:
  struct Stored {
    std::string dtype;
    std::vector<int64_t> shape;
    std::vector<uint8_t> bytes;
  };

  [[nodiscard]] std::vector<NamedTensor> Named(size_t first, size_t step) const {
    std::vector<NamedTensor> named;
    for (size_t i = first; i < order_.size(); i += step) {
      const Stored& stored = tensors_.at(order_[i]);
      named.push_back({order_[i], stored.dtype, stored.shape, stored.bytes.data()});
    }
    return named;
  }

  std::vector<std::string> order_;
  std::map<std::string, Stored> tensors_;
};

inline float Decode(DType dtype, const uint8_t* bytes) {
  uint16_t half = 0;
  float single = 0.0F;
  switch (dtype) {
    case DType::kBf16:
      std::memcpy(&half, bytes, 2);
      return formats::DecodeBf16(half);
    case DType::kFloat32:
      std::memcpy(&single, bytes, 4);
      return single;
    default:
      return static_cast<float>(*bytes);
  }
}

inline float CheckpointBuilder::Value(const std::string& name, int64_t index) const {
  const Stored& stored = tensors_.at(name);
  const DType dtype = stored.dtype == "BF16"  ? DType::kBf16
                      : stored.dtype == "F32" ? DType::kFloat32
                                              : DType::kUint8;
  return Decode(dtype, &stored.bytes[static_cast<size_t>(index * ElementBytes(stored.dtype))]);
}

// Element of a view; bytes of 8-bit dtypes count as integers.
inline float At(const TensorView& view, std::vector<int64_t> at) {
  int64_t offset = 0;
  EXPECT_EQ(static_cast<int>(at.size()), view.ndim);
  for (size_t d = 0; d < at.size(); ++d) {
    EXPECT_LT(at[d], view.shape[d]);
    offset += at[d] * view.strides[d];
  }
  return Decode(view.dtype, view.as<const uint8_t>() + offset * SizeOf(view.dtype));
}

inline std::vector<int64_t> Shape(const TensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.ndim};
}

// Runs `action`, which must throw Error, and returns it.
inline Error Thrown(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no Error was thrown";
  return {ErrorKind::kInternal, "no Error was thrown"};
}

inline void ExpectError(const std::function<void()>& action, ErrorKind kind,
                        const std::vector<std::string>& parts) {
  const Error error = Thrown(action);
  EXPECT_EQ(ToString(error.kind()), ToString(kind)) << error.message();
  for (const std::string& part : parts) {
    EXPECT_THAT(error.message(), ::testing::HasSubstr(part));
  }
}

}  // namespace hopyard::checkpoint_test
