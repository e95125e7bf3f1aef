// SPDX-License-Identifier: Apache-2.0
// What Forward, MakePlan and Weights refuse: kind and text, and nothing written.
#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/forward.h"

#include "plan/backend_sm90.h"
#include "tests/forward_runner.h"

namespace hopyard::test {
namespace {

class ForwardErrors : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 3;

  ForwardErrors()
      : source_(MakeSource()),
        storage_(source_),
        weights_(storage_.Make()),
        inputs_(source_.spec, kTokens) {
    inputs_.Logits();
    in_ = inputs_.get();
    PlanOptions options;
    options.max_tokens = kTokens;
    plan_ = MakePlan(source_.spec, Device{}, options);
    workspace_ = std::make_unique<GuardedBuffer>(plan_.workspace_bytes());
    out_.output = arena_.Array(DType::kBf16, {kTokens, source_.spec.hidden_size});
  }

  static WeightSource MakeSource() {
    WeightSource source;
    source.spec = SmallSpec(WeightFormat::kMxFp8, ActivationFormat::kMxFp8);
    return source;
  }

  Workspace Space() const { return {workspace_->data(), static_cast<size_t>(workspace_->bytes())}; }

  void Refused(ErrorKind kind, const std::string& text) {
    Refused(kind, text, [&] { Forward(plan_, weights_, in_, out_, Space()); });
    in_ = inputs_.get();
  }

  void Refused(ErrorKind kind, const std::string& text, const std::function<void()>& call) {
    const Caught caught = CatchError(call);
    EXPECT_EQ(caught.kind, kind) << caught.message;
    EXPECT_NE(caught.message.find(text), std::string::npos) << caught.message;
    if (out_.output.defined()) {
      const auto* bits = out_.output.as<const uint16_t>();
      EXPECT_TRUE(std::all_of(bits, bits + out_.output.numel(), [](uint16_t b) {
        return b == 0xFFFF;
      })) << "nothing may be written";
    }
  }

