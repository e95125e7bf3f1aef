// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any bytes either parse or throw Error, and every byte of a tensor that a view
// promises can be read. Corpus: tests/fuzz/safetensors_fuzz_corpus.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "hopyard/error.h"

#include "checkpoint/safetensors.h"

namespace {

using hopyard::Error;
using hopyard::ErrorKind;

// Reads every byte of a view, or the tensor is one that no view can carry.
void ReadTensor(const hopyard::checkpoint::StoredTensor& tensor,
                const hopyard::checkpoint::SafetensorsHeader& header, const uint8_t* file) {
  try {
    const auto view = hopyard::checkpoint::ViewOf(tensor, header, file, "fuzz");
    const auto* bytes = static_cast<const volatile uint8_t*>(view.data);
    for (int64_t i = 0; i < view.numel() * hopyard::SizeOf(view.dtype); ++i) {
      (void)bytes[i];
    }
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kUnsupported) {
      __builtin_trap();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // A copy of exactly this size lets AddressSanitizer see a read past the end; the vector's
  // alignment stands for the map's.
  const std::vector<uint8_t> file(data, data + size);
  try {
    const auto header = hopyard::checkpoint::ParseSafetensors(file.data(), file.size(), "fuzz");
    for (const auto& tensor : header.tensors) {
      ReadTensor(tensor, header, file.data());
    }
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kInvalidArgument || error.message().empty()) {
      __builtin_trap();
    }
  }
  return 0;
}
