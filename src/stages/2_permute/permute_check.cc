// SPDX-License-Identifier: Apache-2.0
// Judges a permutation by its invariants alone, without building one of its own.
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "stages/2_permute/permute.h"

namespace hopyard::permute {
namespace {

// Reads i32 arrays and remembers the first violation.
class Checker {
 public:
  Checker(const TensorView& local_slots, const PermuteOptions& options,
          const PermuteOutputs& outputs)
      : local_slots_(local_slots), options_(options), outputs_(outputs) {}

  std::string Run() {
    Counts();
    Segments();
    if (message_.empty()) {  // the maps are indexed through the segments
      SlotsToRows();
    }
    if (message_.empty()) {
      RowsToSlots();
      Tiles();
    }
    return message_;
  }

 private:
  static int64_t At(const TensorView& tensor, int64_t index) {
    return tensor.as<const int32_t>()[index];
  }
  void Expect(int64_t got, int64_t wanted, const char* array, int64_t index) {
    if (got != wanted && message_.empty()) {
      std::ostringstream text;
      text << array << '[' << index << "] is " << got << ", wanted " << wanted;
      message_ = text.str();
    }
  }
  void Fail(const char* what, int64_t index) {
    if (message_.empty()) {
      std::ostringstream text;
      text << what << " at " << index;
      message_ = text.str();
    }
  }
  [[nodiscard]] int64_t num_slots() const { return local_slots_.shape[0] * local_slots_.shape[1]; }
  [[nodiscard]] bool IsLocal(int64_t slot) const {
    const int64_t expert = At(local_slots_, slot);
    return expert >= 0 && expert < options_.num_local_experts;
  }

  void Counts() {
    std::vector<int64_t> counts(static_cast<size_t>(options_.num_local_experts));
    for (int64_t slot = 0; slot < num_slots(); ++slot) {
      if (IsLocal(slot)) {
        ++counts[static_cast<size_t>(At(local_slots_, slot))];
      }
    }
    for (int64_t e = 0; e < options_.num_local_experts; ++e) {
      Expect(At(outputs_.expert_counts, e), counts[static_cast<size_t>(e)], "expert_counts", e);
    }
  }

  // Segment e starts where segment e - 1 ends; its length is its count rounded up.
  void Segments() {
    Expect(At(outputs_.expert_offsets, 0), 0, "expert_offsets", 0);
    for (int64_t e = 0; e < options_.num_local_experts; ++e) {
      const int64_t count = At(outputs_.expert_counts, e);
      const int64_t length = At(outputs_.expert_offsets, e + 1) - At(outputs_.expert_offsets, e);
      if (length < count || length - count >= options_.row_alignment ||
          length % options_.row_alignment != 0) {
        Fail("segment length does not fit the expert's slots", e);
      }
    }
    const int64_t num_rows = At(outputs_.expert_offsets, options_.num_local_experts);
    Expect(At(outputs_.num_rows, 0), num_rows, "num_rows", 0);
    if (num_rows > MaxRows(num_slots(), options_)) {
      Fail("more rows than MaxRows", num_rows);
    }
  }

  // Every local slot has a row of its own among the first `count` rows of its expert's segment, and
  // later slots have later rows.
  void SlotsToRows() {
    std::vector<int64_t> last_row(static_cast<size_t>(options_.num_local_experts), -1);
    for (int64_t slot = 0; slot < num_slots() && message_.empty(); ++slot) {
      const int64_t row = At(outputs_.slot_to_row, slot);
      if (!IsLocal(slot)) {
        Expect(row, -1, "slot_to_row", slot);
        continue;
      }
      const int64_t expert = At(local_slots_, slot);
      const int64_t begin = At(outputs_.expert_offsets, expert);
      if (row < begin || row >= begin + At(outputs_.expert_counts, expert)) {
        Fail("slot_to_row leaves the expert's rows: slot", slot);
        return;
      }
      int64_t& last = last_row[static_cast<size_t>(expert)];
      if (row <= last) {
        Fail("rows of one expert are not in the order of their slots: slot", slot);
      }
      last = row;
      Expect(At(outputs_.row_to_slot, row), slot, "row_to_slot", row);
      Expect(At(outputs_.row_to_token, row), slot / local_slots_.shape[1], "row_to_token", row);
    }
  }

  // Rows behind an expert's slots are padding; the rows before were all claimed by SlotsToRows.
  void RowsToSlots() {
    for (int64_t e = 0; e < options_.num_local_experts; ++e) {
      const int64_t end = At(outputs_.expert_offsets, e + 1);
      for (int64_t row = At(outputs_.expert_offsets, e) + At(outputs_.expert_counts, e); row < end;
           ++row) {
        Expect(At(outputs_.row_to_slot, row), -1, "row_to_slot", row);
        Expect(At(outputs_.row_to_token, row), -1, "row_to_token", row);
      }
    }
  }

  // The tiles of an expert follow one another from the start of its segment, come in whole clusters
  // and cover its rows; no cluster is entirely empty.
  void Tiles() {
    int64_t tile = 0;
    const int64_t num_tiles = At(outputs_.num_tiles, 0);
    if (num_tiles < 0 || num_tiles > MaxTiles(num_slots(), options_)) {
      Fail("num_tiles leaves 0 .. MaxTiles", num_tiles);
      return;
    }
    for (int64_t e = 0; e < options_.num_local_experts && message_.empty(); ++e) {
      const int64_t first = At(outputs_.expert_offsets, e);
      const int64_t end = first + At(outputs_.expert_counts, e);
      int64_t begin = first;
      int64_t in_cluster = 0;
      while (begin < end || in_cluster % options_.cluster != 0) {
        if (tile >= num_tiles) {
          Fail("an expert's rows lack a tile: expert", e);
          return;
        }
        Expect(At(outputs_.tile_expert, tile), e, "tile_expert", tile);
        Expect(At(outputs_.tile_row_begin, tile), begin, "tile_row_begin", tile);
        const int64_t full = begin + options_.tile;
        Expect(At(outputs_.tile_row_end, tile), full <= end ? full : end, "tile_row_end", tile);
        begin = full;
        ++tile;
        ++in_cluster;
      }
    }
    Expect(num_tiles, tile, "num_tiles", 0);
  }

  const TensorView& local_slots_;
  const PermuteOptions& options_;
  const PermuteOutputs& outputs_;
  std::string message_;
};

}  // namespace

std::string CheckPermutation(const TensorView& local_slots, const PermuteOptions& options,
                             const PermuteOutputs& outputs) {
  return Checker(local_slots, options, outputs).Run();
}

}  // namespace hopyard::permute
