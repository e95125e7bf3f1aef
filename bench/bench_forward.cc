// SPDX-License-Identifier: Apache-2.0
// Times whole layers (logits in, output out) of the named models on a Hopper GPU, one JSON line per
// case:
//
//   bench_forward COMMIT CASE ... [--tokens=1,8,64] [--routing=uniform,balanced,zipf,hot]
//                 [--tactic=GEMM1[+GEMM2]]
//
// CASE is MODEL or MODEL:WEIGHTS:ACTIVATIONS, e.g. qwen3-30b-a3b:mxfp4:fp8_block128. Routed experts
// only. A CUDA graph holds kCalls calls with as many routings over weights that do not fit into the
// L2 cache together, so that weights are read cold; the time of a call is the replay's over kCalls.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "hopyard/forward.h"

#include "bench/gpu.h"
#include "bench/shapes.h"
#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"

namespace hopyard::bench {
namespace {

constexpr int kCalls = 8;
constexpr Device kGpu{DeviceKind::kCuda, 0};
// Weights smaller than this are repeated, so that calls do not find each other's in the L2 cache.
constexpr int64_t kColdBytes = int64_t{3} * 50 << 20;

struct Options {
  std::vector<int64_t> tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384};
  std::vector<std::string> routings = {"uniform"};
  std::string tactic;  // empty: what the plan chooses
};

// Logits that lead to the named routing, and the experts that the tokens touch.
struct Logits {
  std::vector<float> values;
  int64_t touched = 0;

  Logits(const MoeSpec& spec, int64_t tokens, const std::string& routing, unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> uniform(1e-6F, 1.0F);
    const auto experts = static_cast<size_t>(spec.num_experts);
    const auto top_k = static_cast<size_t>(spec.top_k);
    std::vector<bool> used(experts);
    std::vector<std::pair<float, size_t>> row(experts);
    for (int64_t t = 0; t < tokens; ++t) {
      for (size_t e = 0; e < experts; ++e) {
        const float gumbel = -std::log(-std::log(uniform(random)));
        float logit = gumbel;
        if (routing == "zipf") {
          logit -= std::log(static_cast<float>((e * 7 + 3) % experts + 1));
        } else if (routing == "hot") {
          logit += e < top_k ? 4.0F : 0.0F;
        } else if (routing == "balanced") {
          // Choices t * top_k .. + top_k - 1 of a walk through all experts.
          const size_t place =
              (e + experts * top_k - static_cast<size_t>(t) * top_k % experts) % experts;
          logit = place < top_k ? 8.0F + 0.01F * gumbel : -8.0F;
        }
        row[e] = {logit, e};
        values.push_back(logit);
      }
      std::partial_sort(row.begin(), row.begin() + spec.top_k, row.end(), std::greater<>());
      for (size_t k = 0; k < top_k; ++k) {
        used[row[k].second] = true;
      }
    }
    touched = std::count(used.begin(), used.end(), true);
  }
};

// Bytes that decode to finite numbers, repeated from a block.
void FillBytes(uint8_t* device, int64_t bytes, const std::function<uint8_t(uint32_t)>& make) {
  constexpr int64_t kBlock = 1 << 23;
  std::mt19937 random(3);
  std::vector<uint8_t> values(static_cast<size_t>(std::min(bytes, kBlock)));
  for (uint8_t& value : values) {
    value = make(static_cast<uint32_t>(random()));
  }
  for (int64_t begin = 0; begin < bytes; begin += kBlock) {
    const int64_t part = std::min(kBlock, bytes - begin);
    HOPYARD_CUDA(cudaMemcpy(device + begin, values.data(), static_cast<size_t>(part),
                            cudaMemcpyHostToDevice));
  }
}

// Matrices of one GEMM for all experts, with scales of about 2^-6.
class RandomMatrices {
 public:
  RandomMatrices(WeightFormat format, int64_t experts, int64_t rows, int64_t cols) {
    const formats::WeightFormatRule rule = formats::RuleOf(format);
    const int64_t code_cols = cols / rule.codes_per_byte;
    bytes_ = experts * rows * code_cols * SizeOf(rule.code_dtype);
    codes_ = std::make_unique<DeviceBuffer<uint8_t>>(bytes_);
    set_.values =
        TensorView::Contiguous(codes_->get(), rule.code_dtype, {experts, rows, code_cols}, kGpu);
    if (format == WeightFormat::kBf16) {
      FillRandom(set_.values.as<uint16_t>(), experts * rows * cols);
      return;
    }
    const bool e4m3 = rule.code_dtype == DType::kE4m3;
    FillBytes(codes_->get(), bytes_, [e4m3](uint32_t draw) {
      return static_cast<uint8_t>(e4m3 ? (draw & 0x8FU) | 0x30U : draw);
    });
    MakeScales(rule, experts, rows, cols);
  }
  [[nodiscard]] const MatrixSet& set() const { return set_; }
  [[nodiscard]] int64_t bytes() const { return bytes_; }  // with scales

