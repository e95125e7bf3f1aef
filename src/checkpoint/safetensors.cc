// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/text.h"
#include "core/error.h"

namespace hopyard::checkpoint {
namespace {

constexpr std::array<StoredDtype, 21> kStoredDtypes = {{
    {"BOOL", 8, std::nullopt},        {"F4", 4, std::nullopt},
    {"F6_E2M3", 6, std::nullopt},     {"F6_E3M2", 6, std::nullopt},
    {"U8", 8, DType::kUint8},         {"I8", 8, DType::kInt8},
    {"F8_E5M2", 8, std::nullopt},     {"F8_E4M3", 8, DType::kE4m3},
    {"F8_E8M0", 8, DType::kE8m0},     {"F8_E4M3FNUZ", 8, std::nullopt},
    {"F8_E5M2FNUZ", 8, std::nullopt}, {"I16", 16, DType::kInt16},
    {"U16", 16, std::nullopt},        {"F16", 16, DType::kFp16},
    {"BF16", 16, DType::kBf16},       {"I32", 32, DType::kInt32},
    {"U32", 32, std::nullopt},        {"F32", 32, DType::kFloat32},
    {"I64", 64, DType::kInt64},       {"U64", 64, std::nullopt},
    {"F64", 64, DType::kFloat64},
}};

// Receives the header's JSON as events and accepts exactly the format's grammar, so that neither
// deep nesting nor a wrong type is ever stored.
class HeaderHandler {
 public:
  explicit HeaderHandler(std::string_view file) : file_(Printable(file)) {}

  std::vector<StoredTensor> TakeTensors() { return std::move(tensors_); }

  bool null() { return Reject("null"); }
  bool boolean(bool value) { return Reject(value ? "true" : "false"); }
  bool number_integer(int64_t value) { return Reject(fmt::format("{}", value)); }
  bool number_float(double /*value*/, const std::string& text) { return Reject(Printable(text)); }
  bool binary(nlohmann::json::binary_t& /*value*/) { return Reject("binary data"); }
  bool number_unsigned(uint64_t value);
  bool string(std::string& value);
  bool start_object(size_t /*count*/);
  bool key(std::string& name);
  bool end_object();
  bool start_array(size_t /*count*/);
  bool end_array();
  bool parse_error(size_t position, const std::string& /*token*/,
                   const nlohmann::json::exception& error) {
    HOPYARD_CHECK(false, kInvalidArgument) << file_ << ": the header is not JSON at its byte "
                                           << position << ": " << Printable(error.what());
    return false;
  }

 private:
  enum class At : uint8_t { kStart, kTop, kMetadata, kEntry, kTensor, kShape, kOffsets, kEnd };
  enum class Field : uint8_t { kNone, kDtype, kShape, kOffsets };

  [[nodiscard]] std::string Where() const;
  bool Reject(const std::string& got);
  void FinishTensor();

