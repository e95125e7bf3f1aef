// SPDX-License-Identifier: Apache-2.0
// Takes valid calls of Forward in every routing mode and spoils each argument in each way, one at a
// time: dtype, rank, every extent, every stride, pointer, alignment, device. Each must be refused
// before anything is written.
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "tests/bad_input.h"

namespace hopyard::test {
namespace {

// A tensor argument of the call, and which of its extents Forward leaves to the caller.
struct Argument {
  const char* name;
  TensorView* view;
  int free_dim = -1;  // any extent that is at least the current one is valid (replay rows) ...
  bool may_shrink = false;   // ... or any from 1 up to it (output columns), or any at all (tables)
  bool sets_tokens = false;  // another argument may be the one that then disagrees
};

std::vector<Argument> ArgumentsOf(ForwardArguments* call) {
  MoeInputs& in = call->inputs;
  MoeOutputs& out = call->outputs;
  std::vector<Argument> all = {
      {"hidden_states", &in.hidden_states, -1, false, true},
      {"hidden_scales", &in.hidden_scales},
      {"token_scales", &in.token_scales},
      {"logits", &in.logits},
      {"routing_bias", &in.routing_bias},
      {"packed_ids", &in.packed_ids},
      {"expert_ids", &in.expert_ids},
      {"expert_weights", &in.expert_weights},
      {"token_ids", &in.token_ids},
      {"token_to_experts", &in.token_to_experts, 0},
      {"shared_weights", &in.shared_weights},
      {"expert_table", &in.expert_table},
      {"num_tokens", &in.num_tokens},
      {"gemm1_delta", &in.gemm1_delta},
      {"output", &out.output, 1, true},
      {"replay", &out.replay, 0},
      {"expert_load", &out.expert_load},
      {"routing_weights", &out.routing_weights},
      {"routing_ids", &out.routing_ids},
      {"rows", &out.rows},
      {"slot_to_row", &out.slot_to_row},
      {"gemm1_activation", &out.gemm1_activation},
  };
  std::vector<Argument> given;
  for (const Argument& argument : all) {
    if (argument.view->defined()) {
      given.push_back(argument);
    }
  }
  return given;
}

std::vector<int64_t> ShapeOfView(const TensorView& view) {
  return {view.shape.begin(), view.shape.begin() + view.ndim};
}

bool IsAllowedExtent(const Argument& argument, int dim, int64_t extent) {
  if (dim != argument.free_dim) {
    return false;
  }
  const int64_t current = argument.view->shape.at(static_cast<size_t>(dim));
  const bool table = std::string(argument.name) == "token_to_experts";
  return table || (argument.may_shrink ? extent >= 1 && extent <= current : extent >= current);
}

// One spoilt view and what the message must hold besides the name.
struct Spoilt {
  std::string what;
  TensorView view;
  std::vector<std::string> parts;
};

void AddShapes(const Argument& argument, std::vector<Spoilt>* out) {
  const TensorView& good = *argument.view;
  std::vector<int64_t> longer = ShapeOfView(good);
  longer.push_back(1);
  out->push_back({"one dimension more", Reshaped(good, longer), {"wanted ["}});
  if (good.ndim > 1) {
    out->push_back({"flattened", Reshaped(good, {good.numel()}), {"wanted ["}});
  }
  for (const int ndim : {TensorView::kMaxDims + 1, 1000, -1}) {
    Spoilt spoilt{"rank " + std::to_string(ndim), good, {std::to_string(ndim), "wanted ["}};
    spoilt.view.ndim = ndim;
    out->push_back(spoilt);
  }
  constexpr int64_t kHuge = int64_t{1} << 62;
  for (int dim = 0; dim < good.ndim; ++dim) {
    const int64_t extent = good.shape.at(static_cast<size_t>(dim));
    for (const int64_t bad : {extent + 1, extent - 1, int64_t{-1}, -extent, kHuge}) {
      if (IsAllowedExtent(argument, dim, bad) && bad != kHuge) {
        continue;
      }
      std::vector<int64_t> shape = ShapeOfView(good);
      shape[static_cast<size_t>(dim)] = bad;
      const std::string what = "extent " + std::to_string(dim) + " = " + std::to_string(bad);
      out->push_back({what, Reshaped(good, shape), {"wanted "}});
    }
  }
}

void AddMemory(const Argument& argument, std::vector<Spoilt>* out) {
  const TensorView& good = *argument.view;
  for (int dim = 0; dim < good.ndim; ++dim) {
    if (good.shape.at(static_cast<size_t>(dim)) == 1) {
      continue;
    }
    for (const int64_t change : {int64_t{1}, int64_t{-1}}) {
      Spoilt spoilt{"stride " + std::to_string(dim), good, {"not contiguous", "has strides ["}};
      spoilt.view.strides.at(static_cast<size_t>(dim)) += change;
      out->push_back(spoilt);
    }
  }
  Spoilt null{"null pointer", good, {"null pointer"}};
  null.view.data = nullptr;
  out->push_back(null);
  Spoilt device{"on the GPU", good, {"CUDA tensor", "cuda:3"}};
  device.view.device = {DeviceKind::kCuda, 3};
  out->push_back(device);
  if (SizeOf(good.dtype) > 1) {
    Spoilt misaligned{"misaligned", good, {"not aligned"}};
    misaligned.view.data = good.as<uint8_t>() + 1;
    out->push_back(misaligned);
  }
  for (const DType dtype : {DType::kFloat64, DType::kInt8, DType::kFp16}) {
    const std::string name(ToString(dtype));
    const bool f16_hidden = dtype == DType::kFp16 && argument.sets_tokens;
    out->push_back({"dtype " + name,
                    WithDType(good, dtype),
                    {"is " + name, f16_hidden ? "convert to bf16" : "wanted "}});
  }
}

std::vector<Spoilt> Spoil(const Argument& argument) {
  std::vector<Spoilt> spoilt;
  AddShapes(argument, &spoilt);
  AddMemory(argument, &spoilt);
  return spoilt;
}

// How the valid call is set up.
struct Setup {
  const char* name;
  MoeSpec spec;
  void (*prepare)(LayerInputs& inputs, const MoeSpec& spec);
};

std::ostream& operator<<(std::ostream& out, const Setup& setup) {
  return out << setup.name;
}

MoeSpec With(WeightFormat weights, ActivationFormat activations) {
  return TinySpec(weights, activations);
}

MoeSpec DeepSeekSpec() {
  MoeSpec spec = TinySpec();
  spec.routing = RoutingRule::DeepSeekV3(2, 1, 2.5F);
  spec.shared.count = 2;
  spec.shared.per_token_weight = true;
  return spec;
}

MoeSpec TableSpec() {
  MoeSpec spec = TinySpec(WeightFormat::kMxFp4, ActivationFormat::kMxFp8);
  spec.local = {ExpertMap::Kind::kTable, 0, 2};
  return spec;
}

std::vector<Setup> Setups() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {
      {"LogitsBiasSharedDeltaNumTokens", DeepSeekSpec(),
       [](LayerInputs& in, const MoeSpec&) {
         in.Logits(DType::kBf16).RoutingBias().SharedWeights().Delta().NumTokens(4);
       }},
      {"PackedTableMxFp8Codes", TableSpec(),
       [](LayerInputs& in, const MoeSpec& spec) {
         in.Packed(MakeIds(IdPattern::kRandom, spec, in.tokens()), MakeWeights(spec, in.tokens()));
         in.ExpertTable({-1, 0, 1, -1}).QuantizeHidden();
       }},
      {"UnpackedNvFp4PerTokenCodes", With(W::kNvFp4, A::kNvFp4PerToken),
       [](LayerInputs& in, const MoeSpec& spec) {
         in.Unpacked(MakeIds(IdPattern::kRandom, spec, in.tokens()), MakeWeights(spec, in.tokens()),
                     DType::kBf16);
         in.QuantizeHidden();
       }},
      {"ReplayFp8BlockCodes", With(W::kFp8Block128, A::kFp8Block128),
       [](LayerInputs& in, const MoeSpec& spec) {
         in.Logits().Replay(MakeIds(IdPattern::kRandom, spec, in.tokens()), DType::kInt16);
         in.QuantizeHidden();
       }},
      {"HashFp8PerTokenCodes", With(W::kFp8PerChannel, A::kFp8PerToken),
       [](LayerInputs& in, const MoeSpec&) { in.Logits().HashTable(11).QuantizeHidden(); }},
      {"LogitsFp8PerTensorCodes", With(W::kFp8PerTensor, A::kFp8PerTensor),
       [](LayerInputs& in, const MoeSpec&) { in.Logits().QuantizeHidden(); }},
      {"LogitsNvFp4Codes", With(W::kNvFp4, A::kNvFp4),
       [](LayerInputs& in, const MoeSpec&) { in.Logits().QuantizeHidden(); }},
  };
}

class SpoiltForward : public ::testing::TestWithParam<Setup> {
 protected:
  SpoiltForward() : call_(GetParam().spec) { GetParam().prepare(call_.inputs(), call_.spec()); }
  ValidCall call_;
};

INSTANTIATE_TEST_SUITE_P(AllModes, SpoiltForward, ::testing::ValuesIn(Setups()),
                         [](const ::testing::TestParamInfo<Setup>& param) {
                           return param.param.name;
                         });

TEST_P(SpoiltForward, EveryTensorInEveryWay) {
  ForwardArguments list = call_.Arguments();
  int refused = 0;
  for (size_t i = 0; i < ArgumentsOf(&list).size(); ++i) {
    const Argument argument = ArgumentsOf(&list)[i];
    for (const Spoilt& spoilt : Spoil(argument)) {
      SCOPED_TRACE(std::string(argument.name) + ": " + spoilt.what);
      ForwardArguments bad = call_.Arguments();
      *ArgumentsOf(&bad)[i].view = spoilt.view;
      const bool f16 = argument.sets_tokens && spoilt.view.dtype == DType::kFp16;
      WantedError wanted{f16 ? ErrorKind::kUnsupported : ErrorKind::kInvalidArgument, spoilt.parts};
      // With another number of tokens it is the next argument that has the wrong shape.
      const bool rows_changed = argument.sets_tokens && spoilt.what.rfind("extent 0", 0) == 0;
      wanted.parts.emplace_back(rows_changed ? " has " : argument.name);
      if (rows_changed) {
        wanted.parts.erase(wanted.parts.begin());
      }
      call_.ExpectRefused(bad, wanted);
      ++refused;
      if (HasFailure()) {
        return;
      }
    }
  }
  EXPECT_GT(refused, 150);
  // The call was valid all along: it runs, and then every output is written.
  call_.Run(call_.Arguments());
  EXPECT_FALSE(call_.Untouched());
}

TEST_P(SpoiltForward, RequiredTensorsMissing) {
  ForwardArguments list = call_.Arguments();
  for (size_t i = 0; i < ArgumentsOf(&list).size(); ++i) {
    const std::string name = ArgumentsOf(&list)[i].name;
    const bool optional = name == "routing_bias" || name == "num_tokens" || name == "gemm1_delta" ||
                          name == "output" || name == "replay" || name == "expert_load" ||
                          name == "routing_weights" || name == "routing_ids" || name == "rows" ||
                          name == "gemm1_activation";
    if (optional) {
      continue;
    }
    SCOPED_TRACE(name);
    ForwardArguments bad = call_.Arguments();
    *ArgumentsOf(&bad)[i].view = TensorView{};
    call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument, {name + " is missing", "wanted "}});
  }
}

