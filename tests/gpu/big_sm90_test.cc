// SPDX-License-Identifier: Apache-2.0
// Layers whose tensors pass 2^31 elements, on a GPU with the memory for them. A sampled token must
// come out as it does in a small call with the same kernels, bit for bit; that small calls are
// right is shown elsewhere. Large tensors are filled on the device.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "core/shape.h"
#include "formats/codes.h"
#include "formats/format_rules.h"
#include "tests/gpu/runner_sm90.h"

namespace hopyard::test {
namespace {

using Bytes = std::vector<uint8_t>;

constexpr int64_t kTwoTo31 = int64_t{1} << 31;

size_t Size(int64_t count) {
  return static_cast<size_t>(count);
}

// Empty, or why the test cannot run here.
std::string MemoryProblem(int64_t bytes) {
  size_t free_bytes = 0;
  size_t total = 0;
  HOPYARD_CUDA(cudaMemGetInfo(&free_bytes, &total));
  // Guards, maps, and what the driver rounds up.
  const int64_t wanted = bytes + (int64_t{1} << 29);
  if (static_cast<int64_t>(free_bytes) >= wanted) {
    return {};
  }
  return "needs " + std::to_string(CeilDiv(wanted, int64_t{1} << 30)) + " GiB of GPU memory; " +
         std::to_string(free_bytes >> 30) + " GiB are free";
}

// `block` again and again. Its length is a prime number of elements, so that an offset that has
// lost its upper bits finds other values.
void FillRepeating(const TensorView& tensor, const Bytes& block) {
  const auto bytes = Size(tensor.numel() * SizeOf(tensor.dtype));
  auto* const to = tensor.as<uint8_t>();
  size_t filled = std::min(bytes, block.size());
  HOPYARD_CUDA(cudaMemcpy(to, block.data(), filled, cudaMemcpyHostToDevice));
  while (filled < bytes) {
    const size_t more = std::min(filled, bytes - filled);
    HOPYARD_CUDA(cudaMemcpy(to + filled, to, more, cudaMemcpyDeviceToDevice));
    filled += more;
  }
}

// Random elements of a type, `scale` the standard deviation of floats.
Bytes RandomBlock(DType dtype, float scale, unsigned seed) {
  constexpr int64_t kElements = 1048573;  // prime
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Bytes block(Size(kElements * SizeOf(dtype)));
  for (int64_t i = 0; i < kElements; ++i) {
    uint8_t* const at = block.data() + i * SizeOf(dtype);
    const float value = normal(random);
    switch (dtype) {
      case DType::kBf16: {
        const uint16_t bits = formats::EncodeBf16(value);
        std::memcpy(at, &bits, sizeof(bits));
        break;
      }
      case DType::kFloat32: {
        const float positive = std::fabs(value) + 0.1F * scale;  // also a block scale
        std::memcpy(at, &positive, sizeof(positive));
        break;
      }
      case DType::kE4m3:
        *at = formats::EncodeE4m3(value);
        break;
      case DType::kE8m0:
        *at = static_cast<uint8_t>(118 + random() % 6);
        break;
      default:
        *at = static_cast<uint8_t>(random());
    }
  }
  return block;
}

// Tensors in device memory.
class DeviceTensors {
 public:
  [[nodiscard]] TensorView Make(DType dtype, std::initializer_list<int64_t> shape) {
    TensorView view = TensorView::Contiguous(static_cast<void*>(nullptr), dtype, shape, kGpu);
    arrays_.emplace_back(view.numel() * SizeOf(dtype));
    view.data = arrays_.back().get();
    return view;
  }
  template <class T>
  [[nodiscard]] TensorView Upload(DType dtype, std::initializer_list<int64_t> shape,
                                  const std::vector<T>& values) {
    const TensorView view = Make(dtype, shape);
    HOPYARD_CUDA(
        cudaMemcpy(view.data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return view;
  }
  [[nodiscard]] bool Intact() const {
    return std::all_of(arrays_.begin(), arrays_.end(),
                       [](const DeviceArray<uint8_t>& array) { return array.GuardsIntact(); });
  }

 private:
  std::deque<DeviceArray<uint8_t>> arrays_;
};

// Row `row` of a contiguous matrix.
uint8_t* RowOf(const TensorView& matrix, int64_t row) {
  return matrix.as<uint8_t>() + row * matrix.shape[1] * SizeOf(matrix.dtype);
}

std::vector<uint16_t> DownloadRow(const TensorView& matrix, int64_t row) {
  std::vector<uint16_t> values(Size(matrix.shape[1]));
  HOPYARD_CUDA(
      cudaMemcpy(values.data(), RowOf(matrix, row), values.size() * 2, cudaMemcpyDeviceToHost));
  return values;
}

// The kernels that a plan takes for its largest batch, as a tactic: other batches then get the
// same.
std::string TacticOf(const MoeSpec& spec, int64_t tokens) {
  PlanOptions options;
  options.max_tokens = tokens;
  options.batch_invariant = true;
  std::string gemm1;
  std::string gemm2;
  for (const Candidate& candidate : Explain(spec, kGpu, options).candidates) {
    if (candidate.chosen) {
      // Without a gate one kernel may run both.
      (candidate.reason.find("GEMM1") != std::string::npos ? gemm1 : gemm2) = candidate.kernel;
    }
  }
  return gemm1 + '+' + gemm2;
}

Plan PlanFor(const MoeSpec& spec, const std::string& tactic, int64_t tokens) {
  PlanOptions options;
  options.max_tokens = tokens;
  options.tactic = tactic;
  return MakePlan(spec, kGpu, options);
}

// Runs the layer and returns its output, in memory of `tensors`.
TensorView RunBig(const Plan& plan, const Weights& weights, const MoeInputs& inputs,
                  DeviceTensors* tensors, const TensorView& load = {}) {
  const int64_t tokens = inputs.hidden_states.shape[0];
  MoeOutputs outputs;
  outputs.output = tensors->Make(DType::kBf16, {tokens, plan.spec().hidden_size});
  outputs.expert_load = load;
  const DeviceArray<uint8_t> workspace(plan.workspace_bytes());
  Forward(plan, weights, inputs, outputs, {workspace.get(), Size(plan.workspace_bytes())});
  HOPYARD_CUDA(cudaDeviceSynchronize());
  EXPECT_TRUE(workspace.GuardsIntact()) << "Forward wrote outside of its workspace";
  return outputs.output;
}

// ---- many tokens

struct ManyTokens {
  const char* name;
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int experts;
  int top_k;
};
std::string ToString(const ManyTokens& shape) {
  return shape.name;
}

// Slots x features or tokens x hidden pass 2^31 in the tensors that the name tells.
constexpr ManyTokens kManyTokens[] = {
    {"FourHundredThousandTokens", 400000, 128, 128, 16, 8},
    {"HiddenStatesAndOutput", 270000, 8192, 128, 4, 1},
    {"Gemm1Output", 270000, 128, 1024, 16, 8},
    {"Gemm2Output", 270000, 1024, 128, 16, 8},
};

// Tokens at both ends, around the one that holds element 2^31 of the hidden states, and some
// between: rows are in expert order, so that each token has some among the first and the last.
std::vector<int64_t> Samples(const ManyTokens& shape) {
  std::vector<int64_t> samples;
  for (const int64_t near :
       {int64_t{1}, kTwoTo31 / shape.hidden, shape.tokens / 2, shape.tokens - 2}) {
    for (int64_t token = near - 1; token <= near + 1; ++token) {
      samples.push_back(std::min(token, shape.tokens - 1));
    }
  }
  for (int64_t i = 1; i < 16; ++i) {
    samples.push_back(shape.tokens / 16 * i + i);
  }
  return samples;
}

using BigCase = std::tuple<ManyTokens, FormatPair>;

class GpuBig : public ::testing::TestWithParam<BigCase> {};

TEST_P(GpuBig, SampledTokensEqualASmallCall) {
  HOPYARD_NEEDS_GPU();
  const auto& [shape, pair] = GetParam();
  WeightSource source;
  source.spec = SmallSpec(pair.weights, pair.activations);
  source.spec.hidden_size = shape.hidden;
  source.spec.intermediate_size = shape.intermediate;
  source.spec.num_experts = shape.experts;
  source.spec.top_k = shape.top_k;
  const MoeSpec& spec = source.spec;
  const std::string tactic = TacticOf(spec, shape.tokens);
  const Plan plan = PlanFor(spec, tactic, shape.tokens);
  const std::string problem =
      MemoryProblem(plan.workspace_bytes() + shape.tokens * (4 * shape.hidden + 4 * shape.experts));
  if (!problem.empty()) {
    GTEST_SKIP() << problem;
  }
  TwinLayer layer(source);
  DeviceTensors tensors;
  MoeInputs inputs;
  inputs.hidden_states = tensors.Make(DType::kBf16, {shape.tokens, shape.hidden});
  inputs.logits = tensors.Make(DType::kFloat32, {shape.tokens, shape.experts});
  FillRepeating(inputs.hidden_states, RandomBlock(DType::kBf16, 1.0F, 1));
  FillRepeating(inputs.logits, RandomBlock(DType::kFloat32, 1.0F, 2));
  const TensorView load =
      tensors.Upload(DType::kInt64, {shape.experts}, std::vector<int64_t>(Size(shape.experts), 0));
  const TensorView output = RunBig(plan, layer.gpu(), inputs, &tensors, load);
  std::vector<int64_t> counts(Size(shape.experts));
  HOPYARD_CUDA(cudaMemcpy(counts.data(), load.data, counts.size() * 8, cudaMemcpyDeviceToHost));
  EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), shape.tokens * shape.top_k);

