// SPDX-License-Identifier: Apache-2.0
// Finalize on the GPU: the bits of the CPU backend, NaN payloads aside.
#include "stages/5_finalize/finalize_sm90.h"

#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "formats/codes.h"
#include "stages/5_finalize/finalize.h"
#include "tests/gpu/device_array.h"

namespace hopyard::finalize {
namespace {

using test::DeviceArray;

// Every NaN as one: which of its operands' payloads a sum keeps is the machine's choice.
std::vector<uint16_t> OneNan(std::vector<uint16_t> values) {
  for (uint16_t& value : values) {
    value = (value & 0x7FFF) > 0x7F80 ? uint16_t{0x7FC0} : value;
  }
  return values;
}

struct Shape {
  int64_t tokens;
  int64_t hidden;
  int64_t width;
  int slots;
};

void ExpectCpuBits(const Shape& shape, bool accumulate, bool weighted) {
  std::mt19937 random(static_cast<unsigned>(shape.hidden + shape.width));
  std::normal_distribution<float> normal;
  const int64_t slots = shape.tokens * shape.slots;
  std::vector<uint16_t> y(static_cast<size_t>(slots * shape.hidden));
  for (uint16_t& value : y) {
    value = formats::EncodeBf16(normal(random));
  }
  y.front() = 0x7FC0;  // one NaN
  std::vector<int32_t> rows(static_cast<size_t>(slots));
  std::vector<float> weights(static_cast<size_t>(slots));
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = random() % 5 == 0 ? -1 : static_cast<int32_t>((i * 7) % rows.size());
    weights[i] = normal(random);
  }
  std::vector<uint16_t> want(static_cast<size_t>(shape.tokens * shape.width));
  for (uint16_t& value : want) {
    value = formats::EncodeBf16(normal(random));
  }
  const DeviceArray<uint16_t> device_y(y);
  const DeviceArray<int32_t> device_rows(rows);
  const DeviceArray<float> device_weights(weights);
  const DeviceArray<uint16_t> output(want);

  Args args;
  args.y = y.data();
  args.slot_to_row = rows.data();
  args.weights = weighted ? weights.data() : nullptr;
  args.output = want.data();
  args.tokens = shape.tokens;
  args.hidden = shape.hidden;
  args.width = shape.width;
  args.slots = shape.slots;
  args.accumulate = accumulate;
  FinalizeCpu(args);

  FinalizeSm90Args device;
  device.y = device_y.get();
  device.slot_to_row = device_rows.get();
  device.weights = weighted ? device_weights.get() : nullptr;
  device.output = output.get();
  device.max_tokens = shape.tokens;
  device.hidden = shape.hidden;
  device.width = shape.width;
  device.slots = shape.slots;
  device.accumulate = accumulate;
  FinalizeSm90(device, nullptr);
  ASSERT_EQ(OneNan(output.Download()), OneNan(want));
  ASSERT_TRUE(output.GuardsIntact());
}

TEST(FinalizeSm90, HasTheBitsOfTheCpu) {
  HOPYARD_NEEDS_GPU();
  for (const Shape& shape : {Shape{1, 8, 8, 1}, Shape{3, 64, 40, 2}, Shape{17, 37, 31, 3},
                             Shape{200, 2048, 2048, 8}, Shape{5, 7168, 7160, 9},
                             Shape{2, 256, 256, 10}, Shape{7, 264, 256, 11}, Shape{3, 72, 65, 35},
                             // More columns than the grid takes in one stride.
                             Shape{2500, 1032, 1024, 2}, Shape{1000, 333, 331, 3}}) {
    for (const bool accumulate : {false, true}) {
      for (const bool weighted : {false, true}) {
        ExpectCpuBits(shape, accumulate, weighted);
        ASSERT_FALSE(HasFatalFailure()) << shape.hidden << ' ' << accumulate << ' ' << weighted;
      }
    }
  }
}

TEST(FinalizeSm90, OnlyLiveTokensAreWritten) {
  HOPYARD_NEEDS_GPU();
  constexpr int64_t kTokens = 6;
  const DeviceArray<uint16_t> y(std::vector<uint16_t>(kTokens * 16, 0x3F80));
  const DeviceArray<int32_t> rows(std::vector<int32_t>{0, 1, 2, 3, 4, 5});
  const DeviceArray<uint16_t> output(kTokens * 16);
  const DeviceArray<int32_t> count(std::vector<int32_t>{4});
  FinalizeSm90Args args;
  args.y = y.get();
  args.slot_to_row = rows.get();
  args.output = output.get();
  args.num_tokens = count.get();
  args.max_tokens = kTokens;
  args.hidden = 16;
  args.width = 16;
  args.slots = 1;
  FinalizeSm90(args, nullptr);
  const std::vector<uint16_t> got = output.Download();
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i], i < 4 * 16 ? 0x3F80 : 0xFFFF);
  }
}

}  // namespace
}  // namespace hopyard::finalize