TEST_P(SpoiltForward, StructSizes) {
  for (const uint32_t size : {0U, 8U, static_cast<uint32_t>(sizeof(MoeInputs) - 1)}) {
    ForwardArguments bad = call_.Arguments();
    bad.inputs.struct_size = size;
    call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument,
                              {"MoeInputs.struct_size=" + std::to_string(size),
                               std::to_string(sizeof(MoeInputs)), "headers"}});
  }
  ForwardArguments bad = call_.Arguments();
  bad.outputs.struct_size += 8;
  call_.ExpectRefused(
      bad, {ErrorKind::kInvalidArgument, {"MoeOutputs.struct_size=", "knows", "headers"}});
}

TEST_P(SpoiltForward, WorkspaceShortNullOrMisaligned) {
  const ForwardArguments good = call_.Arguments();
  for (const size_t bytes : {size_t{0}, good.workspace.bytes - 1}) {
    ForwardArguments bad = good;
    bad.workspace.bytes = bytes;
    call_.ExpectRefused(
        bad, {ErrorKind::kOutOfMemory,
              {"workspace has " + std::to_string(bytes) + " bytes",
               std::to_string(call_.plan().workspace_bytes()), "Plan::workspace_bytes"}});
  }
  for (const int offset : {1, 16, 128}) {
    ForwardArguments bad = good;
    bad.workspace.data = static_cast<uint8_t*>(good.workspace.data) + offset;
    call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument, {"workspace", "256-byte aligned"}});
  }
  ForwardArguments bad = good;
  bad.workspace.data = nullptr;
  call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument, {"workspace", "256-byte aligned"}});
}

