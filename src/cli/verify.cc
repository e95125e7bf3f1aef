// SPDX-License-Identifier: Apache-2.0
#include "cli/verify.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include <fmt/core.h>

#include "cli/layer_source.h"
#include "core/error.h"
#include "stages/1_route/route_judge.h"
#include "stages/layer_ref.h"

namespace hopyard::cli {
namespace {

// Output rounding alone may differ by one bf16 step where plain happens to be exact.
constexpr double kFloorOfRms = 1e-3;
// Tokens that the oracle computes together.
constexpr int64_t kOracleBatch = 2;

struct TokenResult {
  std::vector<double> exact;
  std::vector<double> plain;
};

std::vector<int64_t> SampleTokens(int64_t tokens, int64_t samples) {
  const int64_t count = std::min(tokens, samples);
  std::vector<int64_t> sampled;
  for (int64_t i = 0; i < count; ++i) {
    sampled.push_back(count == 1 ? 0 : i * (tokens - 1) / (count - 1));
  }
  return sampled;
}

// The oracle takes the experts that the run reports, which CompareIds judges: so every sampled
// token is compared, whichever of two tied experts it went to. Weights are the oracle's own.
//
// Both passes share the decoding of an expert between the tokens of a batch; batches give progress.
std::vector<TokenResult> RunOracle(const VerifyInputs& run, const std::vector<int64_t>& tokens) {
  const int64_t width = run.output.shape[1];
  const auto count = static_cast<int64_t>(tokens.size());
  std::vector<TokenResult> results;
  Progress progress("verifying", count * 2);
  for (int64_t begin = 0; begin < count; begin += kOracleBatch) {
    const int64_t end = std::min(begin + kOracleBatch, count);
    ref::LayerRefOptions options;
    options.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
    options.forced_ids = run.routing_ids;
    const ref::LayerRefResult exact =
        ref::LayerRef(run.spec, run.weights, run.inputs, width, options);
    progress.Advance(end - begin);
    options.plain = true;
    const ref::LayerRefResult plain =
        ref::LayerRef(run.spec, run.weights, run.inputs, width, options);
    progress.Advance(end - begin);
    for (int64_t i = 0; i < end - begin; ++i) {
      const auto row = [&](const std::vector<double>& values) {
        const auto first = values.begin() + i * width;
        return std::vector<double>(first, first + width);
      };
      results.push_back({row(exact.output), row(plain.output)});
    }
  }
  return results;
}

using route::SelectionMatch;

// Ids of one token [K + S]: those given, or a right selection by the routing rule; then the shared
// experts.
SelectionMatch CompareIds(const VerifyInputs& run, int64_t token) {
  const MoeSpec& spec = run.spec;
  const int32_t* got = run.routing_ids.as<const int32_t>() + token * spec.slots_per_token();
  for (int s = 0; s < spec.shared.count; ++s) {
    if (got[spec.top_k + s] != spec.num_experts + s) {
      return SelectionMatch::kDifferent;
    }
  }
  const std::vector<int32_t> ids(got, got + spec.top_k);
  if (run.inputs.routing == RoutingInput::kReplay) {
    const int32_t* given = run.inputs.expert_ids.as<const int32_t>() + token * spec.top_k;
    return std::equal(ids.begin(), ids.end(), given) ? SelectionMatch::kEqual
                                                     : SelectionMatch::kDifferent;
  }
  HOPYARD_INTERNAL(run.inputs.routing == RoutingInput::kLogits)
      << "Verify knows ids from logits and given ones";
  RouteInputs inputs;
  inputs.logits = run.inputs.logits;
  inputs.bias = run.inputs.routing_bias;
  return route::JudgeSelection(spec.routing, inputs, token, ids);
}

// Sums over the compared tokens.
class Accumulator {
 public:
  explicit Accumulator(Verification* result) : result_(result) {}

  void AddRow(int64_t token, const float* got, const TokenResult& want) {
    double row_error = 0.0;
    double row_norm = 0.0;
    for (size_t i = 0; i < want.exact.size(); ++i) {
      const double error = std::abs(static_cast<double>(got[i]) - want.exact[i]);
      const double plain = std::abs(want.plain[i] - want.exact[i]);
      result_->max_error = std::max(result_->max_error, error);
      result_->plain_max_error = std::max(result_->plain_max_error, plain);
      row_error += error * error;
      row_norm += want.exact[i] * want.exact[i];
    }
    squares_ += row_norm;
    elements_ += static_cast<double>(want.exact.size());
    // A zero row must be matched exactly; a NaN or infinity on either side is no match.
    double relative = row_error > 0.0 ? HUGE_VAL : 0.0;
    if (!std::isfinite(row_error)) {
      relative = HUGE_VAL;
    } else if (row_norm > 0.0) {
      relative = std::sqrt(row_error / row_norm);
    }
    if (relative >= result_->worst_row_error) {
      result_->worst_row_error = relative;
      result_->worst_row = token;
    }
  }

