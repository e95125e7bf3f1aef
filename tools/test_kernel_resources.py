# SPDX-License-Identifier: Apache-2.0
"""kernel_resources reads what ptxas prints, names rows as the table does, and finds differences."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kernel_resources
from kernel_resources import Resources

NAMESPACE = "_ZN7hopyard4gemm4sm90"
KERNEL = (
    "17GroupedGemmKernelINS1_55_GLOBAL__N__a_7_b_cu_8TableRowILi{}ELb{}EEEEEvNS1_15GroupedGemmArgsE"
)


def log(index: int, spills: int, used: str) -> str:
    symbol = NAMESPACE + KERNEL.format(index // 2, index % 2)
    return (
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {symbol}\n"
        f"    8 bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
        f"ptxas info    : Used {used}, used 16 barriers\n"
        "ptxas info    : Compile time = 1.0 ms\n"
    )


def test_reads_rows_and_nothing_else() -> None:
    other = log(7, 0, "40 registers").replace("TableRow", "OtherRow")
    text = "nvcc warning\n" + log(1, 4, "224 registers") + other + log(0, 0, "168 registers")
    text += (
        "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are "
        f"serialized due to ... in the function '{NAMESPACE + KERNEL.format(0, 0)}'\n"
        "ptxas info    : (C7517) warpgroup.wait is injected in around line 9 by compiler to allow "
        f"use of registers defined by GMMA in function '{NAMESPACE + KERNEL.format(0, 0)}'\n"
    )
    text += log(12, 0, "90 registers").replace(" 16 barriers", " 16 barriers, 120 bytes smem")
    assert kernel_resources.parse_log(text) == {
        1: Resources(224, 0, 8, 8, 0),
        0: Resources(168, 0, 8, 0, 2),
        12: Resources(90, 120, 8, 0, 0),
    }


def test_names_are_those_of_the_table() -> None:
    table = (
        "// Included with HOPYARD_GEMM_CONFIG(name, fields) defined.\n"
        "HOPYARD_GEMM_CONFIG(a_m64n16_s8, .tokens = 16,\n    .stages = 8)\n"
        "HOPYARD_GEMM_CONFIG(\n    b_m64n32_s8, .tokens = 32)\n"
    )
    assert kernel_resources.kernel_names(table) == [
        "a_m64n16_s8",
        "a_m64n16_s8.plain",
        "b_m64n32_s8",
        "b_m64n32_s8.plain",
    ]
    assert kernel_resources.kernel_names(kernel_resources.TABLE.read_text())


def test_a_missing_row_is_no_agreement() -> None:
    row = Resources(1, 2, 3, 4, 0)
    assert kernel_resources.name_rows(["a", "b"], {0: row, 1: row}) == {"a": row, "b": row}
    for found in ({0: row}, {0: row, 1: row, 2: row}, {}):
        with pytest.raises(SystemExit, match=r"of configs\.def's 2 kernels"):
            kernel_resources.name_rows(["a", "b"], found)


def test_finds_every_difference() -> None:
    golden = kernel_resources.read_golden("# comment\n\na 1 2 3 4 0\nb 1 2 3 4 0\nc 1 2 3 4 0\n")
    got = {
        "a": Resources(1, 2, 3, 4, 0),
        "b": Resources(1, 2, 3, 5, 0),
        "d": Resources(9, 0, 0, 0, 1),
    }
    assert list(kernel_resources.differences(got, golden)) == [
        "b: got 1 2 3 5 0, wanted 1 2 3 4 0",
        "c: got nothing, wanted 1 2 3 4 0",
        "d: got 9 0 0 0 1, wanted nothing",
    ]
    assert not list(kernel_resources.differences(golden, golden))


def test_the_committed_file_has_the_tables_rows() -> None:
    names = kernel_resources.kernel_names(kernel_resources.TABLE.read_text())
    golden = kernel_resources.read_golden(kernel_resources.GOLDEN.read_text())
    assert list(golden) == names
    assert all(row.stack == row.spills == row.waits == 0 for row in golden.values())