TEST_P(SpoiltForward, FieldsOfOtherModesAreRefusedNotIgnored) {
  const LayerInputs other = [&] {
    LayerInputs inputs(call_.spec(), ValidCall::kTokens);
    inputs.Logits().HashTable(7);
    const auto ids = MakeIds(IdPattern::kRandom, call_.spec(), ValidCall::kTokens);
    const auto weights = MakeWeights(call_.spec(), ValidCall::kTokens);
    inputs.Packed(ids, weights).Unpacked(ids, weights);
    return inputs;
  }();
  const auto given = [](ForwardArguments* call, size_t i) {
    MoeInputs& in = call->inputs;
    TensorView* const fields[] = {&in.logits,         &in.packed_ids, &in.expert_ids,
                                  &in.expert_weights, &in.token_ids,  &in.token_to_experts};
    return fields[i];
  };
  const char* const names[] = {"logits",         "packed_ids", "expert_ids",
                               "expert_weights", "token_ids",  "token_to_experts"};
  ForwardArguments source{other.get(), {}, {}};
  int refused = 0;
  for (size_t i = 0; i < std::size(names); ++i) {
    ForwardArguments bad = call_.Arguments();
    if (given(&bad, i)->defined()) {
      continue;
    }
    SCOPED_TRACE(names[i]);
    *given(&bad, i) = *given(&source, i);
    call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument,
                              {std::string(names[i]) + " is given, but inputs.routing is k",
                               "which takes", "leave it absent"}});
    ++refused;
  }
  EXPECT_GE(refused, 3);
}

