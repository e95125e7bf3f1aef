// SPDX-License-Identifier: Apache-2.0
// The benchmarks' recorded lines, for tests of what is chosen by them. Tests run in the
// repository's root.
#pragma once

#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "bench/shapes.h"

namespace hopyard::test {

// One JSON line of bench/results, and the layer that it was measured with.
struct Measured {
  nlohmann::json line;
  MoeSpec spec;

  [[nodiscard]] int64_t tokens() const { return line["tokens"].get<int64_t>(); }
  [[nodiscard]] double us() const { return line["median_us"].get<double>(); }
  [[nodiscard]] std::string tactic() const { return line["tactic"].get<std::string>(); }
  [[nodiscard]] bool packed() const { return line.value("packed", false); }
  // MODEL:WEIGHTS:ACTIVATIONS, as the benchmarks' command line has it.
  [[nodiscard]] std::string name() const {
    return line["model"].get<std::string>() + ':' + line["weights"].get<std::string>() + ':' +
           line["activations"].get<std::string>();
  }
};

// The file's lines with uniform routing.
inline std::vector<Measured> ReadMeasured(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file.is_open()) << path;
  std::vector<Measured> out;
  for (std::string text; std::getline(file, text);) {
    Measured one{nlohmann::json::parse(text), {}};
    if (one.line["routing"] != "uniform") {
      continue;
    }
    const bench::ModelShape* shape = bench::FindShape(one.line["model"].get<std::string>());
    if (shape == nullptr) {
      ADD_FAILURE() << path << ": no such model: " << text;
      continue;
    }
    one.spec = shape->spec;
    one.spec.shared.count = 0;
    one.spec.weights = ParseWeightFormat(one.line["weights"].get<std::string>());
    one.spec.activations = ParseActivationFormat(one.line["activations"].get<std::string>());
    out.push_back(std::move(one));
  }
  return out;
}

}  // namespace hopyard::test
