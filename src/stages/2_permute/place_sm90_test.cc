// SPDX-License-Identifier: Apache-2.0
// Places of slots on the GPU against the rules written out one slot at a time.
#include "stages/2_permute/place_sm90.h"

#include <bit>
#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/gpu/device_array.h"

namespace hopyard::permute {
namespace {

using test::DeviceArray;

constexpr int kExperts = 40;
constexpr int32_t kUntouched = -1;             // int32 of DeviceArray's poison
constexpr uint32_t kUntouchedBits = ~0U;       // and float
constexpr int32_t kCountedBefore = 1'000'000;  // a counter's value before the call

struct Case {
  PlaceSource source = PlaceSource::kRouted;
  ExpertMap local;
  int top_k = 4;
  int shared = 0;
  int64_t tokens = 0;
  int64_t live = 0;
  bool shared_per_token = false;
  bool bf16_weights = false;  // of the caller, shared and unpacked ones
  bool wide_counters = false;
  bool optional_outputs = true;

  [[nodiscard]] int slots() const { return top_k + shared; }
  [[nodiscard]] int local_experts() const {
    return local.kind == ExpertMap::Kind::kAll ? kExperts : local.count;
  }
};

std::vector<uint32_t> BitsOf(const std::vector<float>& values) {
  std::vector<uint32_t> bits;
  for (const float value : values) {
    bits.push_back(std::bit_cast<uint32_t>(value));
  }
  return bits;
}

// What the caller gives. Ids go beyond both ends of what is valid.
struct Inputs {
  std::vector<int32_t> ids;
  std::vector<uint16_t> weights;  // bf16
  std::vector<uint16_t> shared_weights;
  std::vector<int32_t> table;

  explicit Inputs(const Case& c) {
    std::mt19937 random(static_cast<unsigned>(c.tokens + c.shared));
    const auto draw = [&random](int64_t low, int64_t high) {
      return static_cast<int32_t>(low + static_cast<int64_t>(random() % (high - low)));
    };
    for (int64_t i = 0; i < c.tokens * c.top_k; ++i) {
      const int32_t id = draw(-3, kExperts + 3);
      // Routing itself writes only valid ids and -1.
      const bool valid = id >= 0 && id < kExperts;
      ids.push_back(c.source == PlaceSource::kRouted && !valid ? -1 : id);
      weights.push_back(static_cast<uint16_t>(random()));
    }
    for (int64_t i = 0; i < c.tokens * c.shared; ++i) {
      shared_weights.push_back(static_cast<uint16_t>(random()));
    }
    for (int e = 0; e < kExperts; ++e) {
      table.push_back(draw(-2, c.local.count + 2));
    }
  }
};

// What the call leaves behind.
struct Results {
  std::vector<int32_t> ids;
  std::vector<uint32_t> weights;
  std::vector<int16_t> replay;
  std::vector<int64_t> load;
  std::vector<uint32_t> slot_weights;
  std::vector<int32_t> local_slots;
  std::vector<int32_t> routing_ids;
  std::vector<uint32_t> routing_weights;
};

int32_t LocalSlot(const Case& c, const Inputs& in, int32_t id) {
  int32_t slot = id;
  if (c.local.kind == ExpertMap::Kind::kRange) {
    slot = id - c.local.offset;
  } else if (c.local.kind == ExpertMap::Kind::kTable) {
    slot = id < 0 ? -1 : in.table[static_cast<size_t>(id)];
  }
  return slot >= 0 && slot < c.local_experts() ? slot : -1;
}

void PutSlot(Results& results, size_t at, int32_t id, int32_t local, uint32_t weight) {
  results.local_slots[at] = local;
  results.slot_weights[at] = weight;
  results.routing_ids[at] = id;
  results.routing_weights[at] = weight;
}

Results Expected(const Case& c, const Inputs& in) {
  const auto choices = static_cast<size_t>(c.tokens * c.top_k);
  const auto slots = static_cast<size_t>(c.tokens * c.slots());
  Results want{std::vector<int32_t>(choices, kUntouched),
               std::vector<uint32_t>(choices, kUntouchedBits),
               std::vector<int16_t>(choices, -1),
               std::vector<int64_t>(kExperts, kCountedBefore),
               std::vector<uint32_t>(slots, kUntouchedBits),
               std::vector<int32_t>(slots, kUntouched),
               std::vector<int32_t>(slots, kUntouched),
               std::vector<uint32_t>(slots, kUntouchedBits)};
  const bool routed = c.source == PlaceSource::kRouted;
  for (size_t i = 0; routed && i < choices; ++i) {
    want.ids[i] = in.ids[i];
    want.weights[i] = static_cast<uint32_t>(in.weights[i]) << 16;
  }
  for (int64_t t = 0; t < c.live; ++t) {
    for (int k = 0; k < c.top_k; ++k) {
      const auto i = static_cast<size_t>(t * c.top_k + k);
      const bool valid = in.ids[i] >= 0 && in.ids[i] < kExperts;
      const int32_t id = valid ? in.ids[i] : -1;
      const uint32_t given = static_cast<uint32_t>(in.weights[i]) << 16;
      const uint32_t weight = valid || routed ? given : 0U;
      want.ids[i] = id;
      want.weights[i] = weight;
      if (!routed && valid) {
        want.replay[i] = static_cast<int16_t>(id);
        ++want.load[static_cast<size_t>(id)];
      }
      PutSlot(want, static_cast<size_t>(t * c.slots() + k), id, LocalSlot(c, in, id), weight);
    }
    for (int s = 0; s < c.shared; ++s) {
      const auto i = static_cast<size_t>(t * c.shared + s);
      const uint32_t weight = c.shared_per_token ? static_cast<uint32_t>(in.shared_weights[i]) << 16
                                                 : std::bit_cast<uint32_t>(0.75F);
      PutSlot(want, static_cast<size_t>(t * c.slots() + c.top_k + s), kExperts + s,
              c.local_experts() + s, weight);
    }
  }
  return want;
}

// The caller's weights as bf16 or f32.
class DeviceWeights {
 public:
  DeviceWeights(const std::vector<uint16_t>& bf16, bool narrow)
      : narrow_(bf16), wide_(Widen(bf16)), is_narrow_(narrow) {}

