// SPDX-License-Identifier: Apache-2.0
// What holds for every way of naming a token's experts: the replay buffer, the load counters, the
// expert table, and that optional outputs change no bit.
#include <algorithm>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "tests/layer.h"

namespace hopyard::test {
namespace {

constexpr int64_t kTokens = 9;
constexpr int16_t kUntouched = -12345;  // no id, and not the -1 of a skipped slot

size_t Index(int64_t i) {
  return static_cast<size_t>(i);
}

// Ids with skipped slots among them, all of which fit 16 bits.
std::vector<int32_t> SomeIds(const MoeSpec& spec) {
  std::vector<int32_t> ids = MakeIds(IdPattern::kSomeInvalid, spec, kTokens);
  for (int32_t& id : ids) {
    id = id == static_cast<int16_t>(id) ? id : -1;
  }
  return ids;
}

struct Entry {
  const char* name;
  void (*apply)(const MoeSpec& spec, LayerInputs* inputs);

  friend std::ostream& operator<<(std::ostream& out, const Entry& entry) {
    return out << entry.name;
  }
};

constexpr Entry kEntries[] = {
    {"Logits", [](const MoeSpec&, LayerInputs* in) { in->Logits().RoutingBias(); }},
    {"LogitsBf16", [](const MoeSpec&, LayerInputs* in) { in->Logits(DType::kBf16).RoutingBias(); }},
    {"Packed", [](const MoeSpec& spec,
                  LayerInputs* in) { in->Packed(SomeIds(spec), MakeWeights(spec, kTokens)); }},
    {"Unpacked", [](const MoeSpec& spec,
                    LayerInputs* in) { in->Unpacked(SomeIds(spec), MakeWeights(spec, kTokens)); }},
    {"UnpackedBf16",
     [](const MoeSpec& spec, LayerInputs* in) {
       in->Unpacked(SomeIds(spec), MakeWeights(spec, kTokens), DType::kBf16);
     }},
    {"ReplayI16", [](const MoeSpec& spec,
                     LayerInputs* in) { in->Logits().Replay(SomeIds(spec), DType::kInt16); }},
    {"ReplayI32", [](const MoeSpec& spec,
                     LayerInputs* in) { in->Logits().Replay(SomeIds(spec), DType::kInt32); }},
    {"Hash",
     [](const MoeSpec&, LayerInputs* in) {
       in->Logits().HashTable(11);
       in->get().token_ids.as<int64_t>()[2] = 11;  // outside the table: skipped
     }},
};

MoeSpec EntrySpec(const FormatPair& pair = {}) {
  MoeSpec spec = MiniSpec(pair);
  spec.routing = RoutingRule::DeepSeekV3(4, 2, 2.5F);
  return spec;
}

// Everything that two runs have in common, bit for bit.
void ExpectSameRun(const RunResult& got, const RunResult& wanted) {
  EXPECT_TRUE(SameBits(got.output, wanted.output));
  EXPECT_TRUE(SameBits(got.ids, wanted.ids));
  EXPECT_TRUE(SameBits(got.weights, wanted.weights));
  EXPECT_TRUE(SameBits(got.rows, wanted.rows));
  EXPECT_TRUE(SameBits(got.slot_to_row, wanted.slot_to_row));
  EXPECT_TRUE(SameBits(got.activation, wanted.activation));
  EXPECT_TRUE(SameBits(got.load, wanted.load));
}

// The first `tokens` rows of replay are the ids; no element behind them was written.
::testing::AssertionResult ReplayIsOf(const RunResult& result, const MoeSpec& spec,
                                      int64_t tokens) {
  std::vector<int16_t> wanted(result.replay.size(), kUntouched);
  const int64_t slots = spec.slots_per_token();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < spec.top_k; ++k) {
      wanted[Index(t * spec.top_k + k)] = static_cast<int16_t>(result.ids[Index(t * slots + k)]);
    }
  }
  return SameBits(result.replay, wanted);
}

// How often each expert stands in the replay.
std::vector<int32_t> CountIds(const RunResult& result, const MoeSpec& spec) {
  std::vector<int32_t> counts(Index(spec.num_experts), 0);
  for (const int16_t id : result.replay) {
    if (id >= 0 && id < spec.num_experts) {
      ++counts[Index(id)];
    }
  }
  return counts;
}

class ForwardEntry : public ::testing::TestWithParam<Entry> {
 protected:
  static LayerInputs Inputs(const MoeSpec& spec) {
    LayerInputs inputs(spec, kTokens);
    GetParam().apply(spec, &inputs);
    return inputs;
  }
  static RunOptions Recording() {
    RunOptions options = OneThread();
    options.spare_replay_rows = 5;
    options.replay_poison = kUntouched;
    return options;
  }
  // As much memory as three tokens need: the batch goes in chunks.
  static RunOptions Chunked(const MoeSpec& spec, int threads = 1) {
    RunOptions options = Recording();
    options.plan.num_threads = threads;
    PlanOptions three = options.plan;
    three.max_tokens = 3;
    options.plan.workspace_cap = MakePlan(spec, Device{}, three).workspace_bytes();
    return options;
  }
};