 private:
  void MakeScales(const formats::WeightFormatRule& rule, int64_t experts, int64_t rows,
                  int64_t cols) {
    if (rule.scale_block > 0 || rule.per_row_scale) {
      const int64_t scale_rows = CeilDiv(rows, rule.scale_block_rows);
      const int64_t scale_cols = rule.per_row_scale ? 1 : CeilDiv(cols, rule.scale_block);
      const int64_t count = experts * scale_rows * scale_cols;
      const int64_t size = SizeOf(rule.scale_dtype);
      scales_ = std::make_unique<DeviceBuffer<uint8_t>>(count * size);
      std::vector<uint8_t> host(static_cast<size_t>(count * size));
      const float value = 0x1p-6F;
      const uint16_t bf16 = formats::EncodeBf16(value);
      for (int64_t i = 0; i < count; ++i) {
        uint8_t* const at = host.data() + i * size;
        if (rule.scale_dtype == DType::kE8m0) {
          *at = static_cast<uint8_t>(118 + i % 5);
        } else if (rule.scale_dtype == DType::kE4m3) {
          *at = formats::EncodeE4m3(value);
        } else {
          std::memcpy(at, size == 2 ? static_cast<const void*>(&bf16) : &value,
                      static_cast<size_t>(size));
        }
      }
      HOPYARD_CUDA(cudaMemcpy(scales_->get(), host.data(), host.size(), cudaMemcpyHostToDevice));
      set_.scales = rule.per_row_scale
                        ? TensorView::Contiguous(scales_->get(), rule.scale_dtype,
                                                 {experts, scale_rows}, kGpu)
                        : TensorView::Contiguous(scales_->get(), rule.scale_dtype,
                                                 {experts, scale_rows, scale_cols}, kGpu);
      bytes_ += count * size;
    }
    if (rule.global_scale) {
      global_ = std::make_unique<DeviceBuffer<float>>(
          std::vector<float>(static_cast<size_t>(experts), 0x1p-6F));
      set_.global_scales = TensorView::Contiguous(global_->get(), DType::kFloat32, {experts}, kGpu);
    }
  }

  MatrixSet set_;
  int64_t bytes_ = 0;
  std::unique_ptr<DeviceBuffer<uint8_t>> codes_;
  std::unique_ptr<DeviceBuffer<uint8_t>> scales_;
  std::unique_ptr<DeviceBuffer<float>> global_;
};

struct LayerWeights {
  RandomMatrices gemm1;
  RandomMatrices gemm2;
  DeviceBuffer<float> input_scales;
  Weights weights;

