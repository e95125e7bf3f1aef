// SPDX-License-Identifier: Apache-2.0
// A lab of made-up times for the tuner's tests: no layer, no clock but its own.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "hopyard/error.h"

#include "core/error.h"
#include "tune/lab.h"
#include "tune/tuner.h"

namespace hopyard::tune {

class FakeLab : public Lab {
 public:
  // Microseconds of a kernel; 0: those of `usual_us`.
  using Times = std::function<double(const std::string& kernel, int64_t tokens, int kind)>;

  Kernels kernels{"a+x", {"a", "b"}, {"x", "y"}};
  std::function<Kernels(int64_t tokens)> kernels_at = [this](int64_t) { return kernels; };
  Times time = [](const std::string&, int64_t, int) { return 50.0; };
  double noise = 0.0;      // relative standard deviation
  double overhead = 1e-3;  // seconds of a run beside the measured call
  int num_kinds = 2;
  uint64_t seed = 1;
  std::set<std::string> unfit;
  int64_t memory_for = 1 << 30;  // tokens
  bool lost_after_failure = false;
  // By kernel or tactic: what happens.
  std::map<std::string, std::function<void(int64_t tokens)>> on_prepare;
  std::map<std::string, std::function<void(int64_t tokens)>> on_run;
  std::map<std::string, std::string> wrong;       // what Check says
  std::map<std::string, std::string> not_finite;  // what NotFinite says
  int right_kinds = 0;                            // the first ones, with which nothing is wrong

  // What was done.
  std::vector<std::pair<int64_t, std::string>> runs;  // tokens, tactic
  std::vector<int> run_kinds;
  int64_t open_benches = 0;
  int recoveries = 0;
  double seconds = 100.0;

  [[nodiscard]] int kinds() const override { return num_kinds; }
  [[nodiscard]] Kernels KernelsAt(int64_t tokens) const override { return kernels_at(tokens); }
  [[nodiscard]] bool Fits(const std::string& tactic) const override {
    return unfit.count(tactic) == 0;
  }
  [[nodiscard]] std::unique_ptr<Bench> Open(int64_t tokens) override {
    HOPYARD_CHECK(tokens <= memory_for, kOutOfMemory)
        << tokens << " tokens need too much; have memory for " << memory_for;
    return std::make_unique<FakeBench>(this, tokens);
  }
  [[nodiscard]] bool Recover() override {
    ++recoveries;
    return !lost_after_failure;
  }
  [[nodiscard]] double Seconds() const override { return seconds; }

  [[nodiscard]] int64_t RunsOf(const std::string& tactic) const {
    int64_t count = 0;
    for (const auto& [tokens, name] : runs) {
      count += name == tactic ? 1 : 0;
    }
    return count;
  }
  // Both GEMMs of a call.
  [[nodiscard]] double TimeOf(const std::string& tactic, int64_t tokens, int kind) const {
    double us = 0.0;
    for (const std::string& kernel : PartsOf(tactic)) {
      us += time(kernel, tokens, kind);
    }
    return us;
  }

 private:
  [[nodiscard]] static std::vector<std::string> PartsOf(const std::string& tactic) {
    const size_t plus = tactic.find('+');
    if (plus == std::string::npos) {
      return {tactic};
    }
    return {tactic.substr(0, plus), tactic.substr(plus + 1)};
  }

  class FakeBench : public Bench {
   public:
    FakeBench(FakeLab* lab, int64_t tokens) : lab_(lab), tokens_(tokens) { ++lab_->open_benches; }
    FakeBench(const FakeBench&) = delete;
    FakeBench& operator=(const FakeBench&) = delete;
    ~FakeBench() override { --lab_->open_benches; }

    void Prepare(const std::string& tactic) override { Happen(lab_->on_prepare, tactic); }
    double Run(const std::string& tactic, int kind) override {
      lab_->runs.emplace_back(tokens_, tactic);
      lab_->run_kinds.push_back(kind);
      Happen(lab_->on_run, tactic);
      std::mt19937_64 random(lab_->seed * 1000003 + lab_->runs.size());
      const double us = lab_->TimeOf(tactic, tokens_, kind) *
                        (1.0 + lab_->noise * std::normal_distribution<double>()(random));
      lab_->seconds += lab_->overhead + 1e-6 * us;
      return us;
    }
    std::string Check(const std::string& tactic, const std::string& reference, int kind) override {
      EXPECT_NE(tactic, reference);
      // What is no number in the reference is not compared.
      const std::string wrong = TextOf(lab_->wrong, tactic, kind);
      return wrong.empty() && NotFinite(reference, kind).empty() ? NotFinite(tactic, kind) : wrong;
    }
    std::string NotFinite(const std::string& tactic, int kind) override {
      return TextOf(lab_->not_finite, tactic, kind);
    }

   private:
    [[nodiscard]] std::string TextOf(const std::map<std::string, std::string>& texts,
                                     const std::string& tactic, int kind) const {
      for (const std::string& kernel : PartsOf(tactic)) {
        if (kind >= lab_->right_kinds && texts.count(kernel) > 0) {
          return texts.at(kernel);
        }
      }
      return {};
    }
    void Happen(const std::map<std::string, std::function<void(int64_t)>>& events,
                const std::string& tactic) const {
      std::vector<std::string> names = PartsOf(tactic);
      names.push_back(tactic);
      for (const std::string& name : names) {
        if (events.count(name) > 0) {
          events.at(name)(tokens_);
          return;
        }
      }
    }

    FakeLab* lab_;
    int64_t tokens_;
  };
};

// Times of single kernels, whatever the tokens and the routing.
inline FakeLab::Times TimesOf(std::map<std::string, double> us) {
  return [us = std::move(us)](const std::string& kernel, int64_t, int) { return us.at(kernel); };
}

inline TunerResult Tune(FakeLab* lab, const std::vector<int64_t>& tokens,
                        const TuneOptions& options = {}) {
  TunerResult tuned = Tuner(lab, tokens, options).Run();
  EXPECT_EQ(lab->open_benches, 0) << "a bench was left open";
  return tuned;
}

inline const TuningFault* FindFault(const TunerResult& tuned, const std::string& tactic) {
  const auto found = std::find_if(tuned.faults.begin(), tuned.faults.end(),
                                  [&](const TuningFault& fault) { return fault.tactic == tactic; });
  return found == tuned.faults.end() ? nullptr : &*found;
}

// What runs so many tokens; empty where no range does.
inline TunedRange RangeAt(const TunerResult& tuned, int64_t tokens) {
  const auto found = std::find_if(tuned.ranges.begin(), tuned.ranges.end(),
                                  [&](const TunedRange& range) { return tokens <= range.last; });
  return found == tuned.ranges.end() ? TunedRange() : *found;
}

inline std::string Shown(const TunerResult& tuned) {
  std::string text;
  for (const TunedRange& range : tuned.ranges) {
    text += ".." + std::to_string(range.last) + ' ' + range.tactic + '\n';
  }
  for (const TuningFault& fault : tuned.faults) {
    text += fault.tactic + " at " + std::to_string(fault.tokens) + ": " + fault.reason + '\n';
  }
  return text;
}

}  // namespace hopyard::tune