TEST_P(SpoiltForward, ModesThatAreReservedOrUnknown) {
  ForwardArguments bad = call_.Arguments();
  bad.inputs.routing = RoutingInput::kPermuted;
  call_.ExpectRefused(bad, {ErrorKind::kUnsupported, {"kPermuted", "reserved", "logits or ids"}});
  bad.inputs.routing = RoutingInput::kBatched;
  call_.ExpectRefused(bad, {ErrorKind::kUnsupported, {"kBatched", "reserved", "logits or ids"}});
  bad.inputs.routing = static_cast<RoutingInput>(200);
  call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument, {"inputs.routing=200", "wanted 0 .. 4"}});
}

TEST_P(SpoiltForward, OutputsThatMeanNothing) {
  ForwardArguments bad = call_.Arguments();
  bad.outputs.output = {};
  bad.outputs.rows = {};
  call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument, {"neither output nor rows"}});
  bad = call_.Arguments();
  bad.outputs.output = {};
  bad.outputs.accumulate = true;
  call_.ExpectRefused(bad, {ErrorKind::kInvalidArgument, {"accumulate", "output is missing"}});
}

TEST_P(SpoiltForward, PlansAndWeightsOfOtherLayers) {
  const ForwardArguments good = call_.Arguments();
  MoeSpec other = call_.spec();
  other.routing.scaling_factor = 3.0F;
  const Plan plan = MakePlan(other, Device{}, OptionsFor(ValidCall::kMaxTokens));
  ExpectInvalid([&] { Forward(plan, call_.weights(), good.inputs, good.outputs, good.workspace); },
                {"weights were made for another layer", "scaling_factor=3", "wanted"});
  ExpectInvalid(
      [&] { Forward(Plan(), call_.weights(), good.inputs, good.outputs, good.workspace); },
      {"plan is empty", "MakePlan"});
  ExpectInvalid(
      [&] { Forward(call_.plan(), Weights(), good.inputs, good.outputs, good.workspace); },
      {"weights are empty", "construct"});
  EXPECT_TRUE(call_.Untouched());
}

}  // namespace
}  // namespace hopyard::test
