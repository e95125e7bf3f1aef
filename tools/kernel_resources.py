# SPDX-License-Identifier: Apache-2.0
"""Registers and memory of every kernel of configs.def, beside the committed ones.

    python3 tools/kernel_resources.py BUILD_FOLDER [--update]

Builds nothing: reads what ptxas said of each kernel when BUILD_FOLDER was built with every row
(preset cuda-full), which cmake/keep_ptxas.sh keeps beside each object. Columns: name, registers per
thread, bytes of static shared memory, of stack and of spills (stores and loads), and waits that
ptxas put behind matrix products of its own accord (C7510, C7514 .. C7518), which is never meant:
they run one after the other. Dynamic shared memory follows from config.h. The numbers are those of
one nvcc release: another toolkit may need another file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "src/gemm/sm90/configs.def"
GOLDEN = ROOT / "src/gemm/sm90/resources.golden"
UPDATE = "python3 tools/kernel_resources.py build/cuda --update"
HEADER = f"""\
# SPDX-License-Identifier: Apache-2.0
# What ptxas gives the kernels of each row of configs.def; written by `{UPDATE}`.
# name registers static_smem stack spills waits
"""

_ROW = re.compile(r"HOPYARD_GEMM_CONFIG\(\s*(\w+)")
_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
# Mangled: GroupedGemmKernel<TableRow<index, plain>>.
_TABLE_ROW = re.compile(r"GroupedGemmKernel.*TableRowILi(\d+)ELb([01])E")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
_WAIT = re.compile(r"\(C75\d\d\).* in (?:the )?function '(\S+)'")


@dataclass(frozen=True)
class Resources:
    """What one thread or block takes; bytes but for the registers."""

    registers: int
    static_smem: int
    stack: int
    spills: int
    waits: int

    def __str__(self) -> str:
        return " ".join(str(value) for value in astuple(self))


def kernel_names(table: str) -> list[str]:
    """Both kernels of every row, the general one and the plain one, by the row's index."""
    lines = [line for line in table.splitlines() if not line.startswith("//")]
    rows = _ROW.findall("\n".join(lines))
    return [name + suffix for name in rows for suffix in ("", ".plain")]


def _kernel_of(entry: str) -> int | None:
    """Where the kernel of a mangled name is among kernel_names; None: it is another one."""
    row = _TABLE_ROW.search(entry)
    return 2 * int(row[1]) + int(row[2]) if row else None


def parse_log(log: str) -> dict[int, Resources]:
    """Resources by place in kernel_names from what `ptxas -v` prints; others are passed over."""
    found: dict[int, Resources] = {}
    waits = Counter(map(_kernel_of, _WAIT.findall(log)))
    index: int | None = None
    frame = (0, 0)
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            index = _kernel_of(entry[1])
        elif match := _FRAME.search(line):
            frame = (int(match[1]), int(match[2]) + int(match[3]))
        elif (match := _USED.search(line)) and index is not None:
            smem = _SMEM.search(line)
            found[index] = Resources(
                int(match[1]), int(smem[1]) if smem else 0, *frame, waits[index]
            )
            index = None
    return found


def read_golden(text: str) -> dict[str, Resources]:
    """Resources by name from the committed file."""
    golden: dict[str, Resources] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, *values = line.split()
            golden[name] = Resources(*map(int, values))
    return golden


def name_rows(names: list[str], found: dict[int, Resources]) -> dict[str, Resources]:
    """By name, in the table's order; every kernel must be there."""
    if sorted(found) != list(range(len(names))):
        raise SystemExit(
            f"kernel_resources: {len(found)} of configs.def's {len(names)} kernels were compiled "
            "there; wanted all of them: cmake --build the preset cuda-full"
        )
    return {name: found[index] for index, name in enumerate(names)}


def differences(got: dict[str, Resources], golden: dict[str, Resources]) -> Iterable[str]:
    """A line for each row that differs."""
    for name in sorted(got.keys() | golden.keys()):
        if got.get(name) != golden.get(name):
            yield f"{name}: got {got.get(name, 'nothing')}, wanted {golden.get(name, 'nothing')}"


def main(arguments: list[str]) -> int:
    """Compares, or updates; 1 where a row differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args(arguments)
    found: dict[int, Resources] = {}
    for log in options.build.rglob("families/*.ptxas"):
        found |= parse_log(log.read_text())
    got = name_rows(kernel_names(TABLE.read_text()), found)
    if options.update:
        GOLDEN.write_text(HEADER + "".join(f"{name} {row}\n" for name, row in got.items()))
        return 0
    golden = read_golden(GOLDEN.read_text()) if GOLDEN.exists() else {}
    wrong = list(differences(got, golden))
    for line in wrong:
        print(line)
    if wrong:
        print(
            f"columns: registers static_smem stack spills waits; where this is meant, run\n"
            f"  {UPDATE}"
        )
    else:
        print(f"kernel_resources: {len(got)} kernels as committed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
