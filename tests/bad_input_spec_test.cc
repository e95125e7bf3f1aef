// SPDX-License-Identifier: Apache-2.0
// The whole message of one example of every rule, as docs/errors.md prints them (test_docs.py
// compares the two). The suites around this file spoil every field; here the words are fixed.
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/quantize.h"
#include "hopyard/routing.h"

#include "plan/backend_sm90.h"
#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

using W = WeightFormat;
using A = ActivationFormat;

void Says(const std::function<void()>& action, ErrorKind kind, const std::string& message) {
  const Caught caught = CatchError(action);
  EXPECT_EQ(ToString(caught.kind), ToString(kind));
  EXPECT_EQ(caught.message, message);
}

// ---- The layer's description -------------------------------------------------------------------

void SpecSays(const std::function<void(MoeSpec*)>& spoil, const std::string& message) {
  MoeSpec spec = TinySpec();
  spoil(&spec);
  Says([&] { std::ignore = MakePlan(spec, Device{}, OptionsFor(4)); }, ErrorKind::kInvalidArgument,
       message);
}

TEST(ErrorMessage, Sizes) {
  SpecSays([](MoeSpec* s) { s->hidden_size = -64; }, "hidden_size=-64; wanted 1 .. 16777215");
  SpecSays([](MoeSpec* s) { s->num_experts = 4096; }, "num_experts=4096; wanted 1 .. 2048");
  SpecSays([](MoeSpec* s) { s->top_k = 33; }, "top_k=33; wanted 1 .. 32");
  SpecSays([](MoeSpec* s) { s->top_k = 5; }, "top_k=5; top_k must be between 1 and num_experts=4");
  SpecSays(
      [](MoeSpec* s) {
        s->local = {ExpertMap::Kind::kRange, 0, 0};
      },
      "local.count=0; wanted 1 .. 2048, the experts that this rank holds");
  SpecSays(
      [](MoeSpec* s) {
        s->local = {ExpertMap::Kind::kRange, 3, 2};
      },
      "local.offset=3 with local.count=2; local experts [offset, offset + count) must lie within "
      "the 4 experts");
  SpecSays([](MoeSpec* s) { s->shared.count = 31; },
           "shared.count=31 with top_k=2; wanted 0 .. 30, at most 32 slots a token in all");
}

TEST(ErrorMessage, Routing) {
  const auto groups = [](int num_groups, int top_groups) {
    return [=](MoeSpec* s) { s->routing = RoutingRule::DeepSeekV3(num_groups, top_groups, 1.0F); };
  };
  SpecSays(groups(0, 1), "num_groups=0; wanted at least 1 (1 = no groups)");
  SpecSays(groups(3, 1), "num_experts=4 is not divisible by num_groups=3; groups have equal size");
  SpecSays(groups(2, 3), "top_groups=3; wanted 1 .. num_groups=2");
  SpecSays(groups(4, 1),
           "top_k=2 exceeds the 1 experts of top_groups=1 groups (num_experts=4, num_groups=4); "
           "keep more groups or lower top_k");
  SpecSays([](MoeSpec* s) { s->routing.score = static_cast<RoutingScore>(10); },
           "rule.score=10 is not a RoutingScore");
  SpecSays([](MoeSpec* s) { s->routing.scaling_factor = std::numeric_limits<float>::infinity(); },
           "scaling_factor=inf; wanted a finite number");
  SpecSays([](MoeSpec* s) { s->routing.scaling_factor = 0.0F; },
           "scaling_factor=0; wanted more than 0, it multiplies every weight (1 changes none)");
}

