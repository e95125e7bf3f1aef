// SPDX-License-Identifier: Apache-2.0
// Permutation: hand-made cases, backend against oracle and checker, bounds, bad input, and faults
// that the checker must find.
#include "stages/2_permute/permute.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "core/shape.h"

namespace hopyard::permute {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int32_t kUntouched = -99;

// Owns the arrays of one call, each behind a canary.
class Call {
 public:
  Call(std::vector<int32_t> local, int64_t slots_per_token, const PermuteOptions& choices)
      : options(choices), slots(std::move(local)) {
    const auto num_slots = static_cast<int64_t>(slots.size());
    local_slots = TensorView::Contiguous(slots.data(), DType::kInt32,
                                         {num_slots / slots_per_token, slots_per_token});
    const int64_t max_rows = MaxRows(num_slots, options);
    const int64_t max_tiles = MaxTiles(num_slots, options);
    const std::vector<std::pair<TensorView*, int64_t>> plan = {
        {&out.expert_offsets, options.num_local_experts + 1},
        {&out.expert_counts, options.num_local_experts},
        {&out.slot_to_row, num_slots},
        {&out.row_to_slot, max_rows},
        {&out.row_to_token, max_rows},
        {&out.tile_expert, max_tiles},
        {&out.tile_row_begin, max_tiles},
        {&out.tile_row_end, max_tiles},
        {&out.num_tiles, 1},
        {&out.num_rows, 1}};
    buffers_.reserve(plan.size());
    for (const auto& [view, size] : plan) {
      buffers_.emplace_back(static_cast<size_t>(size + 1), kUntouched);
      *view = TensorView::Contiguous(buffers_.back().data(), DType::kInt32, {size});
    }
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  [[nodiscard]] std::string Check() const { return CheckPermutation(local_slots, options, out); }
  [[nodiscard]] bool CanariesIntact() const {
    return std::all_of(buffers_.begin(), buffers_.end(),
                       [](const auto& buffer) { return buffer.back() == kUntouched; });
  }
  // The first `count` values.
  static std::vector<int32_t> Live(const TensorView& view, int64_t count) {
    return {view.as<int32_t>(), view.as<int32_t>() + count};
  }
  [[nodiscard]] int32_t num_tiles() const { return *out.num_tiles.as<int32_t>(); }
  [[nodiscard]] int32_t num_rows() const { return *out.num_rows.as<int32_t>(); }
  [[nodiscard]] const std::vector<std::vector<int32_t>>& buffers() const { return buffers_; }

  PermuteOptions options;
  std::vector<int32_t> slots;
  TensorView local_slots;
  PermuteOutputs out;

 private:
  std::vector<std::vector<int32_t>> buffers_;
};

// Three tokens with two slots; expert 1 gets three slots, expert 2 one, expert 0 none.
std::vector<int32_t> SmallSlots() {
  return {1, -1, 2, 1, 1, 3};
}

TEST(Permute, DenseByHand) {
  Call c(SmallSlots(), 2, {3, 2, 1, 1});
  Permute(c.local_slots, c.options, c.out);
  EXPECT_THAT(Call::Live(c.out.expert_offsets, 4), ElementsAre(0, 0, 3, 4));
  EXPECT_THAT(Call::Live(c.out.expert_counts, 3), ElementsAre(0, 3, 1));
  EXPECT_THAT(Call::Live(c.out.slot_to_row, 6), ElementsAre(0, -1, 3, 1, 2, -1));
  EXPECT_THAT(Call::Live(c.out.row_to_slot, 6), ElementsAre(0, 3, 4, 2, kUntouched, kUntouched));
  EXPECT_THAT(Call::Live(c.out.row_to_token, 4), ElementsAre(0, 1, 2, 1));
  EXPECT_THAT(Call::Live(c.out.tile_expert, 3), ElementsAre(1, 1, 2));
  EXPECT_THAT(Call::Live(c.out.tile_row_begin, 3), ElementsAre(0, 2, 3));
  EXPECT_THAT(Call::Live(c.out.tile_row_end, 3), ElementsAre(2, 3, 4));
  EXPECT_EQ(c.num_tiles(), 3);
  EXPECT_EQ(c.num_rows(), 4);
  EXPECT_EQ(c.Check(), "");
}

TEST(Permute, PaddedByHand) {
  Call c(SmallSlots(), 2, {3, 2, 1, 2});
  Permute(c.local_slots, c.options, c.out);
  EXPECT_THAT(Call::Live(c.out.expert_offsets, 4), ElementsAre(0, 0, 4, 6));
  EXPECT_THAT(Call::Live(c.out.slot_to_row, 6), ElementsAre(0, -1, 4, 1, 2, -1));
  EXPECT_THAT(Call::Live(c.out.row_to_slot, 6), ElementsAre(0, 3, 4, -1, 2, -1));
  EXPECT_THAT(Call::Live(c.out.row_to_token, 6), ElementsAre(0, 1, 2, -1, 1, -1));
  EXPECT_THAT(Call::Live(c.out.tile_row_begin, 3), ElementsAre(0, 2, 4));
  EXPECT_THAT(Call::Live(c.out.tile_row_end, 3), ElementsAre(2, 3, 5));
  EXPECT_EQ(c.num_rows(), 6);
  EXPECT_EQ(c.Check(), "");
}

// Clusters of three tiles: the third tile of expert 1 starts behind its rows and is empty.
TEST(Permute, TrailingTilesOfAClusterAreEmpty) {
  Call padded(SmallSlots(), 2, {3, 2, 3, 6});
  Permute(padded.local_slots, padded.options, padded.out);
  EXPECT_THAT(Call::Live(padded.out.expert_offsets, 4), ElementsAre(0, 0, 6, 12));
  EXPECT_THAT(Call::Live(padded.out.tile_expert, 6), ElementsAre(1, 1, 1, 2, 2, 2));
  EXPECT_THAT(Call::Live(padded.out.tile_row_begin, 6), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_THAT(Call::Live(padded.out.tile_row_end, 6), ElementsAre(2, 3, 3, 7, 7, 7));
  EXPECT_EQ(padded.num_tiles(), 6);
  EXPECT_EQ(padded.num_rows(), 12);
  EXPECT_EQ(padded.Check(), "");
  Call dense(SmallSlots(), 2, {3, 2, 3, 1});
  Permute(dense.local_slots, dense.options, dense.out);
  EXPECT_THAT(Call::Live(dense.out.tile_row_begin, 6), ElementsAre(0, 2, 4, 3, 5, 7));
  EXPECT_THAT(Call::Live(dense.out.tile_row_end, 6), ElementsAre(2, 3, 3, 4, 4, 4));
  EXPECT_EQ(dense.num_rows(), 4);
  EXPECT_EQ(dense.Check(), "");
}

TEST(Permute, BoundsByHand) {
  EXPECT_EQ(MaxTiles(8, {256, 8, 1, 8}), 8);
  EXPECT_EQ(MaxRows(8, {256, 8, 1, 8}), 64);
  EXPECT_EQ(MaxTiles(3072 * 8, {128, 64, 1, 1}), 510);
  EXPECT_EQ(MaxRows(3072 * 8, {128, 64, 1, 1}), 3072 * 8);
  EXPECT_EQ(MaxTiles(3072 * 8, {128, 64, 2, 128}), (128 + (24448 / 128)) * 2);
  EXPECT_EQ(MaxRows(3072 * 8, {128, 64, 2, 128}), (128 + (24448 / 128)) * 128);
  EXPECT_EQ(MaxTiles(0, {4, 8, 1, 1}), 0);
  // 64-bit: 400,000 tokens x 8 over 2048 experts in tiles of 65536 rows and clusters of 256.
  EXPECT_EQ(MaxRows(3'200'000, {2048, 65536, 256, 65536 * 256}), int64_t{2048} * 65536 * 256);
}

uint64_t Next(uint64_t& state) {
  state = state * 6364136223846793005U + 1442695040888963407U;
  return state >> 33;
}

// Skews: balanced, one hot expert, few experts, mostly remote, ids all over int32.
std::vector<int32_t> RandomSlots(uint64_t seed, int64_t count, int experts) {
  uint64_t state = seed;
  const auto kind = Next(state) % 5;
  std::vector<int32_t> slots;
  for (int64_t i = 0; i < count; ++i) {
    const auto any = static_cast<int32_t>(Next(state) % static_cast<uint64_t>(experts));
    const auto die = Next(state) % 8;
    int32_t id = any;
    if (kind == 1 && die > 0) {
      id = experts / 2;
    } else if (kind == 2) {
      id = any % 3;
    } else if (kind == 3 && die > 1) {
      id = -1;
    } else if (kind == 4 && die > 5) {
      id = static_cast<int32_t>(static_cast<uint32_t>(Next(state) * 2654435761U));
    }
    slots.push_back(id);
  }
  return slots;
}

// Experts x tiles x clusters, dense and padded.
std::vector<PermuteOptions> AllOptions(const std::vector<int>& experts,
                                       const std::vector<int64_t>& tiles) {
  std::vector<PermuteOptions> all;
  for (const int count : experts) {
    for (const int64_t tile : tiles) {
      for (const int64_t cluster : {1, 2, 3}) {
        all.push_back({count, tile, cluster, 1});
        all.push_back({count, tile, cluster, tile * cluster});
      }
    }
  }
  return all;
}

TEST(Permute, MatchesTheOracleAndTheChecker) {
  uint64_t seed = 1;
  for (const PermuteOptions& options : AllOptions({1, 2, 7, 64, 257}, {1, 8, 12, 192})) {
    for (const int64_t tokens : {0, 1, 2, 31, 200}) {
      for (const int64_t per_token : {1, 3, 8}) {
        const auto slots = RandomSlots(++seed, tokens * per_token, options.num_local_experts);
        Call got(slots, per_token, options);
        Call wanted(slots, per_token, options);
        Permute(got.local_slots, options, got.out);
        PermuteRef(wanted.local_slots, options, wanted.out);
        ASSERT_EQ(got.buffers(), wanted.buffers())
            << options.num_local_experts << ' ' << tokens << ' ' << options.tile << ' '
            << options.cluster << ' ' << options.row_alignment;
        ASSERT_EQ(got.Check(), "");
        ASSERT_TRUE(got.CanariesIntact());
      }
    }
  }
}

// The bound is reached by one slot on every expert and the rest on whole clusters of one.
TEST(Permute, BoundsAreExact) {
  for (const PermuteOptions& options : AllOptions({1, 3, 16}, {1, 4, 8})) {
    for (const int64_t num_slots : {1, 2, 16, 17, 100, 129}) {
      std::vector<int32_t> slots;
      for (int64_t i = 0; i < num_slots; ++i) {
        slots.push_back(static_cast<int32_t>(i < options.num_local_experts ? i : 0));
      }
      Call c(slots, 1, options);
      Permute(c.local_slots, options, c.out);
      EXPECT_EQ(c.num_tiles(), MaxTiles(num_slots, options));
      EXPECT_EQ(c.num_rows(), MaxRows(num_slots, options));
    }
  }
}

TEST(Permute, NothingLocal) {
  Call c({-1, 5, 1 << 30, INT32_MIN}, 2, {5, 4, 2, 8});
  Permute(c.local_slots, c.options, c.out);
  EXPECT_THAT(Call::Live(c.out.slot_to_row, 4), ElementsAre(-1, -1, -1, -1));
  EXPECT_EQ(c.num_tiles(), 0);
  EXPECT_EQ(c.num_rows(), 0);
  EXPECT_EQ(c.Check(), "");
}

// ---- The test of the checker
// ---------------------------------------------------------------------

struct Fault {
  std::string name;
  std::function<void(PermuteOutputs&)> plant;
};

int32_t* Data(const TensorView& view) {
  return view.as<int32_t>();
}

// Slots of the faulty call: 8 experts, tile 4, cluster 2; expert 2 has ten slots, 5 has three.
std::vector<int32_t> FaultSlots() {
  return {2, 5, 2, -1, 2, 2, 5, 2, 0, 2, 2, 2, 7, 2, 5, 2};
}

std::vector<Fault> Faults() {
  const auto swap_rows = [](PermuteOutputs& o, int a, int b) {
    std::swap(Data(o.row_to_slot)[a], Data(o.row_to_slot)[b]);
    std::swap(Data(o.row_to_token)[a], Data(o.row_to_token)[b]);
    Data(o.slot_to_row)[Data(o.row_to_slot)[a]] = a;
    Data(o.slot_to_row)[Data(o.row_to_slot)[b]] = b;
  };
  return {
      {"Zeros",
       [](PermuteOutputs& o) {
         std::fill_n(Data(o.slot_to_row), 16, 0);
         std::fill_n(Data(o.row_to_slot), *Data(o.num_rows), 0);
       }},
      {"UnstableOrder", [=](PermuteOutputs& o) { swap_rows(o, 9, 10); }},
      {"RowsOfTwoExpertsSwapped",
       [=](PermuteOutputs& o) { swap_rows(o, 0, Data(o.expert_offsets)[5]); }},
      {"RowToSlotSwapped",
       [](PermuteOutputs& o) { std::swap(Data(o.row_to_slot)[9], Data(o.row_to_slot)[10]); }},
      {"SlotToRowSwapped",
       [](PermuteOutputs& o) { std::swap(Data(o.slot_to_row)[0], Data(o.slot_to_row)[2]); }},
      {"TwoSlotsShareARow",
       [](PermuteOutputs& o) { Data(o.slot_to_row)[2] = Data(o.slot_to_row)[0]; }},
      {"WrongToken", [](PermuteOutputs& o) { ++Data(o.row_to_token)[9]; }},
      {"RemoteSlotGotARow", [](PermuteOutputs& o) { Data(o.slot_to_row)[3] = 0; }},
      {"LocalSlotLost", [](PermuteOutputs& o) { Data(o.slot_to_row)[0] = -1; }},
      {"CountOffByOne", [](PermuteOutputs& o) { ++Data(o.expert_counts)[2]; }},
      {"CountsSwapped",
       [](PermuteOutputs& o) { std::swap(Data(o.expert_counts)[2], Data(o.expert_counts)[5]); }},
      {"OffsetOffByOne", [](PermuteOutputs& o) { ++Data(o.expert_offsets)[5]; }},
      {"FirstOffset", [](PermuteOutputs& o) { ++Data(o.expert_offsets)[0]; }},
      {"NumRows", [](PermuteOutputs& o) { --Data(o.num_rows)[0]; }},
      {"NumTilesShort", [](PermuteOutputs& o) { --Data(o.num_tiles)[0]; }},
      {"NumTilesLong", [](PermuteOutputs& o) { ++Data(o.num_tiles)[0]; }},
      {"TileExpert", [](PermuteOutputs& o) { ++Data(o.tile_expert)[3]; }},
      {"TileEndOffByOne", [](PermuteOutputs& o) { --Data(o.tile_row_end)[2]; }},
      {"TileEndIntoPadding", [](PermuteOutputs& o) { ++Data(o.tile_row_end)[4]; }},
      {"EmptyTileMadeFull",
       [](PermuteOutputs& o) { Data(o.tile_row_end)[5] = Data(o.tile_row_begin)[5] + 4; }},
      {"TileBegin", [](PermuteOutputs& o) { ++Data(o.tile_row_begin)[1]; }},
      {"TilesSwapped",
       [](PermuteOutputs& o) {
         std::swap(Data(o.tile_row_begin)[2], Data(o.tile_row_begin)[3]);
         std::swap(Data(o.tile_row_end)[2], Data(o.tile_row_end)[3]);
       }},
  };
}

TEST(CheckPermutation, RejectsEveryPlantedFault) {
  for (const int64_t alignment : {1, 8}) {
    const PermuteOptions options{8, 4, 2, alignment};
    for (const Fault& fault : Faults()) {
      Call c(FaultSlots(), 4, options);
      PermuteCpu(c.local_slots, options, c.out);
      ASSERT_EQ(c.Check(), "");
      fault.plant(c.out);
      EXPECT_NE(c.Check(), "") << fault.name << " alignment " << alignment;
    }
  }
}

TEST(CheckPermutation, RejectsUnmarkedPadding) {
  for (const bool token : {false, true}) {
    Call c(FaultSlots(), 4, {8, 4, 2, 8});
    PermuteCpu(c.local_slots, c.options, c.out);
    Data(token ? c.out.row_to_token : c.out.row_to_slot)[1] = 0;
    EXPECT_THAT(c.Check(), HasSubstr("wanted -1"));
  }
}

TEST(CheckPermutation, SaysWhatIsWrong) {
  Call c(FaultSlots(), 4, {8, 4, 2, 8});
  PermuteCpu(c.local_slots, c.options, c.out);
  --Data(c.out.tile_row_end)[2];
  EXPECT_EQ(c.Check(), "tile_row_end[2] is 11, wanted 12");
}

// ---- Bad input
// -----------------------------------------------------------------------------------

void ExpectError(const std::function<void()>& call, const std::vector<std::string>& words) {
  try {
    call();
    FAIL() << "accepted; wanted an error with: " << words[0];
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kInvalidArgument);
    for (const std::string& word : words) {
      EXPECT_THAT(error.message(), HasSubstr(word));
    }
  }
}

TEST(BadPermute, Options) {
  ExpectError([] { (void)MaxTiles(-1, {1, 1, 1, 1}); }, {"num_slots=-1"});
  ExpectError(
      [] {
        (void)MaxTiles(int64_t{1} << 31, {1, 1, 1, 1});
      },
      {"num_slots=2147483648", "chunks"});
  ExpectError([] { (void)MaxTiles(1, {0, 1, 1, 1}); }, {"num_local_experts=0"});
  ExpectError([] { (void)MaxTiles(1, {1, 0, 1, 1}); }, {"tile=0"});
  ExpectError([] { (void)MaxTiles(1, {1, 1 << 17, 1, 1}); }, {"tile=131072", "65536"});
  ExpectError([] { (void)MaxTiles(1, {1, 1, 0, 1}); }, {"cluster=0"});
  ExpectError([] { (void)MaxTiles(1, {1, 1, 257, 1}); }, {"cluster=257", "256"});
  ExpectError(
      [] {
        (void)MaxRows(1, {1, 8, 2, 8});
      },
      {"row_alignment=8", "1 (dense rows) or tile * cluster=16"});
}

TEST(BadPermute, Tensors) {
  const PermuteOptions options{3, 2, 1, 1};
  const auto refused = [&](const std::function<void(Call&)>& spoil,
                           const std::vector<std::string>& words) {
    Call c(SmallSlots(), 2, options);
    spoil(c);
    ExpectError([&] { Permute(c.local_slots, c.options, c.out); }, words);
    for (const auto& buffer : c.buffers()) {
      EXPECT_THAT(buffer, ::testing::Each(kUntouched));
    }
  };
  refused([](Call& c) { c.local_slots.dtype = DType::kInt64; }, {"local_slots is i64"});
  refused([](Call& c) { c.local_slots.ndim = 1; }, {"local_slots has shape [3]"});
  refused([](Call& c) { c.out.expert_offsets.shape[0] = 3; },
          {"expert_offsets has shape [3]", "wanted [4]"});
  refused([](Call& c) { c.out.expert_counts = {}; }, {"expert_counts is missing"});
  refused([](Call& c) { c.out.slot_to_row.shape[0] = 5; }, {"slot_to_row has shape [5]"});
  refused([](Call& c) { c.out.row_to_slot.dtype = DType::kInt64; }, {"row_to_slot is i64"});
  refused([](Call& c) { c.out.row_to_token.data = nullptr; }, {"row_to_token ", "null pointer"});
  refused([](Call& c) { c.out.tile_expert.shape[0] = 1; }, {"tile_expert has shape [1]"});
  refused([](Call& c) { c.out.tile_row_begin.device.kind = DeviceKind::kCuda; },
          {"tile_row_begin is a CUDA tensor"});
  refused([](Call& c) { c.out.tile_row_end = {}; }, {"tile_row_end is missing"});
  refused([](Call& c) { c.out.num_tiles.ndim = 0; }, {"num_tiles has shape []"});
  refused([](Call& c) { c.out.num_rows = {}; }, {"num_rows is missing"});
}

// The rows would not fit i32; nothing of that size is allocated to find out.
TEST(BadPermute, RowsBeyondInt32) {
  std::vector<int32_t> slots(4096, 0);
  const auto view = TensorView::Contiguous(slots.data(), DType::kInt32, {4096, 1});
  ExpectError([&] { Permute(view, {4096, 65536, 16, 65536 * 16}, {}); }, {"i32", "chunks"});
}

}  // namespace
}  // namespace hopyard::permute
