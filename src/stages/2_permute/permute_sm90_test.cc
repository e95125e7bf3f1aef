// SPDX-License-Identifier: Apache-2.0
// Permutation metadata on the GPU: the integers of the CPU backend, and the independent checker.
#include "stages/2_permute/permute_sm90.h"

#include <cstdint>
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
};

void ExpectCpuIntegers(const Problem& problem, const std::vector<int32_t>& slots) {
  const auto num_slots = static_cast<int64_t>(slots.size());
  const int64_t live = problem.live_tokens < 0 ? problem.tokens : problem.live_tokens;
  Arrays want(num_slots, problem.options);
  const TensorView view =
      TensorView::Contiguous(slots.data(), DType::kInt32, {live, problem.slots_per_token});
  PermuteCpu(view, problem.options, want.View());

  const DeviceArray<int32_t> local(slots);
  const DeviceArray<int32_t> scratch(PermuteScratchInts(num_slots, problem.options));
  const DeviceArray<int32_t> count(std::vector<int32_t>{static_cast<int32_t>(live)});
  std::vector<std::unique_ptr<DeviceArray<int32_t>>> arrays;
  for (const auto& array : want.data) {
    arrays.push_back(std::make_unique<DeviceArray<int32_t>>(static_cast<int64_t>(array.size())));
  }
  PermuteSm90Args args;
  args.options = problem.options;
  args.max_tokens = problem.tokens;
  args.slots_per_token = problem.slots_per_token;
  args.num_tokens = problem.live_tokens < 0 ? nullptr : count.get();
  args.local_slots = local.get();
  args.chunk_counts = scratch.get();
  int32_t** const pointers[] = {&args.expert_offsets, &args.expert_counts, &args.slot_to_row,
                                &args.row_to_slot,    &args.row_to_token,  &args.tile_expert,
                                &args.tile_row_begin, &args.tile_row_end,  &args.num_tiles,
                                &args.num_rows};
  for (size_t i = 0; i < arrays.size(); ++i) {
    *pointers[i] = arrays[i]->get();
  }
  PermuteSm90(args, nullptr);
  Arrays got(num_slots, problem.options);
  for (size_t i = 0; i < arrays.size(); ++i) {
    got.data[i] = arrays[i]->Download();
    // Poison is -1 on both sides, so what must stay untouched is compared as well.
    ASSERT_EQ(got.data[i], want.data[i]) << "array " << i;
    ASSERT_TRUE(arrays[i]->GuardsIntact()) << "array " << i;
  }
  ASSERT_TRUE(scratch.GuardsIntact());
  ASSERT_EQ(CheckPermutation(view, problem.options, got.View()), "");
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

TEST(PermuteSm90, LiveTokensAreReadOnTheDevice) {
  HOPYARD_NEEDS_GPU();
  std::mt19937 random(6);
  // As many slots as a thread each, one block, and several take.
  for (const int64_t tokens : {80, 500, 2000}) {
    for (const int64_t live : {0, 1, 79, 100, 500, 511, 2000}) {
      if (live <= tokens) {
        const Problem problem{{16, 32, 1, 1}, tokens, 3, live};
        ExpectCpuIntegers(problem, RandomSlots(random, 3 * tokens, 16, 0));
        ASSERT_FALSE(HasFatalFailure()) << live << " of " << tokens;
      }
    }
  }
}

TEST(PermuteSm90, FourHundredThousandTokens) {
  HOPYARD_NEEDS_GPU();
  std::mt19937 random(7);
  const Problem problem{{128, 128, 2, 1}, 400000, 8, -1};
  ExpectCpuIntegers(problem, RandomSlots(random, 3200000, 128, 0));
}

}  // namespace
}  // namespace hopyard::permute
