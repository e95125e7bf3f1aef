// SPDX-License-Identifier: Apache-2.0
// The hot call on a GPU takes no memory from the heap: every `new` of the program, the library's
// own among them, is counted around a second Forward. The driver has an allocator of its own, and
// that the device's memory is left alone is what the captures of graph_sm90_test show.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include <gtest/gtest.h>

#include "tests/gpu/captured_call.h"

namespace {

std::atomic<int64_t> g_allocations{0};

}  // namespace

// Every other form of `new` ends here but for aligned ones, which nothing uses. Inlined, they would
// look to g++ as if what `new` gives went to `free`.
[[gnu::noinline]] void* operator new(std::size_t size) {
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  void* const memory = std::malloc(size == 0 ? 1 : size);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t /*size*/) noexcept {
  std::free(memory);
}

namespace hopyard::test {
namespace {

class GpuAllocation : public ::testing::TestWithParam<FormatPair> {};

// One launch before the GEMMs, two and more, and a batch that the workspace's cap cuts into chunks.
TEST_P(GpuAllocation, TheSecondCallTakesNothingFromTheHeap) {
  HOPYARD_NEEDS_GPU();
  WeightSource source;
  source.spec = SmallSpec(GetParam().weights, GetParam().activations);
  source.spec.shared = {1, false, 0.5F, source.spec.weights};
  TwinLayer layer(source);
  for (const int64_t tokens : {1, 40, 300}) {
    for (const bool capped : {false, true}) {
      PlanOptions options;
      options.max_tokens = tokens;
      if (capped) {
        PlanOptions part = options;
        part.max_tokens = tokens / 3 + 1;
        options.workspace_cap = MakePlan(source.spec, kGpu, part).workspace_bytes();
      }
      const Plan plan = MakePlan(source.spec, kGpu, options);
      DeviceMirror mirror;
      LayerInputs inputs(source.spec, tokens);
      const RepeatedCall call(plan, layer.gpu(), mirror.Copy(inputs.Logits().get()));
      call.Run(nullptr);  // whatever is loaded once
      const int64_t before = g_allocations;
      call.Run(nullptr);
      EXPECT_EQ(g_allocations - before, 0) << tokens << " tokens, capped " << capped;
      EXPECT_TRUE(call.Intact());
    }
  }
}

TEST(GpuAllocationCount, SeesEveryNew) {
  const int64_t before = g_allocations;
  // Read back through volatile pointers, so that no call is optimised away.
  int* volatile one = new int(1);
  int* volatile many = new int[3];
  delete one;
  delete[] many;
  EXPECT_EQ(g_allocations - before, 2);
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuAllocation, ::testing::ValuesIn(FamilyPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
