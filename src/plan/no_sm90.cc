// SPDX-License-Identifier: Apache-2.0
// Stands in for src/plan/sm90 in a build without CUDA.
#include "hopyard/error.h"

#include "plan/backend_sm90.h"

namespace hopyard::sm90 {

const Backend* FindBackend() {
  return nullptr;
}

const Backend& NeedBackend() {
  throw Error(ErrorKind::kUnsupported, kNoBackend);
}

}  // namespace hopyard::sm90
