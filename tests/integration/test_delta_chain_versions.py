"""Chains in a directory of versions: links that are needed stay, deltas are counted from the full package on, serving follows."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

import dist_export
from dist_export.errors import ConfigError, ExportError, PackageError
from dist_export.package import chain
from dist_export.registry.versions import VersionDirectory, refuse_needed
from dist_export.serve import served
from dist_export.serve.served import Watcher
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from dist_export.watch.decision import Checkpoint, Rules, Seen, is_full_next
from tests.integration.test_delta_bases import publish
from tests.integration.test_delta_chain_export import looked_up, save
from tests.integration.test_delta_chains import STATES
from tests.integration.test_delta_export import export
from tests.integration.test_versions import current_of
from tests.support.deltas import manifest_of, read_package

CHAIN: dict[str, Any] = {"delta_chain": 8}
NOW: dict[str, Any] = {"registry_options": {"versions": {"grace_secs": 0}}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [save(folder / f"step-{step}", state, 1 + step % 3) for step, state in enumerate(STATES)]


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "serving"


def publish_all(sources: list[Path], where: Path, **settings: Any) -> list[Path]:
    return [publish(source, where, **CHAIN, **settings) for source in sources]


def test_latest_is_the_last_version_and_a_chain_grows_on_it(sources, where: Path) -> None:
    links = publish_all(sources, where)
    assert "base" not in manifest_of(links[0])
    for below, link in itertools.pairwise(links):
        assert manifest_of(link)["base"]["path"] == str(below)
    switches = current_of(where)["switches"]
    assert [switch["base"] for switch in switches] == [links[2].name, links[1].name, links[0].name, None]
    assert [switch["num_deltas"] for switch in switches] == [3, 2, 1, 0]
    expected = read_package(export(sources[-1], where.parent / "again"))
    assert looked_up(Path(VersionDirectory().resolve(f"versions:{where}").directory), expected) == expected
    again = publish(sources[-1], where, **CHAIN)
    assert again == links[-1]
    assert len(list((where / "versions").iterdir())) == 4


def test_all_links_of_a_kept_version_are_kept(sources, where: Path) -> None:
    links = publish_all(sources, where, keep_versions=1, **NOW)
    assert all(link.exists() for link in links)
    full = publish(sources[-1], where, base=None, on_base_mismatch="error", keep_versions=1, **NOW)
    assert all(link.exists() for link in links)  # the version before the current one stays, and needs them all
    last = publish(sources[-2], where, base=None, on_base_mismatch="error", keep_versions=1, num_shards=2, **NOW)
    assert [link.exists() for link in [*links, full, last]] == [False] * 4 + [True, True]


def test_a_version_below_a_delta_elsewhere_is_kept(sources, where: Path, tmp_path: Path) -> None:
    full = publish(sources[0], where)
    outside = export(sources[1], tmp_path / "outside", base=str(full))
    keep: dict[str, Any] = {"keep_versions": 1, **NOW}
    last = publish(sources[2], where, base=str(outside), **CHAIN, **keep)
    publish(sources[3], where, base="latest", **CHAIN, **keep)
    again = publish(sources[3], where, base=str(outside), num_shards=2, **CHAIN, **keep)
    assert full.exists()
    assert last.exists()
    with dist_export.open_package(again) as package:
        assert [layer.directory.path for layer in package.layers] == [str(again), str(outside), str(full)]


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_version_below_one_that_was_never_current_is_kept(sources, where: Path, tmp_path: Path, is_elsewhere) -> None:
    """A publisher that loses leaves its version there, and it may be named as a base, as may a link to a version."""
    full = publish(sources[0], where, step=0, **CHAIN)
    publish(sources[2], where, step=2, **CHAIN)
    named = full
    if is_elsewhere:
        named = tmp_path / "named"
        named.symlink_to(full)
    with pytest.raises(ExportError, match="step"):
        publish(sources[1], where, step=1, base=str(named), **CHAIN)
    [lost] = (where / "versions").glob("1-*")
    publish(sources[3], where, step=3, base=str(named if is_elsewhere else lost), **CHAIN)
    for number in range(4, 7):
        last = publish(sources[3], where, step=3, num_shards=number, keep_versions=1, **CHAIN, **NOW)
        assert full.exists()
        with dist_export.open_package(last) as package:
            assert package.layers[-1].directory.path == str(full)


def test_no_link_is_overwritten(sources, where: Path) -> None:
    links = publish_all(sources, where)
    for number, link in enumerate(links[:-1]):
        with pytest.raises(ConfigError, match="is the base of ") as raised:
            refuse_needed(open_directory(link))
        assert all(above.name in str(raised.value) for above in links[number + 1 :])
    refuse_needed(open_directory(links[-1]))


@pytest.mark.parametrize("number", [0, 1])
def test_no_rollback_to_a_chain_with_a_missing_link(sources, where: Path, number: int) -> None:
    links = publish_all(sources[:3], where)
    full = publish(sources[3], where, base=None, on_base_mismatch="error")
    assert VersionDirectory().rollback(str(where), links[2].name) == links[2].name
    assert VersionDirectory().rollback(str(where), full.name) == full.name
    shutil.rmtree(links[number])
    with pytest.raises(ConfigError, match=rf"is a delta of {links[number]}, and neither there nor beside it") as raised:
        VersionDirectory().rollback(str(where), links[2].name)
    assert f"{links[2]} " in str(raised.value)
    assert "\n" not in str(raised.value)
    assert current_of(where)["version"] == full.name


@pytest.mark.parametrize("number", [0, 1])
def test_the_same_export_becomes_another_version_once_a_link_is_gone(sources, where: Path, number: int) -> None:
    links = publish_all(sources[:3], where)
    shutil.rmtree(links[number])
    again = publish(sources[2], where, **CHAIN)
    assert again != links[2]
    assert "base" not in manifest_of(again)  # on_base_mismatch: full
    with dist_export.open_package(again):
        pass


def test_watch_counts_all_deltas_of_a_chain(sources, where: Path) -> None:
    publish_all(sources, where)
    current, _ = VersionDirectory().read_current(f"versions:{where}")
    seen = Seen(checkpoint=Checkpoint(step=9, saved_at=0.0, stamp="a"), current=current)
    rules = {"base": "latest", "max_delta": 1.0}
    assert is_full_next(seen, Rules(full_every=4, **rules))
    assert not is_full_next(seen, Rules(full_every=5, **rules))


@pytest.mark.parametrize("checks", [False, True])
def test_serving_follows_a_chain_and_opens_each_link_once(sources, where: Path, checks: bool, monkeypatch) -> None:
    publish(sources[0], where)
    checked: list[str] = []
    merge = chain.MergedIds.__init__

    def note_and_verify(path: str, *arguments: Any, **more: Any) -> Any:
        checked.append(path)
        return verify(path, *arguments, **more)

    monkeypatch.setattr(served, "verify", note_and_verify)
    holder = Watcher(f"versions:{where}", checks=checks)
    seen = [holder.current.package]
    for step in (1, 2, 3):
        link = publish(sources[step], where, **CHAIN)
        holder.check_now()
        package = holder.current.package
        assert package.directory.path == str(link)
        assert package.layers[1:] == tuple(reversed(seen))
        seen.append(package)
        expected = read_package(export(sources[step], where.parent / f"again{step}"))
        monkeypatch.setattr(chain.MergedIds, "__init__", None)  # the ids are merged before the first request
        ids = list(expected["t"])
        rows, has_row = package.lookup("t", ids, raw=True)
        assert has_row.all()
        assert [bytes(row) for row in rows] == [row for (row,) in expected["t"].values()]
        monkeypatch.setattr(chain.MergedIds, "__init__", merge)
    assert holder.num_refused == 0
    assert checked == ([layer.directory.path for layer in reversed(package.layers)] if checks else [])


@pytest.mark.parametrize("number", [0, 1])
def test_serving_refuses_a_chain_with_an_unsound_link(sources, where: Path, number: int) -> None:
    links = publish_all(sources[:2], where)
    links.append(publish(sources[2], where, **CHAIN))
    shard = next(links[number].glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(PackageError, match=f"{links[number]} is unsound"):
        Watcher(f"versions:{where}", checks=True)
