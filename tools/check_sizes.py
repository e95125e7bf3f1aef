# SPDX-License-Identifier: Apache-2.0
"""Size limits: files, functions, parameters, nesting, the public headers.

C++ is measured by matching braces, which sees every function that has a body and is laid out as
clang-format leaves it; clang-tidy's function-size judges again with a real parser. Python is
measured with `ast`; keyword-only parameters are named at the call and do not count.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from check_common import (
    CPP_SUFFIXES,
    Violation,
    read,
    report,
    source_files,
    strip_cpp,
    strip_preprocessor,
)

MAX_FILE_LINES = 600
MAX_HOST_FUNCTION_LINES = 80
MAX_DEVICE_FUNCTION_LINES = 150
MAX_PARAMETERS = 7
MAX_NESTING = 4
MAX_PUBLIC_HEADERS = 14
MAX_PUBLIC_HEADER_LINES = 300

_MEASURED = CPP_SUFFIXES | {".py", ".sh", ".cmake"}
_CONTROL = re.compile(r"(?:^|[;{}:\s)])(?:if|for|while|switch|do|else|try|catch)\b")
_CONTROL_ONLY = re.compile(r"\s*(?:\}?\s*else\b|if\b|for\b|while\b|switch\b|do\b|try\b|catch\b)")
_TYPE = re.compile(r"\b(?:class|struct|union|enum|namespace)\b|extern\s*\"\"\s*$")
_LAMBDA = re.compile(
    r"\[[^\[\]]*\]\s*(?:<[^{}]*>\s*)?(?:\([^{}]*\)\s*)?(?:mutable\s*|noexcept\s*)*(?:->[^{}]*)?$"
)
_FUNCTION_TAIL = re.compile(
    r"\)\s*(?:(?:const|noexcept|override|final|mutable|volatile|try|requires[^{}]*|&&?)\s*"
    r"|noexcept\([^()]*\)\s*|->[^{};]*)*$"
)
_CONSTRUCTOR = re.compile(r"\)\s*(?:noexcept\s*)?:\s*[\w:<>, ]+\s*[({]")
_NAME = re.compile(r"([~\w:]+|operator\s*[^\s\w(]+|operator\s*\(\s*\))\s*\(")
_ATTRIBUTE = re.compile(r"\[\[.*?\]\]|\b(?:__launch_bounds__|__attribute__|alignas)\s*\([^)]*\)*\)")


@dataclass
class Block:
    """An open brace: what it belongs to and where it began."""

    kind: str  # "scope" (namespace, type), "function", "control" or "other" (lambda, initialiser)
    line: int
    name: str = ""
    parameters: int = 0


def _skip_parentheses(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
            if depth == 0:
                return at + 1
    return len(text)


def _count_parameters(parameters: str) -> int:
    """Number of top-level comma-separated parts; template arguments do not split."""
    if not parameters.strip() or parameters.strip() == "void":
        return 0
    depth = 0
    count = 1
    for character in parameters.replace("->", "  "):
        if character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth -= 1
        elif character == "," and depth == 0:
            count += 1
    return count


def _blank_template(head: str) -> str:
    """Blank out `template <...>`, whose default arguments look like assignments."""
    match = re.search(r"\btemplate\s*<", head)
    if not match:
        return head
    depth = 0
    for at in range(match.end() - 1, len(head)):
        depth += {"<": 1, ">": -1}.get(head[at], 0)
        if depth == 0:
            blank = re.sub(r"\S", "\0", head[match.start() : at + 1])
            return head[: match.start()] + blank + _blank_template(head[at + 1 :])
    return head


def _function_block(head: str, line: int) -> Block | None:
    """The function that `head` (the text before a brace, outside functions) begins, if it does."""
    head = _blank_template(_ATTRIBUTE.sub(lambda match: " " * len(match.group(0)), head))
    match = _NAME.search(head)
    if not match or "=" in head[: match.start()].replace("operator", ""):
        return None
    # `S(int a) : a_{` opens an initialiser; `S(int a) : a_{a} {` the body.
    braced_member = _CONSTRUCTOR.search(head) and head.rstrip().endswith("}")
    if not (braced_member or _FUNCTION_TAIL.search(head)):
        return None
    opening = match.end() - 1
    closing = _skip_parentheses(head, opening)
    leading = len(head) - len(head.lstrip())
    first_line = line - head[leading:].count("\n")
    parameters = _count_parameters(head[opening + 1 : closing - 1])
    return Block("function", first_line, match.group(1).strip(), parameters)


def _inside_function(stack: list[Block]) -> bool:
    return any(block.kind == "function" for block in stack)


def _classify(head: str, line: int, stack: list[Block]) -> Block:
    """What the brace after `head` opens."""
    if not _inside_function(stack) and any(block.kind == "other" for block in stack):
        return Block("other", line)
    if _LAMBDA.search(head):
        return Block("other", line)
    if _inside_function(stack):
        is_control = _CONTROL_ONLY.match(head) or (
            _CONTROL.search(head) and head.rstrip().endswith((")", "else", "do", "try"))
        )
        return Block("control" if is_control else "other", line)
    function = _function_block(head, line)
    if function:
        return function
    return Block("scope" if _TYPE.search(head) else "other", line)


def _check_function(relative: str, block: Block, end: int, device: bool) -> list[Violation]:
    limit = MAX_DEVICE_FUNCTION_LINES if device else MAX_HOST_FUNCTION_LINES
    lines = end - block.line + 1
    found = []
    if lines > limit:
        found.append(f"function {block.name} has {lines} lines; at most {limit}: name its parts")
    if block.parameters > MAX_PARAMETERS:
        found.append(
            f"function {block.name} has {block.parameters} parameters; at most {MAX_PARAMETERS}: "
            "pass a struct"
        )
    return [Violation(relative, block.line, message) for message in found]


def check_cpp(relative: str, text: str) -> list[Violation]:
    """Functions of one C++ or CUDA file."""
    code = strip_preprocessor(strip_cpp(text))
    device = relative.endswith((".cu", ".cuh"))
    violations: list[Violation] = []
    stack: list[Block] = []
    line = 1
    head_start = 0
    parentheses = 0
    for at, character in enumerate(code):
        block = None
        if character == "\n":
            line += 1
        elif character in "()":
            parentheses += 1 if character == "(" else -1
        elif character == "{":
            block = _classify(code[head_start:at], line, stack)
            stack.append(block)
            violations += _check_nesting(relative, stack, line)
        elif character == "}" and stack:
            block = stack.pop()
            if block.kind == "function":
                violations += _check_function(relative, block, line, device)
        # An initialiser outside functions is part of a declaration's head, which goes on after it.
        initialiser = block and block.kind == "other" and not _inside_function(stack)
        statement_end = character == ";" and parentheses == 0
        if (character in "{}" and not initialiser) or statement_end:
            head_start = at + 1
    return violations


def _check_nesting(relative: str, stack: list[Block], line: int) -> list[Violation]:
    levels = sum(block.kind == "control" for block in stack)
    if stack[-1].kind != "control" or levels != MAX_NESTING + 1:
        return []
    return [Violation(relative, line, f"{levels} levels of nesting; at most {MAX_NESTING}")]


_NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def _python_nesting(node: ast.AST, depth: int) -> int:
    deepest = depth
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        inner = depth + (isinstance(child, _NESTING) and not is_elif)
        deepest = max(deepest, _python_nesting(child, inner))
    return deepest


def check_python(relative: str, text: str) -> list[Violation]:
    """Functions of one Python file."""
    violations = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        block = Block("function", node.lineno, node.name)
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        block.parameters = sum(name not in ("self", "cls") for name in names)
        violations += _check_function(relative, block, node.end_lineno or node.lineno, False)
        depth = _python_nesting(node, 0)
        if depth > MAX_NESTING:
            message = f"function {node.name}: {depth} levels of nesting; at most {MAX_NESTING}"
            violations.append(Violation(relative, node.lineno, message))
    return violations


def check_file(relative: str, text: str) -> list[Violation]:
    """Every limit that concerns one file."""
    violations = []
    lines = text.count("\n")
    limit = MAX_FILE_LINES
    if relative.startswith("include/hopyard/"):
        limit = MAX_PUBLIC_HEADER_LINES
    if lines > limit:
        violations.append(Violation(relative, lines, f"{lines} lines; at most {limit}: split it"))
    if relative.endswith(tuple(CPP_SUFFIXES)):
        violations += check_cpp(relative, text)
    elif relative.endswith(".py"):
        violations += check_python(relative, text)
    return violations


def check(root: Path) -> list[Violation]:
    """Violations of the whole tree."""
    violations = []
    public_headers = 0
    for path in source_files(root):
        if path.suffix not in _MEASURED:
            continue
        relative = path.relative_to(root).as_posix()
        public_headers += relative.startswith("include/hopyard/")
        violations += check_file(relative, read(path))
    if public_headers > MAX_PUBLIC_HEADERS:
        message = f"{public_headers} public headers; at most {MAX_PUBLIC_HEADERS}"
        violations.append(Violation("include/hopyard", 1, message))
    return violations


if __name__ == "__main__":
    sys.exit(report("check_sizes", check))
