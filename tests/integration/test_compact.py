"""A delta package and its base become the package that a full export gives, row for row and with its account."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dist_export
from dist_export import cli
from dist_export.delta import replaced_rows
from dist_export.errors import CheckpointError, CommitError, ExportError, PlanError, UserError
from dist_export.manifest import MANIFEST
from dist_export.pipeline import compact as compacting
from dist_export.pipeline.compacted_package import account_for_bytes
from dist_export.registry.versions import VersionDirectory
from dist_export.verify.verify import verify
from tests.integration import test_delta_scores
from tests.integration.test_delta_export import SETTINGS, change, export, save, state_of, tables_of
from tests.support import dcp_writer
from tests.support import score_models as models
from tests.support.delta_by_hand import change_rows, edit, write_delta, write_full
from tests.support.deltas import manifest_of, put_together, read_package
from tests.support.recis_writer import split_table, write_checkpoint

MERGED = "torch_rank_weights_embs_table_multi_shard.json"
INDEXES = ("index", "tensorkey.json")
OF_CHECKPOINT = (
    *("schema_version", "mode", "num_shards", "source", "left_out_tables", "prune", "account"),
    *("dense_tensors", "dropped_dense_tensors"),
)
OF_TABLE = (
    *("name", "rows_in", "rows_out", "rows_dropped", "misplaced", "repaired", "duplicates", "id_sum"),
    *("dropped", "is_hashed", "source_name", "default_row", "delta"),
)


def make(delta: Path, out: Path, **arguments: Any) -> Path:
    """Compact on this one rank."""
    dist_export.compact(delta, out, progress=False, **arguments)
    return out


def compare(made: Path, full: Path) -> None:
    """Hold a compacted package against the full export: every row, and what its manifest says of the checkpoint."""
    assert read_package(made) == read_package(full)
    ours, theirs = manifest_of(made), manifest_of(full)
    for name in OF_CHECKPOINT:
        assert ours.get(name) == theirs.get(name), name
    assert sorted(ours["notes"]) == sorted(theirs["notes"])
    assert "base" not in ours
    for one, other in zip(ours["tables"], theirs["tables"], strict=True):
        for name in OF_TABLE:
            assert one.get(name) == other.get(name), name
        assert [{**slot, "cast": None} for slot in one["kept"]] == [{**slot, "cast": None} for slot in other["kept"]]
    assert [(made / name).exists() for name in INDEXES] == [(full / name).exists() for name in INDEXES]
    for name in (*(name for name in INDEXES if (full / name).exists()), MERGED):
        ours, theirs = json.loads((made / name).read_text()), json.loads((full / name).read_text())
        assert ours == theirs, name
    found = verify(str(made))
    assert found.findings == []


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, before = tmp_path_factory.mktemp("sources"), tables_of()
    return save(folder / "before", before, 2), save(folder / "after", change(before), 3)


@pytest.fixture(scope="module")
def packages(sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a delta and the full export, to be copied by tests that damage them."""
    folder = tmp_path_factory.mktemp("packages")
    base = export(sources[0], folder / "base", num_shards=2)
    export(sources[1], folder / "delta", num_shards=3, base=str(base))
    export(sources[1], folder / "full", num_shards=3)
    return folder