  explicit LayerWeights(const MoeSpec& spec)
      : gemm1(spec.weights, spec.num_experts, spec.gemm1_rows(), spec.hidden_size),
        gemm2(spec.weights, spec.num_experts, spec.hidden_size, spec.intermediate_size),
        input_scales(std::vector<float>{0x1p-5F, 0x1p-5F}) {
    WeightsDesc desc;
    desc.routed.gemm1 = gemm1.set();
    desc.routed.gemm2 = gemm2.set();
    if (spec.activations == ActivationFormat::kFp8PerTensor ||
        spec.activations == ActivationFormat::kNvFp4) {
      desc.routed.gemm1_input_scale =
          TensorView::Contiguous(input_scales.get(), DType::kFloat32, {1}, kGpu);
      desc.routed.gemm2_input_scale =
          TensorView::Contiguous(input_scales.get() + 1, DType::kFloat32, {1}, kGpu);
    }
    weights = Weights(spec, desc);
  }
  [[nodiscard]] int64_t bytes() const { return gemm1.bytes() + gemm2.bytes(); }
};

// FP8 products where both operands are e4m3 or MXFP4 codes.
bool HasFp8Math(const MoeSpec& spec) {
  const bool rows = spec.activations == ActivationFormat::kFp8Block128 ||
                    spec.activations == ActivationFormat::kFp8PerTensor ||
                    spec.activations == ActivationFormat::kFp8PerToken;
  return rows && spec.weights != WeightFormat::kNvFp4;
}

std::string ChosenKernels(const Plan& plan) {
  std::string names;
  for (const Candidate& candidate : plan.Explain().candidates) {
    names += candidate.chosen ? (names.empty() ? "" : "+") + candidate.kernel : "";
  }
  return names;
}

void BenchTokens(const Machine& machine, const ModelShape& shape,
                 const std::vector<std::unique_ptr<LayerWeights>>& layers, int64_t tokens,
                 const std::string& routing, const std::string& tactic) {
  const MoeSpec& spec = shape.spec;
  std::vector<DeviceBuffer<float>> logits;
  double touched = 0.0;
  for (unsigned i = 0; i < kCalls; ++i) {
    const Logits drawn(spec, tokens, routing, 100 + i);
    touched += static_cast<double>(drawn.touched) / kCalls;
    logits.emplace_back(drawn.values);
  }
  const DeviceBuffer<uint16_t> x(tokens * spec.hidden_size);
  FillRandom(x.get(), tokens * spec.hidden_size);
  const DeviceBuffer<uint16_t> output(tokens * spec.hidden_size);
  const DeviceBuffer<float> bias(std::vector<float>(static_cast<size_t>(spec.num_experts), 0.0F));
  PlanOptions options;
  options.max_tokens = tokens;
  // The plan for this number of tokens alone: what it names is what runs.
  options.batch_invariant = true;
  options.tactic = tactic;
  const Plan plan = MakePlan(spec, kGpu, options);
  const DeviceBuffer<uint8_t> workspace(plan.workspace_bytes());
  MoeInputs inputs;
  inputs.hidden_states =
      TensorView::Contiguous(x.get(), DType::kBf16, {tokens, spec.hidden_size}, kGpu);
  if (spec.routing.use_bias) {
    inputs.routing_bias =
        TensorView::Contiguous(bias.get(), DType::kFloat32, {spec.num_experts}, kGpu);
  }
  MoeOutputs outputs;
  outputs.output =
      TensorView::Contiguous(output.get(), DType::kBf16, {tokens, spec.hidden_size}, kGpu);
  const double matrices = 3.0 * static_cast<double>(spec.hidden_size * spec.intermediate_size);
  CaseResult result;
  result.model = shape.name;
  result.tokens = tokens;
  result.bytes = touched / spec.num_experts * static_cast<double>(layers.front()->bytes()) +
                 4.0 * static_cast<double>(tokens * spec.hidden_size);
  result.flops = 2.0 * static_cast<double>(tokens * spec.top_k) * matrices;
  result.tactic = ChosenKernels(plan);
  Machine ceilings = machine;
  if (HasFp8Math(spec)) {
    ceilings.ceilings.flops_per_us = machine.ceilings.fp8_flops_per_us;
  }
  result.times = TimeInGraph(kCalls, [&](int i, cudaStream_t stream) {
    inputs.logits = TensorView::Contiguous(logits[static_cast<size_t>(i)].get(), DType::kFloat32,
                                           {tokens, spec.num_experts}, kGpu);
    Forward(plan, layers[static_cast<size_t>(i) % layers.size()]->weights, inputs, outputs,
            {workspace.get(), static_cast<size_t>(plan.workspace_bytes())}, {stream});
  });
  PrintCase(ceilings, result,
            {{"weights", ToString(spec.weights)},
             {"activations", ToString(spec.activations)},
             {"routing", routing}});
}

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) {
    parts.push_back(part);
  }
  return parts;
}

void BenchCase(const Machine& machine, const std::string& name, const Options& options) {
  const std::vector<std::string> parts = Split(name, ':');
  const ModelShape* known = FindShape(parts.at(0));
  HOPYARD_CHECK(known != nullptr, kInvalidArgument)
      << "no model " << parts.at(0) << "; known: " << ShapeNames();
  ModelShape shape = *known;
  shape.spec.shared.count = 0;
  if (parts.size() == 3) {
    shape.spec.weights = ParseWeightFormat(parts[1]);
    shape.spec.activations = ParseActivationFormat(parts[2]);
  }
  std::vector<std::unique_ptr<LayerWeights>> layers;
  int64_t bytes = 0;
  while (layers.empty() || (bytes < kColdBytes && layers.size() < kCalls)) {
    layers.push_back(std::make_unique<LayerWeights>(shape.spec));
    bytes += layers.back()->bytes();
  }
  for (const std::string& routing : options.routings) {
    for (const int64_t tokens : options.tokens) {
      BenchTokens(machine, shape, layers, tokens, routing, options.tactic);
    }
  }
}

int Main(int argc, char** argv) {
  Options options;
  std::vector<std::string> cases;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--tokens=", 0) == 0) {
      options.tokens.clear();
      for (const std::string& count : Split(argument.substr(9), ',')) {
        options.tokens.push_back(std::stoll(count));
      }
    } else if (argument.rfind("--routing=", 0) == 0) {
      options.routings = Split(argument.substr(10), ',');
    } else if (argument.rfind("--tactic=", 0) == 0) {
      options.tactic = argument.substr(9);
    } else {
      cases.push_back(argument);
    }
  }
  if (cases.empty()) {
    std::cerr << "usage: " << argv[0]
              << " COMMIT MODEL[:WEIGHTS:ACTIVATIONS] ... [--tokens=1,8] [--routing=uniform,zipf] "
                 "[--tactic=GEMM1[+GEMM2]]; models: "
              << ShapeNames() << '\n';
    return 2;
  }
  try {
    const Machine machine = DescribeMachine(argv[1]);
    for (const std::string& name : cases) {
      BenchCase(machine, name, options);
    }
    return 0;
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
}

}  // namespace
}  // namespace hopyard::bench

int main(int argc, char** argv) {
  return hopyard::bench::Main(argc, argv);
}
