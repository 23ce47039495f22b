"""Checkpoints of ``torch.save``: exported equal, found where they lie, refused where they are damaged or deceive."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_export.checkpoint.detect import detect_format
from dist_export.cli import main
from dist_export.errors import CheckpointError, ExportError, PlanError
from dist_export.pipeline import steps
from dist_export.storage.urls import open_place
from tests.support import tiny_model
from tests.support.hostile_cases import assert_refused, run
from tests.support.plain_cases import (
    ITEM,
    NUM_SHARDS,
    TABLES,
    USER,
    assert_same,
    dense_of,
    make_model,
    read_numbered,
    same,
)
from tests.support.sparse_cases import export, tiny


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def tables_of(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: model[name] for name in (USER, ITEM)}


@pytest.mark.parametrize("num_shards", NUM_SHARDS)
def test_tables_come_out_as_they_went_in(num_shards: int, tmp_path: Path) -> None:
    model = make_model()
    export(save(tmp_path / "in" / "ckpt.pt", model), tmp_path / "out", treat_as_tables=TABLES, num_shards=num_shards)
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
)
def test_dtypes_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    table = torch.randn(33, 5).mul(50).to(dtype)
    export(save(tmp_path / "ckpt.pt", {"t.embeddings.a.weight": table}), tmp_path / "out", num_shards=3)
    assert_same(read_numbered(tmp_path / "out"), {"t.embeddings.a.weight": table})


def test_tensors_that_do_not_lie_row_after_row(tmp_path: Path) -> None:
    """Transposed, padded, a view into another tensor's storage, tied, a single row: read by strides, never by shape."""
    base = torch.arange(600, dtype=torch.float32).reshape(30, 20)
    tables = {
        "transposed.weight": torch.arange(28, dtype=torch.float32).reshape(4, 7).t(),
        "padded.weight": base[:, 3:10],
        "every_second.weight": base[::2, ::3],
        "within.weight": base[7:19],
        "tied.weight": base[7:19],
        "whole.weight": base,
        "row.weight": base[3:4, :6],
        "column.weight": base[:, 5:6],
        "half.weight": torch.randn(9, 6).to(torch.bfloat16).t(),
    }
    path = save(tmp_path / "ckpt.pt", tables)
    for num_shards in (1, 4):
        out = tmp_path / str(num_shards)
        export(path, out, treat_as_tables=["*"], num_shards=num_shards, tuning=tiny())
        assert_same(read_numbered(out), {name: tensor.contiguous() for name, tensor in tables.items()})


def test_tables_without_rows(tmp_path: Path) -> None:
    model = {"a.weight": torch.empty(0, 4), "b.weight": torch.ones(1, 4)}
    export(save(tmp_path / "ckpt.pt", model), tmp_path / "out", treat_as_tables=["*"], num_shards=3)
    assert_same(read_numbered(tmp_path / "out"), model)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_training_loop_keeps_the_model_under_a_key(key: str, tmp_path: Path) -> None:
    """The model is found, numbered optimizer state is told and never read, other tensors are left out."""
    model = make_model()
    parameters = [torch.nn.Parameter(tensor) for tensor in model.values()]
    optimizer = torch.optim.Adam(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    whole = {key: OrderedDict(model), "optimizer": optimizer.state_dict(), "epoch": 3, "rng": torch.ones(4)}
    manifest = export(save(tmp_path / "ckpt.pt", whole), tmp_path / "out", treat_as_tables=TABLES)
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))
    notes = "\n".join(manifest.notes)
    assert "optimizer state by number (optimizer) belongs to no table and is not read" in notes
    assert f"the model is what {key!r} holds; left out: rng" in notes


