// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <unistd.h>

#include "checkpoint/safetensors.h"
#include "checkpoint/text.h"
#include "core/error.h"
#include "core/shape.h"

namespace hopyard {
namespace {

using checkpoint::Printable;

struct Planned {
  const NamedTensor* tensor = nullptr;
  const checkpoint::StoredDtype* dtype = nullptr;
  uint64_t bytes = 0;
};

Planned CheckTensor(const NamedTensor& tensor, const std::string& path) {
  const std::string where =
      fmt::format("WriteSafetensors({}): tensor '{}'", Printable(path), Printable(tensor.name));
  // The name survives a round trip through JSON only if it is UTF-8.
  const std::string text =
      nlohmann::json(tensor.name).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  HOPYARD_CHECK(nlohmann::json::parse(text).get<std::string>() == tensor.name, kInvalidArgument)
      << where << " has a name that is not UTF-8";
  HOPYARD_CHECK(tensor.name != checkpoint::kMetadataKey, kInvalidArgument)
      << where << " has the name that the format reserves";
  Planned planned;
  planned.tensor = &tensor;
  planned.dtype = checkpoint::FindStoredDtype(tensor.dtype);
  HOPYARD_CHECK(planned.dtype != nullptr, kInvalidArgument)
      << where << " has dtype '" << Printable(tensor.dtype) << "'; one of "
      << checkpoint::StoredDtypeNames() << " is wanted";
  HOPYARD_CHECK(tensor.shape.size() <= checkpoint::kMaxStoredDims &&
                    std::all_of(tensor.shape.begin(), tensor.shape.end(),
                                [](int64_t extent) { return extent >= 0; }),
                kInvalidArgument)
      << where << " has shape " << checkpoint::ShapeText(tensor.shape) << "; at most "
      << checkpoint::kMaxStoredDims << " non-negative extents are wanted";
  const std::optional<uint64_t> bytes = checkpoint::StoredBytes(*planned.dtype, tensor.shape);
  HOPYARD_CHECK(bytes.has_value(), kInvalidArgument)
      << where << " of shape " << checkpoint::ShapeText(tensor.shape)
      << " has no valid size: a whole number of bytes below 2^61 is wanted";
  HOPYARD_CHECK(*bytes == 0 || tensor.data != nullptr, kInvalidArgument)
      << where << " has " << *bytes << " bytes but no data";
  planned.bytes = *bytes;
  return planned;
}

// Length, header and padding. The data section begins at a multiple of 8; with the widest elements
// first every tensor is aligned to its element size, and the format allows no gaps.
std::string BuildHeader(const std::vector<Planned>& tensors, const std::string& path) {
  // Readers of the Hugging Face stack want the format key.
  std::string text = fmt::format(R"({{"{}":{{"format":"pt"}})", checkpoint::kMetadataKey);
  uint64_t offset = 0;
  for (const Planned& planned : tensors) {
    text += fmt::format(R"(,{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                        nlohmann::json(planned.tensor->name).dump(), planned.dtype->name,
                        fmt::join(planned.tensor->shape, ","), offset, offset + planned.bytes);
    offset += planned.bytes;
  }
  text += '}';
  text.resize(static_cast<size_t>(RoundUp(static_cast<int64_t>(text.size()), 8)), ' ');
  HOPYARD_CHECK(text.size() <= checkpoint::kMaxHeaderBytes, kInvalidArgument)
      << "WriteSafetensors(" << Printable(path) << "): the header has " << text.size()
      << " bytes; at most " << checkpoint::kMaxHeaderBytes << " are allowed";
  std::string bytes(8, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<char>((text.size() >> (8 * i)) & 0xFFU);
  }
  return bytes + text;
}

// A new file beside `path` that becomes `path` on Commit and vanishes otherwise.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::string path) : path_(std::move(path)) {
    static std::atomic<uint64_t> counter{0};
    temporary_ = fmt::format("{}.{}.{}.tmp", path_, ::getpid(), counter.fetch_add(1));
    constexpr int kMode = 0666;  // less the umask
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, kMode);
    Check(fd_ >= 0, "created");
  }
  ~TemporaryFile() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
    if (!temporary_.empty()) {
      ::unlink(temporary_.c_str());
    }
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  void Write(const void* data, uint64_t bytes) {
    const auto* next = static_cast<const uint8_t*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(fd_, next, static_cast<size_t>(bytes));
      if (written < 0 && errno == EINTR) {
        continue;
      }
      Check(written > 0, "written");
      next += written;
      bytes -= static_cast<uint64_t>(written);
    }
  }

  void Commit() {
    Check(::fsync(fd_) == 0, "flushed");
    const int fd = std::exchange(fd_, -1);
    Check(::close(fd) == 0, "closed");
    Check(::rename(temporary_.c_str(), path_.c_str()) == 0, "renamed to its final name");
    temporary_.clear();
  }

 private:
  // The constructor's own failure leaves no file behind: the destructor does not run then.
  void Check(bool ok, std::string_view verb) const {
    const int code = errno;
    HOPYARD_CHECK(ok, kInvalidArgument)
        << "WriteSafetensors: " << Printable(temporary_) << " cannot be " << verb << ": "
        << std::generic_category().message(code);
  }

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
};

}  // namespace

void WriteSafetensors(const std::string& path, const std::vector<NamedTensor>& tensors) {
  std::vector<Planned> planned;
  std::set<std::string_view> names;
  uint64_t total = 0;
  for (const NamedTensor& tensor : tensors) {
    planned.push_back(CheckTensor(tensor, path));
    HOPYARD_CHECK(names.insert(tensor.name).second, kInvalidArgument)
        << "WriteSafetensors(" << Printable(path) << "): tensor '" << Printable(tensor.name)
        << "' is given twice";
    HOPYARD_CHECK(!__builtin_add_overflow(total, planned.back().bytes, &total), kInvalidArgument)
        << "WriteSafetensors(" << Printable(path) << "): the sizes of the tensors overflow";
  }
  std::stable_sort(planned.begin(), planned.end(), [](const Planned& a, const Planned& b) {
    return a.dtype->bits > b.dtype->bits;
  });
  TemporaryFile file(path);
  const std::string header = BuildHeader(planned, path);
  file.Write(header.data(), header.size());
  for (const Planned& tensor : planned) {
    file.Write(tensor.tensor->data, tensor.bytes);
  }
  file.Commit();
}

}  // namespace hopyard
