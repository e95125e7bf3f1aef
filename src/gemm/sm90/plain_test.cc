// SPDX-License-Identifier: Apache-2.0
// Which calls the plain kernels take: each thing that they leave out sends a call to the general
// one.
#include "gemm/sm90/plain.h"

#include <cstdint>
#include <functional>
#include <string>

#include <gtest/gtest.h>

#include "gemm/sm90/rows.h"

namespace hopyard::gemm::sm90 {
namespace {

constexpr GemmConfig kFp8Gated = {
    .family = Family::kFp8, .tokens = 16, .consumers = 1, .gated = true, .promoted = true};
constexpr GemmConfig kFp8AsBf16Gated = {
    .family = Family::kFp8AsBf16, .tokens = 16, .consumers = 1, .gated = true, .promoted = true};
constexpr GemmConfig kMxFp4Gated = {
    .family = Family::kMxFp4AsBf16, .tokens = 16, .consumers = 1, .gated = true};

// A gated GEMM of an ordinary layer.
class Plain : public ::testing::Test {
 protected:
  Plain() {
    args_.activation = ActivationKind::kSwiGlu;
    args_.weights = WeightFormat::kFp8Block128;
    args_.features = 704;
    args_.out = memory_;
    args_.out_pitch = 704;
    args_.second.position_begin = 768;
  }

  alignas(16) uint16_t memory_[8] = {};
  GroupedGemmArgs args_;
};

TEST_F(Plain, TakesOrdinaryLayers) {
  EXPECT_TRUE(IsPlain(kFp8Gated, args_));
  GemmConfig down = kFp8Gated;
  down.gated = false;
  EXPECT_FALSE(IsPlain(down, args_)) << "an activation without a gate";
  args_.activation = ActivationKind::kIdentity;
  EXPECT_TRUE(IsPlain(down, args_));
  EXPECT_FALSE(IsPlain(kFp8Gated, args_)) << "no activation behind a gate";
}

TEST_F(Plain, LeavesTheRestToTheGeneralKernel) {
  float one = 1.0F;
  const struct {
    const char* what;
    std::function<void(GroupedGemmArgs&)> change;
  } cases[] = {
      {"asked for", [&](auto& args) { args.general = true; }},
      {"another activation", [&](auto& args) { args.activation = ActivationKind::kGeGlu; }},
      {"LoRA delta", [&](auto& args) { args.delta = memory_; }},
      {"scales of tokens", [&](auto& args) { args.x_token_scales = &one; }},
      {"router weights on the input", [&](auto& args) { args.slot_weights = &one; }},
      {"scales of channels", [&](auto& args) { args.weights = WeightFormat::kFp8PerChannel; }},
      {"a copy of the activation", [&](auto& args) { args.activation_out = memory_; }},
      {"features that fill no piece", [&](auto& args) { args.features = 700; }},
      {"rows that fill no piece", [&](auto& args) { args.out_pitch = 708; }},
      {"output off a multiple of 16", [&](auto& args) { args.out = memory_ + 1; }},
      {"bias", [&](auto& args) { args.first.has_bias = true; }},
      {"bias of up", [&](auto& args) { args.second.has_bias = true; }},
      {"blocks of K of up apart", [&](auto& args) { args.second.k_blocks_last = 1; }},
      {"swizzled scales of up",
       [&](auto& args) { args.second.scale_layout = ScaleLayout::kSwizzled128x4; }},
      {"shuffled rows of gate", [&](auto& args) { args.first.row_map = RowMap::kShuffled64; }},
      {"rows of gate by twos", [&](auto& args) { args.first.row_unit = 2; }},
      {"shuffled rows", [&](auto& args) { args.second.row_map = RowMap::kShuffled128; }},
      {"swizzled scales",
       [&](auto& args) { args.first.scale_layout = ScaleLayout::kSwizzled128x4; }},
      {"blocks of K apart", [&](auto& args) { args.first.k_blocks_last = 1; }},
      {"rows by twos", [&](auto& args) { args.second.row_unit = 2; }},
      {"blocks of scales cut", [&](auto& args) { args.second.position_begin = 704; }},
      {"blocks of scales cut by a shard", [&](auto& args) { args.first.scale_row_origin = 64; }},
      {"gate and up in turn", [&](auto& args) { args.first.position_step = 2; }},
  };
  for (const auto& one_case : cases) {
    GroupedGemmArgs args = args_;
    one_case.change(args);
    EXPECT_FALSE(IsPlain(kFp8Gated, args)) << one_case.what;
  }
}

// Llama-4 but for its router weights, NVFP4: scales of whole tensors.
TEST_F(Plain, KnowsScalesOfTensors) {
  float one = 1.0F;
  int32_t slot = 0;
  args_.weights = WeightFormat::kFp8PerTensor;
  args_.first.has_global_scale = true;
  args_.second.has_global_scale = true;
  args_.x_scale = &one;
  args_.first.expert_maps = &args_.first.map;
  args_.row_to_slot = &slot;
  EXPECT_TRUE(IsPlain(kFp8Gated, args_)) << "row_to_slot alone asks for nothing";
  GemmConfig short_of_registers = kFp8Gated;
  short_of_registers.blocks = 4;
  EXPECT_FALSE(IsPlain(short_of_registers, args_));
}

// FP8 weights that are decoded may have biases, and cut no blocks of scales either.
TEST_F(Plain, CutsNoBlocksOfScales) {
  args_.first.has_bias = true;
  EXPECT_TRUE(IsPlain(kFp8AsBf16Gated, args_));
  args_.second.position_begin = 704;
  EXPECT_FALSE(IsPlain(kFp8AsBf16Gated, args_));
  args_.weights = WeightFormat::kFp8PerTensor;
  EXPECT_TRUE(IsPlain(kFp8AsBf16Gated, args_)) << "has no blocks of scales";
}

// gpt-oss: biases, and gate and up in turn; NVFP4: global scales.
TEST_F(Plain, KnowsTermsAndPairsWhereWeightsAreDecoded) {
  args_.weights = WeightFormat::kMxFp4;
  args_.first.has_bias = true;
  args_.first.position_step = 2;
  args_.second.position_step = 2;
  args_.second.position_begin = 1;
  args_.second.has_global_scale = true;
  EXPECT_TRUE(IsPlain(kMxFp4Gated, args_));
}

// A matrix that the kernel does not have is not looked at.
TEST_F(Plain, LooksAtNoSecondMatrixWhereThereIsNone) {
  GemmConfig down = kFp8Gated;
  down.gated = false;
  args_.activation = ActivationKind::kIdentity;
  args_.second.has_bias = true;
  EXPECT_TRUE(IsPlain(down, args_));
}

}  // namespace
}  // namespace hopyard::gemm::sm90
