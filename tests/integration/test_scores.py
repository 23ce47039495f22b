"""The sample scored anew from the written shards and the written program, before the commit and by verify."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import dist_export
from dist_export.archive.safe_pickle import read_sample_pickle
from dist_export.dense.folder import _pickled
from dist_export.dense.stage import DenseStage
from dist_export.errors import PackageError, ParityError
from dist_export.formats.safetensors import decode_header, header_length
from dist_export.manifest import decode_manifest, encode_manifest, seal
from dist_export.pipeline import small_files, steps
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model

FOLDER = "fx_user_model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")


def export(checkpoint: Path, out: Path, **more: object) -> dist_export.Manifest:
    settings = {
        "ckpt_dir": str(checkpoint), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 3,
        "model": tiny_model.MODEL, "dataset": tiny_model.DATASET,
    }  # fmt: skip
    return exports.export({**settings, **more})


def after_check(monkeypatch, change) -> None:
    """Let something happen to the written files when everything but the scores has been checked."""
    real = steps.check

    def check(ranks, planned, target, **more):
        tables = real(ranks, planned, target, **more)
        change(Path(target.path))
        return tables

    monkeypatch.setattr(steps, "check", check)


def change_embeddings(folder: Path, by: int = 1) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        raw = bytearray(path.read_bytes())
        length = header_length(bytes(raw[:8]), path=str(path), file_size=len(raw))
        header = decode_header(bytes(raw[8 : 8 + length]), path=str(path), file_size=len(raw))
        for key, begin, end in zip(header.keys, header.begins.tolist(), header.ends.tolist(), strict=True):
            if ".embedding/" in key:
                values = np.frombuffer(raw, np.uint8, end - begin, begin)
                values[3::4] ^= by  # the exponent
        path.write_bytes(raw)


def test_the_manifest_has_the_figures(checkpoint: Path, tmp_path: Path) -> None:
    parity = export(checkpoint, tmp_path / "out").parity
    assert parity.from_files.rows == 5
    assert parity.from_files.reads_rows
    assert parity.from_files.max_abs == parity.from_files.max_rel == {"ctr": 0.0, "like": 0.0}
    assert parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    assert parity.max_ulp.keys() == {"ctr", "like"}
    rows = json.loads((tmp_path / "out" / FOLDER / "sample_rows.json").read_text())
    assert {table: len(found) for table, found in rows.items()} == {"user_emb": 5, "item_emb": 5}


@pytest.mark.parametrize(("dtype", "num_shards"), [("float16", 1), ("bfloat16", 3), ("int8", 3)])
def test_the_sample_sees_rows_as_they_are_written(dtype, num_shards, checkpoint, tmp_path, monkeypatch) -> None:
    """The model gets the rows cast there and back, so its scores are those of serving; a row that differs is found.

    The reference alone gets the source's own.
    """
    own = {
        table: {
            i: row.tobytes()
            for part in parts
            for i, row in zip(part.ids.tolist(), part.slots["embedding"], strict=True)
        }
        for table, parts in tiny_model.tables().items()
    }
    seen = {}
    real = tiny_model.LookalikeTable.insert

    def insert(self, ids, embeddings):
        seen.setdefault(self._name, []).append((ids.tolist(), embeddings.clone()))
        real(self, ids, embeddings)

    monkeypatch.setattr(tiny_model.LookalikeTable, "insert", insert)
    manifest = export(checkpoint, tmp_path / "out", num_shards=num_shards, dtype={"*": dtype})
    assert manifest.parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    package = dist_export.open_package(tmp_path / "out")
    for table, calls in seen.items():
        kinds = []
        for ids, rows in calls:
            assert rows.dtype == torch.float32
            as_written = package.lookup(table, np.array(ids))[0].astype(np.float32).tobytes()
            kinds.append({as_written: "written", b"".join(own[table][i] for i in ids): "own"}[rows.numpy().tobytes()])
        assert kinds[0] == kinds[-1] == "written"
        assert kinds.count("own") == 1
    assert verify(str(tmp_path / "out")).findings == []
    after_check(monkeypatch, change_embeddings)
    with pytest.raises(ParityError, match="has another row in the shards"):
        export(checkpoint, tmp_path / "other", num_shards=num_shards, dtype={"*": dtype})


COPY = {"filter_sparse_opt": False, "num_shards": None}


@pytest.mark.parametrize("more", [COPY, {**COPY, "need_export_sparse": False}])
def test_copies_and_dense_only_exports_are_scored_too(more, checkpoint: Path, tmp_path: Path) -> None:
    parity = export(checkpoint, tmp_path / "out", **more).parity
    assert parity.from_files.reads_rows is more.get("need_export_sparse", True)
    assert parity.from_files.max_ulp == {"ctr": 0, "like": 0}
    assert verify(str(tmp_path / "out")).findings == []


def test_a_package_in_its_checkpoint_is_scored_from_there(checkpoint: Path) -> None:
    assert export(checkpoint, checkpoint, filter_sparse_opt=False, num_shards=None).parity.from_files.reads_rows


def test_a_row_that_was_written_wrong_is_named(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    after_check(monkeypatch, change_embeddings)
    with pytest.raises(
        ParityError, match=r"table 'item_emb': the id -?\d+ of the sample has another row in the shards"
    ):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_row_that_is_not_there_is_named(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    real = DenseStage.score

    def forget(self, written, target, **more):
        self._sampled.looked_up.rows["user_emb"][12345] = "00"
        first = next(iter(self._sampled.looked_up.rows["item_emb"]))
        self._sampled.looked_up.rows["item_emb"][first] = None
        return real(self, written, target, **more)

    monkeypatch.setattr(DenseStage, "score", forget)
    with pytest.raises(ParityError, match="is not in the checkpoint, but in the shards"):
        export(checkpoint, tmp_path / "out")


def test_a_program_that_was_written_wrong_is_found(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """Another weight: the archive in the package is what is run, not the one in memory."""
    other = tmp_path / "other"
    export(checkpoint, other)
    state = tiny_model.trained_dense_state()
    state["dense_arch.out.bias"] += 1
    torch.save(state, checkpoint / "model.pt")
    wrong = (other / FOLDER / "exported_model.pt").read_bytes()
    real = small_files.write_small_files

    def write(target, files, **more):
        return real(target, {**files, f"{FOLDER}/exported_model.pt": wrong}, **more)

    monkeypatch.setattr(small_files, "write_small_files", write)
    with pytest.raises(ParityError, match=r"output 'ctr': the written program on rows of the written shards differs"):
        export(checkpoint, tmp_path / "out")


def test_a_model_is_left_as_it_was_when_its_scores_differ(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    model = tiny_model.build_model()
    model.train()
    known = torch.from_numpy(tiny_model.tables()["user_emb"][0].ids[:1].copy())
    row = torch.full((1, tiny_model.DIM), 7.0)
    model.sparse_arch.user.insert(known, row)
    after_check(monkeypatch, change_embeddings)
    with pytest.raises(ParityError):
        exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), checkpoint, tmp_path / "out",
            filter_sparse_opt=True,
        ).export()  # fmt: skip
    assert torch.equal(model.sparse_arch.user(known), row)
    assert model.training
    assert not model.sparse_arch.user._forward_pre_hooks


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    export(tiny_model.write_tiny_checkpoint(folder / "ckpt"), folder / "out")
    return folder / "out"


def findings_after(package: Path, tmp_path: Path, name: str, change) -> list[str]:
    """Return what verify finds after a change to one file of the dense folder that the manifest vouches for."""
    out = Path(shutil.copytree(package, tmp_path / "out"))
    path = out / FOLDER / name
    path.write_bytes(change(path.read_bytes()))
    manifest = decode_manifest((out / "manifest.json").read_bytes(), where="")
    files = tuple(
        msgspec.structs.replace(file, num_bytes=(out / file.path).stat().st_size, digest="") for file in manifest.files
    )
    (out / "manifest.json").write_bytes(encode_manifest(seal(msgspec.structs.replace(manifest, files=files))))
    return list(map(str, verify(str(out)).findings))


def swap(raw: bytes) -> bytes:
    one, other = read_sample_pickle(raw, where="x")
    return _pickled((other, one))


def with_nan(raw: bytes) -> bytes:
    one, other = read_sample_pickle(raw, where="x")
    one = one.clone()
    one[2] = float("nan")
    return _pickled((one, other))


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/dist_export_evil",)


BROKEN = {
    "swapped outputs": ("output_base.pkl", swap, "output 'ctr' is not what was stored in output_base.pkl"),
    "nan": ("output_base.pkl", with_nan, "4,294,967,296 ULP, in row 2"),
    "one output": ("output_base.pkl", lambda raw: _pickled(read_sample_pickle(raw, where="x")[0]), "1 outputs, the manifest"),
    "another shape": (
        "output_base.pkl",
        lambda raw: _pickled(tuple(t[:2].clone() for t in read_sample_pickle(raw, where="x"))),
        "is torch.float32 [2, 1], the program gives",
    ),
    "code": ("output_base.pkl", lambda _: pickle.dumps(Evil()), "which no sample needs; it was not run"),
    "code in the inputs": ("inputs_dict.pkl", lambda _: pickle.dumps({"user": Evil()}), "it was not run"),
    "no tensors": ("output_base.pkl", lambda _: pickle.dumps((1, 2)), "not of tensors alone"),
    "cut short": ("output_base.pkl", lambda raw: raw[:-40], "is no pickle of sample tensors"),
    "another input": (
        "inputs_dict.pkl",
        lambda raw: _pickled({k: v + 1 for k, v in read_sample_pickle(raw, where="x").items()}),
        "inputs_dict.pkl: input 'item' is not that of inputs_dict.json",
    ),
    "order": ("params_order.json", lambda raw: json.dumps(json.loads(raw)[::-1]).encode(), "the manifest says"),
    "lite": ("inputs_dict_lite.json", lambda raw: raw.replace(b'"idx": 0', b'"idx": 5'), "is not as in inputs_dict.json"),
    "names": ("output_info.json", lambda raw: raw.replace(b"like", b"love"), "output_info.json: ['ctr', 'love']"),
    "rows": (
        "sample_rows.json",
        lambda raw: json.dumps({t: [{**r, "row": "0" * 16} for r in rows] for t, rows in json.loads(raw).items()}).encode(),
        "no longer has the row of id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_verify_finds_what_no_longer_fits(case: str, package: Path, tmp_path: Path) -> None:
    name, change, expected = BROKEN[case]
    found = findings_after(package, tmp_path, name, change)
    assert any(expected in finding for finding in found), found
    assert not Path("/tmp/dist_export_evil").exists()


def test_verify_says_how_close_the_program_is(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out")
    checked = "\n".join(verify(str(tmp_path / "out")).checked)
    assert "gives the stored outputs on the stored sample: ctr max abs 0, max rel 0, 0 ULP; like" in checked
    assert "the rows of its 10 ids are those that were scored" in checked


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.tensor(3),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 4), torch.tensor([True])),
        {"a": torch.arange(3), "b": torch.randn(2, 2).t()},
    ],
)
def test_sample_pickles_come_back_as_they_were(value) -> None:
    found = read_sample_pickle(_pickled(value), where="x")
    assert type(found) is type(value)
    expected, back = (
        list(v.values()) if isinstance(v, dict) else list(v) if isinstance(v, tuple) else [v] for v in (value, found)
    )
    assert all(
        torch.equal(left, right) and left.dtype == right.dtype for left, right in zip(expected, back, strict=True)
    )


class Stretched:
    """A tensor of more values than its storage has."""

    def __init__(self, size, stride) -> None:
        self.size, self.stride = size, stride

    def __reduce__(self):
        storage = _Storage(_saved(torch.ones(4)))
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, {})


def _saved(tensor: torch.Tensor) -> bytes:
    bare = tensor.untyped_storage()
    buffer = io.BytesIO()
    torch.save(torch.storage.TypedStorage(wrap_storage=bare, dtype=tensor.dtype, _internal=True), buffer)
    return buffer.getvalue()


class _Storage:
    def __init__(self, raw: bytes) -> None:
        self.raw = raw

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.raw,)


@pytest.mark.parametrize(
    ("size", "stride"), [((1 << 40,), (0,)), ((8,), (1,)), ((-1,), (1,)), ((4,), (9,)), ((2,), ())]
)
def test_sample_pickles_cannot_stretch_a_storage(size, stride) -> None:
    raw = pickle.dumps(Stretched(size, stride))
    with pytest.raises(PackageError, match="is no pickle of sample tensors"):
        read_sample_pickle(raw, where="x")
    assert read_sample_pickle(pickle.dumps(Stretched((4,), (1,))), where="x").tolist() == [1.0] * 4


def test_a_sample_pickle_whose_storage_runs_code_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    with pytest.raises(PackageError):
        read_sample_pickle(pickle.dumps(_Storage(buffer.getvalue())), where="x")
    assert not Path("/tmp/dist_export_evil").exists()
