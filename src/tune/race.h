// SPDX-License-Identifier: Apache-2.0
// Tactics against each other at one number of tokens, in turns.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tune/lab.h"
#include "tune/paired_times.h"

namespace hopyard::tune {

// Why a tactic left the race for good, or for this number of tokens.
struct Failure {
  std::string tactic;
  std::string reason;
  bool everywhere = false;  // it would fail at other numbers of tokens, too
  bool broke = false;       // its kernels ran, or tried to: they are not trusted in other pairs
};

// Ends the race without a result. kNoReference: the reference failed, and the failures say why.
enum class RaceEnd : uint8_t { kNone, kStopped, kDeviceLost, kNoReference };

struct RaceRules {
  double margin = 0.0;  // a winner is faster by more than this, and by twice the noise
  // In whose place others are tried where it fails, or its output is not finite and another's is.
  std::function<std::vector<std::string>()> stand_ins;
  bool finite = true;  // whether an output that is not finite is worth a stand-in
  // Called between measurements with what is still racing, and the fastest and its time; false
  // stops.
  std::function<bool(int candidates, const std::string& best, double best_us)> pulse;
};

struct Standing {
  std::string tactic;
  double us = 0.0;               // median of a call, over all kinds of routing
  Difference against;            // the reference, over all kinds of routing together
  bool loses_somewhere = false;  // in one kind of routing, by more than counts as equal
};

struct Decision {
  std::string tactic;
  double us = 0.0;
  double reference_us = 0.0;
  double noise = 0.0;  // of the difference between the two
};

class Race {
 public:
  Race(Lab* lab, Bench* bench, std::string reference, RaceRules rules);

  // Prepares and runs the reference, or what stands in for it.
  void EnterReference();
  [[nodiscard]] const std::string& reference() const { return reference_; }
  // What is not finite of the reference's output, where no candidate's is finite.
  [[nodiscard]] const std::string& not_finite() const { return not_finite_; }
  // A few rounds of all of `tactics` and the reference; the slow leave early. Fastest first, the
  // reference among them; tactics that failed are not. Behind the deadline (of Lab::Seconds)
  // nothing new is tried, and two rounds must do.
  [[nodiscard]] std::vector<Standing> Screen(const std::vector<std::string>& tactics,
                                             double deadline);
  // Rounds enough to tell `tactics` from the reference, the fewest behind the deadline.
  // `favourites` win where they are as fast as the fastest.
  [[nodiscard]] Decision Final(const std::vector<std::string>& tactics,
                               const std::vector<std::string>& favourites, double deadline);

  // Nothing more is measured once this is not kNone; results are to be thrown away then.
  [[nodiscard]] RaceEnd end() const { return end_; }
  [[nodiscard]] const std::vector<Failure>& failures() const { return failures_; }
  // Tactics that ran and have not failed.
  [[nodiscard]] std::vector<std::string> Ran() const;
  // Median times of those that took part to the end of a screening or the final; the last counts.
  [[nodiscard]] const std::map<std::string, double>& times() const { return times_; }

 private:
  struct Runner {
    std::string tactic;
    std::vector<std::vector<double>> times;  // [kind][round]
  };

  // A tactic that may be the reference.
  struct Tried {
    std::string tactic;
    double us = 0.0;
    std::string not_finite;  // what is to be said of its output
  };

  // Prepares and runs it; false where that failed.
  bool Try(Tried* one);
  // Prepares a tactic, runs it once and looks at its output with each kind of routing, where that
  // has not been done; false where it failed.
  bool Enter(const std::string& tactic);
  void Fail(const std::string& tactic, const std::string& reason, bool everywhere, bool broke);
  void FailWithCurrentException(const std::string& tactic);
  // The reference, then those of `tactics` that enter.
  [[nodiscard]] std::vector<Runner> Line(const std::vector<std::string>& tactics, double deadline);
  void RunOnce(int kind, Runner* runner);
  // One more round of every runner; those that fail leave.
  void RunRound(size_t round, std::vector<Runner>* runners);
  [[nodiscard]] Standing StandingOf(const Runner& runner, const Runner& reference) const;
  void DropSlow(size_t round, std::vector<Runner>* runners) const;
  [[nodiscard]] bool Wins(const Standing& standing) const;
  [[nodiscard]] bool Decided(const std::vector<Runner>& runners) const;
  // Long calls, and as much alike as a few rounds can tell.
  [[nodiscard]] bool Steady(const std::vector<Runner>& runners) const;
  void Pulse(const std::vector<Runner>& runners);

  Lab* lab_;
  Bench* bench_;
  std::string reference_;
  RaceRules rules_;
  RaceEnd end_ = RaceEnd::kNone;
  double reference_first_us_ = 0.0;
  std::string not_finite_;
  std::set<std::string> entered_;
  std::set<std::string> failed_;
  std::vector<Failure> failures_;
  std::map<std::string, double> times_;
};

}  // namespace hopyard::tune