def test_what_stands_beside_the_model_is_not_made(tmp_path: Path) -> None:
    """Scores of numpy, arguments, paths and times are common, and torch alone would refuse the file for them."""
    model = make_model()
    beside = {
        "best": np.float64(0.75),
        "history": np.arange(5, dtype=np.float32),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "saved": dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc).date(),
    }
    for number, content in enumerate(({"model": model, **beside}, {**model, **beside})):
        path = save(tmp_path / f"{number}.pt", content)
        export(path, tmp_path / str(number), treat_as_tables=TABLES)
        assert_same(read_numbered(tmp_path / str(number)), tables_of(model))
        assert list(dense_of(path, TABLES).load()) == ["dense_arch.mlp.weight", "dense_arch.mlp.bias"]


def test_optimizer_state_by_name_is_a_slot(tmp_path: Path) -> None:
    """Dropped unless it is asked for; what does not fit its table is told."""
    model = make_model()
    momentum, row_wise = torch.rand(103, 8), torch.rand(103)
    whole = {
        "model": model,
        "optim": {
            "state": {
                USER: {"exp_avg": momentum, "user.sum": row_wise, "step": torch.ones(())},
                ITEM: {"sum": row_wise},
            },
            "param_groups": [{"params": [USER, ITEM]}],
        },
    }
    path = save(tmp_path / "ckpt.pt", whole)
    manifest = export(path, tmp_path / "out", treat_as_tables=TABLES)
    (user,) = (table for table in manifest.tables if table.name == USER)
    assert {slot.name: (slot.reason, slot.shape) for slot in user.dropped} == {
        "exp_avg": ("optimizer", (8,)),
        "step": ("optimizer", ()),
        "sum": ("optimizer", ()),
    }
    with pytest.raises(PlanError, match=r"item.weight.sum' has shape \[103\], which does not go with the 61 rows"):
        export(path, tmp_path / "bad", treat_as_tables=TABLES, keep_slots=["*item.weight.sum"])
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))
    export(path, tmp_path / "kept", treat_as_tables=TABLES, keep_slots=["exp_avg", "*user.weight.sum"], num_shards=3)
    expected = {**tables_of(model), f"{USER}.exp_avg": momentum, f"{USER}.sum": row_wise}
    assert_same(read_numbered(tmp_path / "kept"), expected)


def test_names_of_nested_dicts_are_joined(tmp_path: Path) -> None:
    model = {
        "ebc": {"embedding_bags": {"user": {"weight": torch.randn(9, 3)}}},
        "towers": [torch.ones(2), torch.ones(3)],
    }
    path = save(tmp_path / "ckpt.pt", model)
    export(path, tmp_path / "out")
    assert_same(
        read_numbered(tmp_path / "out"),
        {"ebc.embedding_bags.user.weight": model["ebc"]["embedding_bags"]["user"]["weight"]},
    )
    assert [name for name, _, _ in dense_of(path).describe()] == ["towers.0", "towers.1"]


def test_several_files_with_an_index(tmp_path: Path) -> None:
    model = make_model()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: names[place % 2] for place, name in enumerate(model)}
    for file in names:
        save(tmp_path / "in" / file, {name: tensor for name, tensor in model.items() if weight_map[name] == file})
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    export(tmp_path / "in", tmp_path / "out", treat_as_tables=TABLES, num_shards=2)
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))
    index.write_text(json.dumps({"weight_map": weight_map | {USER: names[1]}}))
    with pytest.raises(CheckpointError, match=f"says that '{USER}' is in {names[1]}, but it is in {names[0]}"):
        export(tmp_path / "in", tmp_path / "other", treat_as_tables=TABLES)


@pytest.mark.parametrize("there", [(1,), (2, 3)])
def test_a_file_that_is_missing_by_the_names_of_the_others(there: tuple[int, ...], tmp_path: Path) -> None:
    for number in there:
        save(tmp_path / "in" / f"pytorch_model-{number:05}-of-00003.bin", {f"t{number}_emb.weight": torch.ones(3, 2)})
    lost = 2 if there == (1,) else 1
    with pytest.raises(
        CheckpointError, match=f"pytorch_model-0000{lost}-of-00003.bin is missing: by the names of the files"
    ):
        export(tmp_path / "in", tmp_path / "out", treat_as_tables=["*_emb.weight"])
    one = tmp_path / "in" / f"pytorch_model-{there[0]:05}-of-00003.bin"
    manifest = export(one, tmp_path / "one", treat_as_tables=["*_emb.weight"])
    assert any("is one of 3 files by its name" in note for note in manifest.notes)


