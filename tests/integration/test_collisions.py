"""torchrec's managed-collision tables become hash tables keyed by raw id, whatever way their tensors lie in files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_export
from dist_export.checkpoint.id_reader import read_ids
from dist_export.checkpoint.managed_collisions import CollisionNames, find_collisions
from dist_export.cli import main
from dist_export.errors import CheckpointError, DriftError, ModelError, PlanError
from dist_export.formats.tuning import Tuning
from dist_export.plan.census import UniqueTask
from dist_export.plan.prune import plan_pruning
from dist_export.plan.target_slices import plan_targets
from dist_export.transfer.id_scan import check_unique, take_census
from tests.support import exports
from tests.support.collision_cases import EMPTY, MODULES, Model, make_state, make_zch_state, rows_of, weight_of
from tests.support.dcp_writer import save, write_chunks
from tests.support.recis_writer import read_back
from tests.support.sparse_cases import export, open_source

IDS = [3, 17, -5, 99, 1 << 61, -(1 << 63), 0]
T, Z = weight_of("t"), weight_of("z")


def write(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "model.pt")
    return folder


def assert_rows(target: Path, table: str, expected: dict[int, np.ndarray]) -> None:
    """Each raw id has its row, and no other id has one."""
    found = read_back(target).get(table, {"id": np.zeros(0, np.int64), "embedding": None})
    assert sorted(found["id"].tolist()) == sorted(expected)
    for number, row in zip(found["id"].tolist(), found["embedding"] if expected else (), strict=True):
        np.testing.assert_array_equal(np.asarray(row, np.float32), expected[number])


@pytest.mark.parametrize("num_shards", [1, 3])
def test_mch_and_hash_zch_are_found_by_raw_id(num_shards: int, tmp_path: Path) -> None:
    """Rows without an id stay behind and are counted; unknown ids of MCH get the trained last row."""
    state = make_state([(12, IDS)]) | make_zch_state([7, -1, 1 << 40, -1, -9]) | {"dense_arch.w": torch.ones(2)}
    manifest = export(write(tmp_path / "in", state), tmp_path / "out", num_shards=num_shards)
    assert_rows(tmp_path / "out", T, rows_of(state))
    assert_rows(tmp_path / "out", Z, rows_of(state, "z"))
    mch, zch = manifest.tables
    assert (mch.rows_in, mch.rows_out, mch.rows_dropped) == (12, 7, {"empty": 5})
    assert (zch.rows_in, zch.rows_out, zch.rows_dropped) == (5, 3, {"empty": 2})
    assert mch.default_row == tuple(state[T][-1].tolist())
    assert not zch.default_row
    assert main(["verify", str(tmp_path / "out")]) == 0
    package = dist_export.open_package(tmp_path / "out")
    rows, found = package.lookup(T, np.array([17, 12_345]))
    assert found.tolist() == [True, False]
    np.testing.assert_array_equal(rows[1], state[T][-1].numpy())
    assert any("may fall back to the row of another id" in note for note in manifest.notes)
    fates = {tensor.name.rpartition(".")[2]: (tensor.fate, tensor.reason) for tensor in manifest.account.others}
    assert fates == {
        "_mch_sorted_raw_ids": ("exported", ""), "_mch_remapped_ids_mapping": ("exported", ""),
        "_hash_zch_identities": ("exported", ""), "_mch_counts": ("dropped", "trainer_state"),
        "_output_segments_tensor": ("dropped", "trainer_state"), "_hash_zch_metadata": ("dropped", "trainer_state"),
        "w": ("left_out", "no_model"),
    }  # fmt: skip
    assert any(note.startswith("1 dense tensor of the checkpoint (dense_arch.w)") for note in manifest.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_row_of_unknown_ids_is_exact_in_every_dtype(dtype: Any, tmp_path: Path) -> None:
    state = make_state([(9, IDS)], dtype=dtype)
    manifest = export(write(tmp_path / "in", state), tmp_path / "out")
    assert manifest.tables[0].default_row == tuple(state[T][-1].float().tolist())


def test_shards_with_one_last_row_have_one_default_row(tmp_path: Path) -> None:
    """Shards lie behind each other in one tensor; where their last rows differ the user must say what serving gives."""
    state = make_state([(6, [40, 2, 8]), (5, [3]), (7, [1, 90])])
    source = write(tmp_path / "in", state)
    manifest = export(source, tmp_path / "out")
    assert_rows(tmp_path / "out", T, rows_of(state))
    assert manifest.tables[0].default_row == tuple(state[T][5].tolist())
    state[T][10] += 1
    write(tmp_path / "in", state)
    with pytest.raises(
        CheckpointError, match=r"row 5 is not row 10\. So no single row .* default_row: \{'sparse_arch.*: zeros\}"
    ):
        export(source, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    for default, expected in (("zeros", "zeros"), ([1, 2, 3, 4], (1.0, 2.0, 3.0, 4.0))):
        manifest = export(source, tmp_path / f"out {default}", default_row={"*": default})
        assert manifest.tables[0].default_row == expected
    state[T][[5, 10, 17]] = torch.inf
    write(tmp_path / "in", state)
    with pytest.raises(CheckpointError, match="got row 5, which holds NaN or an infinity"):
        export(source, tmp_path / "no")


@pytest.mark.parametrize("saved_as", ["torch", "dcp"])
def test_a_shard_without_ids_has_a_last_row_too(saved_as: str, tmp_path: Path) -> None:
    """In one piece only the trainer's segments tell where it begins; they may name shards without a row."""
    state = make_state([(4, [3, 9]), (4, []), (3, [])])
    segments = f"{MODULES}t._output_segments_tensor"
    state[segments] = torch.tensor([0, 4, 4, 8, 11, 11] + [-1] * 1019)

    def put_down() -> Path:
        folder = tmp_path / f"in {len(list(tmp_path.iterdir()))}"
        return save(folder, {"model": state}) if saved_as == "dcp" else write(folder, state)

    manifest = export(put_down(), tmp_path / "out")
    assert_rows(tmp_path / "out", T, rows_of(state))
    assert manifest.tables[0].default_row == tuple(state[T][3].tolist())
    assert manifest.tables[0].default_row == tuple(state[T][10].tolist())
    for last, said in ((10, "row 3 is not row 10"), (7, "row 3 is not row 7")):
        state[T][last] += 1
        with pytest.raises(CheckpointError, match=said):
            export(put_down(), tmp_path / "no")
    assert not (tmp_path / "no").exists()


