// SPDX-License-Identifier: Apache-2.0
// What cutting a batch into chunks of tokens adds on Hopper: each chunk's live tokens, and its rows
// counted from the start of the batch.
#pragma once

#include <cstdint>

#include "device/queue.h"

namespace hopyard::permute {

// All pointers are device memory.
struct ChunkSm90Args {
  const int32_t* num_tokens = nullptr;  // live tokens of the batch
  int64_t token_begin = 0;              // of the chunk
  int64_t max_tokens = 0;
  int32_t* chunk_tokens = nullptr;  // out: clamp(*num_tokens - token_begin, 0, max_tokens)
};
// Enqueues the kernel. Throws Error{kCuda} when the launch fails.
void ChunkTokensSm90(const ChunkSm90Args& args, const device::Queue& queue);

struct RowMapSm90Args {
  const int32_t* slot_to_row = nullptr;  // of the chunk, -1 = not local
  int64_t row_base = 0;                  // of the chunk in the batch
  int64_t max_tokens = 0;
  int slots_per_token = 1;
  const int32_t* num_tokens = nullptr;  // of the chunk, clamped to [0, max_tokens]; null: all
  int32_t* out = nullptr;               // [max_tokens, slots_per_token]
};
// out = slot_to_row + row_base where the slot is local. Enqueued and throwing as above.
void CopyRowMapSm90(const RowMapSm90Args& args, const device::Queue& queue);

}  // namespace hopyard::permute
