# SPDX-License-Identifier: Apache-2.0
"""Which layer may include which: the table of the layer rules, checked on every #include.

Layers are the folders of src/; `hopyard` is the public API. Tests, benchmarks and fuzz targets may
include any header. No .cc or .h includes a .cuh, whoever it belongs to: a build without CUDA needs
no #ifdef. Only .cu files launch kernels.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from check_common import (
    CPP_SUFFIXES,
    Violation,
    is_test,
    lines_of,
    read,
    report,
    source_files,
    strip_cpp,
)

_BASE = frozenset({"hopyard", "core", "formats"})
_STAGES = _BASE | {"device", "gemm", "spec", "checkpoint", "stages"}

# Layer -> layers (or single headers) that it may include. Its own are always allowed.
MAY_INCLUDE: dict[str, frozenset[str]] = {
    "hopyard": frozenset(),
    "core": frozenset({"hopyard"}),
    "formats": _BASE,
    "device": frozenset({"hopyard", "core"}),
    "gemm": _BASE | {"device"},
    "spec": _BASE,
    "checkpoint": _BASE,
    "stages": _STAGES,
    "fused": _STAGES,
    "plan": _STAGES | {"fused", "tune"},
    "tune": _STAGES | {"fused", "plan"},
    "ffi": frozenset({"hopyard"}),
    "cli": frozenset({"hopyard", "core", "checkpoint", "stages", "bench/shapes.h"}),
}

# Third-party headers -> layers that may use them.
_THIRD_PARTY: list[tuple[re.Pattern[str], frozenset[str]]] = [
    (re.compile(r"(tvm|dlpack)/"), frozenset({"ffi"})),
    (re.compile(r"CLI/"), frozenset({"cli"})),
    (re.compile(r"(torch|ATen|c10|Python\.h)"), frozenset()),
    (re.compile(r"(fmt|nlohmann)/"), frozenset(MAY_INCLUDE) - {"hopyard"}),
]
_CUDA = re.compile(r"(cuda|cooperative_groups|nccl|nv[A-Zt]|driver_types|vector_types|cublas)")
_CUDA_LAYERS = frozenset({"device", "gemm", "stages", "fused"})
_STANDARD = re.compile(r"[a-z_0-9]+$")

_INCLUDE = re.compile(r'^\s*#\s*include\s*(?P<open>[<"])(?P<name>[^>"]+)[>"]')


def layer_of(relative: str) -> str | None:
    """The layer a file belongs to; None where no rule holds."""
    if relative.startswith("include/hopyard/"):
        return "hopyard"
    parts = relative.split("/")
    if parts[0] == "src" and len(parts) > 2:
        return parts[1]
    return None


def _check_project_include(relative: str, layer: str, name: str) -> str | None:
    if name in MAY_INCLUDE[layer]:
        return None
    # src/ is not on the include path of the extension, so that it cannot reach another layer.
    if layer == "ffi" and "/" not in name:
        return None
    target = name.split("/")[0]
    if target not in MAY_INCLUDE or "/" not in name:
        return f'"{name}" is not a path from src/ or include/; write "<layer>/<file>.h"'
    if name.endswith((".cc", ".cu")):
        return f'"{name}": a source file is compiled, not included'
    if target != layer and target not in MAY_INCLUDE[layer]:
        allowed = ", ".join(sorted(MAY_INCLUDE[layer] | {layer}))
        return f'{layer} includes "{name}"; it may include only: {allowed}'
    if name.endswith(".cuh") and target == "stages" and layer == "stages":
        own_stage, its_stage = relative.split("/")[2], name.split("/")[1]
        if own_stage != its_stage:
            return f'stage {own_stage} includes "{name}" of another stage; only src/fused may'
    return None


def _check_system_include(relative: str, layer: str, name: str) -> str | None:
    if layer == "hopyard" and not _STANDARD.match(name):
        return f"public header includes <{name}>; only the C++ standard library is allowed"
    for pattern, layers in _THIRD_PARTY:
        if pattern.match(name) and layer not in layers:
            return f"{layer} includes <{name}>; allowed only in: {', '.join(sorted(layers)) or '-'}"
    if _CUDA.match(name):
        cuda_file = relative.endswith((".cu", ".cuh")) or layer == "device"
        if layer not in _CUDA_LAYERS or not cuda_file:
            return f"<{name}> outside src/device and .cu/.cuh of gemm, stages, fused"
    return None


def check_file(relative: str, text: str) -> list[Violation]:
    """Violations of one C++ or CUDA file, named by its path from the repository's root."""
    layer = layer_of(relative)
    violations = []
    for number, line in lines_of(strip_cpp(text, keep_strings=True)):
        if "<<<" in line and not relative.endswith(".cu"):
            violations.append(Violation(relative, number, "kernel launch outside a .cu file"))
        match = _INCLUDE.match(line)
        if not match:
            continue
        name = match["name"]
        message = None
        if name.endswith(".cuh") and relative.endswith((".cc", ".h")):
            message = f'"{name}": .cc and .h files never include a .cuh'
        elif layer is None or is_test(relative):
            continue
        elif layer not in MAY_INCLUDE:
            message = f"layer '{layer}' has no row in the table of tools/check_layers.py"
        elif match["open"] == '"':
            message = _check_project_include(relative, layer, name)
        else:
            message = _check_system_include(relative, layer, name)
        if message:
            violations.append(Violation(relative, number, message))
    return violations


def check(root: Path) -> list[Violation]:
    """Violations of the whole tree."""
    violations = []
    for path in source_files(root):
        if path.suffix in CPP_SUFFIXES:
            violations += check_file(path.relative_to(root).as_posix(), read(path))
    return violations


if __name__ == "__main__":
    sys.exit(report("check_layers", check))
