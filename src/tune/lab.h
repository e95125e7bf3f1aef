// SPDX-License-Identifier: Apache-2.0
// What the tuner needs of the world: candidates, something that runs them, a clock. The layer on
// its device is one (layer_lab.h), tests have others.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace hopyard::tune {

// Kernels of each GEMM by name, those worth a measurement, cheapest first; a tactic joins one of
// each by '+'. Where kernels run both GEMMs (CPU) `gemm2` is empty and a tactic is one of `gemm1`.
struct Kernels {
  std::string untuned;  // the tactic of a plan that nothing was measured for
  std::vector<std::string> gemm1;
  std::vector<std::string> gemm2;
};

// Runs tactics at one number of tokens. Whatever a call throws is the tactic's failure.
class Bench {
 public:
  Bench() = default;
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;
  virtual ~Bench() = default;

  // Comes before all else that is asked of the tactic.
  virtual void Prepare(const std::string& tactic) = 0;
  // Microseconds of a call with routing of this kind, the mean over the calls of one round.
  virtual double Run(const std::string& tactic, int kind) = 0;
  // What tells the tactic's output from that of `reference` with routing of this kind; empty:
  // nothing does.
  virtual std::string Check(const std::string& tactic, const std::string& reference, int kind) = 0;
  // Where the tactic's output with routing of this kind is no number; empty: nowhere.
  virtual std::string NotFinite(const std::string& tactic, int kind) = 0;
};

class Lab {
 public:
  Lab() = default;
  Lab(const Lab&) = delete;
  Lab& operator=(const Lab&) = delete;
  virtual ~Lab() = default;

  [[nodiscard]] virtual int kinds() const = 0;  // of routing, at least 1
  [[nodiscard]] virtual Kernels KernelsAt(int64_t tokens) const = 0;
  // Whether the kernels of a tactic fit each other at all.
  [[nodiscard]] virtual bool Fits(const std::string& tactic) const = 0;
  // Inputs and outputs for so many tokens; their memory goes with the bench. Throws where there is
  // not enough.
  [[nodiscard]] virtual std::unique_ptr<Bench> Open(int64_t tokens) = 0;
  // After something threw. False where the device is lost: nothing runs on it in this process.
  [[nodiscard]] virtual bool Recover() = 0;
  [[nodiscard]] virtual double Seconds() const = 0;  // a clock
};

}  // namespace hopyard::tune
