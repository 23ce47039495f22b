"""Deltas: on top of their base they give what a full export gives, row for row, and they hold no row more than they must."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_export
from dist_export.errors import ConfigError, PlanError, UserError
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.pipeline.deltas import InBase
from dist_export.verify.verify import verify
from tests.support import dcp_writer, exports
from tests.support.deltas import manifest_of, put_together, read_deleted, read_package
from tests.support.recis_writer import split_table, write_checkpoint

DIM = 8
OPTIMIZER = "sparse_adam_exp_avg"

Tables = dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]


def tables_of(seed: int = 0) -> Tables:
    """Return ids and slots by table."""
    random = np.random.default_rng(seed)
    found = {}
    for name, count in {"item": 3000, "user": 500}.items():
        ids = random.choice(1 << 40, count, replace=False)
        rows = random.normal(size=(count, DIM)).astype(np.float32)
        rows[:3, 0] = 0.0, np.nan, 1.0
        found[name] = ids, {"embedding": rows, "step": np.arange(count)[:, None], OPTIMIZER: rows * 2}
    return found


def change(tables: Tables, share: float = 0.01) -> Tables:
    """Return a later state: changed rows, one by the sign of a zero, one by the bits of a NaN; new ids; fewer ids."""
    random = np.random.default_rng(7)
    found = {}
    for name, (ids, before) in tables.items():
        slots = {slot: rows.copy() for slot, rows in before.items()}
        touched = random.choice(np.arange(3, len(ids)), max(1, int(share * len(ids))), replace=False)
        slots["embedding"][touched, 5] += 0.5
        slots[OPTIMIZER] += 1  # optimizer state, of which no package knows
        slots["embedding"].view(np.uint32)[0, 0] ^= 1 << 31
        slots["embedding"].view(np.uint32)[1, 0] ^= 1
        slots["step"][2] += 1
        left = np.setdiff1d(np.arange(len(ids)), random.choice(np.arange(3, len(ids)), 5, replace=False))
        order = random.permutation(left)  # another order of rows is no change
        fresh = random.choice(1 << 20, 4, replace=False) + (1 << 41)
        found[name] = (
            np.concatenate([ids[order], fresh]),
            {slot: np.concatenate([rows[order], rows[:4]]) for slot, rows in slots.items()},
        )
    return found


def save(folder: Path, tables: Tables, shards: int) -> Path:
    return write_checkpoint(folder, {name: split_table(ids, slots, shards) for name, (ids, slots) in tables.items()})


def export(source: Path, out: Path, *, tuning: Tuning = STANDARD, **settings: Any) -> Path:
    given = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True}
    exports.export(given | settings, tuning=tuning)
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two states of one training, saved by 2 and by 3 ranks."""
    folder, before = tmp_path_factory.mktemp("sources"), tables_of()
    return save(folder / "before", before, 2), save(folder / "after", change(before), 3)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "more_slots": {"keep_slots": [OPTIMIZER]},
    "float16": {"dtype": {"*": "float16"}, "on_overflow": "clamp"},
    "int8": {"dtype": {"item": "int8"}, "on_overflow": "clamp"},
    "pruned": {"prune": [{"tables": ["item"], "slot": "step", "below": 700}]},
    "renamed": {"rename_tables": {"item": "goods"}, "drop_tables": ["user"]},
}


@pytest.mark.parametrize(
    ("shards", "compare"), [((1, 3), "fingerprints"), ((3, 1), "exact"), ((2, 2), "none")], ids=str
)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_delta_on_its_base_is_the_full_export(sources, tmp_path: Path, settings, shards, compare: str) -> None:
    """By fingerprints, by the base's rows, and by these where the base has no fingerprints."""
    before, after = sources
    base = export(before, tmp_path / "base", num_shards=shards[0], row_fingerprints=compare != "none", **settings)
    full = export(after, tmp_path / "full", num_shards=2, **settings)
    more = {"compare": "exact"} if compare == "exact" else {}
    delta = export(after, tmp_path / "delta", num_shards=shards[1], base=str(base), **settings, **more)
    assert put_together(base, delta) == read_package(full)
    manifest = manifest_of(delta)
    assert manifest["schema_version"] == 2
    assert manifest["base"] == {"path": str(base), "digest": manifest_of(base)["digest"]}
    for table in manifest["tables"]:
        assert table["delta"]["same"] == table["rows_dropped"].get("same", 0)
        assert (table["delta"]["same"] > 0) == ("keep_slots" not in settings)
        assert table["rows_in"] == table["rows_out"] + sum(table["rows_dropped"].values())