  [[nodiscard]] const void* get() const {
    return is_narrow_ ? static_cast<const void*>(narrow_.get()) : wide_.get();
  }
  [[nodiscard]] DType dtype() const { return is_narrow_ ? DType::kBf16 : DType::kFloat32; }

 private:
  static std::vector<uint32_t> Widen(const std::vector<uint16_t>& bf16) {
    std::vector<uint32_t> bits;
    for (const uint16_t value : bf16) {
      bits.push_back(static_cast<uint32_t>(value) << 16);
    }
    return bits;
  }

  DeviceArray<uint16_t> narrow_;
  DeviceArray<uint32_t> wide_;
  bool is_narrow_;
};

// Outputs on the device, and routed inputs.
struct Device {
  DeviceArray<int32_t> ids;
  DeviceArray<float> weights;
  DeviceArray<int16_t> replay;
  DeviceArray<int32_t> load;
  DeviceArray<int64_t> wide_load;
  DeviceArray<float> slot_weights;
  DeviceArray<int32_t> local_slots;
  DeviceArray<int32_t> routing_ids;
  DeviceArray<float> routing_weights;

  explicit Device(const Case& c)
      : ids(c.tokens * c.top_k),
        weights(c.tokens * c.top_k),
        replay(c.tokens * c.top_k),
        load(std::vector<int32_t>(kExperts, kCountedBefore)),
        wide_load(std::vector<int64_t>(kExperts, kCountedBefore)),
        slot_weights(c.tokens * c.slots()),
        local_slots(c.tokens * c.slots()),
        routing_ids(c.tokens * c.slots()),
        routing_weights(c.tokens * c.slots()) {}

