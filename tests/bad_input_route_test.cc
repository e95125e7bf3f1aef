// SPDX-License-Identifier: Apache-2.0
// Spoils every tensor of Route and FusedTopkDeepseek in every way, and fixes the words of the
// operations that stand beside the layer.
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/quantize.h"
#include "hopyard/routing.h"

#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

constexpr int64_t kTokens = 5;
constexpr int kExperts = 12;
constexpr int kTopK = 3;

struct NamedView {
  const char* name;
  TensorView view;
  int free_dim = -1;  // an extent that may grow (replay rows) or change (table rows)
};

// One valid call, spoilt by replacing one view.
struct Setup {
  const char* name;
  std::vector<const char*> arguments;
  void (*run)(const std::vector<NamedView>& all);
};

std::ostream& operator<<(std::ostream& out, const Setup& setup) {
  return out << setup.name;
}

TensorView Find(const std::vector<NamedView>& all, const std::string& name) {
  for (const NamedView& argument : all) {
    if (argument.name == name) {
      return argument.view;
    }
  }
  return {};
}

void RunRoute(const std::vector<NamedView>& all) {
  RouteInputs in;
  in.logits = Find(all, "logits");
  in.bias = Find(all, "bias");
  in.forced_ids = Find(all, "forced_ids");
  in.token_ids = Find(all, "token_ids");
  in.token_to_experts = Find(all, "token_to_experts");
  in.num_tokens = Find(all, "num_tokens");
  RouteOutputs out;
  out.expert_ids = Find(all, "expert_ids");
  out.weights = Find(all, "weights");
  out.replay = Find(all, "replay");
  out.expert_load = Find(all, "expert_load");
  Route(RoutingRule::DeepSeekV3(4, 2, 1.0F), kTopK, in, out);
}

void RunFused(const std::vector<NamedView>& all) {
  FusedTopkDeepseek(Find(all, "scores"), Find(all, "bias"), RoutingRule::DeepSeekV3(4, 2, 1.0F),
                    Find(all, "topk_values"), Find(all, "topk_indices"), Find(all, "replay"));
}

std::vector<Setup> Setups() {
  return {
      {"Forced",
       {"logits", "bias", "forced_ids", "expert_ids", "weights", "replay", "expert_load"},
       RunRoute},
      {"Hash",
       {"logits", "token_ids", "token_to_experts", "num_tokens", "expert_ids", "weights"},
       RunRoute},
      {"FusedTopkDeepseek", {"scores", "bias", "topk_values", "topk_indices", "replay"}, RunFused}};
}

class SpoiltRoute : public ::testing::TestWithParam<Setup> {
 protected:
  SpoiltRoute() {
    for (const char* name : GetParam().arguments) {
      all_.push_back(Make(name));
    }
  }

  // Valid memory for the argument of that name: zeros are valid ids, scores and counts.
  NamedView Make(const std::string& name) {
    struct Kind {
      const char* name;
      std::vector<int64_t> shape;
      DType dtype;
      int free_dim = -1;
    };
    const Kind kinds[] = {{"logits", {kTokens, kExperts}, DType::kFloat32},
                          {"scores", {kTokens, kExperts}, DType::kFloat32},
                          {"bias", {kExperts}, DType::kFloat32},
                          {"forced_ids", {kTokens, kTopK}, DType::kInt32},
                          {"token_ids", {kTokens}, DType::kInt64},
                          {"token_to_experts", {7, kTopK}, DType::kInt32, 0},
                          {"num_tokens", {1}, DType::kInt32},
                          {"expert_ids", {kTokens, kTopK}, DType::kInt32},
                          {"topk_indices", {kTokens, kTopK}, DType::kInt32},
                          {"weights", {kTokens, kTopK}, DType::kFloat32},
                          {"topk_values", {kTokens, kTopK}, DType::kFloat32},
                          {"replay", {kTokens, kTopK}, DType::kInt16, 0},
                          {"expert_load", {kExperts}, DType::kInt64}};
    for (const Kind& kind : kinds) {
      if (name == kind.name) {
        const GuardedBuffer& buffer = arena_.Bytes(1024);
        buffer.Fill(0);
        const TensorView flat = TensorView::Contiguous(buffer.data(), kind.dtype, {1});
        return {kind.name, Reshaped(flat, kind.shape), kind.free_dim};
      }
    }
    ADD_FAILURE() << name;
    return {"", {}, -1};
  }

