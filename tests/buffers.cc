// SPDX-License-Identifier: Apache-2.0
#include "tests/buffers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "core/shape.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace hopyard::test {
namespace {

constexpr int64_t kGuardBytes = 256;
constexpr uint8_t kCanary = 0xC5;

}  // namespace

GuardedBuffer::GuardedBuffer(int64_t bytes, int64_t offset)
    : bytes_(bytes), total_(RoundUp(2 * kGuardBytes + bytes + offset, 256)) {
  base_ = static_cast<uint8_t*>(std::aligned_alloc(256, static_cast<size_t>(total_)));
  data_ = base_ + kGuardBytes + offset;
  std::memset(base_, kCanary, static_cast<size_t>(total_));
  Fill(kPoison);
  Guard(true);
}

GuardedBuffer::~GuardedBuffer() {
  Guard(false);
  std::free(base_);
}

void GuardedBuffer::Guard([[maybe_unused]] bool on) const {
#if defined(__SANITIZE_ADDRESS__)
  const auto before = static_cast<size_t>(data_ - base_);
  const auto after = static_cast<size_t>(total_ - bytes_) - before;
  if (on) {
    ASAN_POISON_MEMORY_REGION(base_, before);
    ASAN_POISON_MEMORY_REGION(data_ + bytes_, after);
  } else {
    ASAN_UNPOISON_MEMORY_REGION(base_, static_cast<size_t>(total_));
  }
#endif
}

bool GuardedBuffer::Intact() const {
  Guard(false);
  const auto is_canary = [](uint8_t byte) { return byte == kCanary; };
  const bool intact = std::all_of(base_, data_, is_canary) &&
                      std::all_of(data_ + bytes_, base_ + total_, is_canary);
  Guard(true);
  return intact;
}

void GuardedBuffer::Fill(uint8_t value) const {
  std::memset(data_, value, static_cast<size_t>(bytes_));
}

TensorView Arena::Array(DType dtype, std::initializer_list<int64_t> shape, int64_t offset) {
  int64_t count = 1;
  for (const int64_t extent : shape) {
    count *= extent;
  }
  void* data = Bytes(count * SizeOf(dtype), offset).data();
  return TensorView::Contiguous(data, dtype, shape);
}

GuardedBuffer& Arena::Bytes(int64_t bytes, int64_t offset) {
  return buffers_.emplace_back(bytes, offset);
}

bool Arena::Intact() const {
  return std::all_of(buffers_.begin(), buffers_.end(),
                     [](const GuardedBuffer& buffer) { return buffer.Intact(); });
}

bool SmallTests() {
  const char* scale = std::getenv("HOPYARD_TEST_SCALE");
  return scale != nullptr && std::string_view(scale) == "small";
}

}  // namespace hopyard::test
