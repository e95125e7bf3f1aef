// SPDX-License-Identifier: Apache-2.0
// The command line that bench_forward and bench_gemm share:
//
//   COMMIT CASE ... [--tokens=1,8,64] [--routing=uniform,balanced,zipf,hot] [--tactic=NAME]
//   [--untuned] [--shared] [--packed]
//
// CASE is MODEL[:WEIGHTS:ACTIVATIONS[:TOKENS]], e.g. qwen3-30b-a3b:mxfp4:fp8_block128:1,8,64.
// Routed experts only, unless --shared keeps the model's shared ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "hopyard/error.h"

#include "bench/gpu.h"
#include "bench/routings.h"
#include "bench/shapes.h"
#include "core/error.h"

namespace hopyard::bench {

struct Case {
  ModelShape shape;
  std::vector<int64_t> tokens;
  std::vector<std::string> routings;
  std::string tactic;  // empty: not given
  bool untuned = false;
  bool packed = false;
  bool shared = false;
};

inline std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, separator);) {
    parts.push_back(part);
  }
  return parts;
}

inline std::vector<int64_t> ParseTokens(const std::string& list) {
  std::vector<int64_t> tokens;
  for (const std::string& count : Split(list, ',')) {
    HOPYARD_CHECK(!count.empty() && count.find_first_not_of("0123456789") == std::string::npos &&
                      std::stoll(count) > 0,
                  kInvalidArgument)
        << "tokens '" << list << "'; wanted numbers from 1 on with commas between them";
    tokens.push_back(std::stoll(count));
  }
  return tokens;
}

// The named case; `options` has what its name leaves open.
inline Case ParseCase(const std::string& name, const Case& options) {
  const std::vector<std::string> parts = Split(name, ':');
  HOPYARD_CHECK(parts.size() == 1 || parts.size() == 3 || parts.size() == 4, kInvalidArgument)
      << "case '" << name << "'; wanted MODEL, MODEL:WEIGHTS:ACTIVATIONS or both and :TOKENS";
  const ModelShape* known = FindShape(parts[0]);
  HOPYARD_CHECK(known != nullptr, kInvalidArgument)
      << "no model " << parts[0] << "; known: " << ShapeNames();
  Case out = options;
  out.shape = *known;
  if (!options.shared) {
    out.shape.spec.shared.count = 0;
  }
  if (parts.size() >= 3) {
    out.shape.spec.weights = ParseWeightFormat(parts[1]);
    out.shape.spec.activations = ParseActivationFormat(parts[2]);
  }
  if (parts.size() == 4) {
    out.tokens = ParseTokens(parts[3]);
  }
  return out;
}

// Takes --tokens=, --routing=, --tactic=, --untuned, --shared and --packed; false for anything
// else.
inline bool TakeOption(const std::string& argument, Case* options) {
  const size_t end = argument.find('=');
  const std::string name = argument.substr(0, end);
  const std::string value = end == std::string::npos ? "" : argument.substr(end + 1);
  if (name == "--tokens") {
    options->tokens = ParseTokens(value);
  } else if (name == "--routing") {
    options->routings = Split(value, ',');
    std::for_each(options->routings.begin(), options->routings.end(), CheckRoutingName);
  } else if (name == "--tactic") {
    options->tactic = value;
  } else if (argument == "--untuned") {
    options->untuned = true;
  } else if (argument == "--packed") {
    options->packed = true;
  } else if (argument == "--shared") {
    options->shared = true;
  } else {
    return false;
  }
  return true;
}

// main of a benchmark: `run(machine, case)` for every case of the command line.
template <class Run>
int BenchCases(int argc, char** argv, Run&& run) {
  try {
    Case options;
    options.tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384};
    options.routings = {"uniform"};
    std::vector<std::string> names(argv + std::min(argc, 2), argv + argc);
    names.erase(std::remove_if(names.begin(), names.end(),
                               [&](const std::string& name) { return TakeOption(name, &options); }),
                names.end());
    if (names.empty()) {
      std::cerr
          << "usage: " << argv[0]
          << " COMMIT MODEL[:WEIGHTS:ACTIVATIONS[:TOKENS]] ... [--tokens=1,8] "
             "[--routing=uniform,zipf] [--tactic=NAME] [--untuned] [--shared] [--packed]; models: "
          << ShapeNames() << '\n';
      return 2;
    }
    std::vector<Case> cases(names.size());
    std::transform(names.begin(), names.end(), cases.begin(),
                   [&](const std::string& name) { return ParseCase(name, options); });
    const Machine machine = DescribeMachine(argv[1]);
    std::for_each(cases.begin(), cases.end(), [&](const Case& one) { run(machine, one); });
    return 0;
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
}

}  // namespace hopyard::bench
