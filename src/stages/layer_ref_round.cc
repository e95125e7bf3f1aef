// SPDX-License-Identifier: Apache-2.0
// Roundings of the plain implementation, written out from spec 4.3 and 4.7 in scalar code.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "formats/codes.h"
#include "stages/layer_ref_parts.h"

namespace hopyard::ref {
namespace {

float MaxMagnitude(const float* values, int64_t count) {
  float largest = 0.0F;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, std::fabs(values[i]));
  }
  return largest;
}

void RoundE4m3(float scale, float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    values[i] =
        scale > 0.0F ? formats::DecodeE4m3(formats::EncodeE4m3(values[i] / scale)) * scale : 0.0F;
  }
}

// e4m3 with one f32 scale amax / 448 per `block` values.
void RoundE4m3Blocks(int64_t block, std::vector<float>* row) {
  const auto cols = static_cast<int64_t>(row->size());
  for (int64_t begin = 0; begin < cols; begin += block) {
    float* values = row->data() + begin;
    const int64_t count = std::min(block, cols - begin);
    RoundE4m3(MaxMagnitude(values, count) / formats::kE4m3Max, values, count);
  }
}

void RoundMxFp8(std::vector<float>* row) {
  constexpr int64_t kBlock = 32;
  const auto cols = static_cast<int64_t>(row->size());
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    float* values = row->data() + begin;
    const int64_t count = std::min(kBlock, cols - begin);
    const float wanted = MaxMagnitude(values, count) / formats::kE4m3Max;
    RoundE4m3(formats::DecodeE8m0(formats::EncodeE8m0RoundUp(wanted)), values, count);
  }
}

void RoundNvFp4(float multiplier, std::vector<float>* row) {
  constexpr int64_t kBlock = 16;
  const auto cols = static_cast<int64_t>(row->size());
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    float* values = row->data() + begin;
    const int64_t count = std::min(kBlock, cols - begin);
    const float wanted =
        multiplier > 0.0F ? MaxMagnitude(values, count) / formats::kE2m1Max / multiplier : 0.0F;
    const float scale = formats::DecodeE4m3(formats::EncodeE4m3(wanted)) * multiplier;
    for (int64_t i = 0; i < count; ++i) {
      values[i] =
          scale > 0.0F ? formats::DecodeE2m1(formats::EncodeE2m1(values[i] / scale)) * scale : 0.0F;
    }
  }
}

void RoundNvFp4PerToken(std::vector<float>* row) {
  const float largest = MaxMagnitude(row->data(), static_cast<int64_t>(row->size()));
  RoundNvFp4(largest / (formats::kE4m3Max * formats::kE2m1Max), row);
}

void RoundBf16(std::vector<float>* row) {
  for (float& value : *row) {
    value = formats::RoundToBf16(value);
  }
}

}  // namespace

void RoundHidden(ActivationFormat format, float scale, std::vector<float>* row) {
  if (format == ActivationFormat::kFp8PerToken) {
    RoundE4m3Blocks(std::max<int64_t>(1, static_cast<int64_t>(row->size())), row);
    return;
  }
  RoundIntermediate(format, scale, row);
}

void RoundIntermediate(ActivationFormat format, float scale, std::vector<float>* row) {
  switch (format) {
    case ActivationFormat::kBf16:
      return RoundBf16(row);
    case ActivationFormat::kFp8Block128:
    case ActivationFormat::kFp8PerToken:
      return RoundE4m3Blocks(128, row);
    case ActivationFormat::kFp8PerTensor:
      return RoundE4m3(scale, row->data(), static_cast<int64_t>(row->size()));
    case ActivationFormat::kMxFp8:
      return RoundMxFp8(row);
    case ActivationFormat::kNvFp4:
      return RoundNvFp4(scale, row);
    case ActivationFormat::kNvFp4PerToken:
      return RoundNvFp4PerToken(row);
  }
}

}  // namespace hopyard::ref
