"""A directory of versions: what is published, which one is current, and what becomes of older ones."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import dist_export
from dist_export import cli
from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError, ExportError
from dist_export.registry.base import LaterStepError, Registered
from dist_export.registry.versions import VersionDirectory, parse
from dist_export.storage.local_directory import LocalDirectory
from dist_export.storage.urls import open_directory
from tests.support import exports
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.s3.s3_cases import Store
from tests.support.s3.s3_server import S3Server

STEPS = (5, 20, 100)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in STEPS:
        write_checkpoint(tmp_path / "run" / f"ckpt_{step}", make_tables({"t": 10 + step}, num_parts=2))
    return tmp_path / "run"


def publish(run: Path, where: Any, step: int, **settings: Any) -> Any:
    return exports.export({"ckpt_dir": str(run), "publish": str(where), "step": step, **settings})


def current_of(where: Path) -> dict[str, Any]:
    return json.loads((where / "current.json").read_text())


def rows_of(where: Any, version: str = "") -> int:
    with dist_export.open_package(f"versions:{where}{version and '@'}{version}") as package:
        return package.manifest.tables[0].rows_out


def test_the_package_is_a_version_and_current_json_names_it(run: Path, tmp_path: Path) -> None:
    where = tmp_path / "serving"
    manifest = publish(run, where, 5)
    found = current_of(where)
    assert found["version"].startswith("5-")
    assert (found["manifest_digest"], found["step"], found["base"]) == (manifest.digest, 5, None)
    assert [folder.name for folder in (where / "versions").iterdir()] == [found["version"]]
    assert rows_of(where) == 15
    second = publish(run, where, 20)
    assert current_of(where)["manifest_digest"] == second.digest
    assert rows_of(where) == 30
    assert rows_of(where, found["version"]) == 15
    assert [switch["step"] for switch in current_of(where)["switches"]] == [20, 5]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"publish": "DIR", "register": "models:/ctr"}, "one export does one of the two"),
        ({"export_dir": "DIR/elsewhere", "register": "versions:DIR"}, "leave both out and set publish"),
    ],
)
def test_a_version_is_where_its_directory_looks_for_it(run: Path, tmp_path: Path, settings: Any, told: str) -> None:
    """Else the export would succeed, and current.json would name what is not there, or nothing."""
    where = tmp_path / "serving"
    given = {name: value.replace("DIR", str(where)) for name, value in settings.items()}
    with pytest.raises(ConfigError, match=told):
        exports.export({"ckpt_dir": str(run), **given})
    assert not where.exists()


def test_a_checkpoint_that_is_written_anew_at_its_path_is_a_new_version(tmp_path: Path) -> None:
    where = tmp_path / "serving"
    for rows in (7, 9):
        write_checkpoint(tmp_path / "latest", make_tables({"t": rows}, num_parts=1))
        exports.export({"ckpt_dir": str(tmp_path / "latest"), "publish": str(where)})
        assert rows_of(where) == rows
    assert len(list((where / "versions").iterdir())) == 2


def test_the_same_export_again_leaves_the_current_version(run: Path, tmp_path: Path) -> None:
    """A scheduler that starts a finished job again must not bring an old model back."""
    where = tmp_path / "serving"
    publish(run, where, 5)
    publish(run, where, 20)
    before = (where / "current.json").read_bytes()
    publish(run, where, 5)
    assert (where / "current.json").read_bytes() == before


def test_a_version_of_an_earlier_step_is_whole_and_not_current(run: Path, tmp_path: Path) -> None:
    where = tmp_path / "serving"
    publish(run, where, 100)
    before = (where / "current.json").read_bytes()
    with pytest.raises(
        ExportError, match=r"whole and committed.*is of step 100, and this one of step 20.*rollback"
    ) as told:
        publish(run, where, 20)
    assert told.value.exit_code == 1
    assert "Run the same export again" not in str(told.value)
    assert str(told.value).endswith("current all the same. The same export again would be refused, too")
    assert (where / "current.json").read_bytes() == before
    (late,) = [folder.name for folder in (where / "versions").iterdir() if folder.name.startswith("20-")]
    assert VersionDirectory().rollback(str(where), late) == late
    assert rows_of(where) == 30


def registered(where: Path, name: str, **more: Any) -> Registered:
    directory = f"{where}/versions/{name}"
    Path(directory).mkdir(parents=True)
    return Registered(directory, "", f"xxh3:{name}", (), (), {}, **more)


def test_of_two_publishers_one_wins_and_the_other_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, registry = f"versions:{tmp_path}", VersionDirectory()
    registry.register(uri, registered(tmp_path, "old"))
    seen = registry.look(uri)
    registry.register(uri, registered(tmp_path, "fast", seen=seen))
    with pytest.raises(ExportError, match=r"current.json has changed since this export began: .* is\s+fast now"):
        registry.register(uri, registered(tmp_path, "slow", seen=seen))
    assert registry.resolve(uri).uri == f"versions:{tmp_path}@fast"
    first, seen, switch = registered(tmp_path, "first", step=5), registry.look(uri), VersionDirectory._switch

    def be_late(*arguments: Any, **more: Any) -> None:
        monkeypatch.setattr(VersionDirectory, "_switch", switch)
        registry.register(uri, registered(tmp_path, "later", step=9, seen=seen))
        switch(*arguments, **more)

    monkeypatch.setattr(VersionDirectory, "_switch", be_late)
    with pytest.raises(LaterStepError, match="has changed since this export began"):
        registry.register(uri, first._replace(seen=seen))


def test_the_first_of_two_that_see_an_empty_directory_wins(tmp_path: Path) -> None:
    uri, registry = f"versions:{tmp_path}", VersionDirectory()
    registry.register(uri, registered(tmp_path, "fast"))
    with pytest.raises(ExportError, match="has changed since this export began"):
        registry.register(uri, registered(tmp_path, "slow"))
    assert registry.resolve(uri).uri == f"versions:{tmp_path}@fast"


def publish_names(where: Path, names: str, **options: Any) -> VersionDirectory:
    registry, uri = VersionDirectory(**options), f"versions:{where}"
    for name in names:
        registry.register(uri, registered(where, name, seen=registry.look(uri)))
    return registry


def names_of(where: Path) -> list[str]:
    return sorted(folder.name for folder in (where / "versions").iterdir())


@pytest.mark.parametrize(("keep", "kept"), [(None, "abcde"), (3, "cde"), (2, "de"), (1, "de")])
def test_older_versions_go_and_the_one_before_the_current_stays(tmp_path: Path, keep: int | None, kept: str) -> None:
    publish_names(tmp_path, "abcde", keep_versions=keep, grace_secs=0)
    assert names_of(tmp_path) == list(kept)


def test_a_version_is_removed_from_its_manifest_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher that dies on the way leaves nothing that counts as a version."""
    publish_names(tmp_path, "ab", grace_secs=0)
    (tmp_path / "versions" / "a" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "versions" / "a" / "shard").write_bytes(b"rows")

    def die(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalDirectory, "remove_tree", die)
    registry = VersionDirectory(keep_versions=1, grace_secs=0)
    registry.register(f"versions:{tmp_path}", registered(tmp_path, "c", seen=registry.look(f"versions:{tmp_path}")))
    assert [path.name for path in (tmp_path / "versions" / "a").iterdir()] == ["shard"]
    assert not next(its for its in registry.list_versions(str(tmp_path)) if its.name == "a").is_there


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_rollback_while_old_versions_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Whatever comes first, current.json names a package that is there."""
    publish_names(tmp_path, "ab", grace_secs=0)
    for name in "ab":
        manifest = exported_manifest(tmp_path / name)
        (tmp_path / "versions" / name / "manifest.json").write_bytes(manifest)
    registry, uri = VersionDirectory(keep_versions=1, grace_secs=0), f"versions:{tmp_path}"
    go_back, remove = VersionDirectory.rollback, LocalDirectory.remove
    told: list[str] = []

    def remove_and_go_back(self: LocalDirectory, name: str) -> None:
        if name == "versions/a/manifest.json" and not told:
            told.append("")
            if when == "before":
                go_back(registry, str(tmp_path), "a")
            else:
                monkeypatch.setattr(VersionDirectory, "_switch", switch_late)
                with pytest.raises(
                    ExportError, match="was removed at this very moment; c is the current version again"
                ):
                    go_back(registry, str(tmp_path), "a")
        remove(self, name)

    switch = VersionDirectory._switch

    def switch_late(*arguments: Any, **more: Any) -> None:
        monkeypatch.setattr(VersionDirectory, "_switch", switch)
        (tmp_path / "versions" / "a" / "manifest.json").unlink()
        switch(*arguments, **more)

    monkeypatch.setattr(LocalDirectory, "remove", remove_and_go_back)
    (tmp_path / "versions" / "c").mkdir()
    registry.register(uri, Registered(f"{tmp_path}/versions/c", "", "xxh3:c", (), (), {}, seen=registry.look(uri)))
    current = current_of(tmp_path)["version"]
    assert current == ("a" if when == "before" else "c")
    assert when == "after" or (tmp_path / "versions" / "a" / "manifest.json").exists()


def exported_manifest(folder: Path) -> bytes:
    """Return the manifest of some package."""
    source = write_checkpoint(folder / "ckpt", make_tables({"item": 10}, 1))
    exports.export({"ckpt_dir": str(source), "export_dir": str(folder / "out")})
    return (folder / "out" / "manifest.json").read_bytes()


def test_an_overwritten_version_has_its_new_digest_in_current_json(run: Path, tmp_path: Path) -> None:
    registry, uri = VersionDirectory(), f"versions:{tmp_path}"
    first = registered(tmp_path, "a")
    registry.register(uri, first)
    registry.register(uri, first._replace(digest="xxh3:other", seen=registry.look(uri)))
    assert current_of(tmp_path)["manifest_digest"] == "xxh3:other"


def test_a_base_stays_as_long_as_a_delta_that_stays_needs_it(tmp_path: Path) -> None:
    """Names in capitals are full packages, the others deltas of the last one."""
    where, base = tmp_path / "serving", ""
    kept, letters = [], {}
    for number, name in enumerate("AbcdEfG"):
        write_checkpoint(tmp_path / name, make_tables({"t": 10 + number}, num_parts=1))
        settings: dict[str, Any] = {"base": "latest"} if name.islower() else {}
        settings |= {"keep_versions": 1, "registry_options": {"versions": {"grace_secs": 0}}}
        exports.export({"ckpt_dir": str(tmp_path / name), "publish": str(where), "filter_sparse_opt": True, **settings})
        letters[current_of(where)["version"]] = name
        base = base if name.islower() else name
        kept.append("".join(sorted(letters[version] for version in names_of(where))))
        assert letters.get(current_of(where)["base"]) == (base if name.islower() else None)
    assert kept == ["A", "Ab", "Abc", "Acd", "AEd", "Ef", "EGf"]


def test_a_version_that_was_current_a_moment_ago_stays_for_its_readers(tmp_path: Path) -> None:
    publish_names(tmp_path, "abcde", keep_versions=1)
    assert names_of(tmp_path) == list("abcde")


def test_after_a_rollback_the_version_that_was_left_counts_as_recent(tmp_path: Path) -> None:
    registry = publish_names(tmp_path, "abc", grace_secs=0)
    for name in "abc":
        (tmp_path / "versions" / name / "manifest.json").write_bytes(b"{}")
    with pytest.raises(dist_export.PackageError, match="no package manifest"):
        registry.rollback(str(tmp_path), "a")
    with pytest.raises(ConfigError, match=r"versions/z is no package; the versions of .* are c, b, a"):
        registry.rollback(str(tmp_path), "z")


def test_rollback_without_a_name_takes_the_one_before(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    where = tmp_path / "serving"
    for step in STEPS:
        publish(run, where, step)
    newest = current_of(where)["version"]
    assert cli.main(["rollback", str(where)]) == 0
    assert current_of(where)["step"] == 20
    assert rows_of(where) == 30
    assert cli.main(["rollback", f"versions:{where}", newest]) == 0
    assert rows_of(where) == 110
    assert cli.main(["versions", str(where)]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].split()[:2] == ["*", newest]
    assert [line.partition("step ")[2] for line in lines] == ["100  full", "20  full", "5  full"]
    assert lines[0].split()[2:4] == ["published", f"{current_of(where)['created_at'][:19]}Z"]
    assert cli.main(["versions", f"versions:{where}", "--json"]) == 0
    assert [it["is_current"] for it in json.loads(capsys.readouterr().out)] == [True, False, False]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for argv, told in {
        ("versions", str(tmp_path)): "so no version is published",
        ("rollback", str(tmp_path)): "so no version is published",
        ("rollback",): "which path? Usage: dist_export rollback DIR [VERSION]",
        ("verify", f"versions:{tmp_path}"): "so no version is published",
        ("verify", "versions:"): "give versions:DIRECTORY",
    }.items():
        assert cli.main(list(argv)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"publish": "a", "export_dir": "b"}, "publish is 'a' and export_dir 'b'; give one of the two"),
        ({"publish": "a", "add_subfolder": True}, "add_subfolder puts"),
        ({"publish": "a", "keep_versions": 0}, "keep_versions is 0"),
        ({"publish": ""}, "publish is empty"),
        ({"export_dir": "b", "keep_versions": 3}, "keep_versions is for a directory of versions"),
        ({}, "export_dir is not set"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ExportConfig(ckpt_dir="c", **settings)
    assert ExportConfig(ckpt_dir="c", publish="d").with_changes(threads=2).export_dir == "versions:d"


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "../../etc", "manifest_digest": "", "created_at": ""}'])
def test_a_damaged_current_json_is_refused_before_anything_is_written(run: Path, tmp_path: Path, text: str) -> None:
    where = tmp_path / "serving"
    where.mkdir()
    (where / "current.json").write_text(text)
    with pytest.raises(ConfigError, match=r"current.json is damaged"):
        publish(run, where, 5)
    assert [path.name for path in where.iterdir()] == ["current.json"]


def test_uris() -> None:
    assert parse("versions:/a/b/") == ("/a/b", None)
    assert parse("versions:s3://user@host/a@5-ab") == ("s3://user@host/a", "5-ab")
    assert parse("versions:s3://user@host/a") == ("s3://user@host/a", None)
    for uri in ("versions:", "versions:a@b c", "models:/a"):
        with pytest.raises(ConfigError, match="give versions:DIRECTORY"):
            parse(uri)


def test_a_server_follows_the_current_version(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from dist_export.serve.served import Watcher

    where = tmp_path / "serving"
    first = publish(run, where, 5)
    watcher = Watcher(f"versions:{where}", poll_secs=0.01)
    watcher.start()
    try:
        for step in (20, 100):
            wait_for(watcher, publish(run, where, step).digest)
        VersionDirectory().rollback(str(where), next(n for n in names_of(where) if n.startswith("5-")))
        wait_for(watcher, first.digest)
    finally:
        watcher.stop()
    assert watcher.num_swaps == 3


def wait_for(watcher: Any, digest: str) -> None:
    until = time.monotonic() + 30
    while watcher.current.package.manifest.digest != digest:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.s3
def test_versions_in_a_store(run: Path, s3_server: S3Server) -> None:
    store = Store(s3_server)
    where, options = store.url("serving"), store.options
    for step in (5, 20, 100):
        settings = {"storage_options": {}, "target_storage_options": options, "keep_versions": 2}
        given = {"versions": {"grace_secs": 0}}
        publish(run, where, step, registry_options=given, **settings)
    registry = VersionDirectory(storage_options=options)
    assert [(found.step, found.is_there) for found in registry.list_versions(where)] == [
        (100, True),
        (20, True),
        (5, False),
    ]
    directory = open_directory(where, options)
    assert {name.partition("-")[0] for name in directory.child("versions").walk()} == {"100", "20"}
    seen = registry.look(f"versions:{where}")
    registry.rollback(where)
    late = Registered(f"{where}/versions/late", "", "xxh3:0", (), (), {}, seen=seen)
    with pytest.raises(ExportError, match="has changed since this export began"):
        registry.register(f"versions:{where}", late)
    own = {"versions": {"storage_options": options}}
    with dist_export.open_package(f"versions:{where}", storage_options=options, registry_options=own) as package:
        assert package.manifest.tables[0].rows_out == 30


@pytest.mark.parametrize("command", ["verify", "inspect", "diff"])
def test_a_directory_of_versions_is_named_as_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    where = tmp_path / "serving"
    publish(run, where, STEPS[0])
    capsys.readouterr()
    assert cli.main([command, str(where), *([str(where)] if command == "diff" else [])]) == 2
    assert f"give versions:{where}" in capsys.readouterr().err
