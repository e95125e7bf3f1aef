// SPDX-License-Identifier: Apache-2.0
// Carries Hopyard's errors across the language border.
#pragma once

#include <new>
#include <string>
#include <utility>

#include <tvm/ffi/error.h>

#include "hopyard/error.h"

namespace hopyard::binding {

// The name that the Python package has registered for the exception class of a kind.
[[nodiscard]] constexpr const char* PythonName(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return "ValueError";
    case ErrorKind::kUnsupported:
      return "NotImplementedError";
    case ErrorKind::kOutOfMemory:
      return "MemoryError";
    case ErrorKind::kCuda:
    case ErrorKind::kNccl:
      return "RuntimeError";
    case ErrorKind::kTimeout:
      return "TimeoutError";
    case ErrorKind::kInternal:
      return "InternalError";
  }
  return "InternalError";
}

[[noreturn]] inline void ThrowInvalid(std::string message) {
  throw Error(ErrorKind::kInvalidArgument, std::move(message));
}

// Runs fn and turns what it throws into a tvm-ffi error; every exported function goes through it.
template <class Fn>
auto Guarded(Fn&& fn) -> decltype(fn()) {
  try {
    return std::forward<Fn>(fn)();
  } catch (const Error& error) {
    throw tvm::ffi::Error(PythonName(error.kind()), error.message(), "");
  } catch (const std::bad_alloc&) {
    throw tvm::ffi::Error("MemoryError", "hopyard: the host is out of memory", "");
  }
}

}  // namespace hopyard::binding
