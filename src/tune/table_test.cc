// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tune/tune_testing.h"

namespace hopyard::tune::testing {
namespace {

TuningTable TableOf(const std::vector<int>& numbers) {
  TuningTable table(AMachine());
  for (const int number : numbers) {
    table.Put(ALayer(number));
  }
  return table;
}

TEST(TuningTable, OrderOfPutsDoesNotShow) {
  EXPECT_EQ(TableOf({1, 2, 3}), TableOf({3, 1, 2}));
  EXPECT_EQ(TableOf({1, 2, 3}).ToJson(), TableOf({2, 3, 1}).ToJson());
}

TEST(TuningTable, PutReplacesTheLayerOfItsKey) {
  TuningTable table = TableOf({1, 2});
  TunedLayer layer = ALayer(1);
  layer.ranges[0].us = 1.0;
  table.Put(layer);
  EXPECT_EQ(table.layers().size(), 2U);
  ASSERT_NE(table.Find(layer.key), nullptr);
  EXPECT_EQ(*table.Find(layer.key), layer);
  EXPECT_TRUE(table.Erase(layer.key));
  EXPECT_FALSE(table.Erase(layer.key));
  EXPECT_EQ(table.Find(layer.key), nullptr);
  EXPECT_EQ(table, TableOf({2}));
}

TEST(TuningTable, PutRefusesWhatMeansNothing) {
  const auto refused = [](const std::vector<std::string>& parts, auto spoil) {
    TunedLayer layer = ALayer(1);
    spoil(&layer);
    TuningTable table = TableOf({1, 2});
    ExpectError(ErrorKind::kInvalidArgument, parts, [&] { table.Put(layer); });
    EXPECT_EQ(table, TableOf({1, 2})) << "a refused layer has changed the table";
  };
  refused({"'tactic_b'", "last=16", "wanted more than 16"},
          [](TunedLayer* layer) { layer->ranges[1].last = 16; });
  refused({"last=0", "wanted more than 0"}, [](TunedLayer* layer) { layer->ranges[0].last = 0; });
  refused({"tokens=17", "above 0 up to last=16"},
          [](TunedLayer* layer) { layer->ranges[0].tokens = 17; });
  refused({"tokens=16", "above 16"}, [](TunedLayer* layer) { layer->ranges[1].tokens = 16; });
  refused({"name is empty"}, [](TunedLayer* layer) { layer->ranges[0].tactic = ""; });
  refused({"name is empty"}, [](TunedLayer* layer) { layer->ranges[0].untuned = ""; });
  refused({"us=nan"}, [](TunedLayer* layer) { layer->ranges[0].us = std::nan(""); });
  refused({"untuned_us=-1"}, [](TunedLayer* layer) { layer->ranges[0].untuned_us = -1; });
  refused({"noise=inf"}, [](TunedLayer* layer) {
    layer->ranges[0].noise = std::numeric_limits<double>::infinity();
  });
  refused({"key.shared.weight=nan"},
          [](TunedLayer* layer) { layer->key.shared.weight = std::nanf(""); });
  refused({"key.weights=99"},
          [](TunedLayer* layer) { layer->key.weights = static_cast<WeightFormat>(99); });
}

TEST(TuningTable, MergeTakesTheOthersLayers) {
  TuningTable table = TableOf({1, 2});
  TuningTable other(AMachine());
  TunedLayer layer = ALayer(2);
  layer.routing = "recorded";
  other.Put(layer);
  other.Put(ALayer(3));
  table.Merge(other);
  EXPECT_EQ(table.layers().size(), 3U);
  EXPECT_EQ(table.Find(layer.key)->routing, "recorded");
  TuningMachine elsewhere = AMachine();
  elsewhere.units = 4;
  ExpectError(ErrorKind::kInvalidArgument, {"another machine", "4 threads", "8 threads"},
              [&] { table.Merge(TuningTable(elsewhere)); });
}

TEST(TuningTable, MergeKeepsWhatTheOtherDoesNotCover) {
  const auto range = [](int64_t last, int64_t tokens, const char* tactic) {
    return TunedRange{last, tokens, tactic, 1.0, "untuned", 2.0, 0.0};
  };
  TunedLayer before = ALayer(1);
  before.ranges = {range(8, 8, "a"), range(64, 24, "b"), range(512, 512, "c")};
  TunedLayer again = before;
  again.ranges = {range(4, 4, "d"), range(32, 32, "e")};
  TuningTable table(AMachine());
  table.Put(before);
  TuningTable other(AMachine());
  other.Put(again);
  table.Merge(other);
  // b ran up to 64 and is gone: c was measured at 512 alone, and does not take its place.
  EXPECT_EQ(table.Find(before.key)->ranges,
            (std::vector<TunedRange>{again.ranges[0],
                                     again.ranges[1],
                                     {64, 64, "untuned", 0.0, "untuned"},
                                     before.ranges[2]}));
  // A run that measured nothing takes nothing away.
  again.ranges.clear();
  TuningTable empty(AMachine());
  empty.Put(again);
  table.Merge(empty);
  EXPECT_EQ(table.Find(before.key)->ranges.size(), 4U);
  table.Put(again);
  EXPECT_TRUE(table.Find(before.key)->ranges.empty()) << "Put replaces";
}

std::vector<TunedRange> JoinedRanges(const std::vector<TunedRange>& before,
                                     const std::vector<TunedRange>& again) {
  TunedLayer layer = ALayer(1);
  layer.ranges = before;
  TuningTable table(AMachine());
  table.Put(layer);
  layer.ranges = again;
  TuningTable other(AMachine());
  other.Put(layer);
  table.Merge(other);
  return table.Find(layer.key)->ranges;
}

TEST(TuningTable, MergeStretchesNothingOverAGap) {
  const TunedRange few = {20, 16, "a", 1.0, "u", 2.0};
  const TunedRange gone = {63, 16, "u", 1.0, "u", 1.0};
  const TunedRange wins = {512, 64, "c", 1.0, "u", 2.0};
  const TunedRange filled = {63, 63, "u", 0.0, "u"};
  EXPECT_EQ(JoinedRanges({gone, wins}, {few}), (std::vector<TunedRange>{few, filled, wins}));
  // The untuned choice may be stretched, a winner that began lower goes on.
  const TunedRange kept = {512, 64, "u", 1.0, "u", 1.0};
  EXPECT_EQ(JoinedRanges({gone, kept}, {few}), (std::vector<TunedRange>{few, kept}));
  const TunedRange low = {16, 16, "c", 1.0, "u", 2.0};
  EXPECT_EQ(JoinedRanges({low, wins}, {few}), (std::vector<TunedRange>{few, wins}));
  // What stands in for a choice that may not run is better than that choice.
  const TunedRange stand_in = {512, 64, "c", 1.0, "u", 0.0};
  EXPECT_EQ(JoinedRanges({gone, stand_in}, {few}), (std::vector<TunedRange>{few, stand_in}));
}

TEST(TuningTable, MergeKeepsWhatLiesBelowTheFirstThatWasMeasured) {
  const TunedRange below = {255, 255, "u", 0.0, "u"};
  const TunedRange first = {256, 256, "c", 1.0, "u", 2.0};
  const TunedRange a = {8, 8, "a", 1.0, "u", 2.0};
  const TunedRange b = {64, 24, "b", 1.0, "u", 2.0};
  EXPECT_EQ(JoinedRanges({a, b}, {below, first}), (std::vector<TunedRange>{a, b, below, first}));
  const TunedRange wide = {300, 24, "b", 1.0, "u", 2.0};
  TunedRange clipped = wide;
  clipped.last = 255;
  EXPECT_EQ(JoinedRanges({a, wide}, {below, first}), (std::vector<TunedRange>{a, clipped, first}));
  const TunedRange same = {300, 256, "d", 1.0, "u", 2.0};
  EXPECT_EQ(JoinedRanges({same}, {below, first}), (std::vector<TunedRange>{below, first}));
}

TEST(TuningTable, FindForTakesOtherRoutingsAndPaths) {
  TunedLayer logits = ALayer(1);
  TunedLayer ids = ALayer(1);
  ids.key.path.ids = true;
  TuningTable table(AMachine());
  table.Put(logits);
  TuningKey wanted = logits.key;
  EXPECT_EQ(table.FindFor(wanted)->key, wanted);
  wanted.routing.num_groups = 7;
  wanted.path.ids = true;
  wanted.path.replay = true;
  ASSERT_NE(table.FindFor(wanted), nullptr);
  EXPECT_EQ(table.FindFor(wanted)->key, logits.key);
  // Its own path goes before another one, its own key before all.
  table.Put(ids);
  wanted.path.replay = false;
  EXPECT_EQ(table.FindFor(wanted)->key, ids.key);
  wanted = logits.key;
  wanted.routing.num_groups = 7;
  EXPECT_EQ(table.FindFor(wanted)->key, logits.key);
  wanted.top_k = 3;
  EXPECT_EQ(table.FindFor(wanted), nullptr);
}

TEST(MachineOf, IsOfThePlansThreads) {
  const TuningMachine machine = MachineOf(Device{}, 3);
  EXPECT_EQ(machine.units, 3);
  EXPECT_FALSE(machine.isa.empty());
  EXPECT_FALSE(machine.device.empty());
  EXPECT_GE(MachineOf(Device{}).units, 1);
  // Plans need no GPU, so there is a machine for one that is not there.
  const TuningMachine gpu = MachineOf({DeviceKind::kCuda, 1000});
  EXPECT_EQ(gpu.device, "NVIDIA H100 80GB HBM3");
  EXPECT_EQ(gpu.isa, "");
  EXPECT_EQ(gpu.units, 132);
}

}  // namespace
}  // namespace hopyard::tune::testing