  const std::vector<int64_t> samples = Samples(shape);
  const auto few = static_cast<int64_t>(samples.size());
  MoeInputs sampled;
  sampled.hidden_states = tensors.Make(DType::kBf16, {few, shape.hidden});
  sampled.logits = tensors.Make(DType::kFloat32, {few, shape.experts});
  for (int64_t i = 0; i < few; ++i) {
    for (const auto& [to, from] : {std::pair{sampled.hidden_states, inputs.hidden_states},
                                   std::pair{sampled.logits, inputs.logits}}) {
      HOPYARD_CUDA(cudaMemcpy(RowOf(to, i), RowOf(from, samples[Size(i)]),
                              Size(to.shape[1] * SizeOf(to.dtype)), cudaMemcpyDeviceToDevice));
    }
  }
  const TensorView wanted = RunBig(PlanFor(spec, tactic, few), layer.gpu(), sampled, &tensors);
  for (int64_t i = 0; i < few; ++i) {
    ASSERT_TRUE(SameBits(DownloadRow(output, samples[Size(i)]), DownloadRow(wanted, i)))
        << "token " << samples[Size(i)] << " with " << tactic;
  }
  EXPECT_TRUE(tensors.Intact());
}

// A pair for every way of passing tokens on: as they are, in another order, as codes, in passes of
// their own.
std::vector<FormatPair> TokenPairs() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {{W::kBf16, A::kBf16},
          {W::kFp8Block128, A::kFp8Block128},
          {W::kMxFp4, A::kBf16},
          {W::kMxFp4, A::kFp8PerToken},
          {W::kNvFp4, A::kNvFp4PerToken}};
}

INSTANTIATE_TEST_SUITE_P(Shapes, GpuBig,
                         ::testing::Combine(::testing::ValuesIn(kManyTokens),
                                            ::testing::ValuesIn(TokenPairs())),
                         [](const auto& test) {
                           return ToString(std::get<0>(test.param)) + "_" +
                                  ToString(std::get<1>(test.param));
                         });

// ---- large weights

// One matrix per expert, as a checkpoint has them, all in one tensor.
MatrixSet MakeMatrices(WeightFormat format, const std::array<int64_t, 3>& shape,
                       DeviceTensors* tensors) {
  const formats::WeightFormatRule rule = formats::RuleOf(format);
  const auto& [experts, rows, cols] = shape;
  MatrixSet set;
  set.values = tensors->Make(rule.code_dtype, {experts, rows, cols / rule.codes_per_byte});
  // Sums of some thousand products stay near 1.
  FillRepeating(set.values, RandomBlock(rule.code_dtype, format == WeightFormat::kBf16 ? 0.02F : 60,
                                        static_cast<unsigned>(rows)));
  if (rule.scale_block > 0) {
    set.scales = tensors->Make(rule.scale_dtype, {experts, CeilDiv(rows, rule.scale_block_rows),
                                                  CeilDiv(cols, rule.scale_block)});
    FillRepeating(set.scales,
                  RandomBlock(rule.scale_dtype, 4e-4F, static_cast<unsigned>(rows + 1)));
  }
  return set;
}

// Experts [begin, begin + count) of the set, where they are.
MatrixSet ExpertsOf(const MatrixSet& set, int64_t begin, int64_t count) {
  MatrixSet part = set;
  for (TensorView* view : {&part.values, &part.scales}) {
    if (view->defined()) {
      view->data = view->as<uint8_t>() + begin * view->strides[0] * SizeOf(view->dtype);
      view->shape[0] = count;
    }
  }
  return part;
}

int64_t ElementBytes(const formats::WeightFormatRule& rule, int64_t elements) {
  const int64_t codes = elements * SizeOf(rule.code_dtype) / rule.codes_per_byte;
  const int64_t blocks = rule.scale_block * rule.scale_block_rows;
  return codes + (blocks == 0 ? 0 : elements / blocks * SizeOf(rule.scale_dtype));
}

class GpuBigWeights : public ::testing::TestWithParam<FormatPair> {};

// Tokens name two neighbours of 256 experts; a layer that has only those two must agree.
TEST_P(GpuBigWeights, EveryExpertEqualsThatOfASmallLayer) {
  HOPYARD_NEEDS_GPU();
  constexpr int kExperts = 256;
  constexpr int64_t kTokens = 24;
  MoeSpec spec = SmallSpec(GetParam().weights, GetParam().activations);
  spec.hidden_size = 4096;
  spec.intermediate_size = 2304;
  spec.num_experts = kExperts;
  spec.top_k = 2;
  const formats::WeightFormatRule rule = formats::RuleOf(spec.weights);
  const int64_t matrix = int64_t{kExperts} * spec.intermediate_size * spec.hidden_size;
  static_assert(int64_t{kExperts} * 2304 * 4096 > kTwoTo31);
  const std::string problem = MemoryProblem(ElementBytes(rule, 3 * matrix));
  if (!problem.empty()) {
    GTEST_SKIP() << problem;
  }
  DeviceTensors tensors;
  WeightsDesc desc;
  desc.routed.gemm1 =
      MakeMatrices(spec.weights, {kExperts, spec.gemm1_rows(), spec.hidden_size}, &tensors);
  desc.routed.gemm2 =
      MakeMatrices(spec.weights, {kExperts, spec.hidden_size, spec.intermediate_size}, &tensors);
  const Weights all(spec, desc);
  // Element 2^31 of GEMM1's codes lies in expert 113, of GEMM2's in 227; byte 2^32 of BF16 codes in
  // the same.
  const std::vector<int32_t> firsts = {0, 56, 113, 114, 226, 227, 253, 254};
  const std::string tactic = TacticOf(spec, kTokens);
  MoeInputs inputs;
  inputs.routing = RoutingInput::kUnpacked;
  inputs.hidden_states = tensors.Make(DType::kBf16, {kTokens, spec.hidden_size});
  FillRepeating(inputs.hidden_states, RandomBlock(DType::kBf16, 1.0F, 3));
  inputs.expert_weights =
      tensors.Upload(DType::kFloat32, {kTokens, 2}, std::vector<float>(Size(2 * kTokens), 0.5F));
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < kTokens; ++t) {
    const int32_t first = firsts[Size(t) % firsts.size()];
    ids.insert(ids.end(), {first, first + 1});
  }
  inputs.expert_ids = tensors.Upload(DType::kInt32, {kTokens, 2}, ids);
  const TensorView output = RunBig(PlanFor(spec, tactic, kTokens), all, inputs, &tensors);
  for (size_t i = 0; i < firsts.size(); ++i) {
    MoeSpec two = spec;
    two.local = {ExpertMap::Kind::kRange, firsts[i], 2};
    WeightsDesc part = desc;
    part.routed.gemm1 = ExpertsOf(desc.routed.gemm1, firsts[i], 2);
    part.routed.gemm2 = ExpertsOf(desc.routed.gemm2, firsts[i], 2);
    const TensorView wanted =
        RunBig(PlanFor(two, tactic, kTokens), Weights(two, part), inputs, &tensors);
    for (auto t = static_cast<int64_t>(i); t < kTokens; t += static_cast<int64_t>(firsts.size())) {
      const std::vector<uint16_t> got = DownloadRow(output, t);
      ASSERT_TRUE(SameBits(got, DownloadRow(wanted, t))) << "experts from " << firsts[i];
      // Numbers, and not all of them zero.
      ASSERT_TRUE(std::all_of(got.begin(), got.end(),
                              [](uint16_t bits) { return (bits & 0x7F80) != 0x7F80; }));
      ASSERT_TRUE(
          std::any_of(got.begin(), got.end(), [](uint16_t bits) { return (bits & 0x7FFF) != 0; }));
    }
  }
  EXPECT_TRUE(tensors.Intact());
}

std::vector<FormatPair> WeightPairs() {
  using W = WeightFormat;
  using A = ActivationFormat;
  return {{W::kBf16, A::kBf16},
          {W::kFp8Block128, A::kFp8Block128},
          {W::kMxFp8, A::kBf16},
          {W::kMxFp4, A::kBf16},
          {W::kMxFp4, A::kFp8Block128}};
}

INSTANTIATE_TEST_SUITE_P(Pairs, GpuBigWeights, ::testing::ValuesIn(WeightPairs()),
                         [](const auto& test) { return ToString(test.param); });

}  // namespace
}  // namespace hopyard::test
