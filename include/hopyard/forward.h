// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "hopyard/plan.h"
#include "hopyard/tensor.h"
#include "hopyard/weights.h"

namespace hopyard {

// How the experts of a token are given. The last two are reserved and refused by name.
enum class RoutingInput : uint8_t {
  kLogits,    // logits [T, E]
  kPacked,    // packed_ids [T, K] i32: (id << 16) | bf16 bits of the weight
  kUnpacked,  // expert_ids [T, K] i32 and expert_weights [T, K] f32 or bf16
  kReplay,    // expert_ids [T, K] i16/i32 and logits: ids forced, weights recomputed
  kHash,      // token_ids [T] and token_to_experts [vocabulary, K] and logits
  kPermuted,  // rows already in expert order + offsets: reserved
  kBatched,   // [experts, max_rows, H] + counts: reserved
};

// T = hidden_states.shape[0] <= plan.max_tokens. Rows are contiguous. Fields not named by
// `routing` stay absent.
struct MoeInputs {
  uint32_t struct_size = sizeof(MoeInputs);
  RoutingInput routing = RoutingInput::kLogits;
  TensorView hidden_states;  // [T, H] bf16; or codes of the plan's activation format
  TensorView hidden_scales;  // block scales of quantised hidden states, linear [T, blocks]; or
                             // f32 [T] (kFp8PerToken). kFp8Block128: f32 [T, ceil(H / 128)]
  TensorView token_scales;   // kNvFp4PerToken: f32 [T] multiplier of each token
  TensorView logits;         // [T, E] f32 or bf16
  TensorView routing_bias;   // [E] f32 or bf16; absent = zeros
  TensorView packed_ids;
  TensorView expert_ids;
  TensorView expert_weights;
  TensorView token_ids;
  TensorView token_to_experts;
  TensorView shared_weights;  // [T, S] f32 or bf16
  TensorView expert_table;    // [num_experts] i32, ExpertMap::kTable only
  TensorView num_tokens;      // i32 scalar in 0 .. T, read at run time; absent = T
  TensorView gemm1_delta;     // [T, K, f * I] bf16, rows up|gate: added to GEMM1 (LoRA), unscaled
};

// Only `output` or `rows` is required. Everything at and beyond num_tokens stays untouched.
struct MoeOutputs {
  uint32_t struct_size = sizeof(MoeOutputs);
  TensorView output;            // [T, W] bf16, W <= H: columns beyond W are dropped
  bool accumulate = false;      // output += result instead of output = result
  TensorView replay;            // [>= T, K] i16: selected global ids
  TensorView expert_load;       // [num_experts] i32 or i64, += tokens per expert
  TensorView routing_weights;   // [T, K + S] f32
  TensorView routing_ids;       // [T, K + S] i32 global ids, shared expert j = num_experts + j
  TensorView rows;              // unfinalised GEMM2 rows [T * (K + S), H] bf16
  TensorView slot_to_row;       // [T, K + S] i32, -1 = not local
  TensorView gemm1_activation;  // [T * (K + S), I] bf16: activation before its quantisation
};

struct Workspace {
  void* data = nullptr;  // 256-byte aligned memory of the plan's device
  size_t bytes = 0;
};

// The layer: route, permute, GEMM1 + activation, GEMM2, finalize. Deterministic: on a CPU equal
// inputs give equal bits for any number of threads and any batch around a token; on a GPU for equal
// batches. Throws Error{kInvalidArgument} before anything is written.
// All tensors lie on the plan's device. On a GPU the work is enqueued on `stream` and no value of a
// tensor is looked at by the host: num_tokens is clamped to 0 .. T where it is used, and ids and
// tables are taken as the table of "values that others leave undefined" in docs/errors.md says. No
// allocation, no synchronisation; the call may be captured in a CUDA graph.
void Forward(const Plan& plan, const Weights& weights, const MoeInputs& inputs,
             const MoeOutputs& outputs, Workspace workspace, Stream stream = {});

}  // namespace hopyard
