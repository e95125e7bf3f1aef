// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace hopyard::checkpoint {

// A regular file mapped read-only. Symbolic links are followed: model caches are made of them.
// The file must not shrink while it is mapped (the kernel would answer a read with SIGBUS).
class MappedFile {
 public:
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const uint8_t* data() const { return data_; }  // page-aligned; null when empty
  [[nodiscard]] size_t size() const { return size_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace hopyard::checkpoint
