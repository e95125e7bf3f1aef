// SPDX-License-Identifier: Apache-2.0
// Memory for tests: exact sizes, canaries on both sides, poison inside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>

#include "hopyard/tensor.h"

namespace hopyard::test {

inline constexpr uint8_t kPoison = 0xFF;  // NaN in every float format, -1 in every integer

// `bytes` of memory at a multiple of 256 plus `offset`, filled with poison, between two canaries
// that AddressSanitizer also guards.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t bytes, int64_t offset = 0);
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;
  ~GuardedBuffer();

  [[nodiscard]] uint8_t* data() const { return data_; }
  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] bool Intact() const;
  void Fill(uint8_t value) const;

 private:
  void Guard(bool on) const;

  uint8_t* base_ = nullptr;
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  int64_t total_ = 0;
};

// Owns buffers at stable addresses.
class Arena {
 public:
  // Poisoned array of the shape, contiguous.
  TensorView Array(DType dtype, std::initializer_list<int64_t> shape, int64_t offset = 0);
  GuardedBuffer& Bytes(int64_t bytes, int64_t offset = 0);
  [[nodiscard]] bool Intact() const;

 private:
  std::deque<GuardedBuffer> buffers_;
};

// HOPYARD_TEST_SCALE=small asks for fewer and smaller cases.
[[nodiscard]] bool SmallTests();

}  // namespace hopyard::test
