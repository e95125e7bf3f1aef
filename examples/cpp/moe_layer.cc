// SPDX-License-Identifier: Apache-2.0
// An MoE layer with MXFP4 weights in plain C++: quantise the experts, plan, run one batch, look at
// the chosen experts, and check one output element by hand.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <vector>

#include "hopyard/hopyard.h"

namespace {

using hopyard::DType;
using hopyard::TensorView;

constexpr int64_t kTokens = 16;
constexpr int64_t kHidden = 512;
constexpr int64_t kWidth = 256;  // intermediate size
constexpr int kExperts = 8;
constexpr int kTopK = 2;

std::vector<float> Normal(int64_t count, float deviation, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    value = normal(engine);
  }
  return values;
}

// One matrix [rows, cols] per expert in MXFP4: codes [experts, rows, cols / 2] and one e8m0 scale
// per 32 columns.
struct Experts {
  int64_t rows;
  int64_t cols;
  std::vector<uint8_t> codes;
  std::vector<uint8_t> scales;

  Experts(const std::vector<float>& values, int64_t rows, int64_t cols) : rows(rows), cols(cols) {
    codes.resize(static_cast<size_t>(kExperts * rows * cols / 2));
    scales.resize(static_cast<size_t>(kExperts * rows * cols / 32));
    // Scale blocks lie along a row, so all experts can be quantised as one tall matrix.
    hopyard::Quantize(
        TensorView::Contiguous(values.data(), DType::kFloat32, {kExperts * rows, cols}),
        View(kExperts * rows));
  }

  hopyard::QuantizedView View(int64_t all_rows) {
    hopyard::QuantizedView view;
    view.format = hopyard::Format::kMxFp4;
    view.codes = TensorView::Contiguous(codes.data(), DType::kUint8, {all_rows, cols / 2});
    view.scales = TensorView::Contiguous(scales.data(), DType::kE8m0, {all_rows, cols / 32});
    return view;
  }

  hopyard::MatrixSet Matrices() {
    hopyard::MatrixSet set;
    set.values = TensorView::Contiguous(codes.data(), DType::kUint8, {kExperts, rows, cols / 2});
    set.scales = TensorView::Contiguous(scales.data(), DType::kE8m0, {kExperts, rows, cols / 32});
    return set;
  }

  // What the codes stand for: [experts, rows, cols].
  std::vector<float> Values() {
    std::vector<float> values(static_cast<size_t>(kExperts * rows * cols));
    hopyard::Dequantize(
        View(kExperts * rows),
        TensorView::Contiguous(values.data(), DType::kFloat32, {kExperts * rows, cols}));
    return values;
  }
};

float Bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value = 0.0F;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Column 0 of one token's output, in double.
double FirstColumn(const float* x, Experts& gemm1, Experts& gemm2, const int16_t* ids,
                   const float* weights) {
  const std::vector<float> w1 = gemm1.Values();
  const std::vector<float> w2 = gemm2.Values();
  double result = 0.0;
  for (int choice = 0; choice < kTopK; ++choice) {
    const float* gate = w1.data() + ids[choice] * 2 * kWidth * kHidden;
    const float* up = gate + kWidth * kHidden;
    const float* down = w2.data() + ids[choice] * kHidden * kWidth;
    double row = 0.0;
    for (int64_t i = 0; i < kWidth; ++i) {
      double g = 0.0;
      double u = 0.0;
      for (int64_t h = 0; h < kHidden; ++h) {
        g += double{gate[i * kHidden + h]} * x[h];
        u += double{up[i * kHidden + h]} * x[h];
      }
      row += down[i] * (g / (1.0 + std::exp(-g)) * u);
    }
    result += weights[choice] * row;
  }
  return result;
}

int Run() {
  Experts gemm1(Normal(kExperts * 2 * kWidth * kHidden, 0.04F, 1), 2 * kWidth, kHidden);
  Experts gemm2(Normal(kExperts * kHidden * kWidth, 0.06F, 2), kHidden, kWidth);

  hopyard::MoeSpec spec;
  spec.hidden_size = kHidden;
  spec.intermediate_size = kWidth;
  spec.num_experts = kExperts;
  spec.top_k = kTopK;
  spec.routing = hopyard::RoutingRule::Renormalize();
  spec.weights = hopyard::WeightFormat::kMxFp4;

  hopyard::WeightsDesc desc;
  desc.routed.gemm1 = gemm1.Matrices();
  desc.routed.gemm2 = gemm2.Matrices();
  desc.routed.row_order = hopyard::RowOrder::kGateUp;
  const hopyard::Weights weights(spec, desc);

  hopyard::PlanOptions options;
  options.max_tokens = kTokens;
  const hopyard::Plan plan = hopyard::MakePlan(spec, hopyard::Device{}, options);
  std::cout << plan.Explain().ToString() << '\n';

  std::vector<float> hidden = Normal(kTokens * kHidden, 1.0F, 3);
  std::vector<uint16_t> hidden_bf16(hidden.size());
  hopyard::QuantizedView as_bf16;
  as_bf16.codes = TensorView::Contiguous(hidden_bf16.data(), DType::kBf16, {kTokens, kHidden});
  hopyard::Quantize(TensorView::Contiguous(hidden.data(), DType::kFloat32, {kTokens, kHidden}),
                    as_bf16);
  const std::vector<float> logits = Normal(kTokens * kExperts, 1.0F, 4);

  std::vector<uint16_t> output(hidden.size());
  std::vector<int16_t> replay(kTokens * kTopK);
  std::vector<float> routing_weights(kTokens * kTopK);
  hopyard::MoeInputs inputs;
  inputs.hidden_states = as_bf16.codes;
  inputs.logits = TensorView::Contiguous(logits.data(), DType::kFloat32, {kTokens, kExperts});
  hopyard::MoeOutputs outputs;
  outputs.output = TensorView::Contiguous(output.data(), DType::kBf16, {kTokens, kHidden});
  outputs.replay = TensorView::Contiguous(replay.data(), DType::kInt16, {kTokens, kTopK});
  outputs.routing_weights =
      TensorView::Contiguous(routing_weights.data(), DType::kFloat32, {kTokens, kTopK});

  const auto bytes = static_cast<size_t>(plan.workspace_bytes());  // a multiple of 256
  void* memory = std::aligned_alloc(256, bytes);
  hopyard::Forward(plan, weights, inputs, outputs, {memory, bytes});
  std::free(memory);

  for (float& value : hidden) {
    value = Bf16(hidden_bf16[static_cast<size_t>(&value - hidden.data())]);
  }
  const float got = Bf16(output[0]);
  const double want =
      FirstColumn(hidden.data(), gemm1, gemm2, replay.data(), routing_weights.data());
  std::cout << "token 0 goes to experts " << replay[0] << " and " << replay[1]
            << "; output[0][0] = " << got << ", by hand " << want << '\n';
  // Two roundings to BF16 (intermediate, GEMM2 rows) and one of the sum, relative to values near 1.
  return std::abs(got - want) < 0.02 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return Run();
  } catch (const hopyard::Error& error) {
    std::cerr << hopyard::ToString(error.kind()) << ": " << error.what() << '\n';
    return 2;
  }
}