@pytest.mark.parametrize("shards", [(1, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_compacted_package_is_the_full_export(sources, tmp_path: Path, settings, shards) -> None:
    base = export(sources[0], tmp_path / "base", num_shards=shards[0], row_fingerprints=shards[0] == 1, **settings)
    delta = export(sources[1], tmp_path / "delta", num_shards=shards[1], base=str(base), **settings)
    full = export(sources[1], tmp_path / "full", num_shards=shards[1], **settings)
    made = make(delta, tmp_path / "made")
    compare(made, full)
    assert bool(list(made.glob("*.row_fingerprints"))) == (shards[0] == 1)
    assert list(made.glob("*.row_index"))
    assert not list(made.glob("*.deleted_ids"))
    both = {name: manifest_of(path)["digest"] for name, path in (("delta", delta), ("base", base))}
    assert manifest_of(made)["compacted"] == {
        "delta": {"path": str(delta), "digest": both["delta"]},
        "base": {"path": str(base), "digest": both["base"]},
    }
    compare(
        make(delta, tmp_path / "other", num_shards=2), export(sources[1], tmp_path / "two", num_shards=2, **settings)
    )


def test_the_loss_of_casts_is_that_of_both(sources, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dtype": {"item": "float16"}, "on_overflow": "clamp"}
    base = export(sources[0], tmp_path / "base", **settings)
    delta = export(sources[1], tmp_path / "delta", base=str(base), **settings)
    of_base, of_delta, found = (
        manifest_of(path)["tables"][0]["kept"][1]["cast"] for path in (base, delta, make(delta, tmp_path / "made"))
    )
    assert found["values"] == of_base["values"] + of_delta["values"]
    assert found["max_abs_error"] == max(of_base["max_abs_error"], of_delta["max_abs_error"])
    means = sorted(its["mean_abs_error"] for its in (of_base, of_delta))
    assert means[0] <= found["mean_abs_error"] <= means[1]


@pytest.mark.parametrize("rows", [400, 420], ids=["as_many", "grown"])
@pytest.mark.parametrize("to_hash_tables", [[], ["*"]], ids=["by_number", "hashed"])
def test_tables_of_a_dcp_checkpoint(tmp_path: Path, rows: int, to_hash_tables: list[str]) -> None:
    settings: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"], "to_hash_tables": to_hash_tables}
    settings["default_row"] = {"*": [0.5] * 8}
    base = export(dcp_writer.save(tmp_path / "one", state_of()), tmp_path / "base", num_shards=2, **settings)
    after = dcp_writer.save(tmp_path / "two", state_of(rows, later=True))
    delta = export(after, tmp_path / "delta", base=str(base), num_shards=3, **settings)
    full = export(after, tmp_path / "full", num_shards=3, **settings)
    compare(make(delta, tmp_path / "made", threads=2), full)


def test_a_table_by_row_number_that_is_cast(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"], "dtype": {"*": "int8"}}
    base = export(dcp_writer.save(tmp_path / "one", state_of()), tmp_path / "base", num_shards=2, **settings)
    after = dcp_writer.save(tmp_path / "two", state_of(430, later=True))
    delta = export(after, tmp_path / "delta", base=str(base), **settings)
    compare(make(delta, tmp_path / "made"), export(after, tmp_path / "full", **settings))


@pytest.mark.parametrize("which", ["nothing", "everything", "deleted"])
def test_deltas_at_the_ends(sources, tmp_path: Path, which: str) -> None:
    """Nothing changed; every row changed; and one table whose rows are all others."""
    tables = tables_of()
    if which == "everything":
        for _, slots in tables.values():
            slots["embedding"] += 1
            slots["step"] += 1
    if which == "deleted":
        ids, slots = tables["item"]
        tables["item"] = ids + 1 + (1 << 41), slots
    base = export(sources[0], tmp_path / "base", num_shards=2)
    after = save(tmp_path / "after", tables, 2)
    delta = export(after, tmp_path / "delta", base=str(base), num_shards=3)
    compare(make(delta, tmp_path / "made"), export(after, tmp_path / "full", num_shards=3))


def test_rows_that_pruning_takes_since_the_base(sources, tmp_path: Path) -> None:
    base = export(sources[0], tmp_path / "base")
    rules = [{"tables": ["item"], "slot": "step", "below": 900}]
    delta = export(sources[1], tmp_path / "delta", base=str(base), prune=rules)
    assert manifest_of(delta)["tables"][0]["delta"]["deleted"] > 800
    compare(make(delta, tmp_path / "made"), export(sources[1], tmp_path / "full", prune=rules))


@pytest.mark.parametrize("has_rule", [False, True], ids=str)
def test_duplicates_and_misplaced_rows_of_the_checkpoint(tmp_path: Path, has_rule: bool) -> None:
    before = tables_of()
    base = export(save(tmp_path / "before", before, 2), tmp_path / "base", num_shards=3)
    parts = {name: split_table(ids, slots, 2) for name, (ids, slots) in change(before).items()}
    one, two = parts["item"]
    # 50 rows are there again where they do not belong, and 20 others are there alone
    moved = {slot: np.concatenate([rows, one.slots[slot][:70]]) for slot, rows in two.slots.items()}
    left = np.r_[:50, 70 : len(one.ids)]
    parts["item"] = [
        dataclasses.replace(one, ids=one.ids[left], slots={slot: rows[left] for slot, rows in one.slots.items()}),
        dataclasses.replace(two, ids=np.concatenate([two.ids, one.ids[:70]]), slots=moved),
    ]
    after = write_checkpoint(tmp_path / "after", parts)
    more: dict[str, Any] = {"on_duplicate": "first"}
    if has_rule:
        more["prune"] = [{"tables": "item", "slot": "step", "below": int(np.median(one.slots["step"][:70]))}]
    delta = export(after, tmp_path / "delta", base=str(base), **more)
    full = export(after, tmp_path / "full", **more)
    made = make(delta, tmp_path / "made")
    assert read_package(made) == read_package(full)
    ours, theirs, of_delta = (manifest_of(package)["tables"][0] for package in (made, full, delta))
    for name in ("rows_in", "rows_dropped", "misplaced", "repaired", "duplicates"):
        assert ours[name] == theirs[name], name
    assert of_delta["repaired"] == theirs["repaired"]
    assert theirs["misplaced"] == 70
    assert 0 < theirs["repaired"] <= 20
    assert has_rule or (theirs["repaired"], theirs["duplicates"]) == (20, 50)
    assert verify(str(made)).findings == verify(str(delta)).findings == []
    assert manifest_of(made)["account"] == manifest_of(full)["account"]


def test_dense_tensors_among_the_shards_are_those_of_the_delta(tmp_path: Path) -> None:
    before, folders = tables_of(), []
    for number, tables in enumerate((before, change(before))):
        parts = {name: split_table(ids, slots, 2) for name, (ids, slots) in tables.items()}
        dense = {"scale": np.full(5, number, np.float32), "child@filter_global_step": np.array([number])}
        state = {"dense_arch.weight": torch.full((2, 2), number)}
        folders.append(write_checkpoint(tmp_path / str(number), parts, dense=dense, model_state=state))
    base = export(folders[0], tmp_path / "base", num_shards=2)
    delta = export(folders[1], tmp_path / "delta", num_shards=3, base=str(base))
    full, made = export(folders[1], tmp_path / "full", num_shards=3), make(delta, tmp_path / "made")
    compare(made, full)
    assert [tensor["name"] for tensor in manifest_of(made)["dense_tensors"]] == ["scale"]
    found = [
        {
            name: tensor
            for file in its.glob("*.safetensors")
            for name, tensor in load_file(file).items()
            if "scale" in name
        }
        for its in (made, full)
    ]
    assert [list(its) for its in found] == [list(found[0])] * 2
    assert all(torch.equal(its, torch.ones(5)) for tensors in found for its in tensors.values())


@pytest.mark.parametrize("digest", ["none", "sha256"])
def test_digests(sources, packages: Path, tmp_path: Path, digest: str) -> None:
    """Without digests of the delta and the result; a base has some."""
    base = export(sources[0], tmp_path / "base", digest="sha256")
    delta = export(sources[1], tmp_path / "delta", num_shards=3, base=str(base), digest=digest)
    made = make(delta, tmp_path / "made", digest=digest)
    with dist_export.open_package(made) as package:
        own = str(package.manifest).partition("  carried over from ")[0]
    assert ("  checked  the files, ids and " in own) == (digest == "sha256")
    assert ("  note     with digest: none the files of delta" in own) == (digest == "none")
    assert read_package(made) == read_package(packages / "full")
    assert any("digest" in note for note in manifest_of(made)["notes"]) == (digest == "none")
    assert verify(str(made)).findings == []
    compare_rows = make(delta, tmp_path / "other")
    assert read_package(compare_rows) == read_package(made)


def test_a_base_that_is_a_copy_of_its_checkpoint(tmp_path: Path) -> None:
    tables = {name: (ids, {"embedding": slots["embedding"]}) for name, (ids, slots) in tables_of().items()}
    later = {name: (ids[7:], {"embedding": slots["embedding"][7:] + 1}) for name, (ids, slots) in tables.items()}
    base = export(save(tmp_path / "before", tables, 2), tmp_path / "base", filter_sparse_opt=False)
    after = save(tmp_path / "after", later, 2)
    delta = export(after, tmp_path / "delta", base=str(base))
    compare(make(delta, tmp_path / "made"), export(after, tmp_path / "full"))


def test_a_package_with_a_model_scores_as_the_full_export(tmp_path: Path) -> None:
    model = models.train(test_delta_scores.build())
    before = models.save(model, tmp_path / "before.pth")
    after = models.save(test_delta_scores.train_on(model), tmp_path / "after.pth")
    test_delta_scores.export(before, tmp_path / "base")
    test_delta_scores.export(after, tmp_path / "full")
    test_delta_scores.export(after, tmp_path / "delta", base=str(tmp_path / "base"), score_program="require")
    made = make(tmp_path / "delta", tmp_path / "made", num_shards=2)
    assert read_package(made) == read_package(tmp_path / "full")
    assert verify(str(made)).findings == []
    ours, of_delta = manifest_of(made), manifest_of(tmp_path / "delta")
    for name in ("dense", "parity", "drift", "score", "serving", "account"):
        assert ours.get(name) == of_delta.get(name) or name == "account", name
    assert ours["account"] == manifest_of(tmp_path / "full")["account"]
    with dist_export.open_package(made) as package:
        own, carried = str(package.manifest).split(
            f"  carried over from {tmp_path / 'delta'}, and not measured or compared"
        )
    for name in ("parity", "scores", "program", "drift", "inputs", "account", "source"):
        assert f"  {name} " in carried
        assert f"  {name} " not in own
    assert "(it was tracing)" not in own
    for folder in ("fx_user_model", "score_program"):
        of_delta = {path.relative_to(tmp_path / "delta"): path for path in (tmp_path / "delta" / folder).rglob("*.*")}
        assert of_delta
        for name, path in of_delta.items():
            assert (made / name).read_bytes() == path.read_bytes(), name
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "delta")
    for size in (1, 2, 64):
        inputs = {name: value for name, value in models.batch_of(size, seed=size).items() if name != "label"}
        with (
            dist_export.open_package(made) as package,
            dist_export.open_package(tmp_path / "full") as full,
            torch.no_grad(),
        ):
            found, expected = package.score(inputs), full.score(inputs)
        assert {name: scores.tobytes() for name, scores in found.items()} == {
            name: scores.tobytes() for name, scores in expected.items()
        }


def test_a_compacted_package_is_a_base(packages: Path, sources, tmp_path: Path) -> None:
    made = make(packages / "delta", tmp_path / "made")
    delta = export(sources[0], tmp_path / "next", base=str(made))
    assert put_together(made, delta) == read_package(packages / "base")
    compare(make(delta, tmp_path / "again"), export(sources[0], tmp_path / "full"))


def test_the_same_again_writes_nothing_and_another_package_is_refused(packages: Path, tmp_path: Path) -> None:
    made = make(packages / "delta", tmp_path / "made")
    written = (made / MANIFEST).stat().st_mtime_ns
    make(packages / "delta", made)
    assert (made / MANIFEST).stat().st_mtime_ns == written
    for folder in ("base", "delta", "full"):
        shutil.copytree(packages / folder, tmp_path / folder)
        before = (tmp_path / folder / MANIFEST).read_bytes()
        with pytest.raises(UserError):
            make(packages / "delta", tmp_path / folder)
        assert (tmp_path / folder / MANIFEST).read_bytes() == before
    for overwritten in ("base", "delta"):
        with pytest.raises(UserError):
            make(tmp_path / "delta", tmp_path / overwritten, base=str(tmp_path / "base"), overwrite=True)
    assert make(packages / "delta", tmp_path / "full", overwrite=True)
    assert "compacted" in manifest_of(tmp_path / "full")


def test_messages_have_the_words_of_the_command(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No setting of an export is named, and a path that is called like one stays."""
    out = shutil.copytree(packages / "full", tmp_path / "export_dir")
    for arguments, text in (
        ([str(out)], f"{out}/manifest.json is there already: OUT holds a committed package. "),
        ([str(out)], "Set --overwrite true to replace it, or give another OUT, or remove the old package first"),
        ([str(out / MANIFEST)], f"OUT {out}/manifest.json is a file"),
        ([str(packages / "delta"), "--overwrite", "true"], "OUT is DELTA"),
        ([str(packages / "base"), "--overwrite", "true"], "give another OUT"),
    ):
        assert cli.main(["compact", str(packages / "delta"), *arguments]) == 2
        assert text in capsys.readouterr().err
    assert cli.main(["compact", "--help"]) == 0
    assert not re.search(r"export_dir|ckpt_dir|interrupted export", capsys.readouterr().out)
    made = make(packages / "delta", tmp_path / "made")
    edit(made, lambda document: document["versions"].update(dist_export="0.0"))
    assert cli.main(["compact", str(packages / "delta"), str(made)]) == 0
    told = capsys.readouterr().out
    assert "--overwrite true or another OUT writes it anew" in told
    assert not re.search(r"export_dir|overwrite:", told)


def test_a_version_takes_the_place_of_its_delta(tmp_path: Path) -> None:
    """It has the step of the checkpoint, and is current as the delta was; both other versions are no longer needed."""
    before, versions = tables_of(), f"versions:{tmp_path / 'pub'}"
    for step, tables in ((5, before), (7, change(before))):
        save(tmp_path / "run" / f"ckpt_{step}", tables, 2)
        (tmp_path / "run" / "checkpoint").write_text(f"ckpt_{step}\n")
        more = {"base": "latest"} if step == 7 else {}
        export(tmp_path / "run", Path(), publish=str(tmp_path / "pub"), export_dir="", **more)
    rows = put_together(*(Path(its) for its in _places(versions)))
    make(Path(versions), Path(versions))
    current, *others = VersionDirectory().list_versions(str(tmp_path / "pub"))
    assert (current.step, current.is_current, len(others)) == (7, True, 2)
    with dist_export.open_package(versions) as package:
        assert "compacted" in manifest_of(Path(package.directory.path))
        assert read_package(Path(package.directory.path)) == rows


def _places(uri: str) -> tuple[str, str]:
    with dist_export.open_package(uri) as package:
        assert package.base is not None
        return package.base.directory.path, package.directory.path


def test_a_version_of_a_directory(packages: Path, tmp_path: Path) -> None:
    make(packages / "delta", Path(f"versions:{tmp_path / 'pub'}"))
    with dist_export.open_package(f"versions:{tmp_path / 'pub'}") as package:
        assert not package.is_delta
        assert read_package(Path(package.directory.path)) == read_package(packages / "full")


def spoil(file: Path, at: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "shard of the base": lambda base, _: spoil(min(base.glob("model-*.safetensors"))),
    "shard of the delta": lambda _, delta: spoil(sorted(delta.glob("model-*.safetensors"))[1]),
    "row index": lambda _, delta: spoil(min(delta.glob("*.row_index")), 70),
    "deleted ids": lambda _, delta: spoil(min(delta.glob("*.deleted_ids"))),
    "index": lambda base, _: spoil(base / "index", 10),
    "no shard": lambda base, _: min(base.glob("model-*.safetensors")).unlink(),
    "no deleted ids": lambda _, delta: min(delta.glob("*.deleted_ids")).unlink(),
    "manifest of the base": lambda base, _: (base / MANIFEST).write_text("{"),
    "manifest of the delta": lambda _, delta: (delta / MANIFEST).write_text("{"),
    "no base": lambda base, _: shutil.rmtree(base),
    "no delta": lambda _, delta: shutil.rmtree(delta),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_or_missing_is_one_line_and_nothing_is_written(
    packages: Path, tmp_path: Path, damage, capsys: pytest.CaptureFixture[str]
) -> None:
    base, delta = (shutil.copytree(packages / name, tmp_path / name) for name in ("base", "delta"))
    damage(base, delta)
    code = cli.main(["compact", str(delta), str(tmp_path / "made"), "--base", str(base), "--progress", "false"])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dist_export:")]
    assert code == 2
    assert len(told) == 1
    assert str(tmp_path) in told[0]
    assert not (tmp_path / "made").exists()


def test_a_row_index_that_is_damaged_and_has_no_digest(packages: Path, tmp_path: Path, capsys) -> None:
    """Whatever vouches for the files, no row that is replaced stays: what cannot be read is an error."""
    delta = shutil.copytree(packages / "delta", tmp_path / "delta")
    for file in delta.glob("*.row_index"):
        file.write_bytes(b"x" * file.stat().st_size)
    assert cli.main(["compact", str(delta), str(tmp_path / "made"), "--digest", "none"]) == 2
    assert "row_index" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_mistakes_are_one_line(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta, full = (str(packages / name) for name in ("base", "delta", "full"))
    for arguments, text in (
        ([full, "{out}"], "is a full package, not a delta"),
        ([full, "{out}", "--base", base], "is a full package"),
        ([delta, "{out}", "--base", full], "is another package"),
        ([delta, "{out}", "--base", delta], "delta"),
        ([delta], "Usage: dist_export compact DELTA OUT"),
        ([delta, "{out}", "--num_shards", "0"], "num_shards"),
    ):
        code = cli.main(["compact", *(text.format(out=tmp_path / "made") for text in arguments)])
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dist_export:")]
        assert (code, len(told)) == (2, 1), told
        assert text in told[0]
        assert not (tmp_path / "made").exists()


def test_the_command_line(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compact", str(packages / "delta"), str(tmp_path / "made")]) == 0
    told = capsys.readouterr().out
    assert f"  source   recis checkpoint {manifest_of(packages / 'full')['source']['path']}" in told
    assert f"  made of  {packages / 'delta'} and its base {packages / 'base'}" in told
    assert cli.main(["inspect", str(tmp_path / "made")]) == 0
    assert f"  made of    {packages / 'delta'} and its base {packages / 'base'}" in capsys.readouterr().out
    compare(tmp_path / "made", packages / "full")
    assert cli.main(["compact", "--help"]) == 0
    assert "--num_shards" in capsys.readouterr().out


def test_the_function(packages: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "dist_export"):
        found = dist_export.compact(packages / "delta", tmp_path / "made", base=packages / "base", num_shards=3)
    compare(tmp_path / "made", packages / "full")
    assert found.digest == manifest_of(tmp_path / "made")["digest"]
    assert f"  made of  {packages / 'delta'} and its base {packages / 'base'}" in caplog.messages
    caplog.clear()
    with caplog.at_level("INFO", "dist_export"):
        assert dist_export.compact(packages / "delta", tmp_path / "two", num_shards=2, progress=False).num_shards == 2
    assert not any("made of" in message for message in caplog.messages)
    for options, text in (
        ({"dtype": "float16"}, "compact has no option 'dtype'; its options are base, num_shards, overwrite"),
        ({"threads": "many"}, "threads"),
        ({"num_shards": 0}, "num_shards is 0"),
        ({"base": packages / "full"}, "is another package"),
        ({"digest": "sha256"}, "give another OUT"),
    ):
        out = tmp_path / ("made" if "digest" in options else "none")
        with pytest.raises(UserError, match=text):
            dist_export.compact(packages / "delta", out, **options)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seed", range(6))
def test_deltas_that_were_written_by_hand(tmp_path: Path, seed: int) -> None:
    """Any shares of changed, new and deleted rows, in tables of any size, also empty ones."""
    random = np.random.default_rng(seed)
    old: dict[str, Any] = {}
    for number in range(4):
        count = int(random.choice([1, 7, 300, 2000]))
        ids = np.unique(random.integers(-(1 << 63), (1 << 63) - 1, count, np.int64))
        old[f"t{number}"] = ids, {"embedding": random.standard_normal((len(ids), 4)).astype(np.float32)}
    shares = {name: random.choice([0.0, 0.02, 0.5, 1.0], 3) for name in old}
    new = {
        name: change_rows(
            rows,
            changed=int(shares[name][0] * len(rows[0])),
            new=int(shares[name][1] * len(rows[0])),
            deleted=int(shares[name][2] * (len(rows[0]) - 1)),
            seed=seed + 100,
        )
        for name, rows in old.items()
    }
    base = write_full(tmp_path / "base", old, num_shards=int(random.integers(1, 5)))
    delta = write_delta(tmp_path / "delta", base, old, new, num_shards=int(random.integers(1, 5)))
    made = make(delta, tmp_path / "made", num_shards=int(random.integers(1, 6)), threads=int(random.integers(1, 3)))
    expected = {
        name: {number: (row.tobytes(),) for number, row in zip(ids.tolist(), slots["embedding"], strict=True)}
        for name, (ids, slots) in new.items()
    }
    assert read_package(made) == expected
    assert verify(str(made)).findings == []


def forge(package: Path, **changes: int) -> None:
    """Add to numbers in the account of the first table; the sums still agree."""

    def change_account(document: Any) -> None:
        table = document["tables"][0]
        for name, number in changes.items():
            table["delta"][name] += number
        table["rows_dropped"]["same"] = table["delta"]["same"]
        table["rows_in"] = table["rows_out"] + sum(table["rows_dropped"].values())

    edit(package, change_account)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"same": -1, "changed": 1, "new": -1}, CommitError, "by the account of the delta it is"),
        ({"same": 1, "deleted": -1}, CheckpointError, "its lists have 5"),
        ({"same": 1, "rows_base": 1}, CommitError, "by the account of the delta it is"),
    ],
    ids=["changed", "deleted", "same"],
)
def test_an_account_that_the_rows_contradict(packages: Path, tmp_path: Path, changes, error, text: str) -> None:
    delta = shutil.copytree(packages / "delta", tmp_path / "delta")
    forge(delta, **changes)
    with pytest.raises(error, match=text):
        make(delta, tmp_path / "made")
    assert not (tmp_path / "made" / MANIFEST).exists()


def test_ids_that_a_manifest_contradicts(packages: Path, tmp_path: Path) -> None:
    delta = shutil.copytree(packages / "delta", tmp_path / "delta")
    edit(delta, lambda document: document["tables"][1].update(id_sum="00000000000000ff"))
    with pytest.raises(CheckpointError, match="table 'user' has"):
        make(delta, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_row_numbers_that_cannot_be(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"treat_as_tables": ["sparse_arch.item.weight"]}
    base = export(dcp_writer.save(tmp_path / "one", state_of()), tmp_path / "base", **settings)
    after = dcp_writer.save(tmp_path / "two", state_of(420, later=True))
    delta = export(after, tmp_path / "delta", base=str(base), **settings)
    forge(delta, new=-1, changed=1, same=-1)
    with pytest.raises(CheckpointError, match="the row number 419 is outside its 419 rows"):
        make(delta, tmp_path / "made")
    forge(delta, new=2, changed=-2, same=2)
    with pytest.raises(CheckpointError, match="20 of 22 row numbers are new, and its account says 21 of 22"):
        make(delta, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("which", ["base", "delta"])
def test_a_package_that_is_replaced_meanwhile(packages: Path, sources, tmp_path: Path, monkeypatch, which: str) -> None:
    base, delta = (shutil.copytree(packages / name, tmp_path / name) for name in ("base", "delta"))
    account = compacting.account_for_table

    def account_and_replace(*arguments: Any) -> Any:
        if which == "base":
            edit(base, lambda document: document["notes"].append("another"))
        else:
            edit(delta, lambda document: document["notes"].append("another"))
        return account(*arguments)

    monkeypatch.setattr(compacting, "account_for_table", account_and_replace)
    with pytest.raises(ExportError):
        make(delta, tmp_path / "made", base=str(base))
    assert not (tmp_path / "made" / MANIFEST).exists()


def test_more_deleted_ids_than_memory_has_room_for(packages: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(replaced_rows, "_DELETED_BYTES", 1 << 25)
    with pytest.raises(PlanError, match=r"are deleted from one shard .* Raise max_memory to \d+MiB, or lower threads"):
        make(packages / "delta", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_bytes_of_tables_that_are_one_tensor_have_no_account(sources, tmp_path: Path) -> None:
    """Of such tables the source counts one, and nobody knows how many of the bytes that a cast saves are of which."""
    settings: dict[str, Any] = {"dtype": {"*": "float16"}, "on_overflow": "clamp"}
    base = export(sources[0], tmp_path / "base", **settings)
    delta = export(sources[1], tmp_path / "delta", base=str(base), **settings)
    with dist_export.open_package(delta) as package:
        assert package.base is not None
        own, below = package.manifest, package.base.manifest
    full = export(sources[1], tmp_path / "full", **settings)
    assert json.loads(msgspec.json.encode(account_for_bytes(own, below))) == manifest_of(full)["account"]
    assert not isinstance(below.account, msgspec.UnsetType)
    tied = msgspec.structs.replace(below.account, dropped={**below.account.dropped, "cast": 16})
    assert account_for_bytes(own, msgspec.structs.replace(below, account=tied)) is msgspec.UNSET


def test_slots_that_were_not_compared_are_known_by_every_reader(tmp_path: Path, capsys) -> None:
    """Their values are the base's in rows that stayed: of compact, diff, verify, a rule of prune, and a package made of it."""
    before, later = tables_of(), change(tables_of())
    later["item"][1]["step"][:] += 1000
    base = export(save(tmp_path / "before", before, 2), tmp_path / "base")
    after, more = save(tmp_path / "after", later, 3), {"compare": "exact", "delta_ignore_slots": ["step"]}
    delta = export(after, tmp_path / "delta", base=str(base), **more)
    made, full = make(delta, tmp_path / "made"), export(after, tmp_path / "full")

    def list_ignored(package: Path) -> list[str]:
        tables = manifest_of(package)["tables"]
        return [
            f"{table['name']}.{slot['name']}" for table in tables for slot in table["kept"] if slot.get("is_ignored")
        ]

    older = [f"{table['name']}.step" for table in manifest_of(delta)["tables"] if "ignored_slots" in table["delta"]]
    assert "item.step" in older
    assert list_ignored(made) == older
    assert list_ignored(full) == list_ignored(base) == []
    same = manifest_of(delta)["tables"][0]["delta"]["same"]
    told = f"table 'item': slot 'step' was not compared (delta_ignore_slots), so its {same:,} rows that stayed have the base's"
    assert any(note.startswith(told) for note in manifest_of(made)["notes"])
    assert any("item.step" in line and "did not compare" in line for line in verify(str(made)).checked)
    assert cli.main(["diff", str(made), str(full)]) == 1
    assert f"slots with older values: {', '.join(older)} in A, none in B" in capsys.readouterr().out
    again = export(made, tmp_path / "again")
    assert list_ignored(again) == older
    assert any("slot 'step' of table 'item' was not compared" in note for note in manifest_of(again)["notes"])
    with pytest.raises(PlanError, match=r"slot 'step' of table 'item' has older values .* Export from the checkpoint"):
        export(made, tmp_path / "pruned", prune=[{"tables": "item", "slot": "step", "below": 3}])
    # a delta on top that compares them has no such rows any more
    exact = export(after, tmp_path / "exact", base=str(made), compare="exact")
    assert list_ignored(make(exact, tmp_path / "whole")) == []
    assert read_package(tmp_path / "whole") == read_package(full)


def test_a_delta_without_tables_of_its_own_has_the_shards_of_its_base(packages: Path, tmp_path: Path) -> None:
    delta = shutil.copytree(packages / "delta", tmp_path / "delta")
    edit(delta, lambda document: document["account"]["left_out"].update(need_export_sparse=5))
    assert (
        manifest_of(make(delta, tmp_path / "made"))["num_shards"] == manifest_of(packages / "base")["num_shards"] == 2
    )
