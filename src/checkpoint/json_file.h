// SPDX-License-Identifier: Apache-2.0
// JSON files of a checkpoint directory as untrusted input: size, depth, duplicate keys, field types
// and ranges are checked, and messages name file and field.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace hopyard::checkpoint {

inline constexpr int kMaxJsonDepth = 32;
inline constexpr uint64_t kMaxConfigBytes = 16U << 20;
inline constexpr uint64_t kMaxIndexBytes = 100'000'000;

// The object in the file at `path`; Error{kInvalidArgument} otherwise.
[[nodiscard]] nlohmann::json ReadJsonObject(const std::string& path, uint64_t max_bytes);
// The same of bytes in memory; `file` names them in messages.
[[nodiscard]] nlohmann::json ParseJsonObject(const void* data, size_t size, std::string_view file);

struct IntRange {
  int64_t low = 0;
  int64_t high = std::numeric_limits<int64_t>::max();
};

// Typed reads of an object's fields. null counts as absent, as in Python configurations. The JSON
// value must outlive the reader.
class FieldReader {
 public:
  FieldReader(const nlohmann::json& object, std::string file, std::string prefix = "");

  [[nodiscard]] bool Has(const std::string& name) const;
  [[nodiscard]] int64_t Int(const std::string& name, IntRange range) const;
  [[nodiscard]] int64_t IntOr(const std::string& name, IntRange range, int64_t fallback) const;
  [[nodiscard]] bool Bool(const std::string& name) const;
  [[nodiscard]] bool BoolOr(const std::string& name, bool fallback) const;
  [[nodiscard]] double Number(const std::string& name) const;
  [[nodiscard]] float Float(const std::string& name) const;                    // finite
  [[nodiscard]] float FloatOr(const std::string& name, float fallback) const;  // finite
  [[nodiscard]] std::string String(const std::string& name) const;
  [[nodiscard]] std::string StringOr(const std::string& name, const std::string& fallback) const;
  [[nodiscard]] std::vector<int64_t> Ints(const std::string& name, IntRange range) const;
  [[nodiscard]] FieldReader Object(const std::string& name) const;

  // "config.json: field 'text_config.hidden_act'", to begin a message with.
  [[nodiscard]] std::string Where(const std::string& name) const;

 private:
  [[nodiscard]] const nlohmann::json& Required(const std::string& name) const;
  [[nodiscard]] int64_t ToInt(const nlohmann::json& value, const std::string& where,
                              IntRange range) const;

  const nlohmann::json* object_;
  std::string file_;
  std::string prefix_;
};

}  // namespace hopyard::checkpoint
