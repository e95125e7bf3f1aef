// SPDX-License-Identifier: Apache-2.0
// Runs hopyard::Forward on a GPU from the CPU tests' own layers and inputs: every tensor is
// mirrored to the device, every output and the workspace is poisoned between guards and copied
// back.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <deque>
#include <vector>

#include "tests/forward_runner.h"
#include "tests/gpu/device_array.h"
#include "tests/refit.h"

namespace hopyard::test {

inline constexpr Device kGpu{DeviceKind::kCuda, 0};

// Where tensors begin: on 256 bytes, or an element later, which is all that a caller has to keep
// to.
enum class Begin { kAligned, kAnElementLater };

// Owns copies of host tensors in device memory: same shape, same strides. Values of weights are
// aligned always: the copy engine wants 16 bytes.
class DeviceMirror {
 public:
  explicit DeviceMirror(Begin begin = Begin::kAligned) : begin_(begin) {}

  [[nodiscard]] TensorView Copy(const TensorView& host) { return CopyTo(begin_, host); }
  // Waits for the device.
  static void CopyBack(const TensorView& device, const TensorView& host) {
    if (host.defined()) {
      HOPYARD_CUDA(cudaDeviceSynchronize());
      HOPYARD_CUDA(cudaMemcpy(host.data, device.data, static_cast<size_t>(SpanBytes(host)),
                              cudaMemcpyDeviceToHost));
    }
  }
  [[nodiscard]] WeightsDesc Copy(WeightsDesc desc) {
    for (ExpertMatrices* group : {&desc.routed, &desc.shared}) {
      for (MatrixSet* set : {&group->gemm1, &group->gate, &group->up, &group->gemm2}) {
        set->values = CopyTo(Begin::kAligned, set->values);
        for (TensorView* view : {&set->scales, &set->global_scales, &set->bias}) {
          *view = Copy(*view);
        }
        for (TensorView& view : set->values_per_expert) {
          view = CopyTo(Begin::kAligned, view);
        }
        for (auto* list : {&set->scales_per_expert, &set->bias_per_expert}) {
          for (TensorView& view : *list) {
            view = Copy(view);
          }
        }
      }
      group->gemm1_input_scale = Copy(group->gemm1_input_scale);
      group->gemm2_input_scale = Copy(group->gemm2_input_scale);
      for (TensorView* view : {&group->alpha, &group->beta, &group->limit}) {
        *view = Copy(*view);
      }
    }
    return desc;
  }
  [[nodiscard]] MoeInputs Copy(MoeInputs inputs) {
    for (TensorView* view :
         {&inputs.hidden_states, &inputs.hidden_scales, &inputs.token_scales, &inputs.logits,
          &inputs.routing_bias, &inputs.packed_ids, &inputs.expert_ids, &inputs.expert_weights,
          &inputs.token_ids, &inputs.token_to_experts, &inputs.shared_weights, &inputs.expert_table,
          &inputs.num_tokens, &inputs.gemm1_delta}) {
      *view = Copy(*view);
    }
    return inputs;
  }
  [[nodiscard]] WeightSlice Copy(WeightSlice slice) {
    for (TensorView* view : {&slice.values, &slice.scales, &slice.bias, &slice.global_scale}) {
      *view = Copy(*view);
    }
    return slice;
  }
  [[nodiscard]] bool Intact() const {
    return std::all_of(arrays_.begin(), arrays_.end(),
                       [](const DeviceArray<uint8_t>& array) { return array.GuardsIntact(); });
  }

 private:
  static int64_t SpanBytes(const TensorView& view) {
    int64_t last = 0;
    for (int d = 0; d < view.ndim; ++d) {
      const auto at = static_cast<size_t>(d);
      if (view.shape.at(at) == 0) {
        return 0;
      }
      last += (view.shape.at(at) - 1) * view.strides.at(at);
    }
    return (last + 1) * SizeOf(view.dtype);
  }

  [[nodiscard]] TensorView CopyTo(Begin begin, const TensorView& host) {
    if (!host.defined()) {
      return host;
    }
    const int64_t shift = begin == Begin::kAligned ? 0 : SizeOf(host.dtype);
    std::vector<uint8_t> bytes(static_cast<size_t>(shift), 0xFF);
    bytes.insert(bytes.end(), host.as<const uint8_t>(), host.as<const uint8_t>() + SpanBytes(host));
    arrays_.emplace_back(bytes);
    TensorView device = host;
    device.data = arrays_.back().get() + shift;
    device.device = kGpu;
    return device;
  }