SEGMENTS = {
    "short": ([0, 11], r"is 0, 11; expected int64 from 0 to 12, ascending, then -1.*set default_row"),
    "late": ([4, 12], "is 4, 12; expected"),
    "descending": ([0, 8, 4, 12], "is 0, 8, 4 and 1 more; expected"),
    "gap": ([0, -1, 12], "is 0, -1, 12; expected"),
    "none": ([-1, -1], "is -1, -1; expected"),
    "float": ([0.0, 12.0], r"is float32 \[2\]; expected"),
    "long": ([0] * 2000 + [12], r"is int64 \[2001\]; expected"),
}


@pytest.mark.parametrize("case", list(SEGMENTS))
def test_segments_that_are_not_those_of_the_table_are_refused(case: str, tmp_path: Path) -> None:
    """Without them the row of unknown ids is not known; with a default row of the user's own nobody asks for it."""
    segments, said = SEGMENTS[case]
    state = make_state([(12, IDS)]) | {f"{MODULES}t._output_segments_tensor": torch.tensor(segments)}
    source = write(tmp_path / "in", state)
    with pytest.raises(CheckpointError, match=said):
        export(source, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    export(source, tmp_path / "out", default_row={"*": "zeros"})
    assert_rows(tmp_path / "out", T, rows_of(state))


def cut(tensor: torch.Tensor, *edges: int) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """Return chunks of a tensor, cut at rows."""
    ends = [0, *edges, len(tensor)]
    rest = (0,) * (tensor.dim() - 1)
    return [((a, *rest), tensor[a:b].clone()) for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("mch_edges", [(6, 11), (), (3, 9, 15)])
@pytest.mark.parametrize("weight_edges", [(6, 11), (), (4,)])
def test_pieces_of_dcp_in_any_cut(mch_edges: tuple[int, ...], weight_edges: tuple[int, ...], tmp_path: Path) -> None:
    """Entries are found wherever they stand, also sorted over all shards at once, as a whole module saves them again."""
    state = make_state([(6, [40, 2, 8]), (5, [3]), (7, [1, 90])]) | make_zch_state([5, -1, 6, 8])
    name = f"{MODULES}t."
    if not mch_edges:
        order = torch.argsort(state[f"{name}_mch_sorted_raw_ids"], stable=True)
        for buffer in ("_mch_sorted_raw_ids", "_mch_remapped_ids_mapping"):
            state[name + buffer] = state[name + buffer][order]
    state[T][-1] = state[T][14] = state[T][2] = state[T][8] = state[T][5]
    chunks = {key: (tensor, cut(tensor, *(mch_edges if "_mch_" in key else ()))) for key, tensor in state.items()}
    chunks[T] = (state[T], cut(state[T], *weight_edges))
    zch = f"{MODULES}z._hash_zch_identities"
    wide = torch.stack([state[zch], state[zch]], 1)[:, 0]  # rows that do not lie behind each other
    chunks[zch] = (state[zch], [((0, 0), wide[:3]), ((3, 0), wide[3:])])
    source = write_chunks(tmp_path / "in", chunks)
    export(source, tmp_path / "out", num_shards=2)
    assert_rows(tmp_path / "out", T, rows_of(state))
    assert_rows(tmp_path / "out", Z, rows_of(state, "z"))


def test_dcp_as_torch_writes_it(tmp_path: Path) -> None:
    state = make_state([(12, IDS)]) | make_zch_state([7, -1, 8], is_flat=True)
    export(save(tmp_path / "in", {"model": state}), tmp_path / "out")
    assert_rows(tmp_path / "out", T, rows_of(state))
    assert_rows(tmp_path / "out", Z, rows_of(state, "z"))


def test_large_tables_that_are_almost_empty(tmp_path: Path) -> None:
    """What stands for no id stands many times, which is no repeat, however the ids are searched."""
    tuning = Tuning(run_rows=64)
    state = make_state([(1000, IDS)]) | make_zch_state([-1] * 900 + [4, 5])
    source = write(tmp_path / "in", state)
    export(source, tmp_path / "out", num_shards=2, tuning=tuning)
    assert_rows(tmp_path / "out", T, rows_of(state))
    assert_rows(tmp_path / "out", Z, rows_of(state, "z"))
    checkpoint = open_source(source)
    pruning = plan_pruning(checkpoint, (), {})
    for held in (16, 4096):
        take_census(checkpoint, plan_targets(checkpoint, 2), range(2), held_ids=held, pruning=pruning, tuning=tuning)
    tasks = [UniqueTask(table, (table,), bucket, 1) for table in range(2) for bucket in range(2)]
    check_unique(checkpoint, tasks, held_ids=16, run_rows=tuning.run_rows)


def test_rules_of_prune_come_on_top(tmp_path: Path) -> None:
    state = make_state([(12, IDS)])
    source = write(tmp_path / "in", state)
    (tmp_path / "deny.txt").write_text("17\n99\n")
    prune = [{"tables": "*", "deny": str(tmp_path / "deny.txt")}]
    manifest = export(source, tmp_path / "out", prune=prune)
    assert_rows(tmp_path / "out", T, {k: v for k, v in rows_of(state).items() if k not in (17, 99)})
    assert manifest.tables[0].rows_dropped == {"empty": 5, "deny_list": 2}
    (tmp_path / "deny.txt").write_text("\n".join(map(str, IDS)))
    with pytest.raises(PlanError, match=r"leave none of the 7 rows of table .*prune\[0\] took 7"):
        export(source, tmp_path / "no", prune=prune)


def test_a_table_without_any_id_is_exported_empty(tmp_path: Path) -> None:
    state = make_state([(5, [])])
    manifest = export(write(tmp_path / "in", state), tmp_path / "out")
    assert (manifest.tables[0].rows_out, manifest.tables[0].rows_dropped) == (0, {"empty": 5})
    assert main(["verify", str(tmp_path / "out")]) == 0


# ---- what does not fit ----------------------------------------------------------------------------------------------

Damage = Callable[[dict[str, torch.Tensor]], object]


def put(buffer: str, value: torch.Tensor, table: str = "t") -> Damage:
    return lambda state: state.update({f"{MODULES}{table}.{buffer}": value})


def set_entry(buffer: str, place: int, value: int) -> Damage:
    return lambda state: state[f"{MODULES}t.{buffer}"].__setitem__(place, value)


BROKEN: dict[str, tuple[Damage, str]] = {
    "no mapping": (
        lambda state: state.pop(f"{MODULES}t._mch_remapped_ids_mapping"),
        r"t\._mch_remapped_ids_mapping is missing\. Without it nobody knows",
    ),
    "no ids": (lambda state: state.pop(f"{MODULES}t._mch_sorted_raw_ids"), r"t\._mch_sorted_raw_ids is missing"),
    "no weight": (
        lambda state: state.pop(T),
        "maps raw ids to the rows of a table, but the checkpoint holds no weight",
    ),
    "a row twice": (set_entry("_mch_remapped_ids_mapping", 0, 11), "names row 11 2 times|names row .* 0 times"),
    "beyond": (set_entry("_mch_remapped_ids_mapping", 0, 12), "names row .* 0 times"),
    "negative": (set_entry("_mch_remapped_ids_mapping", 0, -1), "names row .* 0 times"),
    "huge": (set_entry("_mch_remapped_ids_mapping", 0, 1 << 62), "names row .* 0 times"),
    "an id twice": (set_entry("_mch_sorted_raw_ids", 1, -(1 << 63)), "holds the id -9223372036854775808 twice"),
    "short": (put("_mch_sorted_raw_ids", torch.arange(11)), r"is int64 \[11\], but its table has 12 rows"),
    "int32": (put("_mch_remapped_ids_mapping", torch.arange(12).int()), r"is int32 \[12\]"),
    "wide": (put("_hash_zch_identities", torch.zeros(3, 2, dtype=torch.int64), "z"), r"\[3, 2\], but its table has 3"),
    "unsorted": (
        put("_mch_sorted_raw_ids", torch.arange(5000, 0, -1), "u"),
        "is not sorted by raw id, as torchrec leaves it",
    ),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    damage, said = BROKEN[case]
    state = make_state([(12, IDS)]) | make_zch_state([5, -1, 6])
    if case == "unsorted":
        state |= make_state([(5000, [])], table="u")
    damage(state)
    with pytest.raises(CheckpointError, match=said):
        export(write(tmp_path / "in", state), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_belongs_to_the_table_beside_it() -> None:
    """Two collections have a table of the same name; one beside no module goes by row number."""
    tables = {f"{root}._embedding_module.embedding_bags.t.weight": (4, 2) for root in ("a.mc", "b.mc")}
    tables["plain.embedding_bags.t.weight"] = (4, 2)
    tensors = {
        f"{root}._managed_collision_collection._managed_collision_modules.t.{buffer}": ("int64", (4,))
        for root in ("a.mc", "b.mc")
        for buffer in ("_mch_sorted_raw_ids", "_mch_remapped_ids_mapping")
    }
    names, (first, second, _) = list(tensors), list(tables)
    assert find_collisions(tables, tensors, where="ckpt") == {
        first: CollisionNames(*names[:2]),
        second: CollisionNames(*names[2:]),
    }


def test_what_ids_are_made_of_is_read_in_pieces(tmp_path: Path) -> None:
    state = make_state([(12, IDS)])
    checkpoint = open_source(write(tmp_path / "in", state))
    (ids,) = read_ids(checkpoint, 0)
    expected = np.full(12, EMPTY)
    expected[state[f"{MODULES}t._mch_remapped_ids_mapping"].numpy()] = state[f"{MODULES}t._mch_sorted_raw_ids"].numpy()
    assert ids.tolist() == expected.tolist()


# ---- with a model ---------------------------------------------------------------------------------------------------

SIZES = {"t": (12, 4), "z": (6, 4)}


def export_model(
    tmp_path: Path, state: dict[str, torch.Tensor], model: Model, ids: dict[str, list[int]], **settings: Any
):
    source = write(
        tmp_path / "in", state | {f"dense_arch.{k}": v for k, v in Model(SIZES).dense_arch.state_dict().items()}
    )
    batch = {name: torch.tensor(its) for name, its in ids.items()}
    settings = {"export_dir": tmp_path / "out"} | settings
    exporter = exports.exporter(model, "sparse_arch", "dense_arch", [batch], source, filter_sparse_opt=True, **settings)
    return exporter.export(progress=False), batch


def test_the_sample_is_fed_by_raw_id(tmp_path: Path) -> None:
    """A fresh model knows no id: it is given the checkpoint's state for the sample, and has its own again afterwards."""
    state = make_state([(12, IDS)]) | make_zch_state([7, -1, 1 << 40, -1, -9, 11])
    model = Model(SIZES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    manifest, batch = export_model(tmp_path, state, model, {"t": [3, 17, 12_345, 99], "z": [7, 1 << 40, -9, 3]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trained = Model(SIZES)
    trained.load_state_dict(
        {name: value for name, value in torch.load(tmp_path / "in" / "model.pt").items() if name in before}
    )
    with torch.no_grad():
        expected = trained.eval()(batch)
        package = dist_export.open_package(tmp_path / "out")
        blocks = {
            name: torch.from_numpy(package.lookup(weight_of(name), batch[name].numpy())[0].astype(np.float32))
            for name in SIZES
        }
        # the trainer gives the last id of z a slot that is none of its own, which serving does not
        torch.testing.assert_close(package.load_program().module()(**blocks)[:3], expected[:3])
        own = trained.sparse_arch(batch)
        assert torch.equal(blocks["t"], own["t"])
        assert torch.equal(blocks["z"][:3], own["z"][:3])
        assert not blocks["z"][3].any()
    assert manifest.run["sample"]["asked"] == {T: 4, Z: 4}
    assert manifest.run["sample"]["missing"] == {T: 1, Z: 1}
    assert manifest.parity.from_files.reads_rows


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = make_state([(12, IDS)]) | make_zch_state([7, -1, 1 << 40, -1, -9, 11])
    ids = {"t": [3], "z": [7]}
    model = Model(SIZES)
    model.sparse_arch.mc._managed_collision_collection._managed_collision_modules["t"]._input_hash_func = lambda x: (
        x + 1
    )
    with pytest.raises(
        ModelError, match=r"hashes ids with its input_hash_func before it looks for them, .*allow_hashed_ids"
    ):
        export_model(tmp_path, state, model, ids)
    assert not (tmp_path / "out").exists()
    export_model(tmp_path, state, model, {"t": [2, 16, 8], "z": [7, 7, 7]}, allow_hashed_ids=["*.t.weight"])
    for name, said in (("t", "has 10 rows, the checkpoint 12"), ("z", "has 10 rows, the checkpoint 6")):
        with pytest.raises(ModelError, match=said):
            export_model(tmp_path, state, Model(SIZES | {name: (10, 4)}), ids, export_dir=tmp_path / "no")
    model = Model(SIZES)
    modules = model.sparse_arch.mc._managed_collision_collection._managed_collision_modules
    modules["t"] = torch.nn.Identity()
    with pytest.raises(ModelError, match="has no managed-collision module beside it"):
        export_model(tmp_path, state, model, {"t": [3], "z": [7]}, export_dir=tmp_path / "no")


ZCH_IDS = {
    "each slot has an id": [7, 13, 1 << 40, 21, -9, 11],
    "one slot has none": [7, -1, 1 << 40, 21, -9, 11],
}
ASKED = {
    "some known": [7, 1003, -9, 1002, 1003, 12],
    "every slot": [7, 13, 1 << 40, 21, -9, 11, 1003, 1002, 4],
    "all unknown": [1003, 1002, 1000, 4],
}


@pytest.mark.parametrize(
    ("placed", "asked", "default"),
    [
        ("each slot has an id", "some known", "zeros"),
        ("each slot has an id", "every slot", [0.5, -1.0, 2.0, 3.0]),
        ("one slot has none", "some known", [0.5, -1.0, 2.0, 3.0]),
        ("one slot has none", "all unknown", "zeros"),
    ],
)
def test_the_fallback_of_hash_zch_is_in_the_drift(placed: str, asked: str, default: Any, tmp_path: Path) -> None:
    """The package gives an unknown id its default row, the model that of another id: the drift is what raw ids show."""
    torch.manual_seed(1)  # with some weights no score would move by much
    state = make_state([(12, IDS)]) | make_zch_state(ZCH_IDS[placed])
    model, ids = Model(SIZES), {"t": [17] * len(ASKED[asked]), "z": ASKED[asked]}
    settings = {"default_row": {"*.z.weight": default}}
    manifest, batch = export_model(tmp_path, state, model, ids, **settings)
    trained = Model(SIZES)
    trained.load_state_dict(
        {k: v for k, v in torch.load(tmp_path / "in" / "model.pt").items() if k in trained.state_dict()}
    )
    package = dist_export.open_package(tmp_path / "out")
    with torch.no_grad():
        rows = {
            name: torch.from_numpy(package.lookup(weight_of(name), batch[name].numpy())[0].astype(np.float32))
            for name in SIZES
        }
        drift = (trained.eval()(batch) - trained.dense_arch(rows)).abs().max().item()
    (found,) = manifest.drift.outputs.values()
    assert found.max_abs == pytest.approx(drift, rel=1e-4)
    assert drift > 1e-3
    unknown = len({*ASKED[asked]} - {*ZCH_IDS[placed]})
    known = len({*ASKED[asked]} & {*ZCH_IDS[placed]})
    assert manifest.run["drift"] == {"ids": 1 + known + unknown, "without_row": unknown, "pruned": 0}
    assert manifest.run["sample"]["missing"] == {T: 0, Z: unknown}
    with pytest.raises(DriftError, match="drift"):
        export_model(tmp_path, state, model, ids, **settings, export_dir=tmp_path / "no", max_drift=drift / 2)


def test_unknown_ids_of_mch_are_not_pruned(tmp_path: Path) -> None:
    """They have no row on either side; an id that a rule leaves behind has one in the model."""
    state = make_state([(12, IDS)]) | make_zch_state([7, -1, 1 << 40, -1, -9, 11])
    ids = {"t": [3, 17, 12_345, 99], "z": [7, 7, 7, 7]}
    manifest, _ = export_model(tmp_path, state, Model(SIZES), ids)
    assert manifest.run["drift"] == {"ids": 5, "without_row": 1, "pruned": 0}
    (tmp_path / "deny.txt").write_text("17\n")
    prune = [{"tables": T, "deny": str(tmp_path / "deny.txt")}]
    manifest, _ = export_model(tmp_path, state, Model(SIZES), ids, prune=prune, export_dir=tmp_path / "pruned")
    assert manifest.run["drift"] == {"ids": 5, "without_row": 1, "pruned": 1}
