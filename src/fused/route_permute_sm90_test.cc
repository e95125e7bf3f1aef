// SPDX-License-Identifier: Apache-2.0
// One launch, or a block per token, against the separate launches, which their own tests tie to the
// CPU: every output bit for bit, and what lies beyond the live tokens untouched.
#include "fused/route_permute_sm90.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include "core/shape.h"
#include "stages/1_route/route_testing.h"
#include "stages/2_permute/permute.h"
#include "tests/gpu/device_array.h"

namespace hopyard::fused {
namespace {

using route::testing::Method;
using route::testing::Methods;
using route::testing::Random;
using test::DeviceArray;

enum class Source : uint8_t { kLogits, kReplay, kHash, kPacked, kUnpacked };
constexpr Source kSources[] = {Source::kLogits, Source::kReplay, Source::kHash, Source::kPacked,
                               Source::kUnpacked};
constexpr int kVocabulary = 13;

// What hidden states are rounded to.
struct Target {
  Format format;
  DType dtype;
  bool row_global;
};
constexpr Target kTargets[] = {
    {Format::kBf16, DType::kBf16, false},          {Format::kMxFp8, DType::kBf16, false},
    {Format::kNvFp4, DType::kBf16, false},         {Format::kNvFp4, DType::kBf16, true},
    {Format::kFp8PerTensor, DType::kBf16, false},  {Format::kFp8PerTensor, DType::kE4m3, false},
    {Format::kFp8Block1x128, DType::kBf16, false}, {Format::kFp8Block1x128, DType::kE4m3, false},
    {Format::kFp8PerRow, DType::kBf16, false},     {Format::kFp8PerRow, DType::kE4m3, false}};
constexpr int kNumTargets = static_cast<int>(std::size(kTargets));

struct Problem {
  RoutingRule rule;
  Source source = Source::kLogits;
  int experts = 8;
  int top_k = 2;
  int shared = 0;
  ExpertMap local;
  int64_t tokens = 0;
  int64_t live = -1;    // -1: no device count
  bool narrow = false;  // the narrower of each input's types, and the wider counters
  bool optional = true;
  int logit_kind = 0;  // of route::testing::Fill
  int bias_kind = 0;
  std::vector<int> targets;  // of roundings, indices into kTargets
  bool natural = true;       // their order
  int64_t hidden = 264;
  // The tiles of GEMM1, and those of GEMM2 where it has its own.
  std::vector<PermuteOptions> lists;

