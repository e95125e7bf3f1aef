// SPDX-License-Identifier: Apache-2.0
// What the commands write: results on stdout, everything else on stderr.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "hopyard/error.h"

namespace hopyard::cli {

using Json = nlohmann::ordered_json;

enum ExitCode : int {
  kExitOk = 0,
  kExitVerificationFailed = 1,
  kExitBadInput = 2,
  kExitInternal = 3,  // a defect of Hopyard
};

[[nodiscard]] constexpr ExitCode ExitCodeOf(ErrorKind kind) {
  return kind == ErrorKind::kInternal ? kExitInternal : kExitBadInput;
}

// Flags that every command takes.
struct CommonOptions {
  bool json = false;
  std::string progress = "auto";
};

enum class ProgressMode : uint8_t { kOff, kLines, kBar };

// "auto": a bar on a terminal, lines elsewhere; else bar, lines or off.
[[nodiscard]] ProgressMode ParseProgressMode(std::string_view name);
void SetProgressMode(ProgressMode mode);

// Progress of one piece of work on stderr. Silent for the first second, so that short work prints
// nothing. Advance may be called from several threads.
class Progress {
 public:
  Progress(std::string label, int64_t total);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress();

  void Advance(int64_t count = 1);

 private:
  using Clock = std::chrono::steady_clock;

  void Draw(double seconds);

  std::string label_;
  int64_t total_;
  Clock::time_point start_;
  std::mutex mutex_;
  std::atomic<int64_t> done_{0};
  double next_draw_seconds_ = 1.0;
  bool drawn_ = false;
};

// Progress on stderr of work that says itself how far it is: at most ten lines a second on a
// terminal, one in five seconds elsewhere.
class StatusLine {
 public:
  StatusLine() = default;
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;
  ~StatusLine();

  // `text` is asked for only where it is shown; `share` done, of 1.
  void Show(double share, const std::function<std::string()>& text);

 private:
  using Clock = std::chrono::steady_clock;

  Clock::time_point next_ = Clock::now() + std::chrono::seconds(1);
  bool drawn_ = false;
};

void PrintJson(const Json& value);  // one line on stdout
void PrintNote(std::string_view text);
void PrintError(std::string_view kind, std::string_view message, bool json);

// "1.2 GiB", "330 MiB".
[[nodiscard]] std::string HumanBytes(int64_t bytes);

}  // namespace hopyard::cli
