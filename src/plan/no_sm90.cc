// SPDX-License-Identifier: Apache-2.0
// Stands in for src/plan/sm90 in a build without CUDA.
#include "plan/backend_sm90.h"

namespace hopyard::sm90 {

const Backend* FindBackend() {
  return nullptr;
}

}  // namespace hopyard::sm90