TEST(ErrorMessage, Activation) {
  SpecSays([](MoeSpec* s) { s->activation.kind = static_cast<ActivationKind>(11); },
           "activation.kind=11 is not a ActivationKind; wanted 0 .. 7");
  Says([] { std::ignore = ParseActivationKind("relu"); }, ErrorKind::kInvalidArgument,
       "activation 'relu' is not known; wanted one of swiglu, geglu, geglu_tanh, situ, relu2, "
       "silu, gelu, identity");
  SpecSays(
      [](MoeSpec* s) {
        s->activation.kind = ActivationKind::kGeGlu;
        s->activation.limit.all = 7.0F;
      },
      "activation geglu takes no alpha, beta or limit; only swiglu and situ do");
  SpecSays([](MoeSpec* s) { s->activation.alpha.each.assign(3, 1.0F); },
           "activation.alpha has 3 values; wanted one per local expert (4) or none");
  // Shared experts use `all`: no entry of `each` is theirs.
  SpecSays(
      [](MoeSpec* s) {
        s->shared.count = 2;
        s->activation.limit.each.assign(6, 1.0F);
      },
      "activation.limit has 6 values; wanted one per local expert (4) or none");
  SpecSays([](MoeSpec* s) { s->activation.limit.all = 0.0F; },
           "activation.limit=0 for local expert 0; wanted a positive clamp (infinity: none)");
}

TEST(ErrorMessage, Plan) {
  MoeSpec spec = TinySpec(W::kMxInt4, A::kNvFp4);
  const auto says = [&](const PlanOptions& options, Device device, ErrorKind kind,
                        const std::string& message) {
    Says([&] { std::ignore = MakePlan(spec, device, options); }, kind, message);
  };
  says(OptionsFor(4), Device{}, ErrorKind::kUnsupported,
       "mxint4 weights with nvfp4 activations are not a supported pair; use bf16 activations, or "
       "see the support table of README.md");
  spec = TinySpec(W::kMxFp4, A::kBf16);
  spec.hidden_size = 63;
  says(OptionsFor(4), Device{}, ErrorKind::kUnsupported,
       "mxfp4 packs 2 codes a byte, so hidden_size (63) and intermediate_size (32) must be even; "
       "zero-pad the weights by one column");
  spec = TinySpec();
  if (sm90::FindBackend() == nullptr) {
    says(OptionsFor(4), {DeviceKind::kCuda, 0}, ErrorKind::kUnsupported,
         "this build has no CUDA backend; plan for the CPU, or configure the build with "
         "HOPYARD_CUDA=ON");
  }
  says(OptionsFor(0), Device{}, ErrorKind::kInvalidArgument,
       "max_tokens=0; wanted at least 1, the plan's capacity");
  says(OptionsFor(int64_t{1} << 30), Device{}, ErrorKind::kUnsupported,
       "max_tokens 1073741824 x 2 slots pass 2^31 rows; split the batch over several calls");
  PlanOptions options = OptionsFor(4);
  options.tactic = "4096";
  says(options, Device{}, ErrorKind::kUnsupported,
       "tactic '4096' is no kernel of this layer on the CPU; known: cpu_avx512_bf16 cpu_avx2_bf16 "
       "cpu_scalar_bf16");
}

TEST(ErrorMessage, EmptyHandles) {
  const std::string plan = "plan is empty; make one with MakePlan";
  const ErrorKind kind = ErrorKind::kInvalidArgument;
  Says([] { std::ignore = Plan().spec(); }, kind, plan);
  Says([] { std::ignore = Plan().options(); }, kind, plan);
  Says([] { std::ignore = Plan().device(); }, kind, plan);
  Says([] { std::ignore = Plan().workspace_bytes(); }, kind, plan);
  Says([] { std::ignore = Plan().tokens_per_chunk(); }, kind, plan);
  Says([] { std::ignore = Plan().Explain(); }, kind, plan);
  Says([] { std::ignore = Weights().bytes_per_expert(); }, kind,
       "weights are empty; construct them first");
}

// ---- Weights -----------------------------------------------------------------------------------

void WeightsSay(const MoeSpec& spec, const std::function<void(WeightsDesc*)>& spoil,
                const std::string& message, ErrorKind kind = ErrorKind::kInvalidArgument) {
  const LayerWeights stored(SourceOf(spec));
  WeightsDesc desc = stored.desc();
  spoil(&desc);
  Says([&] { const Weights weights(spec, desc); }, kind, message);
}

