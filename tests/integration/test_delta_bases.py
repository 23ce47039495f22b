"""Which package is the base of a delta, and that it is still there when the delta is committed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

import dist_export
from dist_export.delta import deleted_ids
from dist_export.errors import CommitError, ConfigError, PackageError, PlanError, UserError
from dist_export.manifest import decode_manifest, encode_manifest, seal
from dist_export.pipeline import deltas
from dist_export.registry.versions import VersionDirectory
from dist_export.verify.verify import verify
from tests.integration.test_delta_export import change, export, save, state_of, tables_of
from tests.support import dcp_writer
from tests.support.deltas import manifest_of, put_together, read_package


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, before = tmp_path_factory.mktemp("sources"), tables_of()
    return save(folder / "before", before, 2), save(folder / "after", change(before), 2)


@pytest.mark.parametrize("spelling", ["{}", "file://{}", "{}-link", "{}-delta"])
def test_a_base_is_not_replaced_by_its_own_delta(sources, tmp_path: Path, spelling: str) -> None:
    base = export(sources[0], tmp_path / "base")
    (tmp_path / "base-link").symlink_to(base)
    export(sources[1], tmp_path / "base-delta", base=str(base))
    before = manifest_of(base)
    with pytest.raises(ConfigError, match="is export_dir, so that the delta would take its place"):
        export(sources[1], base, base=spelling.format(base), overwrite=True)
    assert manifest_of(base) == before


def publish(source: Path, where: Path, **settings: Any) -> Path:
    export(
        source,
        Path(),
        publish=str(where),
        **{"export_dir": "", "base": "latest", "on_base_mismatch": "full"} | settings,
    )
    return where / "versions" / VersionDirectory().list_versions(str(where))[0].name


def test_a_link_to_a_version_is_that_version(sources, tmp_path: Path) -> None:
    """Else keep_versions would remove the base of the version that is served."""
    full = publish(sources[0], tmp_path / "pub")
    (tmp_path / "link").symlink_to(full)
    now = {"registry_options": {"versions": {"grace_secs": 0}}, "keep_versions": 1, "base": str(tmp_path / "link")}
    publish(sources[1], tmp_path / "pub", **now)
    delta = publish(sources[1], tmp_path / "pub", **now, num_shards=2)
    assert manifest_of(delta)["base"]["path"] == os.path.realpath(full)
    assert full.exists()
    with dist_export.open_package(delta) as package:
        assert package.base is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": {"*": "bfloat16"}, "on_overflow": "clamp"},
        {"drop_tables": ["user"]},
        {"delta_chain": 8, "drop_tables": ["user"]},
    ],
    ids=str,
)
def test_the_same_export_again_is_the_same_version_where_the_base_does_not_fit(
    sources, tmp_path: Path, settings
) -> None:
    """It is a full package, of which the manifest tells what its base would have been."""
    first = publish(sources[0], tmp_path / "pub")
    full = publish(sources[1], tmp_path / "pub", **settings)
    assert full != first
    assert manifest_of(full)["run"]["misfit"][0] == str(first)
    before = (tmp_path / "pub" / "current.json").read_bytes()
    assert publish(sources[1], tmp_path / "pub", **settings) == full
    assert (tmp_path / "pub" / "current.json").read_bytes() == before


def test_the_same_export_again_is_the_same_version(sources, tmp_path: Path) -> None:
    """Although latest is another package by then."""
    versions = [
        publish(source, tmp_path / "pub") for source in (sources[0], sources[0], sources[1], sources[1], sources[1])
    ]
    assert versions[0] == versions[1] != versions[2]
    assert versions[2] == versions[3] == versions[4]
    assert len(list((tmp_path / "pub" / "versions").iterdir())) == 2
    assert "base" not in manifest_of(versions[0])
    assert manifest_of(versions[2])["base"]["path"] == str(versions[0])


def test_a_directory_of_versions_is_named_as_one(sources, tmp_path: Path) -> None:
    publish(sources[0], tmp_path / "pub")
    named = f"give versions:{tmp_path / 'pub'}"
    with pytest.raises(UserError, match=named):
        dist_export.open_package(tmp_path / "pub")
    with pytest.raises(ConfigError, match=named):
        export(sources[1], tmp_path / "delta", base=str(tmp_path / "pub"))


def test_a_directory_of_versions_that_was_copied_goes_on_with_its_own_base(sources, tmp_path: Path) -> None:
    full = publish(sources[0], tmp_path / "pub")
    publish(sources[1], tmp_path / "pub")
    shutil.copytree(tmp_path / "pub", tmp_path / "copy")
    delta = publish(sources[0], tmp_path / "copy", num_shards=3)
    assert manifest_of(delta)["base"]["path"] == str(tmp_path / "copy" / "versions" / full.name)


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_base_that_is_replaced_meanwhile_fails_the_export(
    sources, tmp_path: Path, monkeypatch, is_removed: bool
) -> None:
    base = export(sources[0], tmp_path / "base")
    write = deleted_ids.write_deleted

    def write_and_replace(*arguments: Any, **more: Any) -> Any:
        written = write(*arguments, **more)
        if is_removed:
            shutil.rmtree(base)
        else:
            export(sources[1], base, overwrite=True)
        return written

    monkeypatch.setattr(deltas, "write_deleted", write_and_replace)
    with pytest.raises(CommitError, match="the base had the manifest"):
        export(sources[1], tmp_path / "delta", base=str(base))
    assert not (tmp_path / "delta" / "manifest.json").exists()


@pytest.mark.parametrize("spelling", ["base", "delta", "latest"])
def test_a_package_without_digests_is_no_base(sources, tmp_path: Path, spelling: str) -> None:
    """Another package of the same ids and shapes may have the same manifest digest."""
    pub, out = tmp_path / "pub", tmp_path / "out"
    digested = publish(sources[0], pub) if spelling == "delta" else None
    base = publish(sources[0], pub, digest="none", base=None, on_base_mismatch="error")
    if digested is not None:  # a delta whose base has lost its digests since
        base = publish(sources[1], pub, base=f"versions:{pub}@{digested.name}")
        strip_digests(digested, base)
    before = sorted(pub.rglob("*"))
    given: dict[str, Any] = {"base": str(base)}
    if spelling == "latest":
        given = {"base": "latest", "publish": str(pub), "export_dir": ""}
    with pytest.raises(
        ConfigError, match=r"with digest: none, so nothing tells its rows from others.*Nothing was written"
    ):
        export(sources[1], out, **given)
    assert not out.exists()
    assert sorted(pub.rglob("*")) == before
    export(sources[1], out, **given, on_base_mismatch="full")
    made = out if spelling != "latest" else Path(VersionDirectory().resolve(f"versions:{pub}").directory)
    manifest = manifest_of(made)
    assert "base" not in manifest
    assert any("everything was exported" in note and "digest: none" in note for note in manifest["notes"])


def strip_digests(base: Path, delta: Path) -> None:
    """Let the shards of a package lose their digests, and let its delta name it all the same."""
    its = decode_manifest((base / "manifest.json").read_bytes(), where="base")
    files = tuple(msgspec.structs.replace(file, digest="") for file in its.files)
    its = seal(msgspec.structs.replace(its, files=files))
    (base / "manifest.json").write_bytes(encode_manifest(its))
    own = decode_manifest((delta / "manifest.json").read_bytes(), where="delta")
    own = seal(msgspec.structs.replace(own, base=msgspec.structs.replace(own.base, digest=its.digest)))
    (delta / "manifest.json").write_bytes(encode_manifest(own))


def test_readers_refuse_a_delta_of_a_base_without_digests(sources, tmp_path: Path) -> None:
    base = export(sources[0], tmp_path / "base")
    delta = export(sources[1], tmp_path / "delta", base=str(base))
    strip_digests(base, delta)
    told = "with digest: none, so nothing tells its rows from others"
    with pytest.raises(PackageError, match=told):
        dist_export.open_package(delta)
    with pytest.raises(PackageError, match=told):
        dist_export.open_package(delta, base=base)
    (finding,) = verify(str(delta)).findings
    assert told in str(finding)


@pytest.mark.parametrize("then", ["delta", "full", "restart"])
def test_deleted_ids_of_a_killed_export_are_in_no_later_package(
    sources, tmp_path: Path, monkeypatch, then: str
) -> None:
    base, out = export(sources[0], tmp_path / "base"), tmp_path / "out"
    write = deleted_ids.write_deleted

    def write_and_die(*arguments: Any, **more: Any) -> Any:
        write(*arguments, **more)
        raise CommitError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(deltas, "write_deleted", write_and_die)
        with pytest.raises(CommitError, match="killed"):
            export(sources[1], out, base=str(base))
    assert list(out.glob("*.deleted_ids"))
    if then == "restart":
        with pytest.raises(ConfigError, match="unfinished export"):
            export(sources[0], out, base=str(base), on_unfinished="error")
    export(sources[0], out, **({} if then == "full" else {"base": str(base)}))
    assert not list(out.glob("*.deleted_ids"))
    assert {file.name for file in out.iterdir()} == {
        "manifest.json",
        *(its["path"] for its in manifest_of(out)["files"]),
    }


def test_kinds_of_tables_that_do_not_fit(tmp_path: Path) -> None:
    weight = "sparse_arch.item.weight"
    settings: dict[str, Any] = {"treat_as_tables": [weight]}
    source = dcp_writer.save(tmp_path / "one", state_of())
    by_number = export(source, tmp_path / "by_number", **settings)
    hashed = export(source, tmp_path / "hashed", to_hash_tables=["*"], **settings)
    with pytest.raises(PlanError, match="is a hash table, and that of the checkpoint is row-indexed"):
        export(source, tmp_path / "delta", base=str(hashed), **settings)
    rules: dict[str, Any] = {"to_hash_tables": ["*"], "prune": [{"tables": ["*"], "norm_at_most": 2.0}]}
    with pytest.raises(PlanError, match="no row can be deleted, and prune has a rule for it"):
        export(source, tmp_path / "delta", base=str(by_number), **settings, **rules)
    assert not (tmp_path / "delta").exists()
    delta = export(source, tmp_path / "delta", base=str(hashed), to_hash_tables=["*"], **settings)
    assert put_together(hashed, delta) == read_package(hashed)
