// SPDX-License-Identifier: Apache-2.0
// The tuner: which tactic wins for which numbers of tokens. A state machine over a Lab; does no
// work of its own. docs/tuning.md tells its rules.
#pragma once

#include <cstdint>
#include <exception>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "hopyard/tune.h"

#include "tune/lab.h"
#include "tune/race.h"

namespace hopyard::tune {

struct TunerResult {
  std::vector<TunedRange> ranges;
  std::vector<TuningFault> faults;
  int64_t measured = 0;  // tactics that ran, once per number of tokens
};

class Tuner {
 public:
  // Of the options, what the rules need: max_seconds, margin, blocklist, progress, measured.
  // `tokens` ascend.
  Tuner(Lab* lab, std::vector<int64_t> tokens, const TuneOptions& options);

  // Throws what the options' functions throw; a lab's errors are faults.
  [[nodiscard]] TunerResult Run();

 private:
  // Candidates at a number of tokens, as far as they may run.
  struct Field {
    std::string untuned;
    std::string reference;  // `untuned`, or what stands in for it where it may not run
    std::vector<std::string> gemm1;
    std::vector<std::string> gemm2;
  };

  void MeasureBuckets();
  // Beyond the largest bucket its winner has not been measured yet.
  void ValidateAbove();
  // On both sides of a change of the untuned choice that a winner stands beside.
  void ValidateChanges();
  // Where the same tactic won at two numbers of tokens far from each other.
  void ValidateBetween();
  // Where the untuned choice was kept that has failed since.
  void MeasureBrokenAgain();
  void DropUnproven();
  [[nodiscard]] bool MeasureMore(int64_t tokens, const std::vector<std::string>& among);
  void RefineBorders();
  void RefineBorder(int64_t low, int64_t high);
  // Races at `tokens`: of `among` if given, else of the whole field. False where there is no
  // result; then a fault says why.
  bool Measure(int64_t tokens, double deadline, const std::vector<std::string>* among);
  // True where the reference broke: another is to take its place.
  bool MeasureOnce(int64_t tokens, double deadline, const std::vector<std::string>* among);
  void RunRace(Race* race, Field field, int64_t tokens, double deadline,
               const std::vector<std::string>* among);
  [[nodiscard]] Decision RaceAll(Race* race, const Field& field, int64_t tokens, double deadline);
  [[nodiscard]] Field FieldAt(int64_t tokens);
  [[nodiscard]] std::vector<std::string> StandIns(const Field& field, int64_t tokens);
  void KeepFailures(const Race& race, int64_t tokens);

  [[nodiscard]] bool Allowed(const std::string& tactic) const;
  // As Allowed, and that its kernels fit; reports what the blocklist keeps out.
  bool Admit(const std::string& tactic, int64_t tokens);
  void Fault(const std::string& tactic, int64_t tokens, const std::string& reason);
  [[nodiscard]] std::string UntunedAt(int64_t tokens) const;
  [[nodiscard]] std::vector<std::string> WinnersBelow(int64_t tokens) const;
  [[nodiscard]] bool Over() const;
  [[nodiscard]] std::string WhyOver() const;
  [[nodiscard]] bool Pulse(TuneProgress progress);
  void ReportTimes(const Race& race, int64_t tokens);
  [[nodiscard]] double SecondsLeft() const;
  [[nodiscard]] int64_t LastWithUntuned(int64_t low, int64_t high) const;
  [[nodiscard]] int64_t BorderBetween(const TunedRange& low, const TunedRange& high) const;
  [[nodiscard]] std::vector<TunedRange> Ranges() const;

  Lab* lab_;
  std::vector<int64_t> tokens_;
  const TuneOptions& options_;
  double begin_ = 0.0;
  double end_ = 0.0;
  RaceEnd ended_ = RaceEnd::kNone;
  std::exception_ptr callers_error_;
  int64_t done_ = 0;  // of tokens_
  int64_t measured_ = 0;
  std::set<std::string> blocklist_;
  std::set<std::string> broken_;          // tactics and kernels that are not run again
  std::set<std::string> reported_;        // of the blocklist
  bool finite_ = true;                    // whether some kernel's output is
  std::map<int64_t, TunedRange> points_;  // by number of tokens; `last` is set at the end
  std::vector<TuningFault> faults_;
};

}  // namespace hopyard::tune