  [[nodiscard]] bool GuardsIntact() const {
    return ids.GuardsIntact() && weights.GuardsIntact() && replay.GuardsIntact() &&
           load.GuardsIntact() && wide_load.GuardsIntact() && slot_weights.GuardsIntact() &&
           local_slots.GuardsIntact() && routing_ids.GuardsIntact() &&
           routing_weights.GuardsIntact();
  }
  [[nodiscard]] Results Download(bool wide) const {
    std::vector<int64_t> counters = wide_load.Download();
    if (!wide) {
      const std::vector<int32_t> narrow = load.Download();
      counters.assign(narrow.begin(), narrow.end());
    }
    return {ids.Download(),
            BitsOf(weights.Download()),
            replay.Download(),
            counters,
            BitsOf(slot_weights.Download()),
            local_slots.Download(),
            routing_ids.Download(),
            BitsOf(routing_weights.Download())};
  }
};

void SetOutputs(const Case& c, const Device& device, PlaceSm90Args& args) {
  args.ids = device.ids.get();
  args.weights = device.weights.get();
  args.slot_weights = device.slot_weights.get();
  args.local_slots = device.local_slots.get();
  if (c.optional_outputs) {
    args.replay = device.replay.get();
    args.load = c.wide_counters ? static_cast<void*>(device.wide_load.get()) : device.load.get();
    args.load_dtype = c.wide_counters ? DType::kInt64 : DType::kInt32;
    args.routing_ids = device.routing_ids.get();
    args.routing_weights = device.routing_weights.get();
  }
}

void ExpectPlaces(const Case& c) {
  const Inputs in(c);
  std::vector<int32_t> packed;
  for (size_t i = 0; i < in.ids.size(); ++i) {
    packed.push_back(static_cast<int32_t>(static_cast<uint32_t>(in.ids[i]) << 16 | in.weights[i]));
  }
  const DeviceArray<int32_t> packed_ids(packed);
  const DeviceArray<int32_t> expert_ids(in.ids);
  const DeviceWeights expert_weights(in.weights, c.bf16_weights);
  const DeviceWeights shared_weights(in.shared_weights, c.bf16_weights);
  const DeviceWeights routed_weights(in.weights, false);
  const DeviceArray<int32_t> table(in.table);
  const DeviceArray<int32_t> count(std::vector<int32_t>{static_cast<int32_t>(c.live)});
  const Device device(c);
  PlaceSm90Args args;
  args.source = c.source;
  args.num_experts = kExperts;
  args.top_k = c.top_k;
  args.shared = c.shared;
  args.local = c.local;
  args.max_tokens = c.tokens;
  args.num_tokens = c.live == c.tokens ? nullptr : count.get();
  args.packed_ids = packed_ids.get();
  args.expert_ids = expert_ids.get();
  args.expert_weights = expert_weights.get();
  args.expert_weights_dtype = expert_weights.dtype();
  args.expert_table = table.get();
  args.shared_weights = c.shared_per_token ? shared_weights.get() : nullptr;
  args.shared_weights_dtype = shared_weights.dtype();
  args.shared_weight = 0.75F;
  SetOutputs(c, device, args);
  if (c.source == PlaceSource::kRouted) {
    const auto bytes = 4 * in.ids.size();
    HOPYARD_CUDA(cudaMemcpy(args.ids, in.ids.data(), bytes, cudaMemcpyHostToDevice));
    HOPYARD_CUDA(cudaMemcpy(args.weights, routed_weights.get(), bytes, cudaMemcpyDeviceToDevice));
  }
  PlaceSm90(args, nullptr);
  Results want = Expected(c, in);
  if (!c.optional_outputs) {
    want.replay.assign(want.replay.size(), -1);
    want.load.assign(want.load.size(), kCountedBefore);
    want.routing_ids.assign(want.routing_ids.size(), kUntouched);
    want.routing_weights.assign(want.routing_weights.size(), kUntouchedBits);
  }
  const Results got = device.Download(c.wide_counters);
  ASSERT_EQ(got.ids, want.ids);
  ASSERT_EQ(got.weights, want.weights);
  ASSERT_EQ(got.replay, want.replay);
  ASSERT_EQ(got.load, want.load);
  ASSERT_EQ(got.slot_weights, want.slot_weights);
  ASSERT_EQ(got.local_slots, want.local_slots);
  ASSERT_EQ(got.routing_ids, want.routing_ids);
  ASSERT_EQ(got.routing_weights, want.routing_weights);
  ASSERT_TRUE(device.GuardsIntact());
}

constexpr PlaceSource kSources[] = {PlaceSource::kRouted, PlaceSource::kPacked,
                                    PlaceSource::kUnpacked};

std::vector<ExpertMap> Maps() {
  return {{},
          {ExpertMap::Kind::kRange, 0, 10},
          {ExpertMap::Kind::kRange, 30, 10},
          {ExpertMap::Kind::kTable, 0, 12}};
}

TEST(PlaceSm90, EverySourceAndMap) {
  HOPYARD_NEEDS_GPU();
  for (const PlaceSource source : kSources) {
    for (const ExpertMap& local : Maps()) {
      for (const int shared : {0, 1, 3}) {
        for (const int64_t tokens : {0, 1, 7, 1000}) {
          Case c;
          c.source = source;
          c.local = local;
          c.shared = shared;
          c.tokens = tokens;
          c.live = tokens;
          c.shared_per_token = tokens % 2 == 1;
          c.bf16_weights = shared == 1;
          c.wide_counters = shared == 3;
          SCOPED_TRACE(testing::Message() << "source " << static_cast<int>(source) << " map "
                                          << static_cast<int>(local.kind) << " shared " << shared
                                          << " tokens " << tokens);
          ExpectPlaces(c);
          ASSERT_FALSE(HasFatalFailure());
        }
      }
    }
  }
}

TEST(PlaceSm90, OnlyLiveTokensAreWritten) {
  HOPYARD_NEEDS_GPU();
  for (const PlaceSource source : kSources) {
    for (const int64_t live : {0, 1, 8}) {
      Case c;
      c.source = source;
      c.shared = 1;
      c.tokens = 9;
      c.live = live;
      ExpectPlaces(c);
      ASSERT_FALSE(HasFatalFailure()) << live;
    }
  }
}

TEST(PlaceSm90, AbsentOutputsAndManySlots) {
  HOPYARD_NEEDS_GPU();
  for (const PlaceSource source : kSources) {
    Case c;
    c.source = source;
    c.optional_outputs = false;
    c.tokens = 5;
    c.live = 5;
    ExpectPlaces(c);
    ASSERT_FALSE(HasFatalFailure());
    c.optional_outputs = true;
    c.top_k = 31;
    c.shared = 1;
    // More tokens than the grid takes in one stride.
    c.tokens = 20'000;
    c.live = 20'000;
    ExpectPlaces(c);
    ASSERT_FALSE(HasFatalFailure());
  }
}

}  // namespace
}  // namespace hopyard::permute
