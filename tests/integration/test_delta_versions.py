"""Deltas in a directory of versions whose base goes away, is replaced, or is elsewhere: what is served can be opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dist_export
from dist_export import cli
from dist_export.errors import ConfigError, ExportError
from dist_export.pipeline import steps
from dist_export.pipeline.small_files import write_rest_of_files
from dist_export.registry.versions import VersionDirectory
from tests.integration.test_delta_bases import publish
from tests.integration.test_delta_export import change, export, save, tables_of
from tests.integration.test_versions import current_of
from tests.support.deltas import manifest_of, put_together, read_package

FULL: dict[str, Any] = {"base": None, "on_base_mismatch": "error"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, before = tmp_path_factory.mktemp("sources"), tables_of()
    return save(folder / "before", before, 2), save(folder / "after", change(before), 2)


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "serving"


def test_no_rollback_to_a_delta_whose_base_is_gone(sources, where: Path, capsys: pytest.CaptureFixture) -> None:
    first = publish(sources[0], where, **FULL, num_shards=4)
    base, delta = publish(sources[0], where, **FULL), publish(sources[1], where)
    newest = publish(sources[0], where, **FULL, num_shards=3)
    shutil.rmtree(base)
    before = (where / "current.json").read_bytes()
    for version in ([delta.name], []):
        capsys.readouterr()
        assert cli.main(["rollback", str(where), *version]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"versions/{delta.name} is a delta of {base}, and neither there nor beside it is that base" in line
        assert f"{newest.name} is still the current version" in line
        assert line.endswith(f"Other versions of {where} are {first.name}")
        assert (where / "current.json").read_bytes() == before
    assert cli.main(["rollback", str(where), first.name]) == 0


def test_the_list_says_what_is_a_delta_and_over_what(sources, where: Path, tmp_path: Path, capsys) -> None:
    base, delta = publish(sources[0], where), publish(sources[1], where)
    elsewhere = export(sources[0], tmp_path / "elsewhere")
    other = publish(sources[1], where, base=str(elsewhere), num_shards=3)

    def listed() -> tuple[list[str], list[tuple[Any, ...]]]:
        capsys.readouterr()
        assert cli.main(["versions", str(where)]) == 0
        lines = [line.rpartition("Z  ")[2] for line in capsys.readouterr().out.splitlines()]
        assert cli.main(["versions", str(where), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return lines, [(its["name"], its["kind"], its["base"], its["has_base"]) for its in found]

    lines, found = listed()
    assert lines == [f"delta over {elsewhere}", f"delta over {base.name}", "full"]
    assert [its[0] for its in found] == [other.name, delta.name, base.name]
    assert [its[1:] for its in found] == [
        ("delta", str(elsewhere), True),
        ("delta", base.name, True),
        ("full", None, True),
    ]
    shutil.rmtree(base)
    (elsewhere / "manifest.json").unlink()
    (elsewhere / "manifest.json").mkdir()
    lines, found = listed()
    assert lines == [
        f"delta over {elsewhere}, which cannot be read",
        f"delta over {base.name}, which is gone",
        "full  removed",
    ]
    assert [its[3] for its in found] == [None, False, True]


def test_a_base_that_is_moved_with_its_deltas_is_there(sources, where: Path, tmp_path: Path) -> None:
    base, delta = publish(sources[0], where), publish(sources[1], where)
    publish(sources[0], where, **FULL, num_shards=3)
    where.rename(tmp_path / "moved")
    assert VersionDirectory().rollback(str(tmp_path / "moved"), delta.name) == delta.name
    assert current_of(tmp_path / "moved")["base"] == base.name


def hook(monkeypatch: pytest.MonkeyPatch, name: str, once: Callable[[], object], *, is_after: bool = False) -> None:
    """Let something happen before or after the next call of a method of the registry, once."""
    method = getattr(VersionDirectory, name)

    def call(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(VersionDirectory, name, method)
        if not is_after:
            once()
        found = method(*arguments, **more)
        if is_after:
            once()
        return found

    monkeypatch.setattr(VersionDirectory, name, call)


def test_a_base_that_goes_at_the_moment_of_a_rollback(sources, where: Path, monkeypatch) -> None:
    base, delta = publish(sources[0], where), publish(sources[1], where)
    newest = publish(sources[0], where, **FULL, num_shards=3)
    hook(monkeypatch, "_switch", lambda: shutil.rmtree(base))
    with pytest.raises(ExportError, match=f"its base was removed at this very moment; {newest.name} is the current"):
        VersionDirectory().rollback(str(where), delta.name)
    assert (current_of(where)["version"], current_of(where)["base"]) == (newest.name, None)


@pytest.mark.parametrize("settings", [{}, {"on_base_mismatch": "error"}], ids=["full", "error"])
@pytest.mark.parametrize("when", ["register", "_switch", "late"])
def test_a_publisher_whose_base_goes_proposes_no_rollback_and_the_rerun_publishes(
    sources, where: Path, monkeypatch, when: str, settings: dict[str, Any]
) -> None:
    """Nobody can read what was committed, so the same export again makes another version."""
    base = publish(sources[0], where)

    def go_on() -> None:
        publish(sources[0], where, **FULL, num_shards=3)
        shutil.rmtree(base)

    if when == "late":
        hook(monkeypatch, "_switch", lambda: shutil.rmtree(base), is_after=True)
    else:
        hook(monkeypatch, when, go_on)
    with pytest.raises(ExportError, match="could not be registered") as told:
        publish(sources[1], where, **settings)
    assert "rollback" not in str(told.value)
    assert "base" in str(told.value)
    (orphan,) = [path for path in (where / "versions").iterdir() if "base" in manifest_of(path)]
    if when == "late":  # the version before is without its rows too
        publish(sources[0], where, **FULL, num_shards=3)
    full = current_of(where)["version"]
    again = [publish(sources[1], where, **settings) for _ in range(2)]
    assert again[0] == again[1] != orphan
    assert put_together(where / "versions" / full, again[0]) == read_package(export(sources[1], where / "expected"))
    assert any(
        f"{orphan} is this export as a delta whose base is there no more" in n for n in manifest_of(again[0])["notes"]
    )
    with dist_export.open_package(f"versions:{where}") as package:
        assert package.base is not None


@pytest.mark.parametrize("how", ["publish", "export_dir"])
@pytest.mark.parametrize("is_current", [True, False])
def test_overwrite_leaves_the_base_of_a_delta(sources, where: Path, is_current: bool, how: str) -> None:
    base, delta = publish(sources[0], where), publish(sources[1], where)
    if not is_current:
        publish(sources[0], where, **FULL, num_shards=3)
    before = {path: path.stat().st_mtime_ns for path in sorted(where.rglob("*"))}

    def again() -> None:
        if how == "publish":
            publish(sources[0], where, overwrite=True)
        else:
            export(sources[1], base, overwrite=True)

    with pytest.raises(ConfigError, match=f"is the base of {delta.name}, which nobody could read if overwrite"):
        again()
    assert {path: path.stat().st_mtime_ns for path in sorted(where.rglob("*"))} == before
    shutil.rmtree(delta)
    again()
    assert "base" not in manifest_of(base)


def test_overwrite_leaves_the_base_of_a_delta_that_came_meanwhile(sources, where: Path, monkeypatch) -> None:
    base = publish(sources[0], where)
    before = manifest_of(base)
    made: list[Path] = []

    def write(state: Any) -> Any:
        monkeypatch.undo()
        made.append(publish(sources[1], where))
        return write_rest_of_files(state)

    monkeypatch.setattr(steps, "write_rest_of_files", write)
    with pytest.raises(ConfigError, match="is the base of "):
        publish(sources[0], where, overwrite=True)
    assert manifest_of(base) == before
    with dist_export.open_package(made[0]) as package:
        assert package.base is not None


def test_a_base_outside_of_the_directory_is_named_by_its_path(sources, where: Path, tmp_path: Path) -> None:
    """Null would say that the version is a full package, and nobody would count its deltas."""
    outside = export(sources[0], tmp_path / "outside")
    first = publish(sources[1], where, base=str(outside))
    assert (current_of(where)["base"], current_of(where)["switches"][0]["num_deltas"]) == (str(outside), 1)
    publish(sources[1], where, num_shards=3)
    assert (current_of(where)["base"], current_of(where)["switches"][0]["num_deltas"]) == (str(outside), 2)
    VersionDirectory().rollback(str(where), first.name)
    assert (current_of(where)["base"], current_of(where)["switches"][0]["num_deltas"]) == (str(outside), 1)
    publish(sources[0], where, **FULL)
    assert current_of(where)["base"] is None
