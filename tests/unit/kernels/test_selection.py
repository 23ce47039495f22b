"""Which kernels a process uses: the compiled ones if they belong to these sources, else numpy's, and it is said once."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_export.errors import ConfigError
from dist_export.kernels import selection, sources
from dist_export.kernels.selection import VARIABLE, select_kernels
from tests.support.kernels import open_kernels


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    selection._select.cache_clear()
    yield
    selection._select.cache_clear()


@pytest.fixture
def kernels():
    """The tests of this file choose by themselves."""


def test_the_built_library_is_used_by_default():
    open_kernels("plain C")  # skips where it is not built
    assert select_kernels().description.startswith("compiled (")


def test_the_variable_chooses_numpy(monkeypatch):
    monkeypatch.setenv(VARIABLE, "numpy")
    assert select_kernels().description == "numpy ($DIST_EXPORT_KERNELS is numpy)"


def test_another_choice_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match="is 'fast'; give one of auto, numpy, compiled"):
        select_kernels()


def test_without_a_library_numpy_is_used_in_silence(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(selection, "LIBRARY", tmp_path / "_compiled.so")
    assert select_kernels().description == "numpy (_compiled.so was not built)"
    assert not caplog.records


def test_a_demand_for_a_missing_library_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(selection, "LIBRARY", tmp_path / "_compiled.so")
    monkeypatch.setenv(VARIABLE, "compiled")
    with pytest.raises(ConfigError, match=r"is compiled, but _compiled\.so was not built\. Install dist_export again"):
        select_kernels()


def test_a_library_of_other_sources_is_not_used_and_that_is_said_once(monkeypatch, tmp_path, caplog):
    open_kernels("plain C")
    folder = tmp_path / "src"
    folder.mkdir()
    for path in sources.list_sources():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sources, "FOLDER", folder)
    assert select_kernels().description.startswith("compiled (")
    selection._select.cache_clear()
    (folder / "kernels.h").write_text((folder / "kernels.h").read_text() + "\n")
    with caplog.at_level(logging.WARNING):
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: select_kernels(), range(32)))
        assert all("was built from other sources" in kernels.description for kernels in found)
    assert len(caplog.records) == 1
    assert "numpy is used in its place. Install dist_export again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_a_file_that_is_no_library_is_not_used(monkeypatch, tmp_path, caplog, content):
    path = tmp_path / "_compiled.so"
    path.write_bytes(content)
    monkeypatch.setattr(selection, "LIBRARY", path)
    assert "cannot be loaded" in select_kernels().description
    assert len(caplog.records) == 1


def test_a_library_of_somebody_else_is_not_used(monkeypatch, caplog):
    libc = next(Path("/").glob("lib*/*/libc.so.6"), None) or next(Path("/").glob("lib*/libc.so.6"), None)
    if libc is None:
        pytest.skip("no libc.so.6 in /lib*")
    monkeypatch.setattr(selection, "LIBRARY", libc)
    assert "cannot be loaded" in select_kernels().description


def test_the_digest_is_of_names_and_contents(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    digests = set()
    for name, content in (("a.c", "1"), ("a.c", "2"), ("b.c", "2"), ("b.h", "2")):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / name).write_text(content)
        (tmp_path / "README").write_text(name)
        digests.add(sources.digest_sources())
    assert len(digests) == 4
    (tmp_path / "README").unlink()
    assert sources.digest_sources() in digests, "only C files and headers count"


def test_nothing_of_python_is_in_the_library():
    """The wheel is named py3-none: one library for all versions."""
    open_kernels("plain C")
    assert b"PyInit" not in sources.LIBRARY.read_bytes()
    for path in sources.list_sources():
        assert "Python.h" not in path.read_text()
