// SPDX-License-Identifier: Apache-2.0
// Permutation metadata on the GPU: the integers of the CPU backend, and the independent checker.
#include "stages/2_permute/permute_sm90.h"

#include <cstdint>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "stages/2_permute/permute.h"
#include "tests/gpu/device_array.h"

namespace hopyard::permute {
namespace {

using test::DeviceArray;

// The ten output arrays, on the host as the CPU fills them or copied from the device.
struct Arrays {
  std::vector<std::vector<int32_t>> data;

  Arrays(int64_t num_slots, const PermuteOptions& options) {
    const int64_t rows = MaxRows(num_slots, options);
    const int64_t tiles = MaxTiles(num_slots, options);
    const int64_t experts = options.num_local_experts;
    for (const int64_t size : {experts + 1, experts, num_slots, rows, rows, tiles, tiles, tiles,
                               int64_t{1}, int64_t{1}}) {
      data.emplace_back(static_cast<size_t>(size), -1);
    }
  }
  [[nodiscard]] PermuteOutputs View() {
    PermuteOutputs out;
    TensorView* const views[] = {&out.expert_offsets, &out.expert_counts, &out.slot_to_row,
                                 &out.row_to_slot,    &out.row_to_token,  &out.tile_expert,
                                 &out.tile_row_begin, &out.tile_row_end,  &out.num_tiles,
                                 &out.num_rows};
    for (size_t i = 0; i < data.size(); ++i) {
      *views[i] = TensorView::Contiguous(data[i].data(), DType::kInt32,
                                         {static_cast<int64_t>(data[i].size())});
    }
    return out;
  }
};

struct Problem {
  PermuteOptions options;
  int64_t tokens = 0;
  int slots_per_token = 1;
  int64_t live_tokens = -1;  // -1: no device count
  // A second list of tiles over the same dense rows; 0: none.
  int64_t second_tile = 0;
  int64_t second_cluster = 1;
};

// The arrays of a permutation on the device, poisoned, in the order of Arrays.
class DeviceArrays {
 public:
  explicit DeviceArrays(const Arrays& like) {
    for (const auto& array : like.data) {
      arrays_.push_back(std::make_unique<DeviceArray<int32_t>>(static_cast<int64_t>(array.size())));
    }
  }
  [[nodiscard]] int32_t* at(size_t i) const { return arrays_[i]->get(); }
  [[nodiscard]] TileListSm90 Tiles(const PermuteOptions& options) const {
    return {static_cast<int>(options.tile),
            static_cast<int>(options.cluster),
            at(5),
            at(6),
            at(7),
            at(8)};
  }
  void Download(Arrays* to) const {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      to->data[i] = arrays_[i]->Download();
      EXPECT_TRUE(arrays_[i]->GuardsIntact()) << "array " << i;
    }
  }