TEST(ErrorMessage, WeightValues) {
  const MoeSpec bf16 = TinySpec();
  const auto reshaped = [](const std::vector<int64_t>& shape) {
    return
        [=](WeightsDesc* d) { d->routed.gemm1.values = Reshaped(d->routed.gemm1.values, shape); };
  };
  WeightsSay(bf16, reshaped({4, 63, 64}),
             "weights.routed.gemm1.values of one expert has shape [63, 64]; wanted [64, 64]");
  WeightsSay(bf16, reshaped({3, 64, 64}),
             "weights.routed.gemm1.values has shape [3, 64, 64]; wanted 4 local experts as the "
             "first dimension");
  WeightsSay(
      bf16, [](WeightsDesc* d) { d->routed.gemm2.major = MajorOrder::kBlockKMajor; },
      "weights.routed.gemm2 in BlockMajorK needs K to be a multiple of 64; got 32: store it "
      "K-major");
  WeightsSay(
      bf16, [](WeightsDesc* d) { d->routed.gemm1.major = static_cast<MajorOrder>(3); },
      "weights.routed.gemm1.major=3 is not a MajorOrder; wanted 0 .. 2");
  WeightsSay(
      TinySpec(W::kMxFp8, A::kMxFp8),
      [](WeightsDesc* d) { d->routed.gemm1.major = MajorOrder::kMnMajor; },
      "weights.routed.gemm1 is MN-major; only bf16 is read that way, store mxfp8 K-major",
      ErrorKind::kUnsupported);
  WeightsSay(
      TinySpec(W::kMxInt4, A::kBf16),
      [](WeightsDesc* d) { d->routed.gemm1.values.dtype = DType::kInt8; },
      "weights.routed.gemm1.values is i8; mxint4 wants u8");
  WeightsSay(
      bf16, [](WeightsDesc* d) { d->routed.gemm1.values.dtype = static_cast<DType>(99); },
      "weights.routed.gemm1.values has dtype 99, which is not a DType; wanted 0 .. 10");
}

TEST(ErrorMessage, WeightScales) {
  const auto scales = [](const std::vector<int64_t>& shape) {
    return
        [=](WeightsDesc* d) { d->routed.gemm1.scales = Reshaped(d->routed.gemm1.scales, shape); };
  };
  WeightsSay(TinySpec(W::kNvFp4, A::kBf16), scales({4, 64, 2}),
             "weights.routed.gemm1.scales of one expert has shape [64, 2]; wanted [64, 4]");
  WeightsSay(
      TinySpec(W::kMxFp8, A::kMxFp8),
      [](WeightsDesc* d) { d->routed.gemm1.scales.dtype = DType::kFloat32; },
      "weights.routed.gemm1.scales is f32; mxfp8 wants e8m0");
  WeightsSay(
      TinySpec(W::kNvFp4, A::kNvFp4), [](WeightsDesc* d) { d->routed.gemm1_input_scale = {}; },
      "weights.routed.gemm1_input_scale is missing; nvfp4 activations have a static scale: give "
      "f32 [1]");
  WeightsSay(
      TinySpec(W::kNvFp4, A::kNvFp4),
      [](WeightsDesc* d) { *d->routed.gemm1_input_scale.as<float>() = 0.0F; },
      "weights.routed.gemm1_input_scale[0] holds 0; wanted a finite number above 0, the step that "
      "codes are multiplied by");
  WeightsSay(
      TinySpec(W::kFp8PerTensor, A::kFp8PerTensor),
      [](WeightsDesc* d) {
        d->routed.gemm2_input_scale.as<float>()[3] = std::numeric_limits<float>::infinity();
      },
      "weights.routed.gemm2_input_scale[3] holds inf; wanted a finite number above 0, the step "
      "that "
      "codes are multiplied by");
  WeightsSay(
      TinySpec(), [](WeightsDesc* d) { d->routed.gemm2.global_scales = d->routed.gemm1.values; },
      "weights.routed.gemm2.global_scales is given, but bf16 has none; leave it absent");
  MoeSpec geglu = TinySpec();
  geglu.activation.kind = ActivationKind::kGeGlu;
  WeightsSay(
      geglu, [](WeightsDesc* d) { d->routed.alpha = d->routed.gemm1.values; },
      "weights.routed.alpha is given, but activation geglu takes no alpha, beta or limit; only "
      "swiglu and situ do");
  WeightsSay(
      TinySpec(), [](WeightsDesc* d) { d->shared.limit = d->routed.gemm1.values; },
      "weights.shared.limit is given, but spec.shared.count=0; leave it absent or set the count");
  MoeSpec shared = TinySpec(W::kNvFp4, A::kNvFp4);
  shared.shared.count = 2;
  shared.shared.weights = W::kNvFp4;
  WeightsSay(
      shared, [](WeightsDesc* d) { d->shared.gemm2 = d->routed.gemm2; },
      "weights.shared.gemm2.values has shape [4, 64, 16]; wanted 2 local experts as the first "
      "dimension");
}

