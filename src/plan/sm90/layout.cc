// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/shape.h"
#include "formats/format_rules.h"
#include "plan/sm90/layer_plan.h"
#include "stages/2_permute/permute_sm90.h"

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KOrder;
using gemm::sm90::RowFormat;

// Bytes from row to row: whole pieces of 16 bytes, and whole groups of K where its order is not the
// natural one.
int64_t RowBytes(const RowFormat& rows, int64_t cols) {
  const int64_t unit = rows.order == KOrder::kNatural ? 16 : gemm::sm90::kKGroup;
  return RoundUp(cols, unit) * SizeOf(rows.dtype);
}

// Without tiles.
PermuteOptions SegmentsOf(const MoeSpec& spec) {
  PermuteOptions options;
  options.num_local_experts = spec.num_local_experts() + spec.shared.count;
  return options;
}

// The most tiles that a pass over up to `slots` slots lists, whichever kernels it takes.
int64_t MostTiles(const MoeSpec& spec, int64_t slots) {
  int64_t most = 0;
  PermuteOptions options = SegmentsOf(spec);
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    const gemm::sm90::KernelInfo info = gemm::sm90::KernelAt(i);
    options.tile = info.tokens;
    options.cluster = info.cluster;
    most = std::max(most, MaxTiles(slots, options));
  }
  return most;
}

Layout LayoutOf(const MoeSpec& spec, bool rounded, int64_t tokens) {
  const GroupFormats routed = FormatsOf(spec, spec.weights, rounded);
  const GroupFormats shared =
      spec.shared.count > 0 ? FormatsOf(spec, spec.shared.weights, rounded) : routed;
  Layout layout;
  layout.x_bytes = RowBytes(routed.operands.x, spec.hidden_size);
  layout.shared_x_bytes = RowBytes(shared.operands.x, spec.hidden_size);
  layout.activation_pitch = RoundUp(spec.intermediate_size, 16);
  // One pitch for the rows of both groups, which lie among each other; it is a whole number of
  // groups of K of the wider type.
  layout.h_bytes = std::max(RowBytes(routed.operands.h, spec.intermediate_size),
                            RowBytes(shared.operands.h, spec.intermediate_size));
  if (routed.operands.h != shared.operands.h) {
    layout.h_bytes = RoundUp(layout.h_bytes, int64_t{2} * gemm::sm90::kKGroup);
  }
  const bool x_blocks = routed.operands.x.format == Format::kFp8Block1x128;
  const bool h_blocks = routed.operands.h.format == Format::kFp8Block1x128;
  const bool per_token = spec.activations == ActivationFormat::kNvFp4PerToken;
  const bool x_rows = per_token || routed.operands.x.format == Format::kFp8PerRow;
  layout.TakeRouting(spec, tokens, MostTiles(spec, tokens * spec.slots_per_token()));
  layout.num_tokens = layout.Take(4);
  layout.permute_scratch =
      layout.Take(4 * permute::PermuteScratchInts(layout.slots, static_cast<int>(layout.segments)));
  layout.gemm2_tiles = layout.Take((3 * layout.max_tiles + 1) * 4);
  layout.x = layout.Take(tokens * layout.x_bytes);
  layout.shared_x = routed.operands.x == shared.operands.x
                        ? layout.x
                        : layout.Take(tokens * layout.shared_x_bytes);
  layout.x_block_scales = layout.Take(x_blocks ? tokens * CeilDiv(spec.hidden_size, 128) * 4 : 0);
  layout.x_row_scales = layout.Take(x_rows ? tokens * 4 : 0);
  layout.h = layout.Take(layout.slots * layout.h_bytes);
  layout.h_block_scales =
      layout.Take(h_blocks ? layout.slots * CeilDiv(spec.intermediate_size, 128) * 4 : 0);
  layout.h_row_scales = layout.Take(per_token ? layout.slots * 4 : 0);
  const bool rounds =
      routed.operands.h.format != Format::kBf16 || shared.operands.h.format != Format::kBf16;
  layout.y = layout.Take(layout.slots *
                         std::max(spec.hidden_size, rounds ? layout.activation_pitch : 0) * 2);
  layout.activation = layout.y;
  return layout;
}
}  // namespace

GroupFormats FormatsOf(const MoeSpec& spec, WeightFormat weights, bool rounded) {
  GroupFormats formats;
  formats.weights = weights;
  formats.operands = gemm::sm90::OperandsOf(weights, spec.activations);
  if (rounded) {
    formats.operands =
        gemm::sm90::RoundedOperandsOf(weights, spec.activations).value_or(formats.operands);
  }
  return formats;
}

PermuteOptions PermuteOptionsFor(const MoeSpec& spec, const TileChoice& choice, int gemm) {
  PermuteOptions options = SegmentsOf(spec);
  for (const GroupKernels& kernels : {choice.routed, choice.shared}) {
    const gemm::sm90::KernelInfo info =
        gemm::sm90::KernelAt(gemm == 0 ? kernels.gemm1 : kernels.gemm2);
    options.tile = info.tokens;
    options.cluster = std::max<int64_t>(options.cluster, info.cluster);
  }
  return options;
}

Layout MakeLayout(const MoeSpec& spec, bool rounded, int64_t tokens) {
  Layout layout = LayoutOf(spec, rounded, tokens);
  layout.bytes = std::max(layout.bytes, LayoutOf(spec, !rounded, tokens).bytes);
  return layout;
}

}  // namespace hopyard::sm90
