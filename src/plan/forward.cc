// SPDX-License-Identifier: Apache-2.0
#include "hopyard/forward.h"

#include <algorithm>
#include <string>

#include "core/error.h"
#include "plan/backend_sm90.h"
#include "plan/forward_pass.h"
#include "spec/validate.h"
#include "stages/2_permute/permute.h"
#include "stages/4_gemm2/gemm2.h"
#include "stages/5_finalize/finalize.h"

namespace hopyard {
namespace {

void PermuteSlots(const ForwardPass& pass) {
  const WorkspaceLayout& layout = pass.plan->layout;
  const int64_t per_token = pass.spec().slots_per_token();
  const int64_t slots = pass.tokens * per_token;
  const auto i32 = [&](int64_t offset, int64_t count) {
    return TensorView::Contiguous(pass.At<int32_t>(offset), DType::kInt32, {count});
  };
  PermuteOutputs out;
  out.expert_offsets = i32(layout.expert_offsets, layout.segments + 1);
  out.expert_counts = i32(layout.expert_counts, layout.segments);
  out.slot_to_row = i32(layout.slot_to_row, slots);
  out.row_to_slot = i32(layout.row_to_slot, slots);
  out.row_to_token = i32(layout.row_to_token, slots);
  out.tile_expert = i32(layout.tiles, layout.max_tiles);
  out.tile_row_begin = i32(layout.tiles + 4 * layout.max_tiles, layout.max_tiles);
  out.tile_row_end = i32(layout.tiles + 8 * layout.max_tiles, layout.max_tiles);
  out.num_tiles = i32(layout.tiles + 12 * layout.max_tiles, 1);
  out.num_rows = i32(layout.tiles + 12 * layout.max_tiles + 4, 1);
  permute::PermuteCpu(
      TensorView::Contiguous(pass.local_slots(), DType::kInt32, {pass.tokens, per_token}),
      layout.permute, out);
}

RowGroups GroupRows(const ForwardPass& pass) {
  const WorkspaceLayout& layout = pass.plan->layout;
  RowGroups groups;
  groups.kernels = &gemm::cpu::Kernels(pass.plan->IsaFor(pass.tokens));
  groups.experts = pass.weights->experts.data();
  groups.expert_offsets = pass.At<int32_t>(layout.expert_offsets);
  groups.row_to_slot = pass.At<int32_t>(layout.row_to_slot);
  groups.slots_per_token = pass.spec().slots_per_token();
  groups.scratch = pass.At<float>(layout.scratch);
  groups.scratch_floats = layout.scratch_floats;
  groups.num_threads = pass.plan->num_threads;
  auto* active = pass.At<int32_t>(layout.active);
  groups.active = active;
  for (int64_t s = 0; s < layout.segments; ++s) {
    if (groups.expert_offsets[s + 1] > groups.expert_offsets[s]) {
      active[groups.num_active++] = static_cast<int32_t>(s);
    }
  }
  return groups;
}

uint16_t* RunGemms(const ForwardPass& pass) {
  const MoeSpec& spec = pass.spec();
  const WorkspaceLayout& layout = pass.plan->layout;
  const int64_t row_base = pass.token_begin * spec.slots_per_token();
  const RowGroups groups = GroupRows(pass);
  gemm1::Args first;
  first.spec = &spec;
  first.groups = groups;
  first.x = pass.x();
  first.x_pitch = layout.x_pitch;
  first.slot_weights = spec.router_weight_on_input ? pass.slot_weights() : nullptr;
  if (pass.inputs->gemm1_delta.defined()) {
    first.delta = pass.inputs->gemm1_delta.as<const uint16_t>() +
                  pass.token_begin * spec.top_k * spec.gemm1_rows();
  }
  first.h = pass.h();
  first.h_pitch = layout.h_pitch;
  if (pass.outputs->gemm1_activation.defined()) {
    first.activation =
        pass.outputs->gemm1_activation.as<uint16_t>() + row_base * spec.intermediate_size;
  }
  gemm1::Gemm1Cpu(first);

  gemm2::Args second;
  second.spec = &spec;
  second.groups = groups;
  second.h = pass.h();
  second.h_pitch = layout.h_pitch;
  second.y = pass.outputs->rows.defined()
                 ? pass.outputs->rows.as<uint16_t>() + row_base * spec.hidden_size
                 : pass.At<uint16_t>(layout.y);
  gemm2::Gemm2Cpu(second);
  return second.y;
}

void Finish(const ForwardPass& pass, const uint16_t* y) {
  const MoeSpec& spec = pass.spec();
  const int slots = spec.slots_per_token();
  if (pass.outputs->slot_to_row.defined()) {
    const int64_t base = pass.token_begin * slots;
    int32_t* out = pass.outputs->slot_to_row.as<int32_t>() + base;
    for (int64_t s = 0; s < pass.tokens * slots; ++s) {
      const int32_t row = pass.slot_to_row()[s];
      out[s] = row < 0 ? -1 : static_cast<int32_t>(row + base);
    }
  }
  if (!pass.outputs->output.defined()) {
    return;
  }
  finalize::Args args;
  args.y = y;
  args.slot_to_row = pass.slot_to_row();
  args.weights = spec.router_weight_on_input ? nullptr : pass.slot_weights();
  args.width = pass.outputs->output.shape[1];
  args.output = pass.outputs->output.as<uint16_t>() + pass.token_begin * args.width;
  args.tokens = pass.tokens;
  args.hidden = spec.hidden_size;
  args.slots = slots;
  args.accumulate = pass.outputs->accumulate;
  args.num_threads = pass.plan->num_threads;
  finalize::FinalizeCpu(args);
}

std::string NameOf(Device device) {
  return device.kind == DeviceKind::kCpu ? "the CPU" : "cuda:" + std::to_string(device.index);
}

// The CPU has no numbers.
bool IsSame(Device a, Device b) {
  return a.kind == b.kind && (a.kind == DeviceKind::kCpu || a.index == b.index);
}

void ForwardOnGpu(const sm90::Call& call) {
  if (call.inputs->hidden_states.shape[0] > 0) {
    sm90::FindBackend()->Forward(call);
  }
}

void CheckWorkspace(const Plan& plan, const Workspace& workspace) {
  HOPYARD_CHECK(static_cast<int64_t>(workspace.bytes) >= plan.workspace_bytes(), kOutOfMemory)
      << "workspace has " << workspace.bytes << " bytes; the plan needs " << plan.workspace_bytes()
      << " (Plan::workspace_bytes)";
  HOPYARD_CHECK(workspace.data != nullptr && reinterpret_cast<uintptr_t>(workspace.data) % 256 == 0,
                kInvalidArgument)
      << "workspace pointer " << workspace.data << " is not 256-byte aligned";
}

}  // namespace

void Forward(const Plan& plan, const Weights& weights, const MoeInputs& inputs,
             const MoeOutputs& outputs, Workspace workspace, Stream stream) {
  const MoeSpec& spec = plan.spec();
  HOPYARD_CHECK(weights.spec() == spec, kInvalidArgument)
      << "weights were made for another layer: got {" << ToString(weights.spec()) << "}; wanted {"
      << ToString(spec) << "}";
  HOPYARD_CHECK(IsSame(weights.device(), plan.device()), kInvalidArgument)
      << "weights are on " << NameOf(weights.device()) << "; wanted " << NameOf(plan.device())
      << ", the plan's device: copy them there, or make a plan for their device";
  spec::Place place;
  place.device = plan.device();
  spec::ValidateForward(spec, plan.options().max_tokens, inputs, outputs, place);
  CheckWorkspace(plan, workspace);
  if (place.device.kind == DeviceKind::kCuda) {
    ForwardOnGpu({&plan.impl(), &weights.impl(), &inputs, &outputs,
                  static_cast<uint8_t*>(workspace.data), stream.handle});
    return;
  }
  const int64_t tokens = inputs.num_tokens.defined() ? *inputs.num_tokens.as<const int32_t>()
                                                     : inputs.hidden_states.shape[0];
  ForwardPass pass;
  pass.plan = &plan.impl();
  pass.weights = &weights.impl();
  pass.inputs = &inputs;
  pass.outputs = &outputs;
  pass.workspace = static_cast<uint8_t*>(workspace.data);
  for (int64_t begin = 0; begin < tokens; begin += plan.tokens_per_chunk()) {
    pass.token_begin = begin;
    pass.tokens = std::min(plan.tokens_per_chunk(), tokens - begin);
    RouteTokens(pass);
    PlaceSlots(pass);
    PermuteSlots(pass);
    LoadHiddenStates(pass);
    const uint16_t* y = RunGemms(pass);
    Finish(pass, y);
  }
}

}  // namespace hopyard
