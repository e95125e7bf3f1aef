# SPDX-License-Identifier: Apache-2.0
"""What a source text must say and must not: licence line, dead code, output, model names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
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

_TEXT_SUFFIXES = CPP_SUFFIXES | {".py", ".sh", ".cmake", ".md", ".txt", ".toml", ".json", ".in"}
# These hold the forbidden words as data.
_SELF = frozenset({"tools/check_text.py", "tools/test_checks.py"})

_SPDX = "SPDX-License-Identifier: Apache-2.0"

# A comment that reads as C++: a statement with its semicolon, a block's head or end, a directive.
_DEAD_CPP = re.compile(
    r"""^(?:
        \#\s*(?:include|define|if|ifdef|ifndef|endif|pragma)\b.*
      | (?:return|break|continue|throw|delete|goto|using|typedef)\b[^;]*;
      | (?:if|for|while|switch|else\s+if)\s*\(.*\)\s*\{?
      | (?:\}\s*)?else\s*\{?
      | [\w:<>,*&\[\]\s.\->()]+?\s*(?:[-+*/|&^%]|<<|>>)?=(?!=)(?!.*[a-z]{2}\s[a-z]{2})\s*[^;]*;
      | [\w:<>.\->]+\([^;]*\)\s*;
      | (?:const|constexpr|static|auto|int|float|double|bool|size_t|u?int\d+_t|std::\w+)
        [\w:<>,*&\s]*\s\w+(?:\[\w*\])?(?:\{[^;]*\})?;
      | [\w:<>,*&\s~]+\([^;]*\)\s*(?:const\s*)?(?:noexcept\s*)?\{
      | \}[;,]?
    )$""",
    re.VERBOSE,
)
_DEAD_PYTHON = re.compile(
    r"""^(?:
        import\s[\w.]+(?:\sas\s\w+)?
      | from\s[\w.]+\simport\s.+
      | (?:async\s+)?def\s\w+\(.*
      | class\s\w+(?:\(.*\))?:
      | (?:if|elif|for|while|with)\s[^:]*(?:[=().\[\]]|\bin\b)[^:]*:
      | (?:else|try|finally):
      | return(?:\s[\w.]+\(.*\))?
      | [\w.\[\]]+\s*[-+*/]?=\s*(?:[\w.]+[(\[].*[)\]]|\d[\w.]*|["'].*["']|None|True|False)
      | [\w.]+\(.*\)
    )$""",
    re.VERBOSE,
)

_TODO = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))")
_OUTPUT = re.compile(
    r"(?<![\w.>])(?:std::)?(?:v?f?printf|puts|fputs|putchar|perror|abort|exit|_Exit|quick_exit)\s*\("
    r"|\bstd::(?:cout|cerr|clog)\b|\bfmt::print\w*\s*\("
)
_UNAVAILABLE = re.compile(r"#\s*include\s*<(?:format|source_location|print)>")

_MODELS = re.compile(
    r"mixtral|qwen|deepseek|gpt[-_ ]?oss|llama|\bglm\b|\bglm[-_]?\d|minimax[-_]?m?\d|kimi|nemotron",
    re.IGNORECASE,
)
# Routing methods are public names of the API, whichever model brought them.
_METHODS = re.compile(r"deepseek_?v3|llama_?4|minimax_?2|fused_?topk_?deepseek", re.IGNORECASE)
_MODEL_PLACES = re.compile(
    r"^(?:src/(?:checkpoint|cli|stages/1_route)/|bench/shapes\.h$|bench/.*\.py$"
    r"|include/hopyard/(?:checkpoint|spec|routing|weights)\.h$|python/hopyard/"
    r"|docs/|tests/|examples/|tools/|README)"
)
_MODEL_SUBJECTS = re.compile(r"^(?:include|src|bench)/")

_DESIGN_FOLDER = re.compile(r"\.\./shared\b|/work/shared\b|\bshared/(?:design|spec|research)\b")


def _comments_cpp(text: str) -> Iterator[tuple[int, str]]:
    for number, line in lines_of(text):
        match = re.match(r"^\s*//+\s?(.*)$", line)
        if match:
            yield number, match.group(1).strip()


def _comments_python(text: str) -> Iterator[tuple[int, str]]:
    for number, line in lines_of(text):
        match = re.match(r"^\s*#+\s?(.*)$", line)
        if match:
            yield number, match.group(1).strip()


def _check_licence(relative: str, text: str) -> Iterator[tuple[int, str]]:
    if not relative.endswith((*CPP_SUFFIXES, ".py", ".sh")):
        return
    mark = "//" if relative.endswith(tuple(CPP_SUFFIXES)) else "#"
    lines = text.splitlines()[:2]
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    if not lines or lines[0].strip() != f"{mark} {_SPDX}":
        yield 1, f"first line must be `{mark} {_SPDX}`"


def _check_dead_code(relative: str, text: str) -> Iterator[tuple[int, str]]:
    if relative.endswith(tuple(CPP_SUFFIXES)):
        comments, pattern = _comments_cpp(text), _DEAD_CPP
    elif relative.endswith(".py"):
        comments, pattern = _comments_python(text), _DEAD_PYTHON
    else:
        return
    for number, comment in comments:
        if pattern.match(comment):
            yield number, f"commented-out code: {comment!r}; delete it, git keeps it"


def _check_words(relative: str, text: str) -> Iterator[tuple[int, str]]:
    for number, line in lines_of(text):
        todo = _TODO.search(line)
        if todo:
            yield number, f"bare {todo.group(1)}; write {todo.group(1)}(#<issue>) or do it"
        if _DESIGN_FOLDER.search(line):
            yield number, "names the design folder, which no clone has"


def _check_output(relative: str, text: str) -> Iterator[tuple[int, str]]:
    if not relative.endswith(tuple(CPP_SUFFIXES)):
        return
    for number, line in lines_of(strip_cpp(text)):
        if _UNAVAILABLE.search(line):
            yield number, f"{line.strip()}: Debian 12's compiler or clang-tidy 14 lacks it"
        in_library = relative.startswith("src/") and not relative.startswith("src/cli/")
        if in_library and not is_test(relative) and (match := _OUTPUT.search(line)):
            yield number, f"`{match.group(0)}` in the library; throw with HOPYARD_CHECK, or return"


def _check_models(relative: str, text: str) -> Iterator[tuple[int, str]]:
    if not _MODEL_SUBJECTS.match(relative) or _MODEL_PLACES.match(relative) or is_test(relative):
        return
    for number, line in lines_of(text):
        match = _MODELS.search(_METHODS.sub("", line))
        if match:
            yield number, f"model name '{match.group(0)}'; say what the rule or shape is instead"


def check_file(relative: str, text: str) -> list[Violation]:
    """Violations of one text file, named by its path from the repository's root."""
    if relative in _SELF:
        rules = [_check_licence]
    else:
        rules = [_check_licence, _check_dead_code, _check_words, _check_output, _check_models]
    return [
        Violation(relative, number, message)
        for rule in rules
        for number, message in rule(relative, text)
    ]


def check(root: Path) -> list[Violation]:
    """Violations of the whole tree."""
    violations = []
    for path in source_files(root):
        relative = path.relative_to(root).as_posix()
        if path.suffix in _TEXT_SUFFIXES or path.name in ("Makefile", "run"):
            violations += check_file(relative, read(path))
    return violations


if __name__ == "__main__":
    sys.exit(report("check_text", check))