  void Finish() {
    result_->oracle_rms = elements_ > 0.0 ? std::sqrt(squares_ / elements_) : 0.0;
    result_->allowed_error = 2.0 * result_->plain_max_error + kFloorOfRms * result_->oracle_rms;
  }

 private:
  Verification* result_;
  double squares_ = 0.0;
  double elements_ = 0.0;
};

// Tokens whose output holds a NaN or an infinity, of all tokens.
int64_t CountNonFinite(const std::vector<float>& output, int64_t width) {
  int64_t rows = 0;
  for (size_t begin = 0; begin < output.size(); begin += static_cast<size_t>(width)) {
    const auto first = output.begin() + static_cast<int64_t>(begin);
    rows += std::all_of(first, first + width, [](float v) { return std::isfinite(v); }) ? 0 : 1;
  }
  return rows;
}

void Judge(int64_t different_ids, int64_t non_finite, Verification* result) {
  const auto fail = [&](bool broken, std::string text) {
    if (broken) {
      result->failures.push_back(std::move(text));
    }
  };
  fail(non_finite > 0, fmt::format("{} tokens have a NaN or infinity in their output", non_finite));
  fail(different_ids > 0,
       fmt::format("{} tokens got other expert ids than the oracle's", different_ids));
  // Negated comparisons, so that a NaN fails.
  fail(!(result->max_error <= result->allowed_error),
       fmt::format("max error {:.3g} exceeds {:.3g}, twice the plain implementation's",
                   result->max_error, result->allowed_error));
  fail(!(result->worst_row_error <= result->row_tolerance),
       fmt::format("token {} is off by {:.3g} of its norm; tolerance {:.3g}", result->worst_row,
                   result->worst_row_error, result->row_tolerance));
  result->passed = result->failures.empty();
}

}  // namespace

double RowTolerance(ActivationFormat format) {
  switch (format) {
    case ActivationFormat::kBf16:
      return 0.01;
    case ActivationFormat::kFp8Block128:
    case ActivationFormat::kFp8PerToken:
    case ActivationFormat::kFp8PerTensor:
    case ActivationFormat::kMxFp8:
      return 0.10;
    case ActivationFormat::kNvFp4:
    case ActivationFormat::kNvFp4PerToken:
      return 0.35;
  }
  return 0.0;
}

Verification Verify(const VerifyInputs& run, int64_t samples) {
  const int64_t width = run.output.shape[1];
  const std::vector<int64_t> tokens = SampleTokens(run.output.shape[0], samples);
  const std::vector<TokenResult> wanted = RunOracle(run, tokens);
  const std::vector<float> output = ToFloats(run.output);
  Verification result;
  result.sampled_tokens = static_cast<int64_t>(tokens.size());
  result.row_tolerance = RowTolerance(run.spec.activations);
  Accumulator sums(&result);
  int64_t different_ids = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const SelectionMatch match = CompareIds(run, tokens[i]);
    different_ids += match == SelectionMatch::kDifferent ? 1 : 0;
    result.tied_tokens += match == SelectionMatch::kTied ? 1 : 0;
    sums.AddRow(tokens[i], output.data() + tokens[i] * width, wanted[i]);
  }
  sums.Finish();
  Judge(different_ids, CountNonFinite(output, width), &result);
  return result;
}

Json ToJson(const Verification& verification) {
  // Nothing compared is no pass: null.
  const Json passed = verification.sampled_tokens > 0 ? Json(verification.passed) : Json(nullptr);
  return {{"passed", passed},
          {"failures", verification.failures},
          {"sampled_tokens", verification.sampled_tokens},
          {"tied_tokens", verification.tied_tokens},
          {"max_error", verification.max_error},
          {"plain_max_error", verification.plain_max_error},
          {"allowed_error", verification.allowed_error},
          {"worst_row_error", verification.worst_row_error},
          {"row_tolerance", verification.row_tolerance},
          {"worst_row", verification.worst_row},
          {"oracle_rms", verification.oracle_rms}};
}

std::string ToText(const Verification& verification) {
  if (verification.sampled_tokens == 0) {
    return "NOTHING TO VERIFY: there are no tokens\n";
  }
  std::string text = fmt::format(
      "{}: {} sampled tokens against the oracle\n"
      "  max error   {:.3g}  (allowed {:.3g}; a plain implementation has {:.3g})\n"
      "  worst row   {:.3g}  (tolerance {:.3g}; token {})\n",
      verification.passed ? "VERIFIED" : "VERIFICATION FAILED", verification.sampled_tokens,
      verification.max_error, verification.allowed_error, verification.plain_max_error,
      verification.worst_row_error, verification.row_tolerance, verification.worst_row);
  if (verification.tied_tokens > 0) {
    text += fmt::format(
        "  {} tokens went to other experts than the oracle's, by scores that tie "
        "within 4 ulp\n",
        verification.tied_tokens);
  }
  for (const std::string& failure : verification.failures) {
    text += "  " + failure + "\n";
  }
  return text;
}

}  // namespace hopyard::cli
