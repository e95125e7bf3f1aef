// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/json_file.h"

#include <cmath>
#include <unordered_set>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/mapped_file.h"
#include "checkpoint/text.h"
#include "core/error.h"

namespace hopyard::checkpoint {
namespace {

// First pass over a document: refuses what the second, which builds it, must not see.
class DocumentGuard {
 public:
  explicit DocumentGuard(std::string file) : file_(std::move(file)) {}

  bool null() { return true; }
  bool boolean(bool /*value*/) { return true; }
  bool number_integer(int64_t /*value*/) { return true; }
  bool number_unsigned(uint64_t /*value*/) { return true; }
  bool number_float(double /*value*/, const std::string& /*text*/) { return true; }
  bool string(std::string& /*value*/) { return true; }
  bool binary(nlohmann::json::binary_t& /*value*/) { return true; }
  bool start_object(size_t /*count*/) { return Enter(); }
  bool start_array(size_t /*count*/) { return Enter(); }
  bool end_object() { return Leave(); }
  bool end_array() { return Leave(); }
  bool key(std::string& name) {
    HOPYARD_CHECK(keys_.back().insert(name).second, kInvalidArgument)
        << file_ << ": has the key '" << Printable(name) << "' twice in one object";
    return true;
  }
  bool parse_error(size_t position, const std::string& /*token*/,
                   const nlohmann::json::exception& error) {
    HOPYARD_CHECK(false, kInvalidArgument)
        << file_ << ": is not JSON at byte " << position << ": " << Printable(error.what());
    return false;
  }

 private:
  bool Enter() {
    HOPYARD_CHECK(keys_.size() < static_cast<size_t>(kMaxJsonDepth), kInvalidArgument)
        << file_ << ": is nested deeper than " << kMaxJsonDepth << " levels";
    keys_.emplace_back();
    return true;
  }
  bool Leave() {
    keys_.pop_back();
    return true;
  }

  std::string file_;
  std::vector<std::unordered_set<std::string>> keys_;
};

// A value for a message: "8" (string), at most a few characters of it.
std::string ValueText(const nlohmann::json& value) {
  if (value.is_structured()) {
    return fmt::format("an {} of {} elements", value.type_name(), value.size());
  }
  const std::string text =
      value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).substr(0, 80);
  return fmt::format("{} ({})", Printable(text), value.type_name());
}

}  // namespace

nlohmann::json ParseJsonObject(const void* data, size_t size, std::string_view file) {
  const auto* begin = static_cast<const char*>(data);
  DocumentGuard guard(Printable(file));
  nlohmann::json::sax_parse(begin, begin + size, &guard);
  nlohmann::json document = nlohmann::json::parse(begin, begin + size, nullptr, false);
  HOPYARD_CHECK(document.is_object(), kInvalidArgument)
      << Printable(file) << ": holds " << document.type_name() << "; an object is wanted";
  return document;
}

nlohmann::json ReadJsonObject(const std::string& path, uint64_t max_bytes) {
  const MappedFile file(path);
  HOPYARD_CHECK(file.size() > 0 && file.size() <= max_bytes, kInvalidArgument)
      << Printable(path) << ": has " << file.size() << " bytes; 1 to " << max_bytes
      << " are allowed";
  return ParseJsonObject(file.data(), file.size(), path);
}

FieldReader::FieldReader(const nlohmann::json& object, std::string file, std::string prefix)
    : object_(&object), file_(std::move(file)), prefix_(std::move(prefix)) {}

std::string FieldReader::Where(const std::string& name) const {
  return fmt::format("{}: field '{}{}'", Printable(file_), prefix_, Printable(name));
}

bool FieldReader::Has(const std::string& name) const {
  const auto found = object_->find(name);
  return found != object_->end() && !found->is_null();
}

const nlohmann::json& FieldReader::Required(const std::string& name) const {
  HOPYARD_CHECK(Has(name), kInvalidArgument) << Where(name) << " is missing";
  return *object_->find(name);
}

int64_t FieldReader::ToInt(const nlohmann::json& value, const std::string& where,
                           IntRange range) const {
  // A number_unsigned above 2^63 must not wrap.
  const bool fits =
      value.is_number_integer() &&
      (!value.is_number_unsigned() ||
       value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
  const int64_t number = fits ? value.get<int64_t>() : 0;
  HOPYARD_CHECK(fits && number >= range.low && number <= range.high, kInvalidArgument)
      << where << " is " << ValueText(value) << "; an integer in [" << range.low << ", "
      << range.high << "] is wanted";
  return number;
}

int64_t FieldReader::Int(const std::string& name, IntRange range) const {
  return ToInt(Required(name), Where(name), range);
}

int64_t FieldReader::IntOr(const std::string& name, IntRange range, int64_t fallback) const {
  return Has(name) ? Int(name, range) : fallback;
}

bool FieldReader::Bool(const std::string& name) const {
  const nlohmann::json& value = Required(name);
  HOPYARD_CHECK(value.is_boolean(), kInvalidArgument)
      << Where(name) << " is " << ValueText(value) << "; true or false is wanted";
  return value.get<bool>();
}

bool FieldReader::BoolOr(const std::string& name, bool fallback) const {
  return Has(name) ? Bool(name) : fallback;
}

double FieldReader::Number(const std::string& name) const {
  const nlohmann::json& value = Required(name);
  HOPYARD_CHECK(value.is_number(), kInvalidArgument)
      << Where(name) << " is " << ValueText(value) << "; a number is wanted";
  return value.get<double>();
}

float FieldReader::Float(const std::string& name) const {
  const nlohmann::json& value = Required(name);
  const double number = value.is_number() ? value.get<double>() : 0.0;
  HOPYARD_CHECK(value.is_number() && std::abs(number) <= std::numeric_limits<float>::max(),
                kInvalidArgument)
      << Where(name) << " is " << ValueText(value) << "; a finite number is wanted";
  return static_cast<float>(number);
}

float FieldReader::FloatOr(const std::string& name, float fallback) const {
  return Has(name) ? Float(name) : fallback;
}

std::string FieldReader::String(const std::string& name) const {
  const nlohmann::json& value = Required(name);
  HOPYARD_CHECK(value.is_string(), kInvalidArgument)
      << Where(name) << " is " << ValueText(value) << "; a string is wanted";
  return value.get<std::string>();
}

std::string FieldReader::StringOr(const std::string& name, const std::string& fallback) const {
  return Has(name) ? String(name) : fallback;
}

std::vector<int64_t> FieldReader::Ints(const std::string& name, IntRange range) const {
  const nlohmann::json& value = Required(name);
  HOPYARD_CHECK(value.is_array(), kInvalidArgument)
      << Where(name) << " is " << ValueText(value) << "; an array of integers is wanted";
  std::vector<int64_t> numbers;
  for (size_t i = 0; i < value.size(); ++i) {
    numbers.push_back(ToInt(value[i], fmt::format("{}[{}]", Where(name), i), range));
  }
  return numbers;
}

FieldReader FieldReader::Object(const std::string& name) const {
  const nlohmann::json& value = Required(name);
  HOPYARD_CHECK(value.is_object(), kInvalidArgument)
      << Where(name) << " is " << ValueText(value) << "; an object is wanted";
  return {value, file_, fmt::format("{}{}.", prefix_, name)};
}

}  // namespace hopyard::checkpoint
