// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "core/parallel.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "formats/rows.h"
#include "gemm/cpu/token_chunk.h"
#include "stages/3_gemm1/gemm1.h"

namespace hopyard {

int64_t GemmScratchFloats(const MoeSpec& spec) {
  const int64_t cols = std::max(spec.hidden_size, spec.intermediate_size);
  return gemm::cpu::RowScratchFloats(cols) + gemm::cpu::TokenChunk::kFloats;
}

namespace gemm1 {
namespace {

using gemm::cpu::BiasAt;
using gemm::cpu::kFeatureBlock;
using gemm::cpu::TokenChunk;

struct Biases {
  float gate[kFeatureBlock] = {};
  float up[kFeatureBlock] = {};
};

Biases LoadBiases(const Args& args, const FeatureTask& task) {
  Biases biases;
  const auto& expert = args.groups.experts[task.segment];
  for (int f = 0; f < task.num_features; ++f) {
    biases.gate[f] = BiasAt(expert.gate, task.feature_begin + f);
    biases.up[f] = BiasAt(expert.up, task.feature_begin + f);
  }
  return biases;
}

// Router weight, then bias, then delta: in place on the token's 16 values.
void Adjust(const Args& args, const FeatureTask& task, int64_t row, const Biases& biases,
            float* gate, float* up) {
  const int64_t slot = args.groups.row_to_slot[row];
  if (args.slot_weights != nullptr) {
    const float weight = args.slot_weights[slot];
    for (int f = 0; f < kFeatureBlock; ++f) {
      gate[f] *= weight;
      up[f] *= weight;
    }
  }
  for (int f = 0; f < kFeatureBlock; ++f) {
    gate[f] += biases.gate[f];
    up[f] += biases.up[f];
  }
  const int slots = args.groups.slots_per_token;
  const int64_t choice = slot % slots;
  if (args.delta == nullptr || choice >= args.spec->top_k) {
    return;
  }
  const int64_t inter = args.spec->intermediate_size;
  const uint16_t* delta =
      args.delta + (slot / slots * args.spec->top_k + choice) * 2 * inter + task.feature_begin;
  for (int f = 0; f < task.num_features; ++f) {
    up[f] += formats::DecodeBf16(delta[f]);
    gate[f] += formats::DecodeBf16(delta[inter + f]);
  }
}

void RunTask(const Args& args, const FeatureTask& task, float* scratch) {
  const auto& expert = args.groups.experts[task.segment];
  const Activation& act = args.spec->activation;
  const bool gated = IsGated(act.kind);
  const bool shared = task.segment >= args.spec->num_local_experts();
  const auto parameter = [&](const float* own, const PerExpert& of_spec) {
    if (own != nullptr) {
      return *own;
    }
    return shared ? of_spec.all : of_spec.at(task.segment);
  };
  gemm::cpu::ActivateArgs activate;
  activate.kind = act.kind;
  activate.alpha = parameter(expert.alpha, act.alpha);
  activate.beta = parameter(expert.beta, act.beta);
  activate.limit = parameter(expert.limit, act.limit);
  const Biases biases = LoadBiases(args, task);
  gemm::cpu::BlockArgs block;
  block.kernels = args.groups.kernels;
  block.row_begin = task.feature_begin;
  block.num_rows = task.num_features;
  const int64_t hidden = args.spec->hidden_size;
  TokenChunk chunk(scratch);
  block.scratch = gemm::cpu::CarveRowScratch(scratch + TokenChunk::kFloats,
                                             std::max(hidden, args.spec->intermediate_size));
  block.x = chunk.x;
  const int64_t end = args.groups.expert_offsets[task.segment + 1];
  int64_t row = args.groups.expert_offsets[task.segment];
  const int64_t max_tokens = TokenChunk::Size(hidden);
  for (; row < end; row += block.num_tokens) {
    block.num_tokens = static_cast<int>(std::min(max_tokens, end - row));
    for (int t = 0; t < block.num_tokens; ++t) {
      const int64_t token = args.groups.row_to_slot[row + t] / args.groups.slots_per_token;
      chunk.x[t] = args.x + token * args.x_pitch;
    }
    block.matrix = &expert.gate;
    block.out = chunk.first;
    DotBlock(block);
    if (gated) {
      block.matrix = &expert.up;
      block.out = chunk.second;
      DotBlock(block);
    }
    for (int t = 0; t < block.num_tokens; ++t) {
      float* gate = chunk.first + int64_t{t} * kFeatureBlock;
      float* up = chunk.second + int64_t{t} * kFeatureBlock;
      Adjust(args, task, row + t, biases, gate, up);
      activate.gate = gate;
      activate.up = up;
      activate.out = gate;
      args.groups.kernels->activate(activate);
      std::copy(gate, gate + task.num_features,
                args.h + (row + t) * args.h_pitch + task.feature_begin);
    }
  }
}

// The row's intermediate format, in place; needs the whole row, hence after the GEMM.
void FinishRow(const Args& args, int64_t row, int64_t segment) {
  const int64_t inter = args.spec->intermediate_size;
  float* h = args.h + row * args.h_pitch;
  if (args.activation != nullptr) {
    formats::FloatToBf16(h, args.activation + row * inter, inter);
  }
  const float* scale = args.groups.experts[segment].gemm2_input_scale;
  const bool dynamic = args.spec->activations == ActivationFormat::kNvFp4PerToken;
  formats::RoundRow(formats::IntermediateFormat(args.spec->activations), h, h, inter,
                    dynamic || scale == nullptr ? 0.0F : *scale);
  std::fill(h + inter, h + args.h_pitch, 0.0F);
}

}  // namespace

void Gemm1Cpu(const Args& args) {
  const RowGroups& groups = args.groups;
  ForFeatureBlocks(groups, args.spec->intermediate_size,
                   [&](const FeatureTask& task, float* scratch) { RunTask(args, task, scratch); });
  ParallelFor(0, groups.num_active, 1, groups.num_threads, [&](int64_t i, int) {
    const int64_t segment = groups.active[i];
    for (int64_t row = groups.expert_offsets[segment]; row < groups.expert_offsets[segment + 1];
         ++row) {
      FinishRow(args, row, segment);
    }
  });
}

}  // namespace gemm1
}  // namespace hopyard