  // Refused with these words, and no byte changed.
  void ExpectRefused(size_t i, const TensorView& view, const std::vector<std::string>& parts) {
    std::vector<NamedView> bad = all_;
    bad[i].view = view;
    ExpectInvalid([&] { GetParam().run(bad); }, parts);
    for (const NamedView& argument : all_) {
      const auto* bytes = argument.view.as<const uint8_t>();
      for (int b = 0; b < 1024; ++b) {
        ASSERT_EQ(bytes[b], 0) << argument.name << " was written";
      }
    }
    ++refused_;
  }

  void SpoilMemory(size_t i) {
    const TensorView good = all_[i].view;
    const std::string name = all_[i].name;
    for (const DType dtype : {DType::kFloat64, DType::kInt8, DType::kE4m3}) {
      ExpectRefused(i, WithDType(good, dtype), {name + " is ", "; wanted "});
    }
    TensorView bad = good;
    bad.data = nullptr;
    ExpectRefused(i, bad, {name + " has a null pointer"});
    bad = good;
    bad.device = {DeviceKind::kCuda, 1};
    ExpectRefused(i, bad, {name + " is a CUDA tensor (cuda:1)", "copy it to the host"});
    bad = good;
    bad.data = good.as<uint8_t>() + 1;
    ExpectRefused(i, bad, {name + " at ", "not aligned"});
    for (int d = 0; d < good.ndim; ++d) {
      if (good.shape.at(static_cast<size_t>(d)) > 1) {
        bad = good;
        bad.strides.at(static_cast<size_t>(d)) += 1;
        ExpectRefused(i, bad, {name + " is not contiguous"});
      }
    }
  }

  void SpoilShape(size_t i) {
    const TensorView good = all_[i].view;
    const std::string name = all_[i].name;
    std::vector<int64_t> shape(good.shape.begin(), good.shape.begin() + good.ndim);
    shape.push_back(1);
    ExpectRefused(i, Reshaped(good, shape), {name + " has shape ["});
    TensorView bad = good;
    for (const int ndim : {-1, TensorView::kMaxDims + 1}) {
      bad.ndim = ndim;
      ExpectRefused(i, bad, {name, "of " + std::to_string(ndim) + " dimensions"});
    }
    shape.pop_back();
    for (int d = 0; d < good.ndim; ++d) {
      for (const int64_t change : {1, -1}) {
        if (d == all_[i].free_dim && (change > 0 || name == "token_to_experts")) {
          continue;
        }
        std::vector<int64_t> wrong = shape;
        wrong[static_cast<size_t>(d)] += change;
        // Other arguments may be the ones that disagree with the tokens, experts or top_k.
        const bool decides = name == "logits" || name == "scores" || name == "topk_indices";
        ExpectRefused(i, Reshaped(good, wrong), {decides ? " " : name + " has "});
      }
    }
  }

  Arena arena_;
  std::vector<NamedView> all_;
  int refused_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Operations, SpoiltRoute, ::testing::ValuesIn(Setups()),
                         [](const ::testing::TestParamInfo<Setup>& param) {
                           return param.param.name;
                         });

TEST_P(SpoiltRoute, EveryTensorInEveryWay) {
  for (size_t i = 0; i < all_.size(); ++i) {
    SCOPED_TRACE(all_[i].name);
    SpoilMemory(i);
    SpoilShape(i);
    if (HasFailure()) {
      return;
    }
  }
  EXPECT_GT(refused_, 60);
  EXPECT_NO_THROW(GetParam().run(all_));
}

// ---- Words -------------------------------------------------------------------------------------

void Says(const std::function<void()>& action, const std::string& message) {
  const Caught caught = CatchError(action);
  EXPECT_EQ(ToString(caught.kind), ToString(ErrorKind::kInvalidArgument));
  EXPECT_EQ(caught.message, message);
}