def test_what_pruning_takes_since_the_base_is_deleted(sources, tmp_path: Path) -> None:
    before, _ = sources
    base = export(before, tmp_path / "base")
    rules = [{"tables": ["item"], "slot": "step", "below": 100}]
    delta = export(before, tmp_path / "delta", base=str(base), prune=rules)
    item, user = manifest_of(delta)["tables"]
    assert item["delta"] == {"rows_base": 3000, "same": 2900, "changed": 0, "new": 0, "deleted": 100} | {
        "deleted_ids": item["delta"]["deleted_ids"]
    }
    assert user["delta"]["same"] == 500
    assert put_together(base, delta) == read_package(export(before, tmp_path / "full", prune=rules))


def test_nothing_changed(sources, tmp_path: Path) -> None:
    before, _ = sources
    base = export(before, tmp_path / "base")
    delta = export(before, tmp_path / "delta", base=str(base), num_shards=3)
    assert [table["rows_out"] for table in manifest_of(delta)["tables"]] == [0, 0]
    assert put_together(base, delta) == read_package(base)


def test_everything_changed(sources, tmp_path: Path) -> None:
    before, _ = sources
    tables = tables_of()
    for _, slots in tables.values():
        slots["embedding"] += 1
        slots["step"] += 1
    base = export(before, tmp_path / "base")
    after = save(tmp_path / "after", tables, 2)
    delta = export(after, tmp_path / "delta", base=str(base))
    assert [table["delta"]["changed"] for table in manifest_of(delta)["tables"]] == [3000, 500]
    assert put_together(base, delta) == read_package(export(after, tmp_path / "full"))


@pytest.mark.parametrize("keep", ["first", "last"])
def test_of_rows_with_one_id_the_kept_one_is_compared(tmp_path: Path, keep: str) -> None:
    """The other one has the base's bytes, and must not make the kept one the same."""
    before = tables_of()
    base = export(save(tmp_path / "before", before, 2), tmp_path / "base")
    parts = {name: split_table(ids, slots, 2) for name, (ids, slots) in before.items()}
    part = parts["item"][0]
    twice = {slot: np.concatenate([rows, rows[:40]]) for slot, rows in part.slots.items()}
    of_base, other = (slice(0, 40), slice(-40, None)) if keep == "last" else (slice(-40, None), slice(0, 40))
    assert twice["embedding"][of_base].tobytes() == part.slots["embedding"][:40].tobytes()
    twice["embedding"][other] += 2.0
    parts["item"][0] = dataclasses.replace(part, ids=np.concatenate([part.ids, part.ids[:40]]), slots=twice)
    after = write_checkpoint(tmp_path / "after", parts)
    delta = export(after, tmp_path / "delta", base=str(base), on_duplicate=keep)
    full = export(after, tmp_path / "full", on_duplicate=keep)
    assert put_together(base, delta) == read_package(full)
    assert manifest_of(delta)["tables"][0]["delta"]["changed"] == 40