  std::string file_;
  At at_ = At::kStart;
  Field field_ = Field::kNone;
  StoredTensor tensor_;
  std::array<uint64_t, 2> offsets_{};
  size_t num_offsets_ = 0;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  bool has_metadata_ = false;
  bool entry_is_metadata_ = false;
  std::vector<StoredTensor> tensors_;
};

std::string HeaderHandler::Where() const {
  switch (at_) {
    case At::kStart:
    case At::kTop:
    case At::kEnd:
      return "the header; an object {tensor name: {dtype, shape, data_offsets}} is wanted";
    case At::kMetadata:
      return fmt::format("'{}'; an object of strings is wanted", kMetadataKey);
    case At::kEntry:
      return fmt::format("'{}'; an object is wanted",
                         entry_is_metadata_ ? std::string(kMetadataKey) : Printable(tensor_.name));
    case At::kShape:
      return fmt::format("shape of tensor '{}'; non-negative integers are wanted",
                         Printable(tensor_.name));
    case At::kOffsets:
      return fmt::format("data_offsets of tensor '{}'; two non-negative integers are wanted",
                         Printable(tensor_.name));
    case At::kTensor:
      break;
  }
  switch (field_) {
    case Field::kDtype:
      return fmt::format("dtype of tensor '{}'; a string is wanted", Printable(tensor_.name));
    case Field::kShape:
      return fmt::format("shape of tensor '{}'; an array is wanted", Printable(tensor_.name));
    default:
      return fmt::format("data_offsets of tensor '{}'; an array is wanted",
                         Printable(tensor_.name));
  }
}

bool HeaderHandler::Reject(const std::string& got) {
  HOPYARD_CHECK(false, kInvalidArgument) << file_ << ": got " << got << " as " << Where();
  return false;
}

bool HeaderHandler::number_unsigned(uint64_t value) {
  if (at_ == At::kShape) {
    HOPYARD_CHECK(value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
                  kInvalidArgument)
        << file_ << ": shape of tensor '" << Printable(tensor_.name) << "' holds " << value
        << "; at most 2^63 - 1 is allowed";
    HOPYARD_CHECK(tensor_.shape.size() < kMaxStoredDims, kInvalidArgument)
        << file_ << ": tensor '" << Printable(tensor_.name) << "' has more than " << kMaxStoredDims
        << " dimensions";
    tensor_.shape.push_back(static_cast<int64_t>(value));
    return true;
  }
  if (at_ == At::kOffsets) {
    HOPYARD_CHECK(num_offsets_ < offsets_.size(), kInvalidArgument)
        << file_ << ": data_offsets of tensor '" << Printable(tensor_.name)
        << "' has more than two numbers; [begin, end] is wanted";
    offsets_.at(num_offsets_++) = value;
    return true;
  }
  return Reject(fmt::format("{}", value));
}

bool HeaderHandler::string(std::string& value) {
  if (at_ == At::kMetadata) {
    return true;
  }
  if (at_ != At::kTensor || field_ != Field::kDtype) {
    return Reject("a string");
  }
  tensor_.dtype = FindStoredDtype(value);
  HOPYARD_CHECK(tensor_.dtype != nullptr, kInvalidArgument)
      << file_ << ": tensor '" << Printable(tensor_.name) << "' has dtype '" << Printable(value)
      << "'; one of " << StoredDtypeNames() << " is wanted";
  return true;
}

bool HeaderHandler::start_object(size_t /*count*/) {
  if (at_ == At::kStart) {
    at_ = At::kTop;
    return true;
  }
  if (at_ == At::kEntry) {
    at_ = entry_is_metadata_ ? At::kMetadata : At::kTensor;
    return true;
  }
  return Reject("an object");
}

bool HeaderHandler::key(std::string& name) {
  if (at_ == At::kMetadata) {
    return true;
  }
  if (at_ == At::kTop) {
    entry_is_metadata_ = name == kMetadataKey;
    HOPYARD_CHECK(!entry_is_metadata_ || !has_metadata_, kInvalidArgument)
        << file_ << ": the header has '" << kMetadataKey << "' twice";
    has_metadata_ = has_metadata_ || entry_is_metadata_;
    tensor_ = StoredTensor{};
    tensor_.name = std::move(name);
    field_ = Field::kNone;
    has_shape_ = false;
    has_offsets_ = false;
    num_offsets_ = 0;
    at_ = At::kEntry;
    return true;
  }
  field_ = name == "dtype"          ? Field::kDtype
           : name == "shape"        ? Field::kShape
           : name == "data_offsets" ? Field::kOffsets
                                    : Field::kNone;
  HOPYARD_CHECK(field_ != Field::kNone, kInvalidArgument)
      << file_ << ": tensor '" << Printable(tensor_.name) << "' has a field '" << Printable(name)
      << "'; dtype, shape and data_offsets are wanted";
  const bool repeated = (field_ == Field::kDtype && tensor_.dtype != nullptr) ||
                        (field_ == Field::kShape && has_shape_) ||
                        (field_ == Field::kOffsets && has_offsets_);
  HOPYARD_CHECK(!repeated, kInvalidArgument) << file_ << ": tensor '" << Printable(tensor_.name)
                                             << "' has the field " << Printable(name) << " twice";
  return true;
}

bool HeaderHandler::end_object() {
  if (at_ == At::kTensor) {
    FinishTensor();
  }
  at_ = at_ == At::kTop ? At::kEnd : At::kTop;
  return true;
}

bool HeaderHandler::start_array(size_t /*count*/) {
  if (at_ != At::kTensor || field_ == Field::kDtype) {
    return Reject("an array");
  }
  at_ = field_ == Field::kShape ? At::kShape : At::kOffsets;
  (at_ == At::kShape ? has_shape_ : has_offsets_) = true;
  return true;
}

bool HeaderHandler::end_array() {
  HOPYARD_CHECK(at_ != At::kOffsets || num_offsets_ == offsets_.size(), kInvalidArgument)
      << file_ << ": data_offsets of tensor '" << Printable(tensor_.name) << "' has "
      << num_offsets_ << " numbers; [begin, end] is wanted";
  at_ = At::kTensor;
  return true;
}

void HeaderHandler::FinishTensor() {
  const std::string name = Printable(tensor_.name);
  HOPYARD_CHECK(tensor_.dtype != nullptr && has_shape_ && has_offsets_, kInvalidArgument)
      << file_ << ": tensor '" << name << "' lacks "
      << (tensor_.dtype == nullptr ? "dtype"
          : has_shape_             ? "data_offsets"
                                   : "shape");
  tensor_.begin = offsets_[0];
  tensor_.end = offsets_[1];
  HOPYARD_CHECK(tensor_.begin <= tensor_.end, kInvalidArgument)
      << file_ << ": tensor '" << name << "' has data_offsets [" << tensor_.begin << ", "
      << tensor_.end << "]; begin <= end is wanted";
  const std::optional<uint64_t> bytes = StoredBytes(*tensor_.dtype, tensor_.shape);
  HOPYARD_CHECK(bytes.has_value(), kInvalidArgument)
      << file_ << ": tensor '" << name << "' of shape " << ShapeText(tensor_.shape) << " and dtype "
      << tensor_.dtype->name << " has no valid size: a whole number of bytes below 2^61 is wanted";
  HOPYARD_CHECK(*bytes == tensor_.end - tensor_.begin, kInvalidArgument)
      << file_ << ": tensor '" << name << "' has data_offsets [" << tensor_.begin << ", "
      << tensor_.end << "], " << tensor_.end - tensor_.begin << " bytes; shape "
      << ShapeText(tensor_.shape) << " of " << tensor_.dtype->name << " wants " << *bytes;
  tensors_.push_back(std::move(tensor_));
}

// Names unique; every tensor inside the data section; no overlaps, no holes.
void CheckTensors(const std::vector<StoredTensor>& by_name, uint64_t data_bytes,
                  const std::string& file) {
  for (size_t i = 1; i < by_name.size(); ++i) {
    HOPYARD_CHECK(by_name[i - 1].name != by_name[i].name, kInvalidArgument)
        << file << ": tensor '" << Printable(by_name[i].name) << "' appears twice in the header";
  }
  std::vector<const StoredTensor*> by_offset;
  by_offset.reserve(by_name.size());
  for (const StoredTensor& tensor : by_name) {
    HOPYARD_CHECK(tensor.end <= data_bytes, kInvalidArgument)
        << file << ": tensor '" << Printable(tensor.name) << "' has data_offsets [" << tensor.begin
        << ", " << tensor.end << "]; the file has " << data_bytes
        << " bytes of data (is it truncated?)";
    by_offset.push_back(&tensor);
  }
  std::sort(by_offset.begin(), by_offset.end(), [](const StoredTensor* a, const StoredTensor* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  uint64_t covered = 0;
  const StoredTensor* previous = nullptr;
  for (const StoredTensor* tensor : by_offset) {
    HOPYARD_CHECK(tensor->begin >= covered, kInvalidArgument)
        << file << ": tensor '" << Printable(tensor->name) << "' at [" << tensor->begin << ", "
        << tensor->end << "] overlaps tensor '" << Printable(previous->name) << "' at ["
        << previous->begin << ", " << previous->end << "]";
    HOPYARD_CHECK(tensor->begin == covered, kInvalidArgument)
        << file << ": bytes [" << covered << ", " << tensor->begin
        << ") of the data belong to no tensor; the next is '" << Printable(tensor->name) << "'";
    covered = tensor->end;
    previous = tensor;
  }
  HOPYARD_CHECK(covered == data_bytes, kInvalidArgument)
      << file << ": bytes [" << covered << ", " << data_bytes
      << ") of the data belong to no tensor";
}

}  // namespace

const StoredDtype* FindStoredDtype(std::string_view name) {
  const auto* found = std::find_if(kStoredDtypes.begin(), kStoredDtypes.end(),
                                   [&](const StoredDtype& dtype) { return dtype.name == name; });
  return found == kStoredDtypes.end() ? nullptr : &*found;
}

std::string StoredDtypeNames() {
  std::vector<std::string_view> names;
  names.reserve(kStoredDtypes.size());
  for (const StoredDtype& dtype : kStoredDtypes) {
    names.push_back(dtype.name);
  }
  return fmt::format("{}", fmt::join(names, ", "));
}

std::optional<uint64_t> StoredBytes(const StoredDtype& dtype, const std::vector<int64_t>& shape) {
  // Zero extents are left out of the overflow check's product, so that strides cannot overflow
  // either.
  uint64_t bits = dtype.bits;
  bool empty = false;
  for (const int64_t extent : shape) {
    empty = empty || extent == 0;
    const auto factor = static_cast<uint64_t>(std::max<int64_t>(extent, 1));
    if (__builtin_mul_overflow(bits, factor, &bits)) {
      return std::nullopt;
    }
  }
  if (empty) {
    return 0;
  }
  if (bits % 8 != 0) {
    return std::nullopt;
  }
  return bits / 8;
}

SafetensorsHeader ParseSafetensors(const void* data, size_t size, std::string_view file) {
  constexpr uint64_t kLengthBytes = 8;
  const std::string name = Printable(file);
  HOPYARD_CHECK(size >= kLengthBytes, kInvalidArgument)
      << name << ": has " << size << " bytes; a safetensors file begins with an 8-byte length";
  const auto* bytes = static_cast<const uint8_t*>(data);
  uint64_t header_bytes = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) {
    header_bytes |= static_cast<uint64_t>(bytes[i]) << (8 * i);
  }
  HOPYARD_CHECK(header_bytes <= kMaxHeaderBytes, kInvalidArgument)
      << name << ": header length is " << header_bytes << " bytes; at most " << kMaxHeaderBytes
      << " are allowed";
  HOPYARD_CHECK(header_bytes <= size - kLengthBytes, kInvalidArgument)
      << name << ": header length is " << header_bytes << " bytes; the file has "
      << size - kLengthBytes << " after its first 8 (is it truncated?)";
  const uint8_t* header_data = bytes + kLengthBytes;
  HOPYARD_CHECK(header_bytes >= 2 && header_data[0] == '{', kInvalidArgument)
      << name << ": the header does not begin with '{'; is this a safetensors file?";

  HeaderHandler handler(file);
  nlohmann::json::sax_parse(header_data, header_data + header_bytes, &handler);
  SafetensorsHeader header;
  header.data_begin = kLengthBytes + header_bytes;
  header.tensors = handler.TakeTensors();
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const StoredTensor& a, const StoredTensor& b) { return a.name < b.name; });
  CheckTensors(header.tensors, size - header.data_begin, name);
  return header;
}

