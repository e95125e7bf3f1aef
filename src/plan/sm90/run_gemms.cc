// SPDX-License-Identifier: Apache-2.0
// The two GEMMs of a pass and what is rounded before each: routed experts, then shared ones, whose
// weights may have another format and want other operands.
#include "core/error.h"
#include "core/shape.h"
#include "device/range.h"
#include "plan/sm90/pass.h"
#include "stages/3_gemm1/rows_sm90.h"

namespace hopyard::sm90 {
namespace {

using gemm::sm90::GroupedGemmArgs;
using gemm::sm90::RowFormat;

// What of a pass belongs to one group of experts.
struct GroupPass {
  const Pass& pass;
  const Group& weights;
  const GroupFormats& formats;
  const GroupKernels& kernels;
  const void* x = nullptr;
  int64_t x_pitch = 0;
};

// Formats with one given scale for all rows: the GEMM multiplies by it.
bool HasStaticScale(const MoeSpec& spec) {
  return spec.activations == ActivationFormat::kFp8PerTensor ||
         spec.activations == ActivationFormat::kNvFp4;
}

bool HasRowGlobal(const MoeSpec& spec) {
  return spec.activations == ActivationFormat::kNvFp4PerToken;
}

// Scales that stand beside rows of this format; null where there are none.
float* BlockScales(const Pass& pass, const RowFormat& rows, int64_t offset) {
  return rows.format == Format::kFp8Block1x128 ? pass.At<float>(offset) : nullptr;
}
float* RowScales(const Pass& pass, const RowFormat& rows, int64_t offset) {
  const bool has = rows.format == Format::kFp8PerRow || HasRowGlobal(pass.spec());
  return has ? pass.At<float>(offset) : nullptr;
}

// BF16 rows in natural order are operands as they lie, where the copies of 16 bytes can read them.
bool ReadsInPlace(const Pass& pass, const RowFormat& x) {
  const TensorView& hidden = pass.call->inputs->hidden_states;
  const auto* rows = pass.Rows<const uint8_t>(hidden);
  return x == RowFormat{} && hidden.dtype == DType::kBf16 &&
         reinterpret_cast<uintptr_t>(rows) % 16 == 0 && hidden.strides[0] % 8 == 0;
}

// The hidden states into `out`, rows of `row_bytes`.
gemm1::RoundRowsArgs HiddenRounding(const Pass& pass, const RowFormat& to, void* out,
                                    int64_t row_bytes) {
  const MoeSpec& spec = pass.spec();
  const Layout& layout = pass.layout();
  const MoeInputs& in = *pass.call->inputs;
  gemm1::RoundRowsArgs args;
  args.to = to;
  args.row_global = HasRowGlobal(spec);
  args.in = pass.Rows<const void>(in.hidden_states);
  args.in_dtype = in.hidden_states.dtype;
  args.in_pitch = in.hidden_states.strides[0];
  args.in_scales = pass.Rows<const void>(in.hidden_scales);
  args.from_mxfp8 = spec.activations == ActivationFormat::kMxFp8 &&
                    to.format == Format::kFp8Block1x128 && args.in_dtype != DType::kBf16;
  args.in_row_scales = pass.Rows<const float>(in.token_scales);
  args.static_scale = HasStaticScale(spec) ? pass.weights->gemm1_input_scale : nullptr;
  args.max_rows = pass.tokens;
  args.num_rows = pass.num_tokens;
  args.cols = spec.hidden_size;
  args.out = out;
  args.out_pitch = row_bytes / SizeOf(to.dtype);
  args.out_block_scales = BlockScales(pass, to, layout.x_block_scales);
  args.out_row_scales = RowScales(pass, to, layout.x_row_scales);
  return args;
}

// Gives the group its operand of GEMM1.
void LoadHidden(GroupPass* group, int64_t offset, int64_t row_bytes) {
  const Pass& pass = group->pass;
  const RowFormat& to = group->formats.operands.x;
  if (ReadsInPlace(pass, to)) {
    group->x = pass.Rows<const void>(pass.call->inputs->hidden_states);
    group->x_pitch = pass.call->inputs->hidden_states.strides[0];
    return;
  }
  group->x = pass.At<const void>(offset);
  group->x_pitch = row_bytes / SizeOf(to.dtype);
}

// The kernel that reads these weights: the plan's, or its twin for their order.
int KernelFor(int chosen, const GroupMatrix& weights) {
  if (weights.args.packed != nullptr) {
    return gemm::sm90::PackedTwin(chosen);
  }
  return weights.shape.major == MajorOrder::kMnMajor
             ? gemm::sm90::MnMajorTwin(chosen, weights.shape.position_step != 1)
             : chosen;
}

// Under the kernel's name in a profile.
void RunKernel(int chosen, const GroupMatrix& weights, const GroupedGemmArgs& args,
               const device::Queue& queue) {
  const int index = KernelFor(chosen, weights);
  HOPYARD_INTERNAL(index >= 0) << gemm::sm90::KernelAt(chosen).name
                               << " has no twin for these weights, which were taken all the same";
  // A view of a literal, so a zero follows.
  const device::Range range(gemm::sm90::KernelAt(index).name.data());
  RunGroupedGemm(index, args, queue);
}

// Segments and tiles of GEMM1 (0) or GEMM2 (1).
GroupedGemmArgs TilesOf(const GroupPass& group, int gemm) {
  const Pass& pass = group.pass;
  const permute::TileListSm90 list = TileListOf(pass, gemm);
  GroupedGemmArgs args;
  args.weights = group.formats.weights;
  args.segment_begin = group.weights.segment_begin;
  args.segment_end = group.weights.segment_end;
  args.tile_expert = list.expert;
  args.tile_row_begin = list.row_begin;
  args.tile_row_end = list.row_end;
  args.num_tiles = list.num_tiles;
  args.max_tiles = MaxTiles(pass.slots(), PermuteOptionsFor(pass.spec(), *pass.choice, gemm));
  return args;
}

// What GEMM1 does between its sums and the activation.
void SetAdjustments(const Pass& pass, GroupedGemmArgs* args) {
  const MoeSpec& spec = pass.spec();
  args->row_to_slot = pass.At<const int32_t>(pass.layout().row_to_slot);
  if (spec.router_weight_on_input) {
    args->slot_weights = pass.At<const float>(pass.layout().slot_weights);
  }
  args->delta = pass.Rows<const uint16_t>(pass.call->inputs->gemm1_delta);
  args->slots_per_token = spec.slots_per_token();
  args->delta_slots = spec.top_k;
}

void RunGemm1(const GroupPass& group) {
  const Pass& pass = group.pass;
  const MoeSpec& spec = pass.spec();
  const Layout& layout = pass.layout();
  const RowFormat& x = group.formats.operands.x;
  const RowFormat& h = group.formats.operands.h;
  GroupedGemmArgs args = TilesOf(group, 0);
  args.first = group.weights.first.args;
  args.second = group.weights.second.args;
  args.k = spec.hidden_size;
  args.features = spec.intermediate_size;
  args.activation = spec.activation.kind;
  args.alpha = group.weights.alpha;
  args.beta = group.weights.beta;
  args.limit = group.weights.limit;
  args.x = group.x;
  args.x_pitch = group.x_pitch;
  args.row_to_source = pass.At<const int32_t>(layout.row_to_token);
  args.x_block_scales = BlockScales(pass, x, layout.x_block_scales);
  args.x_token_scales = RowScales(pass, x, layout.x_row_scales);
  if (HasStaticScale(spec)) {
    args.x_scale = pass.weights->gemm1_input_scale;
  }
  SetAdjustments(pass, &args);
  if (group.kernels.rounds_apart) {
    args.out = pass.At<void>(layout.activation);
    args.out_pitch = layout.activation_pitch;
  } else {
    args.out = pass.At<void>(layout.h);
    args.out_format = h;
    args.out_pitch = layout.h_bytes / SizeOf(h.dtype);
    args.out_block_scales = BlockScales(pass, h, layout.h_block_scales);
    args.out_scale = group.weights.gemm2_input_scale;
    args.out_scale_stride = group.weights.gemm2_input_scale_stride;
  }
  if (pass.call->outputs->gemm1_activation.defined()) {
    args.activation_out = pass.call->outputs->gemm1_activation.as<uint16_t>() +
                          pass.row_base() * spec.intermediate_size;
  }
  RunKernel(group.kernels.gemm1, group.weights.first, args, pass.queue());
}

// Rounds the group's rows of the activation, as its operand of GEMM2.
void RoundIntermediate(const GroupPass& group) {
  const device::Range range("round intermediate");
  const Pass& pass = group.pass;
  const Layout& layout = pass.layout();
  gemm1::RoundRowsArgs args;
  args.to = group.formats.operands.h;
  args.row_global = HasRowGlobal(pass.spec());
  args.in = pass.At<const void>(layout.activation);
  args.in_pitch = layout.activation_pitch;
  args.static_scale = group.weights.gemm2_input_scale;
  args.static_scale_stride = group.weights.gemm2_input_scale_stride;
  args.max_rows = pass.slots();
  args.segment_offsets = pass.At<const int32_t>(layout.expert_offsets);
  args.segment_begin = group.weights.segment_begin;
  args.segment_end = group.weights.segment_end;
  args.cols = pass.spec().intermediate_size;
  args.out = pass.At<void>(layout.h);
  args.out_pitch = layout.h_bytes / SizeOf(args.to.dtype);
  args.out_block_scales = BlockScales(pass, args.to, layout.h_block_scales);
  args.out_row_scales = RowScales(pass, args.to, layout.h_row_scales);
  RoundRowsSm90(args, pass.queue());
}

void RunGemm2(const GroupPass& group, uint16_t* y) {
  const Pass& pass = group.pass;
  const MoeSpec& spec = pass.spec();
  const Layout& layout = pass.layout();
  const RowFormat& h = group.formats.operands.h;
  GroupedGemmArgs args = TilesOf(group, 1);
  args.first = group.weights.down.args;
  args.k = spec.intermediate_size;
  args.features = spec.hidden_size;
  args.x = pass.At<const void>(layout.h);
  args.x_pitch = layout.h_bytes / SizeOf(h.dtype);
  args.x_block_scales = BlockScales(pass, h, layout.h_block_scales);
  args.x_token_scales = RowScales(pass, h, layout.h_row_scales);
  if (HasStaticScale(spec)) {
    args.x_scale = group.weights.gemm2_input_scale;
    args.x_scale_stride = group.weights.gemm2_input_scale_stride;
  }
  args.out = y;
  args.out_pitch = spec.hidden_size;
  RunKernel(group.kernels.gemm2, group.weights.down, args, pass.queue());
}

}  // namespace

void AddHiddenRoundings(const Pass& pass, fused::RoutePermuteArgs* args) {
  const Layout& layout = pass.layout();
  const RowFormat& x = pass.plan->routed.operands.x;
  const RowFormat& shared_x = pass.plan->shared.operands.x;
  if (!ReadsInPlace(pass, x)) {
    args->rounding[args->roundings++] =
        HiddenRounding(pass, x, pass.At<void>(layout.x), layout.x_bytes);
  }
  if (pass.spec().shared.count > 0 && shared_x != x && !ReadsInPlace(pass, shared_x)) {
    args->rounding[args->roundings++] =
        HiddenRounding(pass, shared_x, pass.At<void>(layout.shared_x), layout.shared_x_bytes);
  }
}

const uint16_t* RunGemms(const Pass& pass) {
  const MoeSpec& spec = pass.spec();
  const Layout& layout = pass.layout();
  const TensorView& rows = pass.call->outputs->rows;
  const bool has_shared = spec.shared.count > 0;
  uint16_t* const y = rows.defined() ? rows.as<uint16_t>() + pass.row_base() * spec.hidden_size
                                     : pass.At<uint16_t>(layout.y);
  GroupPass routed = {pass, pass.weights->routed, pass.plan->routed, pass.choice->routed};
  GroupPass shared = {pass, pass.weights->shared, pass.plan->shared, pass.choice->shared};
  LoadHidden(&routed, layout.x, layout.x_bytes);
  LoadHidden(&shared, layout.shared_x, layout.shared_x_bytes);
  RunGemm1(routed);
  if (has_shared) {
    RunGemm1(shared);
  }
  if (routed.kernels.rounds_apart) {
    RoundIntermediate(routed);
  }
  if (has_shared && shared.kernels.rounds_apart) {
    RoundIntermediate(shared);
  }
  RunGemm2(routed, y);
  if (has_shared) {
    RunGemm2(shared, y);
  }
  return y;
}

}  // namespace hopyard::sm90