// ---- One call ----------------------------------------------------------------------------------

class ErrorMessageOfCall : public ::testing::Test {
 protected:
  using Spoil = std::function<void(ForwardArguments*)>;
  static constexpr ErrorKind kBad = ErrorKind::kInvalidArgument;

  static void Says(const ValidCall& call, const Spoil& spoil, const std::string& message,
                   ErrorKind kind = kBad) {
    ForwardArguments bad = call.Arguments();
    spoil(&bad);
    test::Says([&] { call.Run(bad); }, kind, message);
    EXPECT_TRUE(call.Untouched()) << message;
  }
};

TEST_F(ErrorMessageOfCall, Logits) {
  ValidCall call(TinySpec());
  call.inputs().Logits();
  const auto reshaped = [](const std::vector<int64_t>& shape) {
    return [=](ForwardArguments* a) { a->inputs.logits = Reshaped(a->inputs.logits, shape); };
  };
  Says(
      call, [](auto* a) { a->inputs.logits = {}; }, "logits is missing; wanted f32 or bf16 [5, 4]");
  Says(
      call, [](auto* a) { a->inputs.logits.dtype = DType::kFloat64; },
      "logits is f64; wanted f32 or bf16");
  Says(call, reshaped({20}), "logits has shape [20]; wanted [5, 4]");
  Says(call, reshaped({4, 4}), "logits has shape [4, 4]; wanted [5, 4]");
  Says(call, reshaped({5, 3}), "logits has shape [5, 3]; wanted [5, 4]");
  const auto bias = [](auto* a) { a->inputs.routing_bias = a->inputs.logits; };
  Says(call, bias,
       "routing_bias is given, but the routing rule (" + ToString(call.spec().routing) +
           ") uses none; leave it absent or set routing.use_bias");
  MoeSpec biased = TinySpec();
  biased.routing = RoutingRule::MiniMax2();
  ValidCall with_bias(biased);
  with_bias.inputs().Logits().RoutingBias();
  Says(
      with_bias, [](auto* a) { a->inputs.routing_bias = Reshaped(a->inputs.routing_bias, {3}); },
      "routing_bias has shape [3]; wanted [4]");
  Says(
      with_bias, [](auto* a) { a->inputs.routing_bias.dtype = DType::kFp16; },
      "routing_bias is f16; wanted f32 or bf16");
}

TEST_F(ErrorMessageOfCall, HiddenStates) {
  ValidCall call(TinySpec(W::kMxInt4, A::kBf16));
  call.inputs().Logits();
  const auto reshaped = [](const std::vector<int64_t>& shape) {
    return [=](ForwardArguments* a) {
      a->inputs.hidden_states = Reshaped(a->inputs.hidden_states, shape);
    };
  };
  Says(call, reshaped({1, 5, 64}),
       "hidden_states has shape [1, 5, 64]; wanted [T, 64]: flatten leading dimensions");
  Says(call, reshaped({5, 63}), "hidden_states has shape [5, 63]; wanted [5, 64]");
  Says(call, reshaped({7, 64}),
       "hidden_states has 7 tokens; the plan was made for max_tokens=6, make a larger plan");
  Says(
      call, [](auto* a) { a->inputs.hidden_states.dtype = DType::kFp16; },
      "hidden_states is f16; wanted bf16 or codes of the plan's activation format: convert to bf16",
      ErrorKind::kUnsupported);
  Says(
      call, [](auto* a) { a->inputs.hidden_states.dtype = DType::kE4m3; },
      "hidden_states is e4m3; wanted bf16");
  Says(
      call, [](auto* a) { a->inputs.hidden_states.dtype = DType::kUint8; },
      "hidden_states is u8; wanted bf16");
  const auto scales = [](auto* a) { a->inputs.hidden_scales = a->inputs.logits; };
  Says(call, scales, "hidden_scales is given, but hidden_states is bf16; leave it absent");
  const auto per_token = [](auto* a) { a->inputs.token_scales = a->inputs.logits; };
  Says(call, per_token, "token_scales is given, but hidden_states is bf16; leave it absent");
}