TensorView ViewOf(const StoredTensor& tensor, const SafetensorsHeader& header, const void* data,
                  std::string_view file) {
  HOPYARD_CHECK(tensor.dtype->view.has_value(), kUnsupported)
      << Printable(file) << ": tensor '" << Printable(tensor.name) << "' has dtype "
      << tensor.dtype->name << ", which no view can carry";
  HOPYARD_CHECK(tensor.shape.size() <= static_cast<size_t>(TensorView::kMaxDims), kUnsupported)
      << Printable(file) << ": tensor '" << Printable(tensor.name) << "' has shape "
      << ShapeText(tensor.shape) << "; at most " << TensorView::kMaxDims
      << " dimensions are supported";
  TensorView view;
  view.dtype = *tensor.dtype->view;
  view.ndim = static_cast<int>(tensor.shape.size());
  std::copy(tensor.shape.begin(), tensor.shape.end(), view.shape.begin());
  int64_t stride = 1;
  for (size_t d = tensor.shape.size(); d-- > 0;) {
    view.strides.at(d) = stride;
    stride *= tensor.shape[d];
  }
  const uint8_t* first = static_cast<const uint8_t*>(data) + header.data_begin + tensor.begin;
  const auto element = static_cast<uintptr_t>(SizeOf(view.dtype));
  HOPYARD_CHECK(reinterpret_cast<uintptr_t>(first) % element == 0, kUnsupported)
      << Printable(file) << ": tensor '" << Printable(tensor.name) << "' begins at byte "
      << header.data_begin + tensor.begin << ", which is not a multiple of " << element
      << " (its element size); rewrite the file, e.g. with safetensors' save_file or "
         "WriteSafetensors, which align";
  view.data = const_cast<uint8_t*>(first);
  return view;
}

}  // namespace hopyard::checkpoint

namespace hopyard {

SafetensorsFile SafetensorsFile::Open(const std::string& path) {
  SafetensorsFile file;
  file.impl_ = std::make_shared<const Impl>(path);
  return file;
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> names;
  names.reserve(impl_->header.tensors.size());
  for (const checkpoint::StoredTensor& tensor : impl_->header.tensors) {
    names.push_back(tensor.name);
  }
  return names;
}

TensorView SafetensorsFile::Tensor(std::string_view name) const {
  const auto& tensors = impl_->header.tensors;
  const auto found = std::lower_bound(tensors.begin(), tensors.end(), name,
                                      [](const checkpoint::StoredTensor& tensor,
                                         std::string_view key) { return tensor.name < key; });
  HOPYARD_CHECK(found != tensors.end() && found->name == name, kInvalidArgument)
      << checkpoint::Printable(impl_->map.path()) << ": has no tensor '"
      << checkpoint::Printable(name) << "' among its " << tensors.size();
  return checkpoint::ViewOf(*found, impl_->header, impl_->map.data(), impl_->map.path());
}

std::shared_ptr<const void> SafetensorsFile::owner() const {
  return impl_;
}

}  // namespace hopyard
