// SPDX-License-Identifier: Apache-2.0
// The hot call allocates nothing: every way to the heap is counted around a second Forward.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "tests/bad_input.h"

#if defined(__SANITIZE_ADDRESS__) || !defined(__GLIBC__)
#define HOPYARD_COUNTS_ALLOCATIONS 0  // the sanitizer's allocator may not be replaced
#else
#define HOPYARD_COUNTS_ALLOCATIONS 1
#endif

namespace {

std::atomic<bool> g_counting{false};
std::atomic<int64_t> g_allocations{0};

}  // namespace

#if HOPYARD_COUNTS_ALLOCATIONS
namespace {

void Count() {
  if (g_counting.load(std::memory_order_relaxed)) {
    g_allocations.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace

// operator new ends in malloc. The names are glibc's own, by which a program's definitions stand
// before those of the C library for every library that it loads, libgomp too.
// NOLINTBEGIN(readability-identifier-naming,bugprone-reserved-identifier)
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* pointer, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

__attribute__((visibility("default"))) void* malloc(size_t size) {
  Count();
  return __libc_malloc(size);
}
__attribute__((visibility("default"))) void* calloc(size_t count, size_t size) {
  Count();
  return __libc_calloc(count, size);
}
__attribute__((visibility("default"))) void* realloc(void* pointer, size_t size) {
  Count();
  return __libc_realloc(pointer, size);
}
__attribute__((visibility("default"))) void* memalign(size_t alignment, size_t size) {
  Count();
  return __libc_memalign(alignment, size);
}
__attribute__((visibility("default"))) void* aligned_alloc(size_t alignment, size_t size) {
  Count();
  return __libc_memalign(alignment, size);
}
__attribute__((visibility("default"))) int posix_memalign(void** pointer, size_t alignment,
                                                          size_t size) {
  Count();
  *pointer = __libc_memalign(alignment, size);
  return *pointer == nullptr ? 12 : 0;  // ENOMEM
}
}
// NOLINTEND(readability-identifier-naming,bugprone-reserved-identifier)
#endif

namespace hopyard::test {
namespace {

// Allocations of all threads during `action`.
template <class Action>
int64_t AllocationsOf(const Action& action) {
  g_allocations = 0;
  g_counting = true;
  action();
  g_counting = false;
  return g_allocations;
}

struct Entry {
  RoutingInput routing;
  FormatPair formats;
  int threads;
};

std::string Name(const Entry& entry) {
  const char* modes[] = {"Logits", "Packed", "Unpacked", "Replay", "Hash"};
  return modes[static_cast<int>(entry.routing)] + std::string("_") + ToString(entry.formats) + "_" +
         std::to_string(entry.threads);
}

std::vector<Entry> Entries() {
  using W = WeightFormat;
  using A = ActivationFormat;
  const RoutingInput modes[] = {RoutingInput::kLogits, RoutingInput::kPacked,
                                RoutingInput::kUnpacked, RoutingInput::kReplay,
                                RoutingInput::kHash};
  const FormatPair pairs[] = {{W::kBf16, A::kBf16},
                              {W::kFp8Block128, A::kFp8Block128},
                              {W::kFp8PerTensor, A::kFp8PerTensor},
                              {W::kMxFp4, A::kMxFp8},
                              {W::kNvFp4, A::kNvFp4},
                              {W::kMxInt4, A::kBf16}};
  std::vector<Entry> entries;
  for (const RoutingInput mode : modes) {
    for (const FormatPair& pair : pairs) {
      for (const int threads : {1, 2}) {
        entries.push_back({mode, pair, threads});
      }
    }
  }
  return entries;
}

class ForwardAllocation : public ::testing::TestWithParam<Entry> {
 protected:
  void SetUp() override {
    if (HOPYARD_COUNTS_ALLOCATIONS == 0) {
      GTEST_SKIP() << "the sanitizer owns malloc: counted in the other builds";
    }
  }
  static MoeSpec Spec() {
    MoeSpec spec = SmallSpec(GetParam().formats.weights, GetParam().formats.activations);
    spec.routing = RoutingRule::DeepSeekV3(4, 2, 2.5F);
    spec.shared.count = 1;
    spec.shared.weights = spec.weights;
    return spec;
  }
  static void Give(LayerInputs* inputs, int64_t tokens) {
    const MoeSpec spec = Spec();
    const std::vector<int32_t> ids = MakeIds(IdPattern::kRandom, spec, tokens);
    switch (GetParam().routing) {
      case RoutingInput::kPacked:
        inputs->Packed(ids, MakeWeights(spec, tokens));
        return;
      case RoutingInput::kUnpacked:
        inputs->Unpacked(ids, MakeWeights(spec, tokens));
        return;
      case RoutingInput::kReplay:
        inputs->Logits().Replay(ids, DType::kInt16);
        return;
      case RoutingInput::kHash:
        inputs->Logits().HashTable(50);
        return;
      default:
        inputs->Logits().RoutingBias();
    }
  }
};

// Decode, prefill, and a batch that the workspace's cap cuts into chunks; every output asked for.
TEST_P(ForwardAllocation, TheSecondCallAllocatesNothing) {
  const MoeSpec spec = Spec();
  const LayerWeights stored(SourceOf(spec));
  const Weights weights = stored.Make();
  for (const int64_t tokens : {int64_t{1}, int64_t{70}}) {
    for (const bool capped : {false, true}) {
      PlanOptions options;
      options.max_tokens = tokens;
      options.num_threads = GetParam().threads;
      if (capped) {
        PlanOptions part = options;
        part.max_tokens = tokens / 3 + 1;
        options.workspace_cap = MakePlan(spec, Device{}, part).workspace_bytes();
      }
      const Plan plan = MakePlan(spec, Device{}, options);
      GuardedBuffer workspace(plan.workspace_bytes());
      LayerInputs inputs(spec, tokens);
      Give(&inputs, tokens);
      const int64_t slots = spec.slots_per_token();
      Arena arena;
      MoeOutputs outputs;
      outputs.output = arena.Array(DType::kBf16, {tokens, spec.hidden_size});
      outputs.replay = arena.Array(DType::kInt16, {tokens, spec.top_k});
      outputs.expert_load = arena.Array(DType::kInt64, {spec.num_experts});
      outputs.routing_weights = arena.Array(DType::kFloat32, {tokens, slots});
      outputs.routing_ids = arena.Array(DType::kInt32, {tokens, slots});
      outputs.rows = arena.Array(DType::kBf16, {tokens * slots, spec.hidden_size});
      outputs.slot_to_row = arena.Array(DType::kInt32, {tokens, slots});
      outputs.gemm1_activation =
          arena.Array(DType::kBf16, {tokens * slots, spec.intermediate_size});
      const auto call = [&] {
        Forward(plan, weights, inputs.get(), outputs,
                {workspace.data(), static_cast<size_t>(workspace.bytes())});
      };
      call();  // wakes the threads
      EXPECT_EQ(AllocationsOf(call), 0) << tokens << " tokens, capped " << capped;
    }
  }
}

// The count itself counts: new, malloc and its kin, on any thread.
TEST(AllocationCount, SeesEveryWayToTheHeap) {
  if (HOPYARD_COUNTS_ALLOCATIONS == 0) {
    GTEST_SKIP() << "the sanitizer owns malloc: counted in the other builds";
  }
  // Read back through volatile pointers, so that no call is optimised away.
  static void* volatile kept[4];
  const auto heap = [] {
    kept[0] = std::malloc(100);
    kept[1] = std::aligned_alloc(256, 512);
    kept[2] = new int(1);
    kept[3] = std::calloc(3, 7);
    std::free(kept[0]);
    std::free(kept[1]);
    delete static_cast<int*>(kept[2]);
    std::free(kept[3]);
  };
  EXPECT_EQ(AllocationsOf(heap), 4);
  const auto other_thread = [] {
    std::thread([] {
      kept[0] = std::malloc(10);
      std::free(kept[0]);
    }).join();
  };
  EXPECT_GE(AllocationsOf(other_thread), 2);  // the thread's state, and its own
  EXPECT_EQ(AllocationsOf([] {}), 0);
}

INSTANTIATE_TEST_SUITE_P(Entries, ForwardAllocation, ::testing::ValuesIn(Entries()),
                         [](const ::testing::TestParamInfo<Entry>& entry) {
                           return Name(entry.param);
                         });

}  // namespace
}  // namespace hopyard::test