  WeightSource source_;
  LayerWeights storage_;
  Weights weights_;
  LayerInputs inputs_;
  MoeInputs in_;
  MoeOutputs out_;
  Arena arena_;
  Plan plan_;
  std::unique_ptr<GuardedBuffer> workspace_;
};

TEST_F(ForwardErrors, ReservedModes) {
  in_.routing = RoutingInput::kPermuted;
  Refused(ErrorKind::kUnsupported, "kPermuted");
  in_.routing = RoutingInput::kBatched;
  Refused(ErrorKind::kUnsupported, "kBatched");
  in_.routing = static_cast<RoutingInput>(77);
  Refused(ErrorKind::kInvalidArgument, "77");
}

TEST_F(ForwardErrors, HiddenStates) {
  in_.hidden_states.dtype = DType::kFp16;
  Refused(ErrorKind::kUnsupported, "f16");
  in_.hidden_states.dtype = DType::kFloat32;
  Refused(ErrorKind::kInvalidArgument, "hidden_states");
  in_.hidden_states = {};
  Refused(ErrorKind::kInvalidArgument, "hidden_states is missing");
  in_.hidden_states.shape[1] = 255;
  Refused(ErrorKind::kInvalidArgument, "[3, 255]");
  in_.hidden_states.strides[0] = 300;
  Refused(ErrorKind::kInvalidArgument, "contiguous");
  in_.hidden_states.dtype = DType::kE4m3;
  Refused(ErrorKind::kInvalidArgument, "hidden_scales");
  in_.hidden_states.device.kind = DeviceKind::kCuda;
  Refused(ErrorKind::kInvalidArgument, "CUDA");
  const LayerInputs more(source_.spec, kTokens + 1);
  in_.hidden_states = more.get().hidden_states;
  Refused(ErrorKind::kInvalidArgument, "max_tokens=3");
}

TEST_F(ForwardErrors, RoutingFields) {
  in_.logits = {};
  Refused(ErrorKind::kInvalidArgument, "logits is missing");
  in_.logits.shape[1] = 7;
  Refused(ErrorKind::kInvalidArgument, "logits has shape [3, 7]; wanted [3, 8]");
  in_.logits.dtype = DType::kInt32;
  Refused(ErrorKind::kInvalidArgument, "logits is i32");
  in_.routing = RoutingInput::kPacked;
  in_.logits = {};
  Refused(ErrorKind::kInvalidArgument, "packed_ids");
  in_.routing = RoutingInput::kUnpacked;
  in_.logits = {};
  Refused(ErrorKind::kInvalidArgument, "expert_ids");
  in_.routing = RoutingInput::kReplay;
  Refused(ErrorKind::kInvalidArgument, "expert_ids");
  in_.routing = RoutingInput::kHash;
  Refused(ErrorKind::kInvalidArgument, "token_ids");
  in_.expert_table = in_.logits;
  Refused(ErrorKind::kInvalidArgument, "expert_table");
  in_.shared_weights = in_.logits;
  Refused(ErrorKind::kInvalidArgument, "shared_weights");
  in_.packed_ids = in_.logits;
  Refused(ErrorKind::kInvalidArgument, "packed_ids");
}

TEST_F(ForwardErrors, SixtyFourBitIdsAreNotReadAsThirtyTwo) {
  LayerInputs given(source_.spec, kTokens);
  given.Unpacked(MakeIds(IdPattern::kRandom, source_.spec, kTokens),
                 MakeWeights(source_.spec, kTokens));
  in_ = given.get();
  in_.expert_ids.dtype = DType::kInt64;
  Refused(ErrorKind::kInvalidArgument, "expert_ids is i64");
}

TEST_F(ForwardErrors, NumTokens) {
  LayerInputs counted(source_.spec, kTokens);
  counted.Logits();
  for (const int32_t count : {-1, 4}) {
    counted.NumTokens(count);
    in_ = counted.get();
    Refused(ErrorKind::kInvalidArgument, "num_tokens=" + std::to_string(count));
  }
}

TEST_F(ForwardErrors, Outputs) {
  const MoeOutputs good = out_;
  out_.replay = arena_.Array(DType::kInt16, {2, 2});
  Refused(ErrorKind::kInvalidArgument, "replay has 2 rows");
  out_ = good;
  out_.replay = arena_.Array(DType::kInt32, {3, 2});
  Refused(ErrorKind::kInvalidArgument, "replay is i32");
  out_ = good;
  out_.expert_load = arena_.Array(DType::kInt32, {7});
  Refused(ErrorKind::kInvalidArgument, "expert_load");
  out_ = good;
  out_.routing_weights = arena_.Array(DType::kBf16, {3, 2});
  Refused(ErrorKind::kInvalidArgument, "routing_weights");
  out_ = good;
  out_.rows = arena_.Array(DType::kBf16, {6, 256});
  Refused(ErrorKind::kInvalidArgument, "slot_to_row");
  out_ = good;
  out_.gemm1_activation = arena_.Array(DType::kBf16, {6, 127});
  Refused(ErrorKind::kInvalidArgument, "gemm1_activation");
  out_ = good;
  out_.output = arena_.Array(DType::kBf16, {3, 257});
  Refused(ErrorKind::kInvalidArgument, "257 columns");
  out_.output = arena_.Array(DType::kFloat32, {3, 256});
  Refused(ErrorKind::kInvalidArgument, "output is f32");
  out_.output = {};
  Refused(ErrorKind::kInvalidArgument, "neither output nor rows");
}

TEST_F(ForwardErrors, Workspace) {
  const auto call = [&](const Workspace& space) {
    return [&, space] { Forward(plan_, weights_, in_, out_, space); };
  };
  Workspace space = Space();
  space.bytes -= 1;
  Refused(ErrorKind::kOutOfMemory, std::to_string(plan_.workspace_bytes()), call(space));
  space = Space();
  space.data = nullptr;
  Refused(ErrorKind::kInvalidArgument, "256", call(space));
  const GuardedBuffer shifted(plan_.workspace_bytes(), 128);
  space.data = shifted.data();
  Refused(ErrorKind::kInvalidArgument, "256", call(space));
}

TEST_F(ForwardErrors, WeightsOfAnotherLayer) {
  WeightSource other = source_;
  other.spec.top_k = 1;
  const LayerWeights storage(other);
  weights_ = storage.Make();
  Refused(ErrorKind::kInvalidArgument, "weights were made for another layer");
}

TEST_F(ForwardErrors, EmptyPlanAndWeights) {
  weights_ = Weights();
  Refused(ErrorKind::kInvalidArgument, "weights are empty");
  plan_ = Plan();
  Refused(ErrorKind::kInvalidArgument, "plan is empty");
}

TEST_F(ForwardErrors, WrongStructSizes) {
  in_.struct_size = 8;
  Refused(ErrorKind::kInvalidArgument, "MoeInputs.struct_size=8");
  out_.struct_size = 9;
  Refused(ErrorKind::kInvalidArgument, "MoeOutputs.struct_size=9");
}

TEST_F(ForwardErrors, DeltaNeedsAGatedActivation) {
  WeightSource source = source_;
  source.spec.activation.kind = ActivationKind::kRelu2;
  const LayerWeights storage(source);
  PlanOptions options;
  options.max_tokens = kTokens;
  plan_ = MakePlan(source.spec, Device{}, options);
  workspace_ = std::make_unique<GuardedBuffer>(plan_.workspace_bytes());
  weights_ = storage.Make();
  LayerInputs inputs(source.spec, kTokens);
  inputs.Logits().Delta();
  in_ = inputs.get();
  Refused(ErrorKind::kUnsupported, "gemm1_delta");
}

// Every pair of formats is either run (forward_test.cc) or refused with a reason.
TEST(PlanErrors, EveryOtherPairIsRefusedWithAReason) {
  PlanOptions options;
  options.max_tokens = 1;
  int64_t refused = 0;
  for (int w = 0; w < 8; ++w) {
    for (int a = 0; a < 7; ++a) {
      const MoeSpec spec =
          SmallSpec(static_cast<WeightFormat>(w), static_cast<ActivationFormat>(a));
      const Explanation explanation = Explain(spec, Device{}, options);
      if (explanation.supported) {
        EXPECT_TRUE(MakePlan(spec, Device{}, options).Explain().supported);
        continue;
      }
      ++refused;
      const Caught caught =
          CatchError([&] { static_cast<void>(MakePlan(spec, Device{}, options)); });
      EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
      EXPECT_NE(caught.message.find(std::string(ToString(spec.weights))), std::string::npos);
      EXPECT_NE(caught.message.find(std::string(ToString(spec.activations))), std::string::npos);
      EXPECT_EQ(caught.message, explanation.reason);
    }
  }
  EXPECT_GT(refused, 20);
  for (const FormatPair& pair : SupportedPairs()) {
    EXPECT_TRUE(Explain(SmallSpec(pair.weights, pair.activations), Device{}, options).supported)
        << ToString(pair);
  }
}

TEST(PlanErrors, MeaninglessSpecsAreRefusedByName) {
  struct Case {
    std::function<void(MoeSpec*)> spoil;
    const char* text;
  };
  const std::vector<Case> cases = {
      {[](MoeSpec* s) { s->hidden_size = 0; }, "hidden_size=0"},
      {[](MoeSpec* s) { s->intermediate_size = -3; }, "intermediate_size=-3"},
      {[](MoeSpec* s) { s->num_experts = 0; }, "num_experts"},
      {[](MoeSpec* s) { s->num_experts = 2049; }, "num_experts"},
      {[](MoeSpec* s) { s->top_k = 0; }, "top_k"},
      {[](MoeSpec* s) { s->top_k = 9; }, "top_k"},
      {[](MoeSpec* s) {
         s->local = {ExpertMap::Kind::kRange, 6, 3};
       },
       "local.offset=6"},
      {[](MoeSpec* s) {
         s->local = {ExpertMap::Kind::kTable, 0, 0};
       },
       "local.count=0"},
      {[](MoeSpec* s) { s->shared.count = -1; }, "shared.count=-1"},
      {[](MoeSpec* s) {
         s->activation.alpha.each = {1, 2};
       },
       "activation.alpha has 2 values"},
      {[](MoeSpec* s) { s->activation.limit.all = 0; }, "activation.limit=0"},
      {[](MoeSpec* s) { s->activation.kind = ActivationKind::kSiTu; }, "beta"},
      {[](MoeSpec* s) { s->struct_size = 1; }, "struct_size=1"}};
  PlanOptions options;
  options.max_tokens = 1;
  for (const Case& c : cases) {
    MoeSpec spec = SmallSpec(WeightFormat::kBf16, ActivationFormat::kBf16);
    c.spoil(&spec);
    const Caught caught = CatchError([&] { static_cast<void>(MakePlan(spec, Device{}, options)); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument) << c.text;
    EXPECT_NE(caught.message.find(c.text), std::string::npos) << caught.message;
  }
}

TEST(PlanErrors, OptionsAndTactics) {
  const MoeSpec spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  PlanOptions options;
  const auto refused = [&](ErrorKind kind, const std::string& text) {
    const Caught caught = CatchError([&] { static_cast<void>(MakePlan(spec, Device{}, options)); });
    EXPECT_EQ(caught.kind, kind) << text;
    EXPECT_NE(caught.message.find(text), std::string::npos) << caught.message;
    options = {};
    options.max_tokens = 4;
  };
  refused(ErrorKind::kInvalidArgument, "max_tokens=0");
  options.num_threads = -1;
  refused(ErrorKind::kInvalidArgument, "num_threads=-1");
  options.workspace_cap = 256;
  refused(ErrorKind::kInvalidArgument, "workspace_cap=256");
  options.tactic = "cpu_scalar_mxfp5";
  refused(ErrorKind::kUnsupported, "cpu_scalar_mxfp4");
  if (sm90::FindBackend() == nullptr) {
    const Explanation cuda = Explain(spec, Device{DeviceKind::kCuda, 0}, options);
    EXPECT_FALSE(cuda.supported);
    EXPECT_NE(cuda.reason.find("CUDA"), std::string::npos);
  }
}

TEST(PlanErrors, ExplainRefusesTheCapThatMakePlanRefuses) {
  const MoeSpec spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  PlanOptions options;
  options.max_tokens = 1;
  const int64_t least = MakePlan(spec, Device{}, options).workspace_bytes();
  options.max_tokens = 64;
  options.workspace_cap = least;
  EXPECT_TRUE(Explain(spec, Device{}, options).supported);
  EXPECT_EQ(MakePlan(spec, Device{}, options).tokens_per_chunk(), 1);
  for (const int64_t cap : {int64_t{1}, least - 1}) {
    options.workspace_cap = cap;
    const Explanation answer = Explain(spec, Device{}, options);
    EXPECT_FALSE(answer.supported);
    EXPECT_EQ(answer.reason, "workspace_cap=" + std::to_string(cap) + " bytes; one token needs " +
                                 std::to_string(least) +
                                 ": raise the cap to at least that, or 0 (none)");
    for (const Candidate& candidate : answer.candidates) {
      EXPECT_FALSE(candidate.chosen) << candidate.kernel;
      EXPECT_FALSE(candidate.reason.empty());
    }
    const Caught caught = CatchError([&] { static_cast<void>(MakePlan(spec, Device{}, options)); });
    EXPECT_EQ(caught.kind, ErrorKind::kInvalidArgument);
    EXPECT_EQ(caught.message, answer.reason);
  }
}

TEST(PlanErrors, OddPackedSizesAreRefusedWithTheRemedy) {
  PlanOptions options;
  options.max_tokens = 1;
  MoeSpec spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kBf16);
  spec.intermediate_size = 41;
  EXPECT_FALSE(Explain(spec, Device{}, options).supported);
  EXPECT_NE(Explain(spec, Device{}, options).reason.find("even"), std::string::npos);
  spec.weights = WeightFormat::kBf16;
  EXPECT_TRUE(Explain(spec, Device{}, options).supported);
}

TEST(WeightsErrors, ShapesDtypesAndLayoutsAreRefusedByName) {
  WeightSource source;
  source.spec = SmallSpec(WeightFormat::kMxFp4, ActivationFormat::kFp8PerTensor);
  source.spec.intermediate_size = 96;
  source.bias = true;
  const LayerWeights storage(source);
  struct Case {
    std::function<void(WeightsDesc*)> spoil;
    const char* text;
    ErrorKind kind = ErrorKind::kInvalidArgument;
  };
  const std::vector<Case> cases = {
      {[](WeightsDesc* d) { d->routed.gemm1 = {}; }, "weights.routed has neither"},
      {[](WeightsDesc* d) { d->routed.gemm2.values = {}; }, "weights.routed.gemm2.values"},
      {[](WeightsDesc* d) { d->routed.up = d->routed.gemm1; }, "both gemm1 and gate/up"},
      {[](WeightsDesc* d) { d->routed.gemm1.values.dtype = DType::kInt8; },
       "weights.routed.gemm1.values is i8"},
      {[](WeightsDesc* d) { d->routed.gemm1.values.shape[0] = 7; }, "8 local experts"},
      {[](WeightsDesc* d) { d->routed.gemm1.values.shape[2] = 127; }, "[192, 127]"},
      {[](WeightsDesc* d) { d->routed.gemm1.values.data = nullptr; }, "null pointer"},
      {[](WeightsDesc* d) { d->routed.gemm1.scales = {}; }, "weights.routed.gemm1.scales"},
      {[](WeightsDesc* d) { d->routed.gemm1.scales.dtype = DType::kE4m3; }, "scales is e4m3"},
      {[](WeightsDesc* d) { d->routed.gemm2.scales.shape[2] = 2; }, "scales of one expert"},
      {[](WeightsDesc* d) { d->routed.gemm2.scale_layout = ScaleLayout::kSwizzled128x4; }, "128x4"},
      {[](WeightsDesc* d) { d->routed.gemm1.major = MajorOrder::kMnMajor; }, "MN-major",
       ErrorKind::kUnsupported},
      {[](WeightsDesc* d) { d->routed.gemm2.col_origin = 32; }, "col_origin=32"},
      {[](WeightsDesc* d) { d->routed.gemm2.row_origin = 1; }, "row_origin=1"},
      {[](WeightsDesc* d) { d->routed.gemm1.bias.shape[1] = 255; }, "gemm1.bias"},
      {[](WeightsDesc* d) { d->routed.gemm2_input_scale = {}; }, "gemm2_input_scale is missing"},
      {[](WeightsDesc* d) { d->routed.gemm2.global_scales = d->routed.gemm2_input_scale; },
       "global_scales is given"},
      {[](WeightsDesc* d) { d->struct_size = 3; }, "WeightsDesc.struct_size=3"}};
  for (const Case& c : cases) {
    WeightsDesc desc = storage.desc();
    c.spoil(&desc);
    const Caught caught = CatchError([&] { const Weights refused(source.spec, desc); });
    EXPECT_EQ(caught.kind, c.kind) << c.text;
    EXPECT_NE(caught.message.find(c.text), std::string::npos)
        << "wanted " << c.text << "; got " << caught.message;
  }
}

}  // namespace
}  // namespace hopyard::test
