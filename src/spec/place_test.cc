// SPDX-License-Identifier: Apache-2.0
// Arguments on the wrong device, judged without any: what a plan for a GPU refuses, and that it
// looks at no value.
#include <cstdint>
#include <string>

#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "spec/validate.h"
#include "tests/forward_runner.h"

namespace hopyard::spec {
namespace {

constexpr Device kFirst{DeviceKind::kCuda, 0};
constexpr Device kSecond{DeviceKind::kCuda, 1};

// Stands for memory of a device: whatever is read here is no valid value.
void* Elsewhere() {
  static int64_t poison[2] = {-1, -1};
  return poison;
}

Place On(const Device& device) {
  Place place;
  place.device = device;
  return place;
}

std::string Refusal(const Place& place, const Device& device) {
  const TensorView tensor = TensorView::Contiguous(Elsewhere(), DType::kFloat32, {2, 3}, device);
  const test::Caught caught = test::CatchError([&] {
    place.CheckTensor(tensor, {"logits", {DType::kFloat32}, {2, 3}});
  });
  EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
  return caught.message;
}

TEST(Place, NamesBothDevices) {
  EXPECT_EQ(Refusal({}, kSecond),
            "logits is a CUDA tensor (cuda:1); wanted host memory, the plan's device is the CPU: "
            "copy it to the host");
  EXPECT_EQ(Refusal(On(kFirst), {}),
            "logits is in host memory; wanted memory of cuda:0, the plan's device: copy it there");
  EXPECT_EQ(Refusal(On(kFirst), kSecond),
            "logits is a CUDA tensor (cuda:1); wanted memory of cuda:0, the plan's device: copy it "
            "there");
  Place slices = On(kFirst);
  slices.or_host = true;
  slices.whose = "the weights'";
  EXPECT_EQ(Refusal(slices, kSecond),
            "logits is a CUDA tensor (cuda:1); wanted memory of cuda:0 or of the host, the "
            "weights' device: copy it there");
}

TEST(Place, TakesItsOwn) {
  const auto takes = [](const Place& place, const Device& device) {
    const TensorView tensor = TensorView::Contiguous(Elsewhere(), DType::kInt32, {4}, device);
    EXPECT_NO_THROW(place.CheckTensor(tensor, {"ids", {DType::kInt32}, {4}}));
  };
  takes({}, {});
  takes(On(kSecond), kSecond);
  Place slices = On(kSecond);
  slices.or_host = true;
  takes(slices, {});
  takes(slices, kSecond);
}

TEST(Place, ReadsDeviceMemoryByItsOwnMeans) {
  Place place = On(kFirst);
  place.read = [](void* to, const void* from, int64_t bytes) {
    EXPECT_EQ(from, Elsewhere());
    EXPECT_EQ(bytes, 8);
    static_cast<float*>(to)[0] = 2.0F;
    static_cast<float*>(to)[1] = 3.0F;
  };
  const TensorView there = TensorView::Contiguous(Elsewhere(), DType::kFloat32, {2}, kFirst);
  EXPECT_EQ(place.Read(there, 2), (std::vector<float>{2.0F, 3.0F}));
  const float here[] = {5.0F};
  EXPECT_EQ(place.Read(TensorView::Contiguous(here, DType::kFloat32, {1}), 1).front(), 5.0F);
}

// The inputs of a call as they would be on a GPU, where the host cannot look.
MoeInputs Moved(const MoeInputs& inputs, const Device& device) {
  MoeInputs moved = inputs;
  for (TensorView* view : {&moved.hidden_states, &moved.logits, &moved.num_tokens}) {
    view->data = Elsewhere();
    view->device = device;
  }
  return moved;
}

TEST(Place, ACallOnAGpuIsCheckedWithoutReadingIt) {
  const MoeSpec spec = test::SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  test::LayerInputs inputs(spec, 3);
  inputs.Logits().NumTokens(2);
  MoeOutputs outputs;
  outputs.output = TensorView::Contiguous(Elsewhere(), DType::kBf16, {3, 256}, kFirst);
  const Place place = On(kFirst);
  EXPECT_NO_THROW(ValidateForward(spec, 3, Moved(inputs.get(), kFirst), outputs, place));
  const auto refused = [&](const MoeInputs& in, const MoeOutputs& out, const std::string& text) {
    const test::Caught caught = test::CatchError([&] { ValidateForward(spec, 3, in, out, place); });
    EXPECT_NE(caught.message.find(text), std::string::npos) << caught.message;
  };
  refused(inputs.get(), outputs, "hidden_states is in host memory; wanted memory of cuda:0");
  MoeInputs mixed = Moved(inputs.get(), kFirst);
  mixed.logits.device = kSecond;
  refused(mixed, outputs, "logits is a CUDA tensor (cuda:1); wanted memory of cuda:0");
  outputs.output.device = {};
  refused(Moved(inputs.get(), kFirst), outputs, "output is in host memory");
}

TEST(Place, WeightsLieOnOneDevice) {
  test::WeightSource source;
  source.spec = test::SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
  const test::LayerWeights storage(source);
  WeightsDesc desc = storage.desc();
  desc.routed.gemm2.values.device = kFirst;
  Place place = On(kFirst);
  place.whose = "the weights'";
  const test::Caught caught = test::CatchError([&] { ValidateWeights(source.spec, desc, place); });
  EXPECT_EQ(caught.message,
            "weights.routed.gemm1.values is in host memory; wanted memory of cuda:0, the weights' "
            "device: copy it there");
  desc.routed.gemm1.values.device = kFirst;
  EXPECT_NO_THROW(ValidateWeights(source.spec, desc, place));
}

}  // namespace
}  // namespace hopyard::spec