TEST_F(ErrorMessageOfCall, ScalesOfHiddenStates) {
  const auto token_scales = [](auto* a) { a->inputs.token_scales = a->inputs.logits; };
  MoeSpec blocks = TinySpec(W::kFp8Block128, A::kFp8Block128);
  blocks.hidden_size = 256;
  ValidCall block(blocks);
  block.inputs().Logits().QuantizeHidden();
  // Blocks first, tokens second is another library's order.
  Says(
      block,
      [](auto* a) {
        a->inputs.hidden_scales = Reshaped(a->inputs.hidden_scales, {2, 5});
      },
      "hidden_scales has shape [2, 5]; wanted [5, 2]");
  Says(block, token_scales,
       "token_scales is given, but only nvfp4_per_token activations have them; leave it absent");
  ValidCall nvfp4(TinySpec(W::kNvFp4, A::kNvFp4));
  nvfp4.inputs().Logits().QuantizeHidden();
  Says(
      nvfp4, [](auto* a) { a->inputs.hidden_scales = {}; },
      "hidden_scales is missing; wanted e4m3 [5, 4]");
  Says(
      nvfp4,
      [](auto* a) {
        a->inputs.hidden_scales = Reshaped(a->inputs.hidden_scales, {5, 2});
      },
      "hidden_scales has shape [5, 2]; wanted [5, 4]");
  Says(nvfp4, token_scales,
       "token_scales is given, but nvfp4 activations have one static global scale in the weights; "
       "leave it absent");
  ValidCall tensor(TinySpec(W::kFp8PerTensor, A::kFp8PerTensor));
  tensor.inputs().Logits().QuantizeHidden();
  Says(
      tensor, [](auto* a) { a->inputs.hidden_scales = a->inputs.logits; },
      "hidden_scales is given, but fp8_per_tensor has one static scale in the weights; leave it "
      "absent");
}

TEST_F(ErrorMessageOfCall, GivenIds) {
  const MoeSpec spec = TinySpec();
  const auto ids = MakeIds(IdPattern::kRandom, spec, ValidCall::kTokens);
  const auto weights = MakeWeights(spec, ValidCall::kTokens);
  ValidCall packed(spec);
  packed.inputs().Packed(ids, weights);
  Says(
      packed, [](auto* a) { a->inputs.packed_ids.dtype = DType::kInt64; },
      "packed_ids is i64; wanted i32");
  Says(
      packed, [](auto* a) { a->inputs.routing_bias = a->inputs.packed_ids; },
      "routing_bias is given, but inputs.routing is kPacked, which takes packed_ids; leave it "
      "absent or choose the mode that reads it");
  ValidCall unpacked(spec);
  unpacked.inputs().Unpacked(ids, weights);
  Says(
      unpacked,
      [](auto* a) {
        a->inputs.expert_ids = Reshaped(a->inputs.expert_ids, {5, 3});
      },
      "expert_ids has shape [5, 3]; wanted [5, 2]");
  Says(
      unpacked, [](auto* a) { a->inputs.expert_weights = {}; },
      "expert_weights is missing; wanted f32 or bf16 [5, 2]");
  Says(
      unpacked, [](auto* a) { a->inputs.expert_weights.dtype = DType::kFp16; },
      "expert_weights is f16; wanted f32 or bf16");
  Says(
      unpacked, [](auto* a) { a->inputs.expert_ids.strides[0] = 4; },
      "expert_ids is not contiguous: shape [5, 2] has strides [4, 1], wanted [2, 1]; copy it to "
      "row-major memory");
  Says(
      unpacked, [](auto* a) { a->inputs.expert_ids.device.kind = DeviceKind::kCuda; },
      "expert_ids is a CUDA tensor (cuda:0); wanted host memory, the plan's device is the CPU: "
      "copy "
      "it to the host");
  Says(
      unpacked, [](auto* a) { a->inputs.routing = RoutingInput::kPermuted; },
      "inputs.routing is kPermuted (rows already in expert order), which is reserved; give tokens "
      "with logits or ids",
      ErrorKind::kUnsupported);
}

