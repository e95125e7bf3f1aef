// SPDX-License-Identifier: Apache-2.0
#include "cli/histogram.h"

#include <algorithm>
#include <numeric>

#include <fmt/core.h>

#include "core/shape.h"

namespace hopyard::cli {
namespace {

constexpr int64_t kMaxRows = 16;
constexpr int64_t kBarWidth = 40;

}  // namespace

std::string LoadHistogram(const std::vector<int64_t>& load) {
  const auto experts = static_cast<int64_t>(load.size());
  if (experts == 0) {
    return "";
  }
  const int64_t total = std::accumulate(load.begin(), load.end(), int64_t{0});
  const int64_t group = CeilDiv(experts, kMaxRows);
  std::vector<int64_t> sums;
  for (int64_t begin = 0; begin < experts; begin += group) {
    const int64_t end = std::min(begin + group, experts);
    sums.push_back(std::accumulate(load.begin() + begin, load.begin() + end, int64_t{0}));
  }
  const int64_t top = std::max<int64_t>(*std::max_element(sums.begin(), sums.end()), 1);
  const auto busiest = std::max_element(load.begin(), load.end());
  std::string text = fmt::format(
      "expert load: {} slots on {} experts, {} of them idle; busiest is expert {} with {} "
      "({:.1f} x the mean)\n",
      total, experts, std::count(load.begin(), load.end(), 0), busiest - load.begin(), *busiest,
      total > 0 ? static_cast<double>(*busiest * experts) / static_cast<double>(total) : 0.0);
  for (size_t row = 0; row < sums.size(); ++row) {
    const int64_t begin = static_cast<int64_t>(row) * group;
    const int64_t end = std::min(begin + group, experts);
    const std::string name =
        group == 1 ? fmt::format("{}", begin) : fmt::format("{}-{}", begin, end - 1);
    const int64_t width = CeilDiv(sums[row] * kBarWidth, top);
    text += fmt::format("  {:>9} {:#<{}}{} {}\n", name, "", width, "", sums[row]);
  }
  return text;
}

}  // namespace hopyard::cli
