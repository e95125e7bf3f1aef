// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace hopyard {

// Instruction sets that CPU kernels are compiled for, weakest first.
enum class Isa { kScalar, kAvx2, kAvx512 };

[[nodiscard]] std::string_view ToString(Isa isa);  // "scalar", "avx2", "avx512"

// The best set that this machine and operating system run. HOPYARD_CPU_ISA=scalar|avx2|avx512, read
// once, lowers it; a value above what the machine has, or an unknown one, is an error.
[[nodiscard]] Isa BestIsa();

// As the operating system names it; "unknown" where it does not.
[[nodiscard]] std::string CpuModel();

}  // namespace hopyard