TEST_F(ErrorMessageOfCall, OptionalInputs) {
  ValidCall call(TinySpec());
  call.inputs().Logits().Delta().NumTokens(6);
  Says(
      call, [](auto*) {}, "num_tokens=6; wanted 0 .. 5, the rows of hidden_states");
  call.inputs().NumTokens(5);
  Says(
      call,
      [](auto* a) {
        a->inputs.gemm1_delta = Reshaped(a->inputs.gemm1_delta, {5, 2, 32});
      },
      "gemm1_delta has shape [5, 2, 32]; wanted [5, 2, 64]");
  Says(
      call, [](auto* a) { a->inputs.expert_table = a->inputs.logits; },
      "expert_table is given, but spec.local is not a table; leave it absent");
  Says(
      call, [](auto* a) { a->inputs.shared_weights = a->inputs.logits; },
      "shared_weights is given, but the spec has no shared experts with per-token weights; leave "
      "it absent");
  MoeSpec plain = TinySpec();
  plain.activation.kind = ActivationKind::kRelu2;
  ValidCall not_gated(plain);
  not_gated.inputs().Logits().Delta();
  Says(
      not_gated, [](auto*) {},
      "gemm1_delta requires a gated activation; got relu2: merge the adapter into the weights "
      "(Weights::Update)",
      ErrorKind::kUnsupported);
}

TEST_F(ErrorMessageOfCall, Outputs) {
  ValidCall call(TinySpec());
  call.inputs().Logits();
  const auto output = [](const std::vector<int64_t>& shape) {
    return [=](ForwardArguments* a) { a->outputs.output = Reshaped(a->outputs.output, shape); };
  };
  Says(call, output({5, 65}), "output has 65 columns; wanted 1 .. 64");
  Says(call, output({4, 64}), "output has shape [4, 64]; wanted [5, *]");
  Says(
      call, [](auto* a) { a->outputs.output.dtype = DType::kFloat32; },
      "output is f32; wanted bf16");
  Says(
      call,
      [](auto* a) {
        a->outputs.output = {};
        a->outputs.rows = {};
      },
      "outputs have neither output nor rows; give one of them, or nothing is computed");
  Says(
      call, [](auto* a) { a->outputs.slot_to_row = {}; },
      "slot_to_row is missing; wanted i32 [5, 2], rows are of no use without it");
  const auto replay = [](const std::vector<int64_t>& shape) {
    return [=](ForwardArguments* a) { a->outputs.replay = Reshaped(a->outputs.replay, shape); };
  };
  Says(
      call, [](auto* a) { a->outputs.replay.dtype = DType::kInt32; }, "replay is i32; wanted i16");
  Says(call, replay({5, 3}), "replay has shape [5, 3]; wanted [*, 2]");
  Says(call, replay({4, 2}), "replay has 4 rows; wanted at least 5, one per token");
  const std::string needs = std::to_string(call.plan().workspace_bytes());
  Says(
      call, [](auto* a) { a->workspace.bytes = 100; },
      "workspace has 100 bytes; the plan needs " + needs + " (Plan::workspace_bytes)",
      ErrorKind::kOutOfMemory);
}

}  // namespace
}  // namespace hopyard::test
