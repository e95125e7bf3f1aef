// SPDX-License-Identifier: Apache-2.0
#include "cli/verify.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include <fmt/core.h>

#include "cli/layer_source.h"
#include "stages/layer_ref.h"

namespace hopyard::cli {
namespace {

// Output rounding alone may differ by one bf16 step where plain happens to be exact.
constexpr double kFloorOfRms = 1e-3;
// Scores within 4 ulp of FP32 may be ordered either way.
constexpr double kTieTolerance = 4.0 * 0x1.0p-23;

// Tokens that the oracle computes together.
constexpr int64_t kOracleBatch = 2;

struct TokenResult {
  std::vector<double> exact;
  std::vector<double> plain;
  std::vector<int32_t> ids;
};

std::vector<int64_t> SampleTokens(int64_t tokens, int64_t samples) {
  const int64_t count = std::min(tokens, samples);
  std::vector<int64_t> sampled;
  for (int64_t i = 0; i < count; ++i) {
    sampled.push_back(count == 1 ? 0 : i * (tokens - 1) / (count - 1));
  }
  return sampled;
}

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
    const ref::LayerRefResult exact =
        ref::LayerRef(run.spec, run.weights, run.inputs, width, options);
    progress.Advance(end - begin);
    options.plain = true;
    const ref::LayerRefResult plain =
        ref::LayerRef(run.spec, run.weights, run.inputs, width, options);
    progress.Advance(end - begin);
    const int64_t slots = run.spec.slots_per_token();
    for (int64_t i = 0; i < end - begin; ++i) {
      const auto row = [&](const auto& values, int64_t size) {
        const auto first = values.begin() + i * size;
        return std::decay_t<decltype(values)>(first, first + size);
      };
      results.push_back(
          {row(exact.output, width), row(plain.output, width), row(exact.ids, slots)});
    }
  }
  return results;
}

double SelectionScore(const VerifyInputs& run, int64_t token, int32_t expert) {
  const int64_t at = token * run.spec.num_experts + expert;
  const double logit = run.inputs.logits.as<const float>()[at];
  if (!run.spec.routing.use_bias || !run.inputs.routing_bias.defined()) {
    return logit;
  }
  const double bias = run.inputs.routing_bias.as<const float>()[expert];
  return 1.0 / (1.0 + std::exp(-logit)) + bias;
}

enum class IdMatch : uint8_t { kEqual, kTied, kDifferent };

IdMatch CompareIds(const VerifyInputs& run, int64_t token, const std::vector<int32_t>& wanted) {
  const auto slots = static_cast<int64_t>(wanted.size());
  const int32_t* got = run.routing_ids.as<const int32_t>() + token * slots;
  IdMatch match = IdMatch::kEqual;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int32_t want = wanted[static_cast<size_t>(slot)];
    if (got[slot] == want) {
      continue;
    }
    const bool routed = slot < run.spec.top_k && want >= 0 && got[slot] >= 0 &&
                        want < run.spec.num_experts && got[slot] < run.spec.num_experts;
    if (!routed || run.inputs.routing != RoutingInput::kLogits) {
      return IdMatch::kDifferent;
    }
    const double a = SelectionScore(run, token, want);
    const double b = SelectionScore(run, token, got[slot]);
    if (std::abs(a - b) > kTieTolerance * std::max(std::abs(a), std::abs(b))) {
      return IdMatch::kDifferent;
    }
    match = IdMatch::kTied;
  }
  return match;
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
    const IdMatch match = CompareIds(run, tokens[i], wanted[i].ids);
    different_ids += match == IdMatch::kDifferent ? 1 : 0;
    result.tied_tokens += match == IdMatch::kTied ? 1 : 0;
    if (match == IdMatch::kEqual) {
      sums.AddRow(tokens[i], output.data() + tokens[i] * width, wanted[i]);
    }
  }
  sums.Finish();
  Judge(different_ids, CountNonFinite(output, width), &result);
  return result;
}

Json ToJson(const Verification& verification) {
  return {{"passed", verification.passed},
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
  std::string text = fmt::format(
      "{}: {} sampled tokens against the oracle\n"
      "  max error   {:.3g}  (allowed {:.3g}; a plain implementation has {:.3g})\n"
      "  worst row   {:.3g}  (tolerance {:.3g}; token {})\n",
      verification.passed ? "VERIFIED" : "VERIFICATION FAILED", verification.sampled_tokens,
      verification.max_error, verification.allowed_error, verification.plain_max_error,
      verification.worst_row_error, verification.row_tolerance, verification.worst_row);
  if (verification.tied_tokens > 0) {
    text += fmt::format("  {} tokens not compared: their scores tie within 4 ulp\n",
                        verification.tied_tokens);
  }
  for (const std::string& failure : verification.failures) {
    text += "  " + failure + "\n";
  }
  return text;
}

}  // namespace hopyard::cli
