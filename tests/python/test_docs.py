# SPDX-License-Identifier: Apache-2.0
"""docs/errors.md names tests that exist and prints messages that tests assert, or the package
raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")

GTEST = re.compile(r"^TEST(?:_[FP])?\(\s*(\w+),\s*(\w+)\s*\)", re.MULTILINE)
LITERAL = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
NAMED_GTEST = re.compile(r"`([A-Z]\w+)\.([A-Z]\w+)`")
NAMED_PYTEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
EXAMPLE = re.compile(r"^\|[^|]*\| (?:bad|no|`k\w+`) \| `([^`]+)` \|$", re.MULTILINE)
PYTHON_EXAMPLE = re.compile(r"^\|[^|]*\| `(?:\w+Error)` \| `([^`]+)` \|$", re.MULTILINE)


def sources_of_tests() -> list[str]:
    paths = [*ROOT.glob("tests/**/*_test.cc"), *ROOT.glob("src/**/*_test.cc")]
    return [path.read_text(encoding="utf-8") for path in paths]


def is_asserted(message: str, literals: str) -> bool:
    """Whether every part between placeholders is (part of) a string of some test."""
    return all(part in literals for part in message.split("…"))


def strings_of(source: str) -> str:
    """The strings of a C++ text, adjacent ones joined, one a line."""
    joined = re.sub(r'(?<!\\)"\s*\n\s*"', "", source)
    return "\n".join(match.group(1) for match in LITERAL.finditer(joined))


def messages_of(source: str) -> list[re.Pattern[str]]:
    """Patterns of the texts of a Python source that say something: a field is anything."""
    patterns = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Constant, ast.JoinedStr)):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        words = [str(part.value) if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(word) for word in words if word) > 10:
            text = "".join(".+" if word is None else re.escape(word) for word in words)
            patterns.append(re.compile(text))
    return patterns


def is_raised(message: str, patterns: list[re.Pattern[str]]) -> bool:
    """Whether a whole message fits one of the patterns; "…" is anything."""
    return any(pattern.fullmatch(message) for pattern in patterns)


def test_named_tests_exist():
    known = {match.groups() for source in sources_of_tests() for match in GTEST.finditer(source)}
    named = set(NAMED_GTEST.findall(ERRORS))
    assert len(named) > 60
    assert sorted(named - known) == []


def test_named_python_tests_exist():
    named = set(NAMED_PYTEST.findall(ERRORS))
    assert len(named) > 5
    for file, test in named:
        source = (ROOT / "tests" / "python" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"


def test_printed_messages_are_asserted():
    literals = "\n".join(strings_of(source) for source in sources_of_tests())
    examples = EXAMPLE.findall(ERRORS)
    assert len(examples) > 60
    assert [message for message in examples if not is_asserted(message, literals)] == []


def test_printed_messages_of_python_are_raised():
    package = ROOT / "python" / "hopyard"
    patterns = [p for f in package.rglob("*.py") for p in messages_of(f.read_text("utf-8"))]
    examples = PYTHON_EXAMPLE.findall(ERRORS)
    assert len(examples) > 20
    assert [message for message in examples if not is_raised(message, patterns)] == []


def test_the_checks_can_fail():
    known = messages_of('raise ValueError(f"{name} is a {kind}, wanted " "an array; pass one")')
    assert is_raised("hidden is a list, wanted an array; pass one", known)
    assert not is_raised("hidden is a list, wanted a tensor; pass one", known)
    assert PYTHON_EXAMPLE.findall("| a | `TypeError` | `b c` |") == ["b c"]
    assert NAMED_GTEST.findall("see `Suite.Name`") == [("Suite", "Name")]
    assert GTEST.findall("TEST_F(Suite,\n       Name) {") == [("Suite", "Name")]
    source = 'Says("top_k=33; "\n     "wanted 1 .. 32", "a \\" b");'
    assert strings_of(source).splitlines() == ["top_k=33; wanted 1 .. 32", 'a \\" b']
    assert is_asserted("top_k=…; wanted", "top_k=33; wanted 1")
    assert not is_asserted("top_k=34", "top_k=33; wanted 1")