 private:
  std::vector<std::unique_ptr<DeviceArray<int32_t>>> arrays_;
};

// The kernels' arrays of the first list, then of the second with the maps of the first.
std::vector<Arrays> RunOnGpu(const Problem& problem, const std::vector<PermuteOptions>& lists,
                             const std::vector<int32_t>& slots) {
  const auto num_slots = static_cast<int64_t>(slots.size());
  const PermuteOptions& options = lists[0];
  const DeviceArray<int32_t> local(slots);
  const DeviceArray<int32_t> scratch(PermuteScratchInts(num_slots, options.num_local_experts));
  const DeviceArray<int32_t> count(std::vector<int32_t>{static_cast<int32_t>(problem.live_tokens)});
  std::vector<DeviceArrays> arrays;
  std::vector<Arrays> got;
  for (const PermuteOptions& list : lists) {
    got.emplace_back(num_slots, list);
    arrays.emplace_back(got.back());
  }
  PermuteSm90Args args;
  args.segments = options.num_local_experts;
  args.padded = options.row_alignment != 1;
  args.max_tokens = problem.tokens;
  args.slots_per_token = problem.slots_per_token;
  args.num_tokens = problem.live_tokens < 0 ? nullptr : count.get();
  args.local_slots = local.get();
  args.chunk_counts = scratch.get();
  int32_t** const pointers[] = {&args.expert_offsets, &args.expert_counts, &args.slot_to_row,
                                &args.row_to_slot, &args.row_to_token};
  for (size_t i = 0; i < std::size(pointers); ++i) {
    *pointers[i] = arrays[0].at(i);
  }
  args.num_rows = arrays[0].at(9);
  for (size_t list = 0; list < lists.size(); ++list) {
    args.tiles[list] = arrays[list].Tiles(lists[list]);
  }
  PermuteSm90(args, nullptr);
  EXPECT_TRUE(scratch.GuardsIntact());
  for (size_t list = 0; list < lists.size(); ++list) {
    arrays[list].Download(&got[list]);
  }
  // Dense rows, whatever the tiles.
  for (const size_t i : {0, 1, 2, 3, 4, 9}) {
    got.back().data[i] = got.front().data[i];
  }
  return got;
}

void ExpectCpuIntegers(const Problem& problem, const std::vector<int32_t>& slots) {
  const int64_t live = problem.live_tokens < 0 ? problem.tokens : problem.live_tokens;
  const TensorView view =
      TensorView::Contiguous(slots.data(), DType::kInt32, {live, problem.slots_per_token});
  std::vector<PermuteOptions> lists = {problem.options};
  if (problem.second_tile > 0) {
    lists.push_back(
        {problem.options.num_local_experts, problem.second_tile, problem.second_cluster, 1});
  }
  std::vector<Arrays> got = RunOnGpu(problem, lists, slots);
  for (size_t list = 0; list < lists.size(); ++list) {
    Arrays want(static_cast<int64_t>(slots.size()), lists[list]);
    PermuteCpu(view, lists[list], want.View());
    for (size_t i = 0; i < want.data.size(); ++i) {
      // Poison is -1 on both sides, so what must stay untouched is compared as well.
      ASSERT_EQ(got[list].data[i], want.data[i]) << "list " << list << ", array " << i;
    }
    ASSERT_EQ(CheckPermutation(view, lists[list], got[list].View()), "") << "list " << list;
  }
}

std::vector<int32_t> RandomSlots(std::mt19937& random, int64_t count, int experts, int skew) {
  std::vector<int32_t> slots(static_cast<size_t>(count));
  for (int32_t& slot : slots) {
    const auto draw = static_cast<int32_t>(random() % static_cast<unsigned>(experts + 2)) - 1;
    slot = skew != 0 && random() % 4 != 0 ? skew % experts : draw;
  }
  return slots;
}

TEST(PermuteSm90, HasTheIntegersOfTheCpu) {
  HOPYARD_NEEDS_GPU();
  std::mt19937 random(5);
  for (const int experts : {1, 3, 32, 257, 2080}) {
    for (const int64_t tokens : {1, 2, 33, 511, 1024, 5000}) {
      for (const int skew : {0, 7}) {
        for (const PermuteOptions& options :
             {PermuteOptions{experts, 64, 1, 1}, PermuteOptions{experts, 8, 2, 16},
              PermuteOptions{experts, 128, 2, 1}}) {
          const Problem problem{options, tokens, 4, -1};
          ExpectCpuIntegers(problem, RandomSlots(random, tokens * 4, experts, skew));
          ASSERT_FALSE(HasFatalFailure()) << experts << ' ' << tokens << ' ' << options.tile;
        }
      }
    }
  }
}

// Two GEMMs over the same rows: smaller, larger and equal tiles, with and without clusters.
TEST(PermuteSm90, HasTheIntegersOfTheCpuInBothLists) {
  HOPYARD_NEEDS_GPU();
  std::mt19937 random(8);
  for (const int experts : {1, 3, 257, 2080}) {
    for (const int64_t tokens : {1, 2, 33, 63, 64, 65, 511, 512, 513, 5000}) {
      for (const int skew : {0, 7}) {
        for (const Problem& sizes : {Problem{{experts, 16, 1, 1}, tokens, 4, -1, 64, 1},
                                     Problem{{experts, 128, 2, 1}, tokens, 4, -1, 16, 1},
                                     Problem{{experts, 96, 1, 1}, tokens, 4, tokens / 2, 128, 2},
                                     Problem{{experts, 128, 2, 1}, tokens, 4, -1, 128, 1}}) {
          ExpectCpuIntegers(sizes, RandomSlots(random, tokens * 4, experts, skew));
          ASSERT_FALSE(HasFailure()) << experts << ' ' << tokens << ' ' << sizes.options.tile;
        }
      }
    }
  }
}

TEST(PermuteSm90, LiveTokensAreReadOnTheDevice) {
  HOPYARD_NEEDS_GPU();
  std::mt19937 random(6);
  // As many slots as a thread each, one block, and several take.
  for (const int64_t tokens : {80, 500, 2000}) {
    for (const int64_t live : {0, 1, 79, 100, 500, 511, 2000}) {
      if (live <= tokens) {
        const Problem problem{{16, 32, 1, 1}, tokens, 3, live, live % 2 == 0 ? 0 : 128, 2};
        ExpectCpuIntegers(problem, RandomSlots(random, 3 * tokens, 16, 0));
        ASSERT_FALSE(HasFatalFailure()) << live << " of " << tokens;
      }
    }
  }
}

TEST(PermuteSm90, FourHundredThousandTokens) {
  HOPYARD_NEEDS_GPU();
  std::mt19937 random(7);
  const Problem problem{{128, 128, 2, 1}, 400000, 8, -1, 16, 1};
  ExpectCpuIntegers(problem, RandomSlots(random, 3200000, 128, 0));
}

}  // namespace
}  // namespace hopyard::permute
