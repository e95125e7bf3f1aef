// SPDX-License-Identifier: Apache-2.0
#include <nvtx3/nvToolsExt.h>

#include "device/range.h"

namespace hopyard::device {
namespace {

// Null without a profiler.
nvtxDomainHandle_t Domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("hopyard");
  return domain;
}

}  // namespace

void PrepareRanges() {
  nvtxInitialize(nullptr);
  Domain();
}

Range::Range(const char* name) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  nvtxDomainRangePushEx(Domain(), &attributes);
}

Range::~Range() {
  nvtxDomainRangePop(Domain());
}

}  // namespace hopyard::device
