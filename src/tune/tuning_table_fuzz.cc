// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: any text either is a table, which writes and reads back as it is, or throws
// Error{kInvalidArgument}. Corpus: tests/fuzz/tuning_table_fuzz_corpus.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "hopyard/error.h"
#include "hopyard/tune.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(static_cast<const char*>(static_cast<const void*>(data)), size);
  try {
    const auto table = hopyard::TuningTable::FromJson(text);
    if (!(hopyard::TuningTable::FromJson(table.ToJson()) == table)) {
      __builtin_trap();
    }
  } catch (const hopyard::Error& error) {
    if (error.kind() != hopyard::ErrorKind::kInvalidArgument || error.message().empty()) {
      __builtin_trap();
    }
  }
  return 0;
}
