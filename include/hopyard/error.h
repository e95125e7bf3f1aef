// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <string>
#include <string_view>
#include <utility>

namespace hopyard {

// What went wrong, as a promise: the kind decides the Python exception type and may be tested for.
enum class ErrorKind {
  kInvalidArgument,  // ValueError: the caller's argument, file or environment is wrong
  kUnsupported,      // NotImplementedError: valid, but no kernel or mode does it; Explain says why
  kOutOfMemory,      // MemoryError
  kCuda,             // RuntimeError
  kNccl,             // RuntimeError
  kTimeout,          // TimeoutError
  kInternal,         // InternalError: a defect of Hopyard
};

[[nodiscard]] constexpr std::string_view ToString(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return "InvalidArgument";
    case ErrorKind::kUnsupported:
      return "Unsupported";
    case ErrorKind::kOutOfMemory:
      return "OutOfMemory";
    case ErrorKind::kCuda:
      return "Cuda";
    case ErrorKind::kNccl:
      return "Nccl";
    case ErrorKind::kTimeout:
      return "Timeout";
    case ErrorKind::kInternal:
      return "Internal";
  }
  return "Unknown";
}

// The only exception type the library throws on purpose. A message names the argument, what it
// got, what it wanted and, where there is one, the remedy.
class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}

  [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }
  [[nodiscard]] const std::string& message() const noexcept { return message_; }
  [[nodiscard]] const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  std::string message_;
};

}  // namespace hopyard
