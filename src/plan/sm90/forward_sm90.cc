// SPDX-License-Identifier: Apache-2.0
// The layer on Hopper: the stages enqueued one after the other. Nothing is allocated, waited for or
// read back, so a call can be captured.
#include <algorithm>

#include "device/memory.h"
#include "device/range.h"
#include "fused/route_permute_sm90.h"
#include "plan/sm90/pass.h"
#include "stages/2_permute/chunk_sm90.h"
#include "stages/5_finalize/finalize_sm90.h"

namespace hopyard::sm90 {
namespace {

bool IsPrecomputed(RoutingInput routing) {
  return routing == RoutingInput::kPacked || routing == RoutingInput::kUnpacked;
}

// Live tokens of the chunk: the caller's own count where there is but one chunk.
const int32_t* ChunkTokens(const Pass& pass, bool only_chunk) {
  const TensorView& given = pass.call->inputs->num_tokens;
  if (!given.defined() || only_chunk) {
    return given.as<const int32_t>();
  }
  permute::ChunkSm90Args args;
  args.num_tokens = given.as<const int32_t>();
  args.token_begin = pass.token_begin;
  args.max_tokens = pass.tokens;
  args.chunk_tokens = pass.At<int32_t>(pass.layout().num_tokens);
  permute::ChunkTokensSm90(args, pass.queue());
  return args.chunk_tokens;
}

route::RouteSm90Args RouteArgsOf(const Pass& pass) {
  const MoeInputs& in = *pass.call->inputs;
  const MoeOutputs& out = *pass.call->outputs;
  const MoeSpec& spec = pass.spec();
  route::RouteSm90Args args;
  args.rule = spec.routing;
  args.num_experts = spec.num_experts;
  args.top_k = spec.top_k;
  args.max_tokens = pass.tokens;
  args.num_tokens = pass.num_tokens;
  args.logits = pass.Rows<const void>(in.logits);
  args.logits_dtype = in.logits.dtype;
  args.bias = in.routing_bias.data;
  args.bias_dtype = in.routing_bias.dtype;
  if (in.routing == RoutingInput::kReplay) {
    args.source = route::IdSource::kForced;
    args.forced_ids = pass.Rows<const void>(in.expert_ids);
    args.forced_dtype = in.expert_ids.dtype;
  } else if (in.routing == RoutingInput::kHash) {
    args.source = route::IdSource::kTable;
    args.token_ids = pass.Rows<const void>(in.token_ids);
    args.token_dtype = in.token_ids.dtype;
    args.table = in.token_to_experts.as<const int32_t>();
    args.table_rows = in.token_to_experts.shape[0];
  }
  args.ids = pass.At<int32_t>(pass.layout().ids);
  args.weights = pass.At<float>(pass.layout().weights);
  args.replay = pass.Rows<int16_t>(out.replay);
  args.load = out.expert_load.data;
  args.load_dtype = out.expert_load.dtype;
  return args;
}

permute::PlaceSm90Args PlaceArgsOf(const Pass& pass) {
  const MoeSpec& spec = pass.spec();
  const MoeInputs& in = *pass.call->inputs;
  const MoeOutputs& out = *pass.call->outputs;
  permute::PlaceSm90Args args;
  args.num_experts = spec.num_experts;
  args.top_k = spec.top_k;
  args.shared = spec.shared.count;
  args.local = spec.local;
  args.max_tokens = pass.tokens;
  args.num_tokens = pass.num_tokens;
  if (IsPrecomputed(in.routing)) {
    const bool packed = in.routing == RoutingInput::kPacked;
    args.source = packed ? permute::PlaceSource::kPacked : permute::PlaceSource::kUnpacked;
    args.packed_ids = pass.Rows<const int32_t>(in.packed_ids);
    args.expert_ids = pass.Rows<const int32_t>(in.expert_ids);
    args.expert_weights = pass.Rows<const void>(in.expert_weights);
    args.expert_weights_dtype = in.expert_weights.dtype;
    args.replay = pass.Rows<int16_t>(out.replay);
    args.load = out.expert_load.data;
    args.load_dtype = out.expert_load.dtype;
  }
  args.ids = pass.At<int32_t>(pass.layout().ids);
  args.weights = pass.At<float>(pass.layout().weights);
  args.expert_table = in.expert_table.as<const int32_t>();
  args.shared_weights = pass.Rows<const void>(in.shared_weights);
  args.shared_weights_dtype = in.shared_weights.dtype;
  args.shared_weight = spec.shared.weight;
  args.slot_weights = pass.At<float>(pass.layout().slot_weights);
  args.local_slots = pass.At<int32_t>(pass.layout().local_slots);
  args.routing_ids = pass.Rows<int32_t>(out.routing_ids);
  args.routing_weights = pass.Rows<float>(out.routing_weights);
  return args;
}

permute::PermuteSm90Args PermuteArgsOf(const Pass& pass) {
  const Layout& layout = pass.layout();
  permute::PermuteSm90Args args;
  args.segments = static_cast<int>(layout.segments);
  args.max_tokens = pass.tokens;
  args.slots_per_token = pass.spec().slots_per_token();
  args.num_tokens = pass.num_tokens;
  args.local_slots = pass.At<int32_t>(layout.local_slots);
  args.chunk_counts = pass.At<int32_t>(layout.permute_scratch);
  args.expert_offsets = pass.At<int32_t>(layout.expert_offsets);
  args.expert_counts = pass.At<int32_t>(layout.expert_counts);
  args.slot_to_row = pass.At<int32_t>(layout.slot_to_row);
  args.row_to_slot = pass.At<int32_t>(layout.row_to_slot);
  args.row_to_token = pass.At<int32_t>(layout.row_to_token);
  args.tiles[0] = TileListOf(pass, 0);
  args.num_rows = args.tiles[0].num_tiles + 1;
  const permute::TileListSm90 second = TileListOf(pass, 1);
  if (second.expert != args.tiles[0].expert) {
    args.tiles[1] = second;
  }
  return args;
}

}  // namespace

permute::TileListSm90 TileListOf(const Pass& pass, int gemm) {
  const Layout& layout = pass.layout();
  const PermuteOptions first = PermuteOptionsFor(pass.spec(), *pass.choice, 0);
  const PermuteOptions options = PermuteOptionsFor(pass.spec(), *pass.choice, gemm);
  const bool same = options.tile == first.tile && options.cluster == first.cluster;
  permute::TileListSm90 list;
  list.tile = static_cast<int>(options.tile);
  list.cluster = static_cast<int>(options.cluster);
  list.expert = pass.At<int32_t>(same ? layout.tiles : layout.gemm2_tiles);
  list.row_begin = list.expert + layout.max_tiles;
  list.row_end = list.row_begin + layout.max_tiles;
  list.num_tiles = list.row_end + layout.max_tiles;
  return list;
}

void PrepareRows(const Pass& pass) {
  const device::Range range("route, permute, round hidden states");
  fused::RoutePermuteArgs args;
  // Ids and weights that the caller computed are taken where slots are placed.
  args.routes = !IsPrecomputed(pass.call->inputs->routing);
  if (args.routes) {
    args.route = RouteArgsOf(pass);
  }
  args.place = PlaceArgsOf(pass);
  args.permute = PermuteArgsOf(pass);
  AddHiddenRoundings(pass, &args);
  fused::RoutePermuteSm90(args, fused::WayFor(args), pass.queue());
}

void Finish(const Pass& pass, const uint16_t* y) {
  const device::Range range("finalize");
  const MoeSpec& spec = pass.spec();
  const Layout& layout = pass.layout();
  const MoeOutputs& out = *pass.call->outputs;
  const auto* slot_to_row = pass.At<const int32_t>(layout.slot_to_row);
  if (out.slot_to_row.defined()) {
    permute::RowMapSm90Args args;
    args.slot_to_row = slot_to_row;
    args.row_base = pass.row_base();
    args.max_tokens = pass.tokens;
    args.slots_per_token = spec.slots_per_token();
    args.num_tokens = pass.num_tokens;
    args.out = pass.Rows<int32_t>(out.slot_to_row);
    permute::CopyRowMapSm90(args, pass.queue());
  }
  if (!out.output.defined()) {
    return;
  }
  finalize::FinalizeSm90Args args;
  args.y = y;
  args.slot_to_row = slot_to_row;
  args.weights = spec.router_weight_on_input ? nullptr : pass.At<float>(layout.slot_weights);
  args.output = pass.Rows<uint16_t>(out.output);
  args.num_tokens = pass.num_tokens;
  args.max_tokens = pass.tokens;
  args.hidden = spec.hidden_size;
  args.width = out.output.shape[1];
  args.slots = spec.slots_per_token();
  args.accumulate = out.accumulate;
  finalize::FinalizeSm90(args, pass.queue());
}

void RunLayer(const Call& call) {
  const device::Range range("layer");
  const device::CurrentDevice current(call.plan->device.index);
  const int64_t tokens = call.inputs->hidden_states.shape[0];
  const int64_t chunk = call.plan->tokens_per_chunk;
  Pass pass;
  pass.call = &call;
  pass.plan = call.plan->sm90.get();
  pass.weights = call.weights->sm90.get();
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    pass.token_begin = begin;
    pass.tokens = std::min(chunk, tokens - begin);
    pass.num_tokens = ChunkTokens(pass, tokens <= chunk);
    pass.choice = &ChoiceFor(pass.plan->tiles, pass.tokens);
    PrepareRows(pass);
    const uint16_t* const y = RunGemms(pass);
    Finish(pass, y);
  }
}

}  // namespace hopyard::sm90
