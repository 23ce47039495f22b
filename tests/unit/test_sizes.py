"""The check of sizes finds what is too large, and counts no docstring."""

from __future__ import annotations

from pathlib import Path

from scripts.check_sizes import FUNCTION_LINES, MODULE_LINES, MODULES_BESIDE_ROOMS, find_crowd, find_large


def function(num_lines: int, docstring: str = "") -> str:
    return "def f():\n" + docstring + "    pass\n" * (num_lines - 1)


def test_a_module_may_have_400_lines() -> None:
    assert list(find_large("pass\n" * MODULE_LINES)) == []
    ((line, what),) = find_large("pass\n" * (MODULE_LINES + 1))
    assert line == 1
    assert "has 401 lines, 400 at most" in what


def test_a_function_may_have_60_lines_beside_its_docstring() -> None:
    documented = function(FUNCTION_LINES, '    """Do it.\n\n    Well.\n    """\n')
    assert list(find_large(documented)) == []
    ((line, what),) = find_large("import os\n\n\n" + documented + "    pass\n")
    assert line == 4
    assert "f has 61 lines, 60 at most" in what


def test_methods_and_functions_within_functions_count() -> None:
    inner = "class C:\n    async " + function(FUNCTION_LINES + 1).replace("\n", "\n    ").rstrip() + "\n"
    assert len(list(find_large(inner))) == 1


def test_nine_modules_may_be_in_no_room(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    for number in range(MODULES_BESIDE_ROOMS):
        (tmp_path / f"m{number}.py").touch()
        (tmp_path / "room" / f"m{number}.py").touch()
    assert list(find_crowd(tmp_path)) == []
    (tmp_path / "more.py").touch()
    (said,) = find_crowd(tmp_path)
    assert "10 modules are in no room, 9 at most" in said