  [[nodiscard]] int segments() const { return lists[0].num_local_experts; }
  [[nodiscard]] int slots() const { return top_k + shared; }
  [[nodiscard]] int64_t max_slots() const { return tokens * slots(); }
  [[nodiscard]] bool routes() const {
    return source != Source::kPacked && source != Source::kUnpacked;
  }
};

std::vector<float> Values(Random* random, int64_t count, int kind = 0) {
  std::vector<float> values(static_cast<size_t>(count));
  route::testing::Fill(random, kind, &values);
  return values;
}

// The upper halves of the values: BF16, rounded towards zero.
std::vector<uint16_t> UpperHalves(const std::vector<float>& values) {
  std::vector<uint16_t> halves;
  for (const uint32_t bits : route::testing::Bits(values)) {
    halves.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return halves;
}

// From `low` on, `range` different numbers.
std::vector<int32_t> Ints(Random* random, int64_t count, int low, int range) {
  std::vector<int32_t> values(static_cast<size_t>(count));
  for (int32_t& value : values) {
    value = low + random->Below(range);
  }
  return values;
}

std::vector<int16_t> Narrow(const std::vector<int32_t>& values) {
  return {values.begin(), values.end()};
}

// What a caller gives, on the device. Ids go beyond both ends of what is valid.
struct Inputs {
  std::vector<float> logits_on_host;
  std::vector<float> weights_on_host;
  std::vector<int32_t> ids_on_host;
  DeviceArray<float> logits;
  DeviceArray<uint16_t> narrow_logits;
  DeviceArray<float> bias;
  DeviceArray<int32_t> ids;
  DeviceArray<int16_t> narrow_ids;
  DeviceArray<float> weights;
  DeviceArray<uint16_t> narrow_weights;
  DeviceArray<int32_t> packed;
  DeviceArray<int32_t> token_ids;
  DeviceArray<int32_t> table;
  DeviceArray<float> shared_weights;
  DeviceArray<int32_t> expert_table;
  DeviceArray<int32_t> count;
  DeviceArray<uint16_t> hidden;
  DeviceArray<float> static_scale;

  Inputs(const Problem& p, Random* random)
      : logits_on_host(Values(random, p.tokens * p.experts, p.logit_kind)),
        weights_on_host(Values(random, p.tokens * p.top_k)),
        ids_on_host(Ints(random, p.tokens * p.top_k, -2, p.experts + 4)),
        logits(logits_on_host),
        narrow_logits(UpperHalves(logits_on_host)),
        bias(Values(random, p.experts, p.bias_kind)),
        ids(ids_on_host),
        narrow_ids(Narrow(ids_on_host)),
        weights(weights_on_host),
        narrow_weights(UpperHalves(weights_on_host)),
        packed(Pack(ids_on_host, UpperHalves(weights_on_host))),
        token_ids(Ints(random, p.tokens, -1, kVocabulary + 2)),
        table(Ints(random, int64_t{kVocabulary} * p.top_k, -1, p.experts + 2)),
        shared_weights(Values(random, p.tokens * p.shared)),
        expert_table(Ints(random, p.experts, -1, p.local.count + 2)),
        count(std::vector<int32_t>{static_cast<int32_t>(p.live)}),
        hidden(UpperHalves(Values(random, p.tokens * p.hidden, p.logit_kind))),
        static_scale(std::vector<float>{0.37F}) {}

 private:
  static std::vector<int32_t> Pack(const std::vector<int32_t>& ids,
                                   const std::vector<uint16_t>& weights) {
    std::vector<int32_t> packed;
    for (size_t i = 0; i < ids.size(); ++i) {
      packed.push_back(static_cast<int32_t>(static_cast<uint32_t>(ids[i]) << 16 | weights[i]));
    }
    return packed;
  }
};

// One run's outputs, poisoned, in the order in which they were asked for.
class Outputs {
 public:
  template <class T>
  T* Take(int64_t count) {
    arrays_.push_back(
        std::make_unique<DeviceArray<uint8_t>>(count * static_cast<int64_t>(sizeof(T))));
    return static_cast<T*>(static_cast<void*>(arrays_.back()->get()));
  }
  // What stands where Take said.
  [[nodiscard]] std::vector<int32_t> IntsAt(const int32_t* begin) const {
    for (const auto& array : arrays_) {
      if (static_cast<const void*>(array->get()) == begin) {
        const std::vector<uint8_t> bytes = array->Download();
        std::vector<int32_t> ints(bytes.size() / sizeof(int32_t));
        std::memcpy(ints.data(), bytes.data(), bytes.size());
        return ints;
      }
    }
    ADD_FAILURE() << "no such output";
    return {};
  }
  [[nodiscard]] std::vector<std::vector<uint8_t>> Download() const {
    std::vector<std::vector<uint8_t>> all;
    for (const auto& array : arrays_) {
      EXPECT_TRUE(array->GuardsIntact()) << "output " << all.size();
      all.push_back(array->Download());
    }
    return all;
  }

 private:
  std::vector<std::unique_ptr<DeviceArray<uint8_t>>> arrays_;
};

void BindRoute(const Problem& p, const Inputs& in, route::RouteSm90Args* args) {
  args->rule = p.rule;
  args->num_experts = p.experts;
  args->top_k = p.top_k;
  args->max_tokens = p.tokens;
  args->num_tokens = p.live < 0 ? nullptr : in.count.get();
  args->logits = p.narrow ? static_cast<const void*>(in.narrow_logits.get()) : in.logits.get();
  args->logits_dtype = p.narrow ? DType::kBf16 : DType::kFloat32;
  args->bias = p.rule.use_bias && !p.narrow ? in.bias.get() : nullptr;
  if (p.source == Source::kReplay) {
    args->source = route::IdSource::kForced;
    args->forced_ids = p.narrow ? static_cast<const void*>(in.narrow_ids.get()) : in.ids.get();
    args->forced_dtype = p.narrow ? DType::kInt16 : DType::kInt32;
  } else if (p.source == Source::kHash) {
    args->source = route::IdSource::kTable;
    args->token_ids = in.token_ids.get();
    args->table = in.table.get();
    args->table_rows = kVocabulary;
  }
}

void BindPlace(const Problem& p, const Inputs& in, permute::PlaceSm90Args* args) {
  args->num_experts = p.experts;
  args->top_k = p.top_k;
  args->shared = p.shared;
  args->local = p.local;
  args->max_tokens = p.tokens;
  args->num_tokens = p.live < 0 ? nullptr : in.count.get();
  if (p.source == Source::kPacked) {
    args->source = permute::PlaceSource::kPacked;
    args->packed_ids = in.packed.get();
  } else if (p.source == Source::kUnpacked) {
    args->source = permute::PlaceSource::kUnpacked;
    args->expert_ids = in.ids.get();
    args->expert_weights =
        p.narrow ? static_cast<const void*>(in.narrow_weights.get()) : in.weights.get();
    args->expert_weights_dtype = p.narrow ? DType::kBf16 : DType::kFloat32;
  }
  args->expert_table = in.expert_table.get();
  args->shared_weights = p.narrow ? nullptr : in.shared_weights.get();
  args->shared_weight = 0.75F;
}

// Replay and counters, of the stage that has the ids first.
template <class Args>
void BindRecords(const Problem& p, Outputs* out, Args* args) {
  if (p.optional) {
    args->replay = out->Take<int16_t>(p.tokens * p.top_k);
    args->load = p.narrow ? static_cast<void*>(out->Take<int64_t>(p.experts))
                          : out->Take<int32_t>(p.experts);
    args->load_dtype = p.narrow ? DType::kInt64 : DType::kInt32;
  }
}

gemm1::RoundRowsArgs BindRounding(const Problem& p, const Target& target, const Inputs& in,
                                  Outputs* out) {
  gemm1::RoundRowsArgs args;
  const bool bytes = target.dtype == DType::kE4m3;
  args.to.format = target.format;
  args.to.dtype = target.dtype;
  if (!p.natural) {
    args.to.order = bytes ? gemm::sm90::KOrder::kFp8Decoded : gemm::sm90::KOrder::kBf16Decoded;
  }
  args.row_global = target.row_global;
  args.in = in.hidden.get();
  args.in_pitch = p.hidden;
  args.static_scale = in.static_scale.get();
  args.max_rows = p.tokens;
  args.num_rows = p.live < 0 ? nullptr : in.count.get();
  args.cols = p.hidden;
  args.out_pitch = RoundUp(p.hidden, p.natural ? 16 : gemm::sm90::kKGroup);
  args.out = out->Take<uint8_t>(p.tokens * args.out_pitch * SizeOf(target.dtype));
  args.out_block_scales = out->Take<float>(p.tokens * CeilDiv(p.hidden, 128));
  args.out_row_scales = out->Take<float>(p.tokens);
  return args;
}

RoutePermuteArgs Bind(const Problem& p, const Inputs& in, Outputs* out) {
  RoutePermuteArgs args;
  for (const int target : p.targets) {
    args.rounding[args.roundings++] = BindRounding(p, kTargets[target], in, out);
  }
  args.routes = p.routes();
  BindPlace(p, in, &args.place);
  args.place.ids = out->Take<int32_t>(p.tokens * p.top_k);
  args.place.weights = out->Take<float>(p.tokens * p.top_k);
  args.place.slot_weights = out->Take<float>(p.max_slots());
  args.place.local_slots = out->Take<int32_t>(p.max_slots());
  if (p.optional) {
    args.place.routing_ids = out->Take<int32_t>(p.max_slots());
    args.place.routing_weights = out->Take<float>(p.max_slots());
  }
  if (args.routes) {
    BindRoute(p, in, &args.route);
    args.route.ids = args.place.ids;
    args.route.weights = args.place.weights;
    BindRecords(p, out, &args.route);
  } else {
    BindRecords(p, out, &args.place);
  }
  const int64_t rows = p.max_slots();
  permute::PermuteSm90Args& permute = args.permute;
  permute.segments = p.segments();
  permute.max_tokens = p.tokens;
  permute.slots_per_token = p.slots();
  permute.num_tokens = args.place.num_tokens;
  permute.local_slots = args.place.local_slots;
  permute.expert_offsets = out->Take<int32_t>(p.segments() + 1);
  permute.expert_counts = out->Take<int32_t>(p.segments());
  permute.slot_to_row = out->Take<int32_t>(p.max_slots());
  permute.row_to_slot = out->Take<int32_t>(rows);
  permute.row_to_token = out->Take<int32_t>(rows);
  for (size_t i = 0; i < p.lists.size(); ++i) {
    const int64_t tiles = MaxTiles(p.max_slots(), p.lists[i]);
    permute.tiles[i] = {static_cast<int>(p.lists[i].tile), static_cast<int>(p.lists[i].cluster),
                        out->Take<int32_t>(tiles),         out->Take<int32_t>(tiles),
                        out->Take<int32_t>(tiles),         out->Take<int32_t>(1)};
  }
  permute.num_rows = out->Take<int32_t>(1);
  return args;
}

// Each list by its invariants alone.
void CheckLists(const Problem& p, const RoutePermuteArgs& args, const Outputs& outputs) {
  const permute::PermuteSm90Args& permute = args.permute;
  for (size_t i = 0; i < p.lists.size(); ++i) {
    const permute::TileListSm90& list = permute.tiles[i];
    std::vector<std::vector<int32_t>> arrays;
    for (const int32_t* array : {permute.expert_offsets, permute.expert_counts, permute.slot_to_row,
                                 permute.row_to_slot, permute.row_to_token, list.expert,
                                 list.row_begin, list.row_end, list.num_tiles, permute.num_rows}) {
      arrays.push_back(outputs.IntsAt(array));
    }
    PermuteOutputs out;
    TensorView* const views[] = {&out.expert_offsets, &out.expert_counts, &out.slot_to_row,
                                 &out.row_to_slot,    &out.row_to_token,  &out.tile_expert,
                                 &out.tile_row_begin, &out.tile_row_end,  &out.num_tiles,
                                 &out.num_rows};
    for (size_t a = 0; a < arrays.size(); ++a) {
      *views[a] = TensorView::Contiguous(arrays[a].data(), DType::kInt32,
                                         {static_cast<int64_t>(arrays[a].size())});
    }
    const std::vector<int32_t> local = outputs.IntsAt(args.place.local_slots);
    const int64_t live = p.live < 0 ? p.tokens : std::min(p.live, p.tokens);
    EXPECT_EQ(permute::CheckPermutation(
                  TensorView::Contiguous(local.data(), DType::kInt32, {live, p.slots()}),
                  p.lists[i], out),
              "")
        << "list " << i << " of " << p.lists.size();
  }
}

// Runs both ways, with overlapping launches and without; returns the way that is not kApart, if
// there is one.
RoutePermuteWay ExpectTheSameBits(const Problem& p, Random* random) {
  const Inputs in(p, random);
  const DeviceArray<int32_t> scratch(permute::PermuteScratchInts(p.max_slots(), p.segments()));
  std::vector<std::vector<uint8_t>> want;
  RoutePermuteWay taken = RoutePermuteWay::kApart;
  for (const bool overlap : {false, true}) {
    for (const bool apart : {true, false}) {
      Outputs outputs;
      RoutePermuteArgs args = Bind(p, in, &outputs);
      args.permute.chunk_counts = scratch.get();
      taken = WayFor(args);
      const RoutePermuteWay way = apart ? RoutePermuteWay::kApart : taken;
      RoutePermuteSm90(args, way, {nullptr, overlap});
      const std::vector<std::vector<uint8_t>> got = outputs.Download();
      want = want.empty() ? got : want;
      for (size_t i = 0; i < want.size(); ++i) {
        EXPECT_EQ(got[i], want[i])
            << "output " << i << ", way " << static_cast<int>(way) << ", overlap " << overlap;
      }
      // The poison of num_rows is gone: outputs are not equal for want of a kernel.
      EXPECT_NE(got.back(), std::vector<uint8_t>(4, 0xFF));
      if (!apart) {
        CheckLists(p, args, outputs);
      }
    }
  }
  EXPECT_TRUE(scratch.GuardsIntact());
  return taken;
}

ExpertMap MapOf(int kind, int experts) {
  const int count = (experts + 1) / 2;
  switch (kind) {
    case 0:
      return {};
    case 1:
      return {ExpertMap::Kind::kRange, experts - count, count};
    default:
      return {ExpertMap::Kind::kTable, 0, count};
  }
}

struct Shape {
  int experts;
  int top_k;
  int groups;
  int top_groups;
};
// Some have too many candidates, or groups, for several warps a token.
constexpr Shape kShapes[] = {{1, 1, 1, 1},     {8, 2, 1, 1},    {31, 5, 31, 9},   {60, 6, 3, 1},
                             {128, 8, 1, 1},   {160, 6, 20, 7}, {256, 8, 8, 4},   {256, 32, 2, 1},
                             {384, 8, 1, 1},   {512, 10, 8, 2}, {2048, 3, 32, 5}, {512, 29, 64, 20},
                             {2048, 10, 1, 1}, {64, 4, 64, 30}};
constexpr int64_t kTokens[] = {0, 1, 2, 7, 15, 16, 17, 40};

Problem Draw(const Shape& shape, const RoutingRule& rule, int64_t tokens, Random* random) {
  Problem p;
  p.rule = rule;
  p.experts = shape.experts;
  p.top_k = shape.top_k;
  p.shared = random->Below(4);
  p.local = MapOf(random->Below(3), shape.experts);
  p.tokens = tokens;
  p.live = random->Below(2) == 0 ? -1 : random->Below(static_cast<int>(tokens) + 2);
  p.narrow = random->Below(2) == 0;
  p.optional = random->Below(4) != 0;
  p.logit_kind = random->Below(route::testing::kLogitKinds);
  p.bias_kind = random->Below(2);
  p.targets.resize(static_cast<size_t>(random->Below(kMaxRoundings + 1)));
  for (int& target : p.targets) {
    target = random->Below(kNumTargets);
  }
  p.natural = random->Below(2) == 0;
  p.hidden = int64_t{8} * (1 + random->Below(70));
  const bool all = p.local.kind == ExpertMap::Kind::kAll;
  const int segments = (all ? shape.experts : p.local.count) + p.shared;
  const int lists = 1 + random->Below(2);
  for (int i = 0; i < lists; ++i) {
    p.lists.push_back({segments, int64_t{16} << random->Below(4), 1 + random->Below(2), 1});
  }
  return p;
}

// HasTheBitsOfSeparateLaunches takes every n-th of its problems: all, or few enough for a
// sanitizer. Both numbers are odd where the number of token counts is even, so each count comes up.
int ProblemStep() {
  return route::testing::Scaled(50) == 1 ? 11 : 1;
}

void ExpectTheSameBitsOfEveryBatch(const Shape& shape, const Method& method, Source source,
                                   Random* random) {
  static int problems = 0;
  for (const int64_t tokens : kTokens) {
    if (problems++ % ProblemStep() != 0) {
      continue;
    }
    Problem p = Draw(shape, method.rule, tokens, random);
    p.source = source;
    if (!p.routes() && method.name != "Default") {
      return;  // the rule plays no part
    }
    SCOPED_TRACE(::testing::Message()
                 << method.name << " source " << static_cast<int>(source) << " E=" << shape.experts
                 << " K=" << shape.top_k << '+' << p.shared << " T=" << tokens << " live " << p.live
                 << " map " << static_cast<int>(p.local.kind) << " narrow " << p.narrow
                 << " optional " << p.optional << " logits " << p.logit_kind << " bias "
                 << p.bias_kind << " hidden " << p.hidden << " roundings " << p.targets.size());
    const RoutePermuteWay way = ExpectTheSameBits(p, random);
    const bool few_slots = p.tokens <= 16 && p.max_slots() <= 256;
    // Keys of this many experts leave room for all of a block's tokens.
    EXPECT_TRUE(way == RoutePermuteWay::kOneBlock || !few_slots || shape.experts > 256);
    EXPECT_TRUE(way != RoutePermuteWay::kOneBlock || few_slots);
  }
}

class RoutePermuteShape : public ::testing::TestWithParam<Shape> {};

TEST_P(RoutePermuteShape, HasTheBitsOfSeparateLaunches) {
  HOPYARD_NEEDS_GPU();
  const Shape& shape = GetParam();
  Random random(1);
  for (const Method& method : Methods(shape.groups, shape.top_groups)) {
    for (const Source source : kSources) {
      ExpectTheSameBitsOfEveryBatch(shape, method, source, &random);
      ASSERT_FALSE(HasFailure());
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, RoutePermuteShape, ::testing::ValuesIn(kShapes));

// The largest blocks and the longest strides that a block, and a block per token, lead to.
TEST(RoutePermuteSm90, EveryNumberOfTokensUpToTheLast) {
  HOPYARD_NEEDS_GPU();
  Random random(2);
  for (const Shape& shape : {Shape{256, 8, 8, 4}, Shape{512, 29, 64, 20}, Shape{2048, 10, 1, 1}}) {
    const RoutingRule rule = RoutingRule::DeepSeekV3(shape.groups, shape.top_groups, 2.5F);
    for (int64_t tokens = 0; tokens <= 20; ++tokens) {
      ExpectTheSameBits(Draw(shape, rule, tokens, &random), &random);
      ASSERT_FALSE(HasFailure()) << shape.experts << " experts, " << tokens << " tokens";
    }
  }
}

TEST(RoutePermuteSm90, WaysByTheNumberOfTokens) {
  HOPYARD_NEEDS_GPU();
  struct Step {
    int64_t tokens;
    RoutePermuteWay way;
  };
  constexpr Step kSteps[] = {
      {1, RoutePermuteWay::kOneBlock},     {16, RoutePermuteWay::kOneBlock},
      {17, RoutePermuteWay::kTokenBlock},  {100, RoutePermuteWay::kTokenBlock},
      {256, RoutePermuteWay::kTokenBlock}, {257, RoutePermuteWay::kApart}};
  Random random(3);
  for (const Shape& shape : {Shape{128, 8, 1, 1}, Shape{256, 8, 8, 4}, Shape{32, 4, 1, 1}}) {
    for (const Step& step : kSteps) {
      const RoutingRule rule = RoutingRule::DeepSeekV3(shape.groups, shape.top_groups, 2.5F);
      EXPECT_EQ(ExpectTheSameBits(Draw(shape, rule, step.tokens, &random), &random), step.way)
          << shape.experts << " experts, " << step.tokens << " tokens";
      ASSERT_FALSE(HasFailure());
    }
  }
}

// Every format of hidden states, in both orders, with one block and with one a token.
TEST(RoutePermuteSm90, EveryRounding) {
  HOPYARD_NEEDS_GPU();
  Random random(4);
  for (int target = 0; target < kNumTargets; ++target) {
    for (const bool natural : {false, true}) {
      for (const int64_t tokens : {1, 5, 16, 30}) {
        Problem p = Draw({64, 4, 1, 1}, RoutingRule::Renormalize(), tokens, &random);
        p.targets = {target, (target + 3) % kNumTargets};
        p.natural = natural;
        p.hidden = natural && target % 2 == 0 ? 2056 : 2880;
        ExpectTheSameBits(p, &random);
        ASSERT_FALSE(HasFailure()) << "target " << target << ", " << tokens << " tokens";
      }
    }
  }
}

}  // namespace
}  // namespace hopyard::fused
