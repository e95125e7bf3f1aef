// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "formats/codes.h"
#include "gemm/cpu/token_chunk.h"
#include "stages/4_gemm2/gemm2.h"

namespace hopyard::gemm2 {
namespace {

using gemm::cpu::BiasAt;
using gemm::cpu::kFeatureBlock;
using gemm::cpu::TokenChunk;

void RunTask(const Args& args, const FeatureTask& task, float* scratch) {
  const MoeSpec& spec = *args.spec;
  const gemm::MatrixRef& matrix = args.groups.experts[task.segment].down;
  float bias[kFeatureBlock] = {};
  for (int f = 0; f < task.num_features; ++f) {
    bias[f] = BiasAt(matrix, task.feature_begin + f);
  }
  TokenChunk chunk(scratch);
  gemm::cpu::BlockArgs block;
  block.kernels = args.groups.kernels;
  block.matrix = &matrix;
  block.row_begin = task.feature_begin;
  block.num_rows = task.num_features;
  block.x = chunk.x;
  block.out = chunk.first;
  block.scratch = gemm::cpu::CarveRowScratch(scratch + TokenChunk::kFloats,
                                             std::max(spec.hidden_size, spec.intermediate_size));
  const int64_t end = args.groups.expert_offsets[task.segment + 1];
  int64_t row = args.groups.expert_offsets[task.segment];
  const int64_t max_tokens = TokenChunk::Size(spec.intermediate_size);
  for (; row < end; row += block.num_tokens) {
    block.num_tokens = static_cast<int>(std::min(max_tokens, end - row));
    for (int t = 0; t < block.num_tokens; ++t) {
      chunk.x[t] = args.h + (row + t) * args.h_pitch;
    }
    DotBlock(block);
    for (int t = 0; t < block.num_tokens; ++t) {
      const float* values = chunk.first + int64_t{t} * kFeatureBlock;
      uint16_t* y = args.y + (row + t) * spec.hidden_size + task.feature_begin;
      for (int f = 0; f < task.num_features; ++f) {
        y[f] = formats::EncodeBf16(values[f] + bias[f]);
      }
    }
  }
}

}  // namespace

void Gemm2Cpu(const Args& args) {
  ForFeatureBlocks(args.groups, args.spec->hidden_size,
                   [&](const FeatureTask& task, float* scratch) { RunTask(args, task, scratch); });
}

}  // namespace hopyard::gemm2