TEST_P(ForwardEntry, ReplayEndsWithTheTokens) {
  const TestLayer layer(EntrySpec());
  LayerInputs inputs = Inputs(layer.spec());
  for (const RunOptions& options : {Recording(), Chunked(layer.spec())}) {
    inputs.mutable_inputs()->num_tokens = {};
    const RunResult whole = layer.Run(inputs, options);
    EXPECT_TRUE(ReplayIsOf(whole, layer.spec(), kTokens));
    EXPECT_TRUE(layer.Judge(inputs, whole));
    for (const int32_t count : {0, 1, 4, 8, 9}) {
      inputs.NumTokens(count);
      const RunResult part = layer.Run(inputs, options);
      EXPECT_TRUE(ReplayIsOf(part, layer.spec(), count)) << count << " tokens";
      EXPECT_TRUE(std::equal(part.ids.begin(), part.ids.begin() + count * layer.spec().top_k,
                             whole.ids.begin()));
      EXPECT_TRUE(SameBits(part.load, CountIds(part, layer.spec()))) << count << " tokens";
    }
  }
}

TEST_P(ForwardEntry, OptionalOutputsChangeNoBitInAnyPairOfFormats) {
  for (const FormatPair& pair : SupportedPairs()) {
    const TestLayer layer(EntrySpec(pair), true);
    const LayerInputs inputs = Inputs(layer.spec());
    const RunResult recorded = layer.Run(inputs, Recording());
    RunOptions without = Recording();
    without.replay = false;
    const RunResult unrecorded = layer.Run(inputs, without);
    EXPECT_TRUE(unrecorded.replay.empty());
    ExpectSameRun(unrecorded, recorded);
    RunOptions bare = OneThread();
    bare.extras = false;
    EXPECT_TRUE(SameBits(layer.Run(inputs, bare).output, recorded.output));
    ASSERT_FALSE(HasFailure()) << ToString(pair);
  }
}

TEST_P(ForwardEntry, LoadCountsTheReplay) {
  const TestLayer layer(EntrySpec());
  const LayerInputs inputs = Inputs(layer.spec());
  RunOptions parallel = Recording();
  parallel.plan.num_threads = 3;
  for (RunOptions options :
       {Recording(), parallel, Chunked(layer.spec()), Chunked(layer.spec(), 3)}) {
    for (const DType dtype : {DType::kInt32, DType::kInt64}) {
      options.load_dtype = dtype;
      const RunResult result = layer.Run(inputs, options);
      EXPECT_TRUE(SameBits(result.load, CountIds(result, layer.spec()))) << ToString(dtype);
    }
  }
}

// Slot s of the rank holds expert kSlots[s]; 3 exists twice. 4 and 5 are remote: what is no slot of
// the rank, negative or too large, names none.
constexpr int kSlots[] = {6, 3, 0, 1, 3, 7, 2};
const std::vector<int32_t> kTable = {2, 3, 6, 4, 7, -99, 0, 5};

TEST_P(ForwardEntry, AnExpertTableLeavesIdsReplayAndLoadLogical) {
  const TestLayer everywhere(EntrySpec());
  WeightSource source;
  source.spec = EntrySpec();
  source.spec.local = {ExpertMap::Kind::kTable, 0, 7};
  source.experts.assign(std::begin(kSlots), std::end(kSlots));
  const TestLayer rank(source);
  LayerInputs inputs = Inputs(source.spec);
  const RunResult wanted = everywhere.Run(inputs, Recording());
  inputs.ExpertTable(kTable);
  const RunResult got = rank.Run(inputs, Recording());
  EXPECT_TRUE(SameBits(got.ids, wanted.ids));
  EXPECT_TRUE(SameBits(got.weights, wanted.weights));
  EXPECT_TRUE(SameBits(got.replay, wanted.replay));
  EXPECT_TRUE(SameBits(got.load, wanted.load));
  EXPECT_TRUE(rank.Judge(inputs, got));
  int64_t remote = 0;
  for (size_t slot = 0; slot < got.ids.size(); ++slot) {
    const int32_t id = got.ids[slot];
    const bool local = id >= 0 && id != 4 && id != 5;
    EXPECT_EQ(got.slot_to_row[slot] >= 0, local) << "slot " << slot << ", expert " << id;
    remote += id >= 0 && !local ? 1 : 0;
  }
  EXPECT_GT(remote, 0) << "the test means nothing without remote experts";
}

TEST_P(ForwardEntry, AnExpertRangeLeavesIdsReplayAndLoadGlobal) {
  const TestLayer everywhere(EntrySpec());
  MoeSpec spec = EntrySpec();
  spec.local = {ExpertMap::Kind::kRange, 2, 3};
  const TestLayer rank(spec);
  const LayerInputs inputs = Inputs(spec);
  const RunResult wanted = everywhere.Run(inputs, Recording());
  const RunResult got = rank.Run(inputs, Recording());
  EXPECT_TRUE(SameBits(got.ids, wanted.ids));
  EXPECT_TRUE(SameBits(got.weights, wanted.weights));
  EXPECT_TRUE(SameBits(got.replay, wanted.replay));
  EXPECT_TRUE(SameBits(got.load, wanted.load));
  EXPECT_TRUE(rank.Judge(inputs, got));
}

INSTANTIATE_TEST_SUITE_P(Entries, ForwardEntry, ::testing::ValuesIn(kEntries),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace hopyard::test
