# SPDX-License-Identifier: Apache-2.0
"""Each check script must find planted violations and leave innocent look-alikes alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import check_layers
import check_sizes
import check_text

CPP_LICENCE = "// SPDX-License-Identifier: Apache-2.0\n"


def messages(violations: list) -> str:
    return "\n".join(str(violation) for violation in violations)


@pytest.mark.parametrize(
    ("path", "include", "expected"),
    [
        ("include/hopyard/plan.h", '"core/error.h"', "may include only: hopyard"),
        ("include/hopyard/plan.h", "<fmt/core.h>", "public header"),
        ("include/hopyard/plan.h", "<cuda_runtime.h>", "public header"),
        ("src/core/shape.cc", '"formats/codes.h"', "may include only: core, hopyard"),
        ("src/core/shape.h", "<cuda_bf16.h>", "outside src/device"),
        ("src/device/sm90/tma.h", '"stages/layer_ref.h"', "device includes"),
        ("src/gemm/problem.h", '"plan/plan_impl.h"', "gemm includes"),
        ("src/gemm/cost.cc", "<cuda_runtime_api.h>", "outside src/device"),
        ("src/spec/validate.cc", '"stages/1_route/route.h"', "spec includes"),
        ("src/checkpoint/reader.cc", "<cuda.h>", "outside src/device"),
        ("src/stages/3_gemm1/g.cuh", '"stages/1_route/route_sm90.cuh"', "of another stage"),
        ("src/stages/3_gemm1/g.cc", '"plan/plan_impl.h"', "stages includes"),
        ("src/stages/3_gemm1/g.cc", '"stages/3_gemm1/g_sm90.cuh"', "never include a .cuh"),
        ("src/stages/3_gemm1/g_test.cc", '"stages/3_gemm1/g_sm90.cuh"', "never include a .cuh"),
        ("src/plan/plan.h", '"gemm/sm90/kernel.cuh"', "never include a .cuh"),
        ("src/ffi/exports.cc", '"core/error.h"', "may include only: ffi, hopyard"),
        ("src/cli/run.cc", '"plan/plan_impl.h"', "cli includes"),
        ("src/plan/plan.cc", "<tvm/ffi/any.h>", "allowed only in: ffi"),
        ("src/plan/plan.cc", "<CLI/CLI.hpp>", "allowed only in: cli"),
        ("src/ffi/exports.cc", "<torch/extension.h>", "allowed only in: -"),
        ("src/plan/plan.cc", '"plan_impl.h"', "not a path from src/"),
        ("src/plan/plan.cc", '"plan/forward.cc"', "compiled, not included"),
        ("src/novel/file.cc", '"core/error.h"', "has no row in the table"),
    ],
)
def test_layers_finds(path: str, include: str, expected: str) -> None:
    found = check_layers.check_file(path, f"{CPP_LICENCE}\n#include {include}\n")
    assert len(found) == 1, messages(found)
    assert expected in found[0].message
    assert found[0].line == 3


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("include/hopyard/plan.h", '"hopyard/spec.h"'),
        ("include/hopyard/plan.h", "<cstdint>"),
        ("src/core/error.cc", "<cuchar>"),
        ("src/device/sm90/tma.h", "<cuda.h>"),
        ("src/gemm/sm90/kernel.cuh", "<cuda_bf16.h>"),
        ("src/fused/small_batch/f.cu", '"stages/1_route/route_sm90.cuh"'),
        ("src/plan/plan.cc", '"stages/layer_ref.h"'),
        ("src/plan/plan.cc", "<fmt/core.h>"),
        ("src/cli/run.cc", "<CLI/CLI.hpp>"),
        ("src/ffi/exports.cc", "<tvm/ffi/any.h>"),
        ("src/core/shape_test.cc", '"plan/plan_impl.h"'),
        ("tests/anything.cc", '"formats/codes.h"'),
    ],
)
def test_layers_accepts(path: str, include: str) -> None:
    assert not check_layers.check_file(path, f"{CPP_LICENCE}\n#include {include}\n")


def test_layers_ignores_comments_and_finds_launches() -> None:
    text = '// #include "plan/plan.h"\n/* #include "plan/plan.h" */\nKernel<<<1, 2>>>(x);\n'
    found = check_layers.check_file("src/core/a.cc", text)
    assert [violation.line for violation in found] == [3]
    assert not check_layers.check_file("src/stages/a/a.cu", "Kernel<<<1, 2>>>(x);\n")


def function(lines: int, head: str = "int F(int a)") -> str:
    return f"{head} {{\n" + "  ++a;\n" * (lines - 2) + "}\n"


@pytest.mark.parametrize(
    "head",
    [
        "int F(int a)",
        "template <class T, int kN>\nstd::vector<T> Type::Name(const T& a) const noexcept",
        "auto F(int a) -> std::vector<int>",
        "Type::Type(int a) : base_(a), other_{a}",
        "Type::Type(int a) : base_{a}, other_(a)",
        "template <class T = int, int kN = (1 + 2)>\nvoid F(T a)",
        "Type::~Type()",
        "bool operator()(int a) const",
        "[[nodiscard]] static inline bool operator==(const A& a, const A& b)",
    ],
)
def test_sizes_measures_functions(head: str) -> None:
    extra = head.count("\n")
    wrapped = "namespace a {{\nstruct S {{\n{}}};\n}}  // namespace a\n"
    good = wrapped.format(function(80 - extra, head))
    bad = wrapped.format(function(81 - extra, head))
    assert not check_sizes.check_cpp("src/core/a.cc", good)
    found = check_sizes.check_cpp("src/core/a.cc", bad)
    assert len(found) == 1, messages(found)
    assert "81 lines; at most 80" in found[0].message
    assert found[0].line == 3


def test_sizes_device_functions_may_be_longer() -> None:
    assert not check_sizes.check_cpp("src/gemm/sm90/a.cuh", function(150))
    assert check_sizes.check_cpp("src/gemm/sm90/a.cuh", function(151))


def test_sizes_does_not_count_types_and_tables() -> None:
    body = "  int a = 0;\n" * 100
    assert not check_sizes.check_cpp("src/core/a.cc", f"struct S {{\n{body}}};\n")
    rows = "  {1, F(2)},\n" * 100
    assert not check_sizes.check_cpp("src/core/a.cc", f"constexpr Row kRows[] = {{\n{rows}}};\n")


def test_sizes_counts_parameters() -> None:
    seven = "void F(int a, std::map<int, int> b, Fn<void(int, int)> c, int d, int e, int f, int g)"
    assert not check_sizes.check_cpp("src/core/a.cc", f"{seven} {{}}\n")
    found = check_sizes.check_cpp("src/core/a.cc", f"{seven[:-1]},\n       int h) {{}}\n")
    assert "8 parameters; at most 7" in messages(found)


def test_sizes_counts_nesting() -> None:
    def nested(levels: int) -> str:
        heads = ["for (int i = 0; i < n; ++i)", "if (a[i] > 0)", "while (b)", "switch (c)", "do"]
        text = "void F() {\n"
        text += "".join(f"{heads[level % 5]} {{\n" for level in range(levels))
        return text + "}\n" * levels + "}\n"

    assert not check_sizes.check_cpp("src/core/a.cc", nested(4))
    assert "5 levels of nesting" in messages(check_sizes.check_cpp("src/core/a.cc", nested(5)))
    chain = "void F() {\n  if (a) {\n" + "  } else if (b) {\n" * 9 + "  } else {\n  }\n}\n"
    assert not check_sizes.check_cpp("src/core/a.cc", chain)


def test_sizes_is_not_fooled_by_literals_and_comments() -> None:
    text = 'void F() {\n  Use("{{{{", \'{\', R"(})");  // {\n  const int x = 1\'000;\n}\n'
    assert not check_sizes.check_cpp("src/core/a.cc", text + function(80))
    assert check_sizes.check_cpp("src/core/a.cc", text + function(81))


def test_sizes_files_and_public_headers(tmp_path: Path) -> None:
    assert not check_sizes.check_file("src/core/a.h", "\n" * 600)
    assert check_sizes.check_file("src/core/a.h", "\n" * 601)
    assert not check_sizes.check_file("include/hopyard/a.h", "\n" * 300)
    assert check_sizes.check_file("include/hopyard/a.h", "\n" * 301)
    headers = tmp_path / "include" / "hopyard"
    headers.mkdir(parents=True)
    for number in range(14):
        (headers / f"h{number}.h").write_text(CPP_LICENCE)
    assert not check_sizes.check(tmp_path)
    (headers / "one_more.h").write_text(CPP_LICENCE)
    assert "15 public headers" in messages(check_sizes.check(tmp_path))


def test_sizes_python() -> None:
    def python(head: str, lines: int) -> str:
        return f"{head}\n" + "    x = 1\n" * (lines - 1)

    assert not check_sizes.check_python("a.py", python("def f(a, b, c, d, e, g, h, *, i):", 80))
    assert "81 lines" in messages(check_sizes.check_python("a.py", python("def f():", 81)))
    eight = check_sizes.check_python("a.py", python("def f(a, b, c, d, e, g, h, i):", 2))
    assert "8 parameters" in messages(eight)
    deep = (
        "def f():\n" + "".join("    " * (n + 1) + "if x:\n" for n in range(5)) + " " * 24 + "y()\n"
    )
    assert "5 levels" in messages(check_sizes.check_python("a.py", deep))


@pytest.mark.parametrize(
    "comment",
    [
        "// int x = 0;",
        "// return Compute(a, b);",
        "// Launch(stream);",
        "// plan->Run(a);",
        "// if (x > 0) {",
        "// } else {",
        "// for (int i = 0; i < n; ++i)",
        "// rows[i] += weights[i] * x;",
        "// std::vector<int> rows;",
        "// void F(int a) {",
        '// #include "core/error.h"',
        "// }",
    ],
)
def test_text_finds_dead_cpp(comment: str) -> None:
    found = check_text.check_file("src/core/a.cc", f"{CPP_LICENCE}void F();\n  {comment}\n")
    assert [violation.line for violation in found] == [3], messages(found)
    assert "commented-out code" in found[0].message


@pytest.mark.parametrize(
    "comment",
    [
        "// Rows in use, including padding;",
        "// scores win by value; ties by id",
        "// w = score / sum (docs/numerics.md)",
        "// for each token (and slot) in order",
        "// if the table (runtime) says so: skipped",
        "// 2^(code - 127); 255 is NaN, 0 is 2^-127.",
        "// f(x) = x * sigmoid(x)",
        "// }  // namespace",
    ],
)
def test_text_leaves_prose(comment: str) -> None:
    assert not check_text.check_file("src/core/a.cc", f"{CPP_LICENCE}{comment}\n")


@pytest.mark.parametrize(
    "line",
    ["# import numpy", "# x = compute(1)", "# def f(a):", "# return f(x)", "# print(x)"],
)
def test_text_finds_dead_python(line: str) -> None:
    found = check_text.check_file(
        "python/hopyard/a.py", f"# SPDX-License-Identifier: Apache-2.0\n{line}\n"
    )
    assert "commented-out code" in messages(found)


@pytest.mark.parametrize(
    ("path", "line", "expected"),
    [
        ("src/core/a.cc", "// TODO: faster", "bare TODO"),
        ("docs/a.md", "FIXME later", "bare FIXME"),
        ("src/core/a.cc", 'printf("x");', "in the library"),
        ("src/core/a.cc", 'std::fprintf(stderr, "x");', "in the library"),
        ("src/core/a.cc", "std::cout << 1;", "in the library"),
        ("src/core/a.cc", "std::abort();", "in the library"),
        ("src/core/a.cc", "#include <format>", "lacks it"),
        ("src/gemm/a.cc", "// the shape of gpt-oss", "model name"),
        ("src/plan/a.cc", 'Name("Qwen3")', "model name"),
        ("include/hopyard/plan.h", "// as Mixtral does", "model name"),
        ("src/plan/a.cc", "// DeepSeek-V3.1", "model name"),
        ("docs/a.md", "see ../shared/spec", "design folder"),
        ("Makefile", "# /work/shared", "design folder"),
    ],
)
def test_text_finds(path: str, line: str, expected: str) -> None:
    licence = CPP_LICENCE if path.endswith((".cc", ".h")) else ""
    found = check_text.check_file(path, f"{licence}{line}\n")
    assert len(found) == 1, messages(found)
    assert expected in found[0].message


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("src/core/a.cc", "// TODO(#12): faster"),
        ("src/core/a.cc", 'Say("printf(x)");'),
        ("src/core/a.cc", 'std::snprintf(b, n, "x");'),
        ("src/cli/a.cc", "std::cout << 1;"),
        ("src/core/a_test.cc", "std::cout << 1;"),
        ("src/checkpoint/a.cc", 'Is("qwen3_moe")'),
        ("src/plan/a.cc", "RoutingRule::DeepSeekV3(8, 4, 2.5F)"),
        ("src/ffi/a.cc", 'Bind("fused_topk_deepseek")'),
        ("bench/shapes.h", "// Qwen3-30B-A3B"),
        ("src/core/a.cc", "// shared/private experts"),
    ],
)
def test_text_accepts(path: str, line: str) -> None:
    found = check_text.check_file(path, f"{CPP_LICENCE}{line}\n")
    assert not found, messages(found)


@pytest.mark.parametrize("path", ["src/core/a.h", "python/hopyard/a.py", "tools/a.sh"])
def test_text_wants_the_licence(path: str) -> None:
    assert "first line must be" in messages(check_text.check_file(path, "x\n"))
    comment = "//" if path.endswith(".h") else "#"
    good = f"{comment} SPDX-License-Identifier: Apache-2.0\n"
    assert not check_text.check_file(path, good)
    assert comment == "//" or not check_text.check_file(path, f"#!/bin/x\n{good}")


@pytest.mark.parametrize("name", ["layers", "sizes", "text"])
def test_programs_fail_on_a_bad_tree(name: str, tmp_path: Path) -> None:
    source = tmp_path / "src" / "core" / "bad.cc"
    source.parent.mkdir(parents=True)
    source.write_text('#include "plan/plan.h"\nvoid F() {\n' + "  G();\n" * 90 + "}\n")
    script = Path(__file__).parent / f"check_{name}.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "src/core/bad.cc:" in run.stdout
    source.unlink()
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