def test_dense_parameters_are_loaded_by_name(tmp_path: Path) -> None:
    """All but tables and state, whatever their dtype and strides, from one file or its directory."""
    model = make_model() | {
        "dense_arch.half": torch.randn(3, 5).to(torch.bfloat16).t(),
        "dense_arch.scale": torch.tensor(2.5, dtype=torch.float64),
        "dense_arch.none": torch.empty(0, 3),
        "dense_arch.complex": torch.randn(3, dtype=torch.complex64),
        "dense_arch.one": torch.ones(1).expand(4, 7),
    }
    path = save(tmp_path / "in" / "pytorch_model.bin", {"model": model})
    expected = {name: tensor for name, tensor in model.items() if name not in (USER, ITEM)}
    for place in (path, path.parent):
        dense = dense_of(place, tables=TABLES)
        facts = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in expected.items()]
        assert dense.describe() == facts
        assert dense.where == str(path)
        loaded = dense.load()
        assert list(loaded) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor), name
            assert loaded[name].dtype == tensor.dtype


def test_a_dense_arch_is_traced_with_the_parameters_of_the_file(tmp_path: Path) -> None:
    """The dense arch alone, its parameters found under its path; without a table that is known there is none."""

    model = tiny_model.build_model()
    save(tmp_path / "in" / "last.ckpt", {"state_dict": model.state_dict()})
    settings = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    manifest = export(tmp_path / "in", tmp_path / "out", need_export_sparse=False, filter_sparse_opt=False, **settings)
    assert manifest.dense is not None
    assert manifest.source.format == "none"