def test_rows_in_another_part_s_slice_are_found_by_their_ids(tmp_path: Path) -> None:
    before = tables_of()
    base = export(save(tmp_path / "before", before, 2), tmp_path / "base", num_shards=3)
    parts = {name: split_table(ids, slots, 2) for name, (ids, slots) in change(before).items()}
    one, two = parts["item"]
    moved = {slot: np.concatenate([rows, one.slots[slot][:50]]) for slot, rows in two.slots.items()}
    parts["item"] = [
        dataclasses.replace(one, ids=one.ids[50:], slots={slot: rows[50:] for slot, rows in one.slots.items()}),
        dataclasses.replace(two, ids=np.concatenate([two.ids, one.ids[:50]]), slots=moved),
    ]
    after = write_checkpoint(tmp_path / "after", parts)
    delta = export(after, tmp_path / "delta", base=str(base))
    assert put_together(base, delta) == read_package(export(after, tmp_path / "full"))
    assert manifest_of(delta)["tables"][0]["misplaced"] == 50


def state_of(rows: int = 400, *, later: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(400, DIM)
    if later:
        weight = torch.cat([weight, torch.ones(rows - 400, DIM)]) if rows > 400 else weight[:rows]
        weight[[3, 200]] += 1.0
    return {"sparse_arch.item.weight": weight, "dense_arch.fc.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize("rows", [400, 420], ids=["as_many", "grown"])
def test_tables_by_row_number(tmp_path: Path, rows: int) -> None:
    settings = {"treat_as_tables": ["sparse_arch.item.weight"]}
    base = export(dcp_writer.save(tmp_path / "one", state_of()), tmp_path / "base", num_shards=2, **settings)
    after = dcp_writer.save(tmp_path / "two", state_of(rows, later=True))
    delta = export(after, tmp_path / "delta", base=str(base), num_shards=3, **settings)
    assert put_together(base, delta) == read_package(export(after, tmp_path / "full", **settings))
    (table,) = manifest_of(delta)["tables"]
    assert (table["delta"]["changed"], table["delta"]["new"]) == (2, rows - 400)


def test_a_table_by_row_number_that_shrank_is_a_mismatch(tmp_path: Path) -> None:
    settings = {"treat_as_tables": ["sparse_arch.item.weight"]}
    base = export(dcp_writer.save(tmp_path / "one", state_of()), tmp_path / "base", **settings)
    after = dcp_writer.save(tmp_path / "two", state_of(390, later=True))
    with pytest.raises(PlanError, match="has 400 rows by number, and that of the checkpoint 390"):
        export(after, tmp_path / "delta", base=str(base), **settings)
    assert not (tmp_path / "delta").exists()


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dtype": (
        {},
        {"dtype": {"item": "float16"}, "on_overflow": "clamp"},
        "would be written with embedding float16",
    ),
    "slots": ({}, {"keep_slots": [OPTIMIZER]}, "would be written with embedding"),
    "tables": ({"drop_tables": ["user"]}, {}, "lacks the tables user"),
    "fewer": ({}, {"drop_tables": ["user"]}, "further tables user"),
    "index": ({"row_index": False}, {}, "has no row index"),
}


