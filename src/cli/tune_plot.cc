// SPDX-License-Identifier: Apache-2.0
#include "cli/tune_plot.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <string_view>
#include <utility>

#include <fmt/core.h>

namespace hopyard::cli {
namespace {

// Pixels.
constexpr double kWidth = 960;
constexpr double kHeight = 540;
constexpr double kLeft = 80;
constexpr double kRight = 330;  // room for the names
constexpr double kTop = 40;
constexpr double kBottom = 50;
constexpr size_t kNamed = 14;  // names that fit beside the picture

using Points = std::map<double, double>;  // tokens -> microseconds

// A logarithmic axis onto pixels.
class Axis {
 public:
  Axis(double low, double high, double first, double last)
      : low_(std::log(low)),
        span_(std::max(std::log(high) - low_, 1e-9)),
        first_(first),
        last_(last) {}
  [[nodiscard]] double operator()(double value) const {
    return first_ + (std::log(value) - low_) / span_ * (last_ - first_);
  }

 private:
  double low_;
  double span_;
  double first_;
  double last_;
};

struct Frame {
  Axis x;
  Axis y;
};

std::string Line(const Points& points, const Frame& frame, std::string_view style) {
  std::string path;
  for (const auto& [tokens, us] : points) {
    path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : " L", frame.x(tokens), frame.y(us));
  }
  return fmt::format("<path d=\"{}\" fill=\"none\" {}/>\n", path, style);
}

std::string Text(double x, double y, std::string_view anchor, std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    escaped += c == '&' ? "&amp;" : c == '<' ? "&lt;" : std::string(1, c);
  }
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>\n", x, y, anchor,
                     escaped);
}

std::string GridLine(double x1, double y1, double x2, double y2) {
  return fmt::format(
      "<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#ddd\"/>\n", x1, y1,
      x2, y2);
}

// Powers of two of tokens, powers of ten of microseconds and their doubles and fives.
std::string Grid(const Frame& frame, std::pair<double, double> tokens,
                 std::pair<double, double> us) {
  std::string out;
  for (int power = 0; std::exp2(power) <= tokens.second; ++power) {
    const double at = std::exp2(power);
    if (at >= tokens.first) {
      out += GridLine(frame.x(at), kTop, frame.x(at), kHeight - kBottom);
      out += Text(frame.x(at), kHeight - kBottom + 18, "middle", fmt::format("{}", at));
    }
  }
  for (int power = -3; std::pow(10.0, power) <= us.second; ++power) {
    const double decade = std::pow(10.0, power);
    for (const double at : {decade, 2 * decade, 5 * decade}) {
      if (at >= us.first && at <= us.second) {
        out += GridLine(kLeft, frame.y(at), kWidth - kRight, frame.y(at));
        out += Text(kLeft - 6, frame.y(at) + 4, "end", fmt::format("{:g}", at));
      }
    }
  }
  return out;
}

// What a plan takes at the measured numbers of tokens. The untuned choice may not have been run.
std::pair<Points, Points> WinnersAndUntuned(const TunedLayer& layer) {
  Points winners;
  Points untuned;
  for (const TunedRange& range : layer.ranges) {
    if (range.measured()) {
      winners[static_cast<double>(range.tokens)] = range.us;
    }
    if (range.untuned_us > 0.0) {
      untuned[static_cast<double>(range.tokens)] = range.untuned_us;
    }
  }
  return {winners, untuned};
}

// Those that a plan takes have names beside the picture, whatever else was measured.
std::vector<std::pair<std::string, Points>> WinnersFirst(
    const TunedLayer& layer, const std::map<std::string, Points>& lines) {
  std::vector<std::pair<std::string, Points>> ordered(lines.begin(), lines.end());
  std::stable_partition(ordered.begin(), ordered.end(), [&](const auto& line) {
    return std::any_of(layer.ranges.begin(), layer.ranges.end(),
                       [&](const TunedRange& range) { return range.tactic == line.first; });
  });
  return ordered;
}

}  // namespace

std::string PlotSvg(const std::string& title, const TunedLayer& layer,
                    const std::vector<TuningTime>& times) {
  std::map<std::string, Points> lines;
  std::pair<double, double> tokens{INFINITY, 0};
  std::pair<double, double> us{INFINITY, 0};
  for (const TuningTime& time : times) {
    const auto count = static_cast<double>(time.tokens);
    lines[time.tactic][count] = time.us;
    tokens = {std::min(tokens.first, count), std::max(tokens.second, count)};
    us = {std::min(us.first, time.us), std::max(us.second, time.us)};
  }
  if (lines.empty()) {
    return {};
  }
  const Frame frame{{tokens.first, tokens.second, kLeft, kWidth - kRight},
                    {us.first, us.second, kHeight - kBottom, kTop}};
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
      kWidth, kHeight);
  out += Grid(frame, tokens, us);
  out += Text(kLeft, 24, "start", title);
  out += Text((kLeft + kWidth - kRight) / 2, kHeight - 12, "middle", "tokens");
  out += Text(kLeft - 6, kTop - 10, "end", "us");
  double hue = 0;
  size_t named = 0;
  for (const auto& [name, points] : WinnersFirst(layer, lines)) {
    // The golden angle keeps neighbours apart.
    const std::string colour = fmt::format("stroke=\"hsl({:.0f},65%,45%)\"", hue);
    hue = std::fmod(hue + 137.5, 360.0);
    out += Line(points, frame, colour);
    if (named < kNamed) {
      const double y = kTop + 14 + 18 * static_cast<double>(named);
      out += fmt::format("<line x1=\"{0}\" y1=\"{2}\" x2=\"{1}\" y2=\"{2}\" {3}/>\n",
                         kWidth - kRight + 8, kWidth - kRight + 28, y - 4, colour);
      out += Text(kWidth - kRight + 34, y, "start", name);
    }
    ++named;
  }
  if (named > kNamed) {
    out += Text(kWidth - kRight + 34, kTop + 14 + 18 * static_cast<double>(kNamed), "start",
                fmt::format("and {} more", named - kNamed));
  }
  const auto [winners, untuned] = WinnersAndUntuned(layer);
  out += Line(untuned, frame, "stroke=\"black\" stroke-dasharray=\"5 4\"");
  out += Line(winners, frame, "stroke=\"black\" stroke-width=\"2.5\"");
  out +=
      Text(kWidth - kRight + 8, kHeight - kBottom - 20, "start", "thick: tuned, dashed: untuned");
  return out + "</svg>\n";
}

}  // namespace hopyard::cli
