"""Refuse names that the glossary has another word for. Looks at what ``dist_export`` defines, never at what it calls."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

INSTEAD = {
    "attempt": "working state",
    "bare": "row-indexed",
    "claim": "lock, lease",
    "conceal": "redact",
    "convert": "cast",
    "emptied": "empty table",
    "gone": "pruned",
    "helping": "work stealing",
    "home": "placement",
    "limits": "memory budget",
    "numbered": "row-indexed",
    "places": "slice, target",
    "repeats": "duplicate",
    "repeated": "duplicate",
    "route": "segment",
    "standin": "placeholder",
    "stranger": "foreign file",
    "unfit": "overflow",
}
"""Word that is not used -> word of the glossary. A plural counts as its singular."""

ALLOWED = {
    "attempt": "reporting/events.py: the field of an event that counts how often an export was tried",
    "claim": "runtime/shared_store.py: to take an item of a queue, which is no lock",
}
"""Names that mean something else -> where, and what."""


def words_of(name: str) -> set[str]:
    """Return the words of an identifier in lower case, with and without the plural's s."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    return words | {word.removesuffix("s") for word in words}


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of each function, class, argument, variable and attribute that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname, node.lineno) for alias in node.names if alias.asname)


def main(package: Path) -> int:
    """Print each name that the glossary forbids; return 1 if there is one."""
    found = []
    for path in sorted(package.rglob("*.py")):
        names = [(path.stem, 1), *names_in(ast.parse(path.read_text(encoding="utf-8")))]
        found += [
            f"{path}:{line}: {name}: the glossary says '{INSTEAD[word]}' instead of '{word}'"
            for name, line in names
            if name not in ALLOWED
            for word in sorted(words_of(name) & INSTEAD.keys())
        ]
    print("\n".join(found) if found else f"{package}: no name that the glossary forbids")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent / "dist_export"))
