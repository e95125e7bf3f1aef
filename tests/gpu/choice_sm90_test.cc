// SPDX-License-Identifier: Apache-2.0
// Which kernels plans take by the cost model, beside those that whole layers were measured with.
// Needs no GPU.
#include <cmath>
#include <iostream>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/plan.h"

#include "bench/shapes.h"
#include "gemm/sm90/cost.h"
#include "gemm/sm90/operands.h"
#include "gemm/sm90/rows.h"
#include "tests/measured.h"

namespace hopyard::test {
namespace {

constexpr Device kGpuDevice{DeviceKind::kCuda, 0};

WeightOrders OrdersFor(const MoeSpec& spec, bool packed) {
  WeightsDesc desc;
  desc.packed = packed;
  return OrdersOf(spec, desc);
}

// GEMM1+GEMM2 of the plan for `tokens` tokens alone, as bench_forward names them.
std::string PickFor(const MoeSpec& spec, int64_t tokens, bool packed = false) {
  PlanOptions options;
  options.weight_orders = OrdersFor(spec, packed);
  options.max_tokens = tokens;
  options.batch_invariant = true;
  options.untuned = true;
  return Explain(spec, kGpuDevice, options).Chosen();
}

int FindKernel(const std::string& name) {
  for (int i = 0; i < gemm::sm90::NumKernels(); ++i) {
    if (gemm::sm90::KernelAt(i).name == name) {
      return i;
    }
  }
  return -1;
}

// What the model expects of the GEMMs of GEMM1+GEMM2; NaN where this build has no such kernels.
double Estimate(const MoeSpec& spec, int64_t tokens, const std::string& tactic, bool packed) {
  const size_t plus = tactic.find('+');
  const int first = FindKernel(tactic.substr(0, plus));
  const int second = FindKernel(tactic.substr(plus + 1));
  const bool whole = first >= 0 && second >= 0;
  if (!whole ||
      (packed && (gemm::sm90::PackedTwin(first) < 0 || gemm::sm90::PackedTwin(second) < 0))) {
    return NAN;
  }
  const gemm::sm90::RowSpread rows(tokens, static_cast<double>(spec.top_k) / spec.num_experts);
  const int64_t experts = spec.num_local_experts();
  const gemm::sm90::LayerOperands operands = gemm::sm90::OperandsOf(spec.weights, spec.activations);
  const bool fused = operands.fused_h && gemm::sm90::KernelAt(first).rounds;
  const double rounding =
      operands.h.format == Format::kBf16 || fused
          ? 0.0
          : gemm::sm90::EstimateRounding(rows.average() * static_cast<double>(experts),
                                         spec.intermediate_size);
  return rounding +
         EstimateMicroseconds(
             first, {spec.weights, spec.hidden_size, spec.intermediate_size, experts, packed},
             rows) +
         EstimateMicroseconds(
             second, {spec.weights, spec.intermediate_size, spec.hidden_size, experts, packed},
             rows);
}

// Of lines of one case, the last: those before it know fewer kernels.
std::vector<Measured> LastOfEachCase(std::vector<Measured> lines) {
  std::set<std::tuple<std::string, bool, int64_t>> seen;
  std::vector<Measured> out;
  for (auto one = lines.rbegin(); one != lines.rend(); ++one) {
    if (seen.insert({one->name(), one->packed(), one->tokens()}).second) {
      out.push_back(std::move(*one));
    }
  }
  return out;
}

// The recorded kernels were found good by measuring some of them. Differences are printed with the
// command that measures them.
TEST(GpuChoice, IsThatOfTheRecordedLayersOrCloseToIt) {
  int compared = 0;
  int different = 0;
  for (const Measured& one : LastOfEachCase(ReadMeasured("bench/results/h100/forward.jsonl"))) {
    const double recorded = Estimate(one.spec, one.tokens(), one.tactic(), one.packed());
    if (std::isnan(recorded)) {
      continue;
    }
    ++compared;
    const std::string pick = PickFor(one.spec, one.tokens(), one.packed());
    const double picked = Estimate(one.spec, one.tokens(), pick, one.packed());
    // Packed weights have one kernel for several names.
    if (pick == one.tactic() || picked == recorded) {
      continue;
    }
    ++different;
    EXPECT_LT(recorded, 1.12 * picked)
        << "the model is far from " << one.line << ", picks " << pick;
    std::cout << one.name() << (one.packed() ? " packed" : "") << " T=" << one.tokens() << ": "
              << one.tactic() << " took " << one.us() << " us with the layer; expected " << recorded
              << " us of its GEMMs, " << picked << " of\n  bench_forward COMMIT " << one.name()
              << ':' << one.tokens() << (one.packed() ? " --packed" : "") << " --tactic=" << pick
              << '\n';
  }
  if (compared == 0) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  std::cout << different << " of " << compared << " differ\n";
  EXPECT_GT(compared, 100);
  EXPECT_LT(different, compared / 6);
}

// Few work items spread: of the kernels that bench_tune found the fastest with two tokens, against
// 10 % more (tune.jsonl, a26f9a4), and with one.
TEST(GpuChoice, FourBlocksAMultiprocessorWhereItemsFillThem) {
  MoeSpec spec = bench::FindShape("gpt-oss-120b")->spec;
  spec.activations = ActivationFormat::kFp8Block128;
  if (FindKernel("mxfp4_fp8_gated_m64n16_s4") < 0) {
    GTEST_SKIP() << "a build of a few kernels";
  }
  EXPECT_EQ(PickFor(spec, 1), "mxfp4_fp8_gated_m64n16_s8+mxfp4_fp8_m128n16_s8");
  EXPECT_EQ(PickFor(spec, 2), "mxfp4_fp8_gated_m64n16_s4+mxfp4_fp8_m128n16_s8");
}

// The same spec, the same kernels: nothing but the spec, the weights' order and the kernel table
// goes into the model.
TEST(GpuChoice, DependsOnTokensNotOnCapacity) {
  for (const bench::ModelShape& model : bench::ModelShapes()) {
    PlanOptions options;
    options.max_tokens = 100000;
    options.untuned = true;
    const std::vector<Candidate> large = Explain(model.spec, kGpuDevice, options).candidates;
    EXPECT_EQ(large, Explain(model.spec, kGpuDevice, options).candidates);
    std::string first;
    for (const Candidate& candidate : large) {
      const bool takes_one = candidate.reason.find("tokens 1..") != std::string::npos ||
                             candidate.reason.find("every number of tokens") != std::string::npos;
      if (candidate.chosen && takes_one) {
        first += (first.empty() ? "" : "+") + candidate.kernel;
      }
    }
    EXPECT_EQ(first, PickFor(model.spec, 1)) << model.name;
  }
}

}  // namespace
}  // namespace hopyard::test
