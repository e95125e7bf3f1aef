# SPDX-License-Identifier: Apache-2.0
"""What the three check scripts share: the list of files, comment stripping, the report."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CPP_SUFFIXES = frozenset({".h", ".cc", ".cuh", ".cu"})

_TOKEN = re.compile(
    r"""//[^\n]*"""
    r"""|/\*.*?\*/"""
    r'''|R"(?P<tag>[^()\s\\]{0,16})\(.*?\)(?P=tag)"'''
    r'''|"(?:\\.|[^"\\\n])*"'''
    r"""|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Violation:
    """One broken rule at a line of a file."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def source_files(root: Path) -> list[Path]:
    """Files that git tracks or would track; below a root without git, every file."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0:
        names = sorted({name for name in listing.stdout.decode().split("\0") if name})
        paths = [root / name for name in names]
    else:
        paths = sorted(root.rglob("*"))
    return [path for path in paths if path.is_file()]


def read(path: Path) -> str:
    """The file's text; bytes that are no UTF-8 are replaced."""
    return path.read_text(encoding="utf-8", errors="replace")


def strip_cpp(text: str, keep_strings: bool = False) -> str:
    """Blank out comments, and the inside of literals unless kept. Line numbers stay as they are."""

    def blank(match: re.Match[str]) -> str:
        token = match.group(0)
        if not token.startswith(("//", "/*")):
            if keep_strings:
                return token
            return '""' + "\n" * token.count("\n")
        return " " + "\n" * token.count("\n")

    return _TOKEN.sub(blank, text)


def strip_preprocessor(text: str) -> str:
    """Blank out preprocessor lines with their continuations."""
    return re.sub(
        r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*",
        lambda match: "\n" * match.group(0).count("\n"),
        text,
        flags=re.MULTILINE,
    )


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Pairs of line number and line."""
    yield from enumerate(text.splitlines(), start=1)


def is_test(relative: str) -> bool:
    """Tests, benchmarks and fuzz targets, which may include and say more."""
    return bool(re.search(r"_(test|bench|fuzz)\.cc$", relative)) or relative.startswith(
        ("tests/", "bench/")
    )


def report(name: str, check: Callable[[Path], list[Violation]]) -> int:
    """Run a check on the repository (or the folder given) and print what it found."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    violations = check(root)
    for violation in violations:
        print(violation)
    print(f"{name}: {len(violations)} violation(s)")
    return 1 if violations else 0
