// SPDX-License-Identifier: Apache-2.0
#include "cli/buffer.h"

#include <algorithm>
#include <cstring>

#include "cli/console.h"
#include "core/error.h"
#include "core/parallel.h"
#include "core/shape.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hopyard::cli {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kSmallAlignment = 256;

}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(bytes) {
  const int64_t alignment = bytes >= 2 * kHugePage ? kHugePage : kSmallAlignment;
  const int64_t size = RoundUp(std::max<int64_t>(bytes, 1), alignment);
  memory_.reset(std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(size)));
  HOPYARD_CHECK(memory_ != nullptr, kOutOfMemory)
      << "cannot allocate " << HumanBytes(size) << "; use fewer experts or tokens";
#if defined(__linux__)
  if (alignment == kHugePage) {
    // Advice only: where huge pages are off the memory works all the same.
    (void)madvise(memory_.get(), static_cast<size_t>(size), MADV_HUGEPAGE);
  }
#endif
}

Buffer Buffer::Copy() const {
  Buffer copy(bytes_);
  const int64_t chunks = CeilDiv(bytes_, kHugePage);
  ParallelFor(0, chunks, 1, MaxThreads(), [&](int64_t chunk, int /*thread*/) {
    const int64_t begin = chunk * kHugePage;
    std::memcpy(copy.as<char>() + begin, as<char>() + begin,
                static_cast<size_t>(std::min(kHugePage, bytes_ - begin)));
  });
  return copy;
}

}  // namespace hopyard::cli
