// SPDX-License-Identifier: Apache-2.0
// Ranges as a profiler sees them: this program is one, by the symbol that NVTX looks for. No GPU.
#include <string>
#include <vector>

#include <gtest/gtest.h>
// Types alone: the functions are in the library, where this program wants to be found by them.
#define NVTX_NO_IMPL
#include <nvtx3/nvToolsExt.h>

#include "device/range.h"

namespace hopyard::device {
namespace {

std::vector<std::string>& Seen() {
  static std::vector<std::string> seen;
  return seen;
}

// The one domain of this test; any address will do.
int the_domain = 0;

nvtxDomainHandle_t CreateDomain(const char* name) {
  Seen().push_back(std::string("domain ") + name);
  return reinterpret_cast<nvtxDomainHandle_t>(&the_domain);
}
int Push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* attributes) {
  Seen().push_back(std::string(static_cast<void*>(domain) == &the_domain ? "push " : "lost ") +
                   attributes->message.ascii);
  return 0;
}
int Pop(nvtxDomainHandle_t domain) {
  Seen().emplace_back(static_cast<void*>(domain) == &the_domain ? "pop" : "lost");
  return 0;
}

template <class Function>
void Set(NvtxFunctionTable table, int id, Function function) {
  *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

int Inject(NvtxGetExportTableFunc_t get) {
  const auto* const callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr ||
      callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0) {
    return 0;
  }
  Set(table, NVTX_CBID_CORE2_DomainCreateA, &CreateDomain);
  Set(table, NVTX_CBID_CORE2_DomainRangePushEx, &Push);
  Set(table, NVTX_CBID_CORE2_DomainRangePop, &Pop);
  return 1;
}

TEST(Range, ProfilerSeesNestedNames) {
  PrepareRanges();
  PrepareRanges();
  {
    const Range layer("hopyard layer");
    const Range kernel("bf16_m128n16_s6");
  }
  EXPECT_EQ(Seen(), (std::vector<std::string>{"domain hopyard", "push hopyard layer",
                                              "push bf16_m128n16_s6", "pop", "pop"}));
}

}  // namespace
}  // namespace hopyard::device

extern "C" {
// NVTX has a weak null of this name (nvtxDetail/nvtxInit.h).
NvtxInitializeInjectionNvtxFunc_t InitializeInjectionNvtx2_fnptr = hopyard::device::Inject;
}