TEST(ErrorMessage, FusedTopkDeepseek) {
  std::vector<float> memory(4096, 0.0F);
  const auto view = [&](DType dtype, std::initializer_list<int64_t> shape) {
    return TensorView::Contiguous(memory.data(), dtype, shape);
  };
  TensorView scores = view(DType::kFloat32, {2, 16});
  TensorView bias = view(DType::kFloat32, {16});
  TensorView values = view(DType::kFloat32, {2, 4});
  TensorView indices = view(DType::kInt32, {2, 4});
  TensorView replay = view(DType::kInt16, {2, 4});
  RoutingRule rule = RoutingRule::DeepSeekV3(4, 2, 1.0F);
  const auto says = [&](const std::string& message) {
    Says([&] { FusedTopkDeepseek(scores, bias, rule, values, indices, replay); }, message);
    scores = view(DType::kFloat32, {2, 16});
    bias = view(DType::kFloat32, {16});
    values = view(DType::kFloat32, {2, 4});
    indices = view(DType::kInt32, {2, 4});
    replay = view(DType::kInt16, {2, 4});
    rule = RoutingRule::DeepSeekV3(4, 2, 1.0F);
  };
  scores.dtype = DType::kInt32;
  says("scores is i32; wanted f32 or bf16 or f16");
  bias = view(DType::kFloat32, {15});
  says("bias has shape [15]; wanted [16]");
  values = view(DType::kFloat32, {2, 5});
  says("topk_values has shape [2, 5]; wanted [2, 4]");
  values.dtype = DType::kBf16;
  says("topk_values is bf16; wanted the dtype of scores, f32");
  indices.dtype = DType::kInt64;
  says("topk_indices is i64; wanted i32");
  indices = view(DType::kInt32, {2, 33});
  says("topk_indices has 33 columns, the top_k; wanted 1 .. 32");
  indices = view(DType::kInt32, {2, 0});
  says("topk_indices has 0 columns, the top_k; wanted 1 .. 32");
  replay.dtype = DType::kInt32;
  says("replay is i32; wanted i16");
  replay = view(DType::kInt16, {1, 4});
  says("replay has 1 rows; wanted at least one per token (2)");
  replay = view(DType::kInt16, {2, 5});
  says("replay has shape [2, 5]; wanted [*, 4]");
  rule.num_groups = 5;
  says("num_experts=16 is not divisible by num_groups=5; groups have equal size");
  rule = RoutingRule::DeepSeekV3(8, 1, 1.0F);
  says(
      "top_k=4 exceeds the 2 experts of top_groups=1 groups (num_experts=16, num_groups=8); keep "
      "more groups or lower top_k");
  scores = view(DType::kFloat32, {2, 2049});
  says("scores have 2049 experts; wanted 1 .. 2048");
}

TEST(ErrorMessage, Quantize) {
  std::vector<float> memory(4096, 0.0F);
  std::vector<uint8_t> bytes(4096, 0);
  const TensorView source = TensorView::Contiguous(memory.data(), DType::kFloat32, {4, 64});
  QuantizedView good;
  good.format = Format::kMxFp8;
  good.codes = TensorView::Contiguous(bytes.data(), DType::kE4m3, {4, 64});
  good.scales = TensorView::Contiguous(bytes.data() + 1024, DType::kE8m0, {4, 2});
  Quantize(source, good);
  QuantizedView bad = good;
  bad.format = static_cast<Format>(10);
  Says([&] { Quantize(source, bad); }, "ShapeOf: format=10 is not a Format; wanted 0 .. 9");
  bad = good;
  bad.scale_layout = static_cast<ScaleLayout>(2);
  Says([&] { Quantize(source, bad); }, "ShapeOf: layout=2 is not a ScaleLayout; wanted 0 .. 1");
  bad = good;
  bad.codes.ndim = 7;
  Says([&] { Quantize(source, bad); },
       "Quantize: destination.codes has shape of 7 dimensions; wanted two dimensions [rows, cols]; "
       "flatten leading dimensions");
  bad = good;
  bad.scales.ndim = 7;
  Says([&] { Quantize(source, bad); },
       "Quantize: destination.scales has shape of 7 dimensions; wanted at most 4 dimensions, none "
       "negative, and at most 2^60 elements");
  // The product wraps to the right count.
  bad = good;
  bad.scales = Reshaped(good.scales, {int64_t{1} << 32, int64_t{1} << 32, 8});
  Says([&] { Quantize(source, bad); },
       "Quantize: destination.scales has shape [4294967296, 4294967296, 8]; wanted at most 4 "
       "dimensions, none negative, and at most 2^60 elements");
}

}  // namespace
}  // namespace hopyard::test
