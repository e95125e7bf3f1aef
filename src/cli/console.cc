// SPDX-License-Identifier: Apache-2.0
#include "cli/console.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fmt/core.h>
#include <unistd.h>

#include "core/error.h"

namespace hopyard::cli {
namespace {

constexpr int kBarWidth = 32;
constexpr double kBarInterval = 0.1;
constexpr double kLineInterval = 5.0;

// Set once by main before any work starts.
ProgressMode g_progress_mode = ProgressMode::kOff;

void DrawBar(std::string_view label, double share, std::string_view text) {
  const int filled = static_cast<int>(share * kBarWidth);
  fmt::print(stderr, "\r{} [{:=<{}}{:>{}}] {:3.0f} %  {} \x1b[K", label, "", filled, "",
             kBarWidth - filled, share * 100.0, text);
}

}  // namespace

ProgressMode ParseProgressMode(std::string_view name) {
  if (name == "auto") {
    return isatty(STDERR_FILENO) != 0 ? ProgressMode::kBar : ProgressMode::kLines;
  }
  if (name == "bar") {
    return ProgressMode::kBar;
  }
  if (name == "lines") {
    return ProgressMode::kLines;
  }
  HOPYARD_CHECK(name == "off", kInvalidArgument)
      << "--progress is '" << name << "'; wanted auto, bar, lines or off";
  return ProgressMode::kOff;
}

void SetProgressMode(ProgressMode mode) {
  g_progress_mode = mode;
}

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)), total_(std::max<int64_t>(total, 1)), start_(Clock::now()) {}

Progress::~Progress() {
  if (drawn_ && g_progress_mode == ProgressMode::kBar) {
    std::fputs("\r\x1b[K", stderr);
    std::fflush(stderr);
  }
}

void Progress::Advance(int64_t count) {
  done_.fetch_add(count, std::memory_order_relaxed);
  if (g_progress_mode == ProgressMode::kOff) {
    return;
  }
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) {
    return;
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  if (seconds >= next_draw_seconds_) {
    Draw(seconds);
    next_draw_seconds_ =
        seconds + (g_progress_mode == ProgressMode::kBar ? kBarInterval : kLineInterval);
  }
}

void Progress::Draw(double seconds) {
  const int64_t done = std::min(done_.load(std::memory_order_relaxed), total_);
  const double share = static_cast<double>(done) / static_cast<double>(total_);
  const double left = done > 0 ? seconds * (1.0 - share) / share : 0.0;
  if (g_progress_mode == ProgressMode::kLines) {
    fmt::print(stderr, "{}: {:.0f} % ({} of {}), {:.0f} s left\n", label_, share * 100.0, done,
               total_, left);
  } else {
    DrawBar(label_, share, fmt::format("{:.0f} s left", left));
  }
  std::fflush(stderr);
  drawn_ = true;
}

StatusLine::~StatusLine() {
  if (drawn_ && g_progress_mode == ProgressMode::kBar) {
    std::fputs("\r\x1b[K", stderr);
    std::fflush(stderr);
  }
}

void StatusLine::Show(double share, const std::function<std::string()>& text) {
  const Clock::time_point now = Clock::now();
  if (g_progress_mode == ProgressMode::kOff || now < next_) {
    return;
  }
  const bool bar = g_progress_mode == ProgressMode::kBar;
  next_ = now + std::chrono::milliseconds(
                    static_cast<int64_t>(1e3 * (bar ? kBarInterval : kLineInterval)));
  if (bar) {
    DrawBar("", share, text());
  } else {
    fmt::print(stderr, "{:.0f} %  {}\n", share * 100.0, text());
  }
  std::fflush(stderr);
  drawn_ = true;
}

void PrintJson(const Json& value) {
  fmt::print("{}\n", value.dump(-1, ' ', false, Json::error_handler_t::replace));
  std::fflush(stdout);
}

void PrintNote(std::string_view text) {
  fmt::print(stderr, "note: {}\n", text);
}

void PrintError(std::string_view kind, std::string_view message, bool json) {
  fmt::print(stderr, "error: {}\n", message);
  if (json) {
    PrintJson({{"error", {{"kind", kind}, {"message", message}}}});
  }
}

std::string HumanBytes(int64_t bytes) {
  constexpr double kMiB = 1024.0 * 1024.0;
  const double mib = static_cast<double>(bytes) / kMiB;
  return mib >= 1024.0 ? fmt::format("{:.1f} GiB", mib / 1024.0) : fmt::format("{:.1f} MiB", mib);
}

}  // namespace hopyard::cli