  Begin begin_;
  std::deque<DeviceArray<uint8_t>> arrays_;
};

// Pairs of an output on the host and its mirror.
[[nodiscard]] inline std::vector<TensorView*> FieldsOf(MoeOutputs* outputs) {
  return {&outputs->output,          &outputs->replay,          &outputs->expert_load,
          &outputs->routing_weights, &outputs->routing_ids,     &outputs->rows,
          &outputs->slot_to_row,     &outputs->gemm1_activation};
}

// `weights` on the GPU, `inputs` on the host.
[[nodiscard]] inline RunResult RunOnGpu(const Weights& weights, const MoeInputs& inputs,
                                        const RunOptions& options = {},
                                        Begin begin = Begin::kAligned) {
  const MoeSpec& spec = weights.spec();
  const int64_t tokens = inputs.hidden_states.shape[0];
  const Plan plan = MakePlan(spec, kGpu, PlanOptionsOf(options, tokens));
  OutputBuffers buffers;
  AddOutputs(spec, tokens, options, &buffers);
  DeviceMirror mirror(begin);
  MoeOutputs outputs = buffers.outputs;
  for (TensorView* view : FieldsOf(&outputs)) {
    *view = mirror.Copy(*view);
  }
  const DeviceArray<uint8_t> workspace(plan.workspace_bytes());
  Forward(plan, weights, mirror.Copy(inputs), outputs,
          Workspace{workspace.get(), static_cast<size_t>(plan.workspace_bytes())});
  const std::vector<TensorView*> from = FieldsOf(&outputs);
  const std::vector<TensorView*> to = FieldsOf(&buffers.outputs);
  for (size_t i = 0; i < from.size(); ++i) {
    DeviceMirror::CopyBack(*from[i], *to[i]);
  }
  EXPECT_TRUE(workspace.GuardsIntact()) << "Forward wrote outside of its workspace";
  EXPECT_TRUE(mirror.Intact()) << "Forward wrote outside of a tensor";
  return ResultOf(buffers.outputs);
}

// Of a layer with biases.
[[nodiscard]] inline WeightSource SourceOf(const MoeSpec& spec) {
  WeightSource source;
  source.spec = spec;
  source.bias = true;
  return source;
}
// Weights that are updated; `fresh`: those that they shall become, of MXFP4 with rows whose
// exponents differ a lot from those before.
[[nodiscard]] inline WeightSource SourceOf(const UpdateCase& update, bool fresh) {
  MoeSpec spec = SmallSpec(update.format, ActivationFormat::kBf16);
  // Products in FP8 read the rows' exponents, which an update must renew.
  if (update.format == WeightFormat::kMxFp4) {
    spec.activations = ActivationFormat::kFp8PerToken;
  }
  spec.num_experts = 2;
  spec.intermediate_size = CodesPerByte(update.format) == 2 ? 256 : 128;
  spec.shared = {1, false, 1.0F, update.format};
  WeightSource source = SourceOf(spec);
  source.layout = update.layout;
  if (fresh) {
    source.seed = 99;
    source.gain = 8.0F;
  }
  return source;
}

// The same weights on both devices.
class TwinLayer {
 public:
  explicit TwinLayer(const WeightSource& source)
      : spec_(source.spec),
        storage_(source),
        cpu_(storage_.Make()),
        gpu_(source.spec, mirror_.Copy(storage_.desc())) {}

  [[nodiscard]] const MoeSpec& spec() const { return spec_; }
  [[nodiscard]] const Weights& cpu() const { return cpu_; }
  [[nodiscard]] Weights& gpu() { return gpu_; }
  [[nodiscard]] const LayerWeights& storage() const { return storage_; }
  [[nodiscard]] RunResult RunOnCpu(const LayerInputs& inputs, const RunOptions& options = {}) {
    return RunLayer(spec_, cpu_, inputs.get(), options);
  }
  [[nodiscard]] RunResult Run(const LayerInputs& inputs, const RunOptions& options = {}) {
    RunResult result = RunOnGpu(gpu_, inputs.get(), options);
    EXPECT_TRUE(mirror_.Intact()) << "Forward wrote to the weights";
    return result;
  }
  // Against the oracle, and everything that is exact against the CPU backend.
  void Judge(const LayerInputs& inputs, const RunResult& got, const RunOptions& options = {},
             const std::vector<int64_t>& tokens = {}) {
    const RunResult cpu = RunOnCpu(inputs, options);
    EXPECT_TRUE(SameBits(got.ids, cpu.ids)) << "routing_ids";
    EXPECT_TRUE(SameBits(got.replay, cpu.replay)) << "replay";
    EXPECT_TRUE(SameBits(got.load, cpu.load)) << "expert_load";
    EXPECT_TRUE(SameBits(got.slot_to_row, cpu.slot_to_row)) << "slot_to_row";
    EXPECT_TRUE(SameBits(Bits(got.weights), Bits(cpu.weights))) << "routing_weights";
    EXPECT_TRUE(MatchesOracle(spec_, cpu_, inputs.get(), got, tokens));
  }
  void RunAndJudge(const LayerInputs& inputs, const RunOptions& options = {},
                   const std::vector<int64_t>& tokens = {}) {
    Judge(inputs, Run(inputs, options), options, tokens);
  }

 private:
  static std::vector<uint32_t> Bits(const std::vector<float>& values) {
    std::vector<uint32_t> bits;
    for (const float value : values) {
      bits.push_back(std::bit_cast<uint32_t>(value));
    }
    return bits;
  }

  MoeSpec spec_;
  LayerWeights storage_;
  DeviceMirror mirror_;
  Weights cpu_;
  Weights gpu_;
};

}  // namespace hopyard::test