def test_what_inspect_and_plan_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "ckpt.pt", make_model())
    assert main(["inspect", str(path), "--treat_as_tables", "*item.weight", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(t["name"], t["rows"], t["shape"], t["dtype"], t["slots"]) for t in found["tables"]] == [
        (USER, 103, [8], "float32", ["embedding"]),
        (ITEM, 61, [4], "float32", ["embedding"]),
    ]
    assert main(["inspect", str(path)]) == 0
    assert f"dense      {ITEM} float32 [61, 4]" in capsys.readouterr().out
    assert (
        main(["plan", "--ckpt_dir", str(path), "--export_dir", str(tmp_path / "o"), "--filter_sparse_opt", "true"]) == 0
    )
    assert "source: torch checkpoint" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_only_kept_tables_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of 40 MB with a table of 4 kB an export reads the pickle, the directory and the table."""
    from dist_export.storage import range_reader

    rows = torch.randn(128, 8)
    path = save(
        tmp_path / "ckpt.pt",
        {"ebc.embeddings.t.weight": rows, "optimizer": {"state": {0: torch.ones(10_000_000)}, "param_groups": []}},
    )
    read = []
    original = range_reader.RangeReader.read_into
    monkeypatch.setattr(
        range_reader.RangeReader,
        "read_into",
        lambda self, view, at: (read.append(len(view)), original(self, view, at))[1],
    )
    export(path, tmp_path / "out", digest="xxh3")
    assert sum(read) < 2_000_000
    assert_same(read_numbered(tmp_path / "out"), {"ebc.embeddings.t.weight": rows})


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_no_table_is_known(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt.pt", {"item.weight": torch.ones(3, 2), "b": torch.ones(3)})
    with pytest.raises(
        CheckpointError,
        match=r"name those that are tables with treat_as_tables: \[patterns\]. Its matrices: item.weight$",
    ):
        export(path, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"treat_as_tables: the pattern 'user\*' matches no tensor; .* item.weight"
    ):
        export(path, tmp_path / "out", treat_as_tables=["user*"])
    with pytest.raises(CheckpointError, match=r"the table 'b' has shape \[3\]; a table has rows and columns"):
        export(path, tmp_path / "out", treat_as_tables=["b"])
    with pytest.raises(PlanError, match=r"cannot be copied as it is: .*Set filter_sparse_opt: true"):
        export(path, tmp_path / "out", treat_as_tables=["item*"], filter_sparse_opt=False)
    with pytest.raises(CheckpointError, match="complex64, which no package can hold"):
        export(
            save(tmp_path / "c.pt", {"c": torch.ones(2, 2, dtype=torch.complex64)}),
            tmp_path / "out",
            treat_as_tables=["c"],
        )
    assert not (tmp_path / "out").exists()


def test_a_link_to_the_file_is_followed(tmp_path: Path) -> None:
    """What the user names may be a link, as a directory may be; to a file whose name does not tell what it is."""
    model = make_model()
    save(tmp_path / "store" / "blob", model)
    (tmp_path / "latest").symlink_to(tmp_path / "store" / "blob")
    export(tmp_path / "latest", tmp_path / "out", treat_as_tables=TABLES)
    assert_same(read_numbered(tmp_path / "out"), tables_of(model))


def test_a_store_is_read_like_a_directory(tmp_path: Path) -> None:
    import fsspec

    model = make_model()
    path = save(tmp_path / "ckpt.pt", model)
    fsspec.filesystem("memory").pipe_file("/plain/in/ckpt.pt", path.read_bytes())
    for place in ("memory://plain/in/ckpt.pt", "memory://plain/in"):
        out = tmp_path / str(len(place))
        assert detect_format(open_place(place)) == "torch"
        export(place, out, treat_as_tables=TABLES, num_shards=2)
        assert_same(read_numbered(out), tables_of(model))
        loaded = dense_of(place, tables=TABLES).load()
        assert same(loaded["dense_arch.mlp.bias"], model["dense_arch.mlp.bias"])


def test_a_file_that_is_saved_again_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that writes its last.ckpt again: no package, for it would hold rows of both."""
    path = save(tmp_path / "last.ckpt", make_model())
    original = steps.check

    def check(*arguments: Any, **more: Any) -> Any:
        save(path, make_model(seed=1))
        return original(*arguments, **more)

    monkeypatch.setattr(steps, "check", check)
    with pytest.raises(ExportError, match=r"last.ckpt: changed while it was being exported.* No manifest was written"):
        export(path, tmp_path / "out", treat_as_tables=TABLES)
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---- hostile files --------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("never",)


def pack(path: Path, content: Any) -> None:
    """A zip as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/version", "3\n")


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"t": torch.ones(2, 2)}
    for _ in range(depth):
        found = {"a": found}
    return found


def bushy() -> Any:
    found: Any = [torch.ones(2, 2)]
    for _ in range(30):
        found = [found] * 9
    return {"a": found}


def cut(path: Path) -> None:
    save(path, make_model())
    path.write_bytes(path.read_bytes()[:-700])


def change_member(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Write a sound file and change one member of its zip."""

    def apply(path: Path) -> None:
        save(path, {"ebc.embeddings.t.weight": torch.ones(64, 4)})
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(path.with_name("y"), "w") as other:
            for info in archive.infolist():
                data = archive.read(info)
                other.writestr(info.filename, change(data) if info.filename.endswith(f"/{name}") else data)
        path.with_name("y").replace(path)

    return apply


HOSTILE = {
    "empty": (lambda p: p.write_bytes(b""), "is no file of torch.save"),
    "text": (lambda p: p.write_bytes(b"hello" * 100), "is no file of torch.save"),
    "cut": (cut, "is truncated, or no file of torch.save"),
    "old format": (
        lambda p: torch.save(make_model(), p, _use_new_zipfile_serialization=False),
        "is in the format of torch before 1.6; expected its zip format: load it with torch.load and write it again",
    ),
    "code": (lambda p: pack(p, {"a": Evil()}), "cannot be read (torch.load with weights_only=True)"),
    "a module": (
        lambda p: torch.save(torch.nn.Linear(2, 2), p),
        "not an allowed global by default. Save the state_dict alone",
    ),
    "a tensor": (lambda p: torch.save(torch.ones(2, 2), p), "expected a state_dict or a dict that has one"),
    "a list": (lambda p: torch.save([1], p), "holds a list of 1 (int), expected a state_dict"),
    "deep": (lambda p: torch.save(nested(60), p), "is nested too deeply, or without end"),
    "bushy": (lambda p: torch.save(bushy(), p), "is nested too deeply, or without end"),
    "two names": (
        lambda p: torch.save({"a": {"b": torch.ones(2, 2)}, "a.b": torch.ones(2, 2)}, p),
        "holds two tensors called 'a.b'",
    ),
    "no name": (lambda p: torch.save({"": torch.ones(2, 2)}, p), "a table or parameter needs a name"),
    "short storage": (change_member("data/0", lambda data: data[:512]), "a tensor lies in 1,024 bytes of"),
    "big-endian": (change_member("byteorder", lambda _: b"big"), "was written on a machine of big-endian bytes"),
    "expanded": (
        lambda p: torch.save({"embeddings.t.weight": torch.ones(1, 4).expand(1 << 40, 4)}, p),
        "its rows share what is stored (expanded)",
    ),
    "overlapping": (
        lambda p: torch.save({"embeddings.t.weight": torch.ones(40).as_strided((10, 8), (2, 1))}, p),
        "its rows share what is stored (expanded)",
    ),
    "wide": (lambda p: torch.save({"embeddings.t.weight": torch.ones(1, 70_000)}, p), "no row has so many columns"),
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_a_hostile_file_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = HOSTILE[case]
    path = tmp_path / "ckpt.pt"
    make(path)
    places = ("--ckpt_dir", path, "--export_dir", tmp_path / "out", "--filter_sparse_opt", "true")
    for outcome in (
        run(capsys, tmp_path, "plan", *places),
        run(capsys, tmp_path, *places),
        run(capsys, tmp_path, "inspect", path),
    ):
        assert_refused(outcome, said)
        assert str(path) in outcome.lines[0]
    assert not (tmp_path / "out").exists()


def test_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """No prefix of a checkpoint passes for one."""
    path = save(tmp_path / "ckpt.pt", make_model())
    raw = path.read_bytes()
    for length in np.linspace(0, len(raw) - 1, 40).astype(int).tolist():
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            export(path, tmp_path / "out", treat_as_tables=TABLES)


@pytest.mark.parametrize("names", [("a.pt", "b.pt"), ("model.pth", "optim.bin")])
def test_several_files_without_an_index(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        save(tmp_path / "in" / name, make_model())
    with pytest.raises(
        CheckpointError, match=r"holds several files of torch.save .*give the one that is meant as ckpt_dir"
    ):
        export(tmp_path / "in", tmp_path / "out", treat_as_tables=TABLES)
    export(tmp_path / "in" / names[0], tmp_path / "out", treat_as_tables=TABLES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_numpy_is_called_so(save, tmp_path: Path) -> None:
    """Packed or not; it is no damaged file of ``torch.save`` that saving again would mend."""
    save(tmp_path / "t.npz", ids=np.arange(3), rows=np.ones((3, 2)))
    with pytest.raises(CheckpointError, match=r"t\.npz is an archive of numpy \(\.npz\) with 2 arrays") as caught:
        export(tmp_path / "t.npz", tmp_path / "out")
    assert "save it again" not in str(caught.value)