@pytest.mark.parametrize(("of_base", "of_delta", "text"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_base_of_other_settings(sources, tmp_path: Path, of_base, of_delta, text: str) -> None:
    base = export(sources[0], tmp_path / "base", **of_base)
    with pytest.raises(PlanError, match=text) as told:
        export(sources[1], tmp_path / "delta", base=str(base), **of_delta)
    assert "Nothing was written" in str(told.value)
    assert not (tmp_path / "delta").exists()
    whole = export(sources[1], tmp_path / "delta", base=str(base), on_base_mismatch="full", **of_delta)
    assert read_package(whole) == read_package(export(sources[1], tmp_path / "full", **of_delta))
    assert "base" not in manifest_of(whole)
    assert any("everything was exported: base" in note for note in manifest_of(whole)["notes"])


def test_no_base_there(sources, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json: there is no such file"):
        export(sources[1], tmp_path / "delta", base=str(tmp_path / "nowhere"))
    whole = export(sources[1], tmp_path / "delta", base=str(tmp_path / "nowhere"), on_base_mismatch="full")
    assert "base" not in manifest_of(whole)


def test_a_damaged_base(sources, tmp_path: Path) -> None:
    base = export(sources[0], tmp_path / "base")
    (base / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest"):
        export(sources[1], tmp_path / "delta", base=str(base))


def test_the_base_of_a_delta_is_the_base(sources, tmp_path: Path) -> None:
    base = export(sources[0], tmp_path / "base")
    first = export(sources[0], tmp_path / "first", base=str(base))
    second = export(sources[1], tmp_path / "second", base=str(first))
    assert manifest_of(second)["base"] == manifest_of(first)["base"]
    assert put_together(base, second) == read_package(export(sources[1], tmp_path / "full"))


def test_the_same_delta_again_writes_nothing_until_the_base_is_another(sources, tmp_path: Path) -> None:
    base = export(sources[0], tmp_path / "base")
    delta = export(sources[1], tmp_path / "delta", base=str(base))
    written = (delta / "manifest.json").stat().st_mtime_ns
    export(sources[1], delta, base=str(base))
    assert (delta / "manifest.json").stat().st_mtime_ns == written
    export(sources[1], base, overwrite=True)
    with pytest.raises(UserError, match="overwrite"):
        export(sources[1], delta, base=str(base))
    export(sources[1], delta, base=str(base), overwrite=True)
    assert manifest_of(delta)["base"]["digest"] == manifest_of(base)["digest"]
    assert [table["rows_out"] for table in manifest_of(delta)["tables"]] == [0, 0]


def test_latest_is_the_full_package_behind_the_current_version(sources, tmp_path: Path) -> None:
    settings = {"publish": str(tmp_path / "serving"), "export_dir": "", "base": "latest"}
    with pytest.raises(ConfigError, match="no version is published"):
        export(sources[0], tmp_path, **settings)
    export(sources[0], tmp_path, **settings, on_base_mismatch="full")
    export(sources[1], tmp_path, **settings)
    export(sources[0], tmp_path, **settings)
    manifests = [manifest_of(path) for path in (tmp_path / "serving" / "versions").iterdir()]
    assert sorted("base" in manifest for manifest in manifests) == [False, True, True]
    (full,) = [manifest["digest"] for manifest in manifests if "base" not in manifest]
    assert {manifest["base"]["digest"] for manifest in manifests if "base" in manifest} == {full}


def test_fingerprints_are_used_where_the_base_has_them_and_not_if_rows_are_to_be_read(sources, tmp_path: Path) -> None:
    """Fingerprints of other rows make every row changed, and are not looked at by ``exact``."""
    base = export(sources[0], tmp_path / "base", row_fingerprints=True)
    for file in base.glob("*.row_fingerprints"):
        content = bytearray(file.read_bytes())
        content[64:] = bytes(len(content) - 64)
        file.write_bytes(content)
    by_fingerprints = export(sources[0], tmp_path / "by_fingerprints", base=str(base))
    exact = export(sources[0], tmp_path / "exact", base=str(base), compare="exact")
    assert [table["delta"]["changed"] for table in manifest_of(by_fingerprints)["tables"]] == [3000, 500]
    assert [table["delta"]["changed"] for table in manifest_of(exact)["tables"]] == [0, 0]


def test_rows_that_a_sample_finds_in_the_base_are_those_of_no_deleted_id(sources, tmp_path: Path) -> None:
    base = export(sources[0], tmp_path / "base")
    export(sources[1], tmp_path / "delta", base=str(base))
    with dist_export.open_package(tmp_path / "delta") as delta, dist_export.open_package(base) as opened:
        in_base = InBase(opened, delta.directory, delta.manifest.tables)
        for table, ids in read_deleted(tmp_path / "delta").items():
            same = next(iter(read_package(base)[table].keys() - ids - read_package(tmp_path / "delta")[table].keys()))
            asked = np.array([*sorted(ids), same, -5])
            rows, has_row = in_base.find(table, "embedding", asked)
            assert has_row.tolist() == [False] * len(ids) + [True, False]
            assert rows[len(ids)].tobytes() == read_package(base)[table][same][0]


def test_settings_that_do_not_go_together(sources, tmp_path: Path) -> None:
    for settings, text in (
        ({"base": "latest"}, "publish is not set"),
        ({"base": ""}, "base is empty"),
        ({"base": "x", "filter_sparse_opt": False}, "base needs new shards"),
        ({"on_base_mismatch": "full"}, "base is not set"),
        ({"compare": "exact"}, "base is not set"),
    ):
        with pytest.raises(ConfigError, match=text):
            export(sources[0], tmp_path / "out", **settings)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("has_rule", [False, True], ids=["delta", "delta and prune"])
def test_few_rows_of_wide_tables_are_picked_out(tmp_path: Path, num_shards: int, has_rule: bool) -> None:
    """Rows in the order of the base, of which so few change that they are read one by one."""
    random = np.random.default_rng(3)
    ids, rows = random.choice(1 << 40, 9000, replace=False), random.normal(size=(9000, 96)).astype(np.float32)
    steps = np.arange(9000)[:, None]
    later, later_steps = rows.copy(), steps.copy()
    later[[0, 17, 18, 4000, 8999], 95] += 1
    later_steps[77] += 1
    left = np.delete(np.arange(9000), [30, 31, 5000])
    before = save(tmp_path / "before", {"item": (ids, {"embedding": rows, "step": steps})}, 2)
    after = save(
        tmp_path / "after",
        {"item": (ids[left], {"embedding": later[left], "step": later_steps[left]})},
        2,
    )
    settings: dict[str, Any] = {"num_shards": num_shards, "row_fingerprints": True}
    if has_rule:
        settings["prune"] = [{"tables": "item", "slot": "step", "below": 50}]
    base = export(before, tmp_path / "base", **settings)
    delta = export(after, tmp_path / "delta", base=str(base), **settings)
    full = export(after, tmp_path / "full", **settings)
    assert put_together(base, delta) == read_package(full)
    account = manifest_of(delta)["tables"][0]["delta"]
    assert (account["changed"], account["new"]) == (3 if has_rule else 6, 0)


def test_slots_that_are_ignored_do_not_make_a_row_another(tmp_path: Path) -> None:
    before = tables_of()
    base = export(save(tmp_path / "before", before, 2), tmp_path / "base")
    later = change(before)
    later["item"][1]["step"][:] += 1000
    later["item"][1]["embedding"][7] += 1
    after = save(tmp_path / "after", later, 3)
    delta = export(after, tmp_path / "delta", base=str(base), compare="exact", delta_ignore_slots=["step"])
    full, found = read_package(export(after, tmp_path / "full")), put_together(base, delta)
    item = manifest_of(delta)["tables"][0]
    assert item["delta"]["ignored_slots"] == ["step"]
    assert (item["delta"]["changed"], item["delta"]["new"], item["delta"]["deleted"]) == (33, 4, 5)
    of_base = read_package(base)
    place = [slot["name"] for slot in item["kept"] if slot["name"] != "id"].index("step")
    written = read_package(delta)
    for table in ("item", "user"):
        assert found[table].keys() == full[table].keys()
        for its, row in found[table].items():
            expected = list(full[table][its])
            if its not in written[table]:
                expected[place] = of_base[table][its][place]
            assert list(row) == expected
    package = dist_export.open_package(delta)
    assert verify(delta).findings == []
    assert (
        package.manifest.digest
        != dist_export.open_package(export(after, tmp_path / "plain", base=str(base))).manifest.digest
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"compare": "exact", "delta_ignore_slots": ["stepp"]},
            "no table keeps the slot 'stepp'; kept besides",
        ),
        ({"delta_ignore_slots": ["step"]}, "set compare: exact"),
        ({"compare": "exact", "delta_ignore_slots": ["embedding"]}, "are always compared"),
        ({"base": None, "delta_ignore_slots": ["step"]}, "base is not set"),
    ],
)
def test_slots_that_cannot_be_ignored(
    sources: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    before, after = sources
    base = export(before, tmp_path / "base")
    with pytest.raises(UserError, match=reason):
        export(after, tmp_path / "delta", **{"base": str(base), **settings})
    assert not (tmp_path / "delta").exists()
