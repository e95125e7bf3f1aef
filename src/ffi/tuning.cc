// SPDX-License-Identifier: Apache-2.0
// Measuring from Python.
#include <cstdint>
#include <string>
#include <vector>

#include <tvm/ffi/function.h>

#include "hopyard/tune.h"

#include "objects.h"

namespace hopyard::binding {
namespace {

namespace ffi = tvm::ffi;

std::vector<std::string> TextsOf(const Fields& fields, const char* key) {
  std::vector<std::string> texts;
  for (const ffi::String& text : fields.Get<ffi::Array<ffi::String>>(key, {})) {
    texts.emplace_back(text);
  }
  return texts;
}

TuneOptions TuneOptionsOf(const Fields& fields) {
  TuneOptions options;
  for (const int64_t tokens : fields.Get<ffi::Array<int64_t>>("tokens", {})) {
    options.tokens.push_back(tokens);
  }
  std::vector<std::string> routings = TextsOf(fields, "routings");
  if (!routings.empty()) {
    options.routings = std::move(routings);
  }
  options.recorded = fields.View("recorded");
  options.max_seconds = fields.Get<double>("max_seconds", options.max_seconds);
  options.margin = fields.Get<double>("margin", options.margin);
  options.max_bytes = fields.Get<int64_t>("max_bytes", options.max_bytes);
  options.blocklist = TextsOf(fields, "blocklist");
  options.seed = static_cast<uint64_t>(fields.Get<int64_t>("seed", 1));
  return options;
}

Dict DictOf(const TuneProgress& progress) {
  return Dict{{"done", progress.done},
              {"total", progress.total},
              {"tokens", progress.tokens},
              {"candidates", progress.candidates},
              {"best", ffi::String(progress.best)},
              {"best_us", progress.best_us},
              {"seconds", progress.seconds},
              {"seconds_left", progress.seconds_left}};
}

// `progress` takes a map and returns whether to go on, `measured` takes (tactic, tokens, us).
TuningTableRef TuneFn(const PlanRef& plan, const WeightsRef& weights, const Dict& options,
                      const ffi::Function& progress, const ffi::Function& measured,
                      int64_t stream) {
  return Guarded([&] {
    TuneOptions parsed = TuneOptionsOf(Fields(options));
    parsed.progress = [&](const TuneProgress& now) {
      return progress(DictOf(now)).template cast<bool>();
    };
    parsed.measured = [&](const TuningTime& time) {
      measured(ffi::String(time.tactic), time.tokens, time.us);
    };
    return TuningTableRef(Tune(plan->plan, weights->weights, parsed, StreamOf(stream)));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(tune, TuneFn);

}  // namespace hopyard::binding
