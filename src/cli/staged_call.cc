// SPDX-License-Identifier: Apache-2.0
#include "cli/staged_call.h"

#include <algorithm>
#include <cstdint>

namespace hopyard::cli {
namespace {

// Those that the command gives a call.
std::vector<TensorView*> FieldsOf(MoeInputs* inputs) {
  return {&inputs->hidden_states, &inputs->logits, &inputs->routing_bias, &inputs->expert_ids};
}

std::vector<TensorView*> FieldsOf(MoeOutputs* outputs) {
  return {&outputs->output,          &outputs->replay,      &outputs->expert_load,
          &outputs->routing_weights, &outputs->routing_ids, &outputs->gemm1_activation};
}

int64_t BytesOf(const TensorView& view) {
  return view.numel() * SizeOf(view.dtype);
}

}  // namespace

StagedCall::StagedCall(const Plan& plan, const MoeInputs& inputs, const MoeOutputs& outputs)
    : plan_(plan), inputs_(inputs), outputs_(outputs), host_outputs_(outputs) {
  if (plan_.device().kind == DeviceKind::kCpu) {
    return;
  }
  for (TensorView* view : FieldsOf(&inputs_)) {
    *view = OnDevice(*view);
  }
  for (TensorView* view : FieldsOf(&outputs_)) {
    *view = OnDevice(*view);
  }
}

TensorView StagedCall::OnDevice(const TensorView& host) {
  if (!host.defined()) {
    return host;
  }
  memory_.emplace_back(plan_.device(), BytesOf(host));
  CopyBytes(memory_.back().data(), host.data, BytesOf(host), plan_.device());
  TensorView view = host;
  view.data = memory_.back().data();
  view.device = plan_.device();
  return view;
}

void StagedCall::Run(const Weights& weights, const Workspace& workspace) const {
  hopyard::Forward(plan_, weights, inputs_, outputs_, workspace);
  Synchronize(plan_.device());
}

void StagedCall::Fetch() const {
  if (plan_.device().kind == DeviceKind::kCpu) {
    return;
  }
  MoeOutputs from = outputs_;
  MoeOutputs to = host_outputs_;
  const std::vector<TensorView*> sources = FieldsOf(&from);
  const std::vector<TensorView*> targets = FieldsOf(&to);
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i]->defined()) {
      CopyBytes(targets[i]->data, sources[i]->data, BytesOf(*sources[i]), plan_.device());
    }
  }
}

void Poison(const DeviceMemory& memory) {
  constexpr int64_t kPiece = int64_t{1} << 24;
  const std::vector<uint8_t> poison(static_cast<size_t>(std::min(memory.bytes(), kPiece)), 0xFF);
  for (int64_t begin = 0; begin < memory.bytes(); begin += kPiece) {
    CopyBytes(static_cast<uint8_t*>(memory.data()) + begin, poison.data(),
              std::min(memory.bytes() - begin, kPiece), memory.device());
  }
}

}  // namespace hopyard::cli
