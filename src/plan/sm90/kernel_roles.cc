// SPDX-License-Identifier: Apache-2.0
#include "plan/sm90/kernel_roles.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

namespace hopyard::sm90 {
namespace {

using gemm::sm90::KernelAt;
using gemm::sm90::MnMajorTwin;
using gemm::sm90::NumKernels;

// Kernels for K-major weights as checkpoints have them; those for MN-major and packed ones stand in
// for them when a call brings such.
std::vector<int> KernelsThatRun(const Role& role) {
  std::vector<int> kernels;
  for (int i = 0; i < NumKernels(); ++i) {
    const gemm::sm90::KernelInfo kernel = KernelAt(i);
    if (!kernel.mn_major && !kernel.packed &&
        gemm::sm90::Runs(i, role.shape.weights, role.rows, role.gated)) {
      kernels.push_back(i);
    }
  }
  return kernels;
}

bool HasName(int index, const std::string& name) {
  return index >= 0 && KernelAt(index).name == name;
}

// GEMM1 and GEMM2 of a group of experts.
void AddRoles(const MoeSpec& spec, const GroupFormats& formats, bool shared,
              const WeightOrders& orders, std::vector<Role>* roles) {
  Role first;
  first.name = shared ? "GEMM1 of shared experts" : "GEMM1";
  first.rows = formats.operands.x;
  first.gated = IsGated(spec.activation.kind);
  first.rounded = formats.operands.h.format != Format::kBf16;
  first.fused = formats.operands.fused_h;
  first.shape = {formats.weights, spec.hidden_size, spec.intermediate_size,
                 shared ? 0 : spec.num_local_experts(),
                 (shared ? orders.shared_gemm1 : orders.gemm1) == ReadOrder::kPacked};
  first.shared_experts = shared ? spec.shared.count : 0;
  Role second;
  second.name = shared ? "GEMM2 of shared experts" : "GEMM2";
  second.rows = formats.operands.h;
  second.shape = {formats.weights, spec.intermediate_size, spec.hidden_size, first.shape.experts,
                  (shared ? orders.shared_gemm2 : orders.gemm2) == ReadOrder::kPacked};
  second.shared_experts = first.shared_experts;
  for (Role* role : {&first, &second}) {
    role->kernels = KernelsThatRun(*role);
    roles->push_back(std::move(*role));
  }
}

}  // namespace

std::vector<Role> RolesOf(const MoeSpec& spec, bool rounded, const WeightOrders& orders) {
  std::vector<Role> roles;
  AddRoles(spec, FormatsOf(spec, spec.weights, rounded), false, orders, &roles);
  if (spec.shared.count > 0 && spec.shared.weights != spec.weights) {
    AddRoles(spec, FormatsOf(spec, spec.shared.weights, rounded), true, orders, &roles);
  } else {
    roles[0].shared_experts = spec.shared.count;
    roles[1].shared_experts = spec.shared.count;
  }
  return roles;
}

bool Fits(int index, const Role& role) {
  return std::find(role.kernels.begin(), role.kernels.end(), index) != role.kernels.end();
}

int FindKernel(const Role& role, const std::string& name) {
  for (int i = 0; i < NumKernels(); ++i) {
    const bool named = HasName(i, name) || HasName(MnMajorTwin(i, false), name) ||
                       HasName(MnMajorTwin(i, true), name);
    if (Fits(i, role) && named) {
      return i;
    }
  }
  return -1;
}

bool RoundsApart(int index, const Role& role) {
  return role.rounded && !(role.fused && KernelAt(index).rounds);
}

int KernelThatRuns(int index, const Role& role) {
  const int twin = role.shape.packed ? gemm::sm90::PackedTwin(index) : -1;
  return twin < 0 ? index : twin;
}

std::pair<int, bool> OutcomeOf(int index, const Role& role) {
  return {KernelThatRuns(index, role), RoundsApart(index, role)};
}

std::string NoPackedKernel(WeightFormat weights, int index) {
  return fmt::format(
      "there is no kernel for packed {} weights in place of {} (HOPYARD_KERNELS=dev has none at "
      "all); make Weights without packed",
      ToString(weights), KernelAt(index).name);
}

int KernelOf(const TileChoice& choice, size_t number) {
  const GroupKernels& kernels = number < 2 ? choice.routed : choice.shared;
  return number % 2 == 0 ? kernels.gemm1 : kernels.gemm2;
}

bool HasRounding(const MoeSpec& spec) {
  return gemm::sm90::RoundedOperandsOf(spec.weights, spec.activations).has_value();
}

double Microseconds(int index, const Role& role, const Batch& batch) {
  double sum = 0.0;
  gemm::sm90::GemmShape shape = role.shape;
  for (const gemm::sm90::RowSpread* rows : {&batch.routed, &batch.shared}) {
    if (shape.experts > 0) {
      sum += EstimateMicroseconds(index, shape, *rows);
      if (RoundsApart(index, role)) {
        sum += gemm::sm90::EstimateRounding(rows->average() * static_cast<double>(shape.experts),
                                            shape.features);
      }
    }
    shape.experts = role.shared_experts;
  }
  return sum;
}

}  // namespace hopyard::sm90
