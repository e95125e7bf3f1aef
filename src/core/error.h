// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>

#include "hopyard/error.h"

// HOPYARD_CHECK(cond, kind) << message     the caller's fault: throws Error{kind}
// HOPYARD_INTERNAL(cond) << message        our fault: throws Error{kInternal} with file and line
// The message is built only on failure.
#define HOPYARD_CHECK(cond, kind) \
  if (cond) [[likely]] {          \
  } else                          \
    ::hopyard::detail::ErrorStream(::hopyard::ErrorKind::kind).stream()

#define HOPYARD_INTERNAL(cond)                                                                 \
  if (cond) [[likely]] {                                                                       \
  } else                                                                                       \
    ::hopyard::detail::ErrorStream(::hopyard::ErrorKind::kInternal, #cond, __FILE__, __LINE__) \
        .stream()

namespace hopyard::detail {

// Collects a message; the destructor throws it.
class ErrorStream {
 public:
  explicit ErrorStream(ErrorKind kind) : kind_(kind) {}
  ErrorStream(ErrorKind kind, const char* condition, const char* file, int line) : kind_(kind) {
    stream_ << file << ':' << line << ": internal check failed: " << condition << ' ';
  }
  ErrorStream(const ErrorStream&) = delete;
  ErrorStream& operator=(const ErrorStream&) = delete;
  // NOLINTNEXTLINE(bugprone-exception-escape): throwing is this destructor's purpose.
  ~ErrorStream() noexcept(false) { throw Error(kind_, stream_.str()); }

  std::ostream& stream() { return stream_; }

 private:
  ErrorKind kind_;
  std::ostringstream stream_;
};

}  // namespace hopyard::detail
