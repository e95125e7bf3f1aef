// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/mapped_file.h"

#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "checkpoint/text.h"
#include "core/error.h"
#include "core/file_descriptor.h"

namespace hopyard::checkpoint {
MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a FIFO must fail below, not wait for a writer.
  const FileDescriptor file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  HOPYARD_CHECK(file.get() >= 0, kInvalidArgument)
      << Printable(path_) << ": cannot be opened: " << SystemErrorText();
  struct stat status {};
  HOPYARD_CHECK(::fstat(file.get(), &status) == 0, kInvalidArgument)
      << Printable(path_) << ": cannot be examined: " << SystemErrorText();
  HOPYARD_CHECK(S_ISREG(status.st_mode), kInvalidArgument)
      << Printable(path_) << ": is not a regular file";
  size_ = static_cast<size_t>(status.st_size);
  if (size_ == 0) {
    return;
  }
  void* mapping = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  HOPYARD_CHECK(mapping != MAP_FAILED, kOutOfMemory)
      << Printable(path_) << ": " << size_ << " bytes cannot be mapped: " << SystemErrorText();
  data_ = static_cast<const uint8_t*>(mapping);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    ::munmap(const_cast<uint8_t*>(data_), size_);
  }
}

}  // namespace hopyard::checkpoint
