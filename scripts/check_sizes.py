"""Refuse modules of ``dist_export`` above 400 lines, functions above 60 lines of code, and a tenth module beside the rooms.

A docstring does not count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MODULE_LINES = 400
FUNCTION_LINES = 60
MODULES_BESIDE_ROOMS = 9


def find_large(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, what is too large) of a module."""
    num_lines = len(text.splitlines())
    if num_lines > MODULE_LINES:
        yield 1, f"the module has {num_lines} lines, {MODULE_LINES} at most; move what is a matter of its own"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (size := count_lines(node)) > FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {size} lines, {FUNCTION_LINES} at most; give a step a name"


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function from its ``def`` on, without its docstring."""
    assert function.end_lineno is not None
    num_lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        assert first.end_lineno is not None
        num_lines -= first.end_lineno - first.lineno + 1
    return num_lines


def find_crowd(package: Path) -> Iterator[str]:
    """Yield what is wrong where too many modules are in no room."""
    modules = sorted(path.name for path in package.glob("*.py"))
    if len(modules) > MODULES_BESIDE_ROOMS:
        yield f"{package.name}: {len(modules)} modules are in no room, {MODULES_BESIDE_ROOMS} at most: {', '.join(modules)}"


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    found = [
        f"{path.relative_to(root)}:{line}: {what}"
        for path in sorted((root / "dist_export").rglob("*.py"))
        for line, what in find_large(path.read_text("utf-8"))
    ]
    found += find_crowd(root / "dist_export")
    print("\n".join(found) or f"no module above {MODULE_LINES} lines, no function above {FUNCTION_LINES}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
