// SPDX-License-Identifier: Apache-2.0
// What config.json of each supported model family says about its MoE layers. The only place, with
// layer_reader.cc's tensor names, that knows about models.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "hopyard/spec.h"
#include "hopyard/weights.h"

namespace hopyard::checkpoint {

// Names of the parts of a layer's MoE module and how the fused experts lie.
struct MoeNames {
  std::vector<std::string> modules;  // names of the module, in order of preference: "mlp"
  std::string router;                // "gate": <module>.gate.weight
  std::string shared;                // "shared_experts"; used when spec.shared.count > 0
};

struct Family {
  std::string model_type;
  int num_layers = 0;
  std::vector<int> moe_layers;  // ascending
  MoeSpec spec;                 // without weights, activations and shared.weights
  MoeNames names;
  bool selection_bias = false;        // <router>.e_score_correction_bias is required
  bool router_bias = false;           // <router>.bias is required
  bool expert_bias = false;           // experts.gate_up_proj_bias and down_proj_bias are required
  bool experts_are_mn_major = false;  // fused BF16 experts are [E, H, 2I] and [E, I, H]
  RowOrder row_order = RowOrder::kGateUp;
  bool fp8_block = false;  // quantization_config says e4m3 in 128 x 128 blocks
  bool mxfp4 = false;      // ... or MXFP4
};

// Throws Error: kInvalidArgument for missing, mistyped, absurd or inconsistent fields, kUnsupported
// for values that are valid but that no layer of ours computes. `file` names the file.
[[nodiscard]] Family ReadFamily(const nlohmann::json& config, const std::string& file);

}  // namespace hopyard::checkpoint
