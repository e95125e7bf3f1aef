// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace hopyard::cli {

// Uninitialised memory, aligned to 2 MiB when large (so that huge pages can back it), else 256.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);

  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] void* data() const { return memory_.get(); }
  template <class T>
  [[nodiscard]] T* as() const {
    return static_cast<T*>(memory_.get());
  }
  [[nodiscard]] Buffer Copy() const;

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t bytes_ = 0;
};

}  // namespace hopyard::cli
