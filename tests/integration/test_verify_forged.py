"""A manifest whose digest was computed anew: what it says and the files show otherwise is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.formats.package_entries import DenseEntry, ParityEntry
from dist_export.manifest import SAMPLE_ROWS, compute_digest
from dist_export.verify.dense import _Judge
from dist_export.verify.verify import verify
from tests.integration.test_package import restate
from tests.support import exports

IDS = torch.arange(16)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(40, 4)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.user(ids), "item": self.item(ids), "scale": 2.0, "unused": ids.float()[:, None]}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": torch.sigmoid(self.linear(torch.cat([blocks["user"], blocks["item"]], dim=1)))}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.sparse_arch, self.dense_arch = Sparse(), Dense()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    torch.save(Model().state_dict(), folder / "ckpt.pt")
    settings: dict[str, Any] = {"dtype": {"*item*": "int8"}, "atol": 1e-4, "score_program": "require"}
    exports.exporter(
        Model(), "sparse_arch", "dense_arch", iter([IDS]), str(folder / "ckpt.pt"), str(folder / "out"), **settings
    ).export(progress=False)
    return folder / "out"


def bare(doc: dict[str, Any], *names: str) -> None:
    for slot in (slot for table in doc["tables"] for slot in table["kept"]):
        for name in names:
            slot.pop(name, None)


def shift(sums: dict[str, Any], name: str, to: Any) -> None:
    """Count 10 bytes as others."""
    sums[name] -= 10
    account = sums if isinstance(to, str) else to
    account["exported"] += 10


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "encoding": (lambda doc: bare(doc, "encoding"), "has no encoding"),
    "encoding and dim": (lambda doc: bare(doc, "encoding", "dim"), "has no encoding"),
    "all of the encoding": (lambda doc: bare(doc, "encoding", "dim", "cast"), "dropped by cast"),
    "encoding and cast": (lambda doc: bare(doc, "encoding", "cast"), "has no encoding"),
    "atol": (lambda doc: doc["parity"].update(atol=10.0), "to be anything"),
    "rtol": (lambda doc: doc["parity"].update(rtol=2.0), "to be anything"),
    "input order": (lambda doc: doc["dense"].update(input_order=["item", "other", "user"]), "dense.input_order"),
    "input order twice": (lambda doc: doc["dense"].update(input_order=["item", "item", "user"]), "dense.input_order"),
    "input order changed": (lambda doc: doc["dense"]["input_order"].reverse(), "dense.input_order"),
    "no input order": (lambda doc: doc["dense"].pop("input_order"), "dense.input_order"),
    "constants": (lambda doc: doc["dense"]["constants"].update(scale="3.0"), "dense.constants"),
    "no constants": (lambda doc: doc["dense"].pop("constants"), "dense.constants"),
    "a larger batch": (lambda doc: doc["dense"].update(max_batch_size=10**6), "was traced for at most 204800"),
    "a free dimension": (
        lambda doc: doc["dense"]["inputs"][0].update(shape=["batch", "x"]),
        "the exported program has",
    ),
    "a renamed batch": (lambda doc: doc["dense"]["inputs"][0].update(shape=["rows", 4]), "the exported program has"),
    "a free output": (lambda doc: doc["dense"]["outputs"][0].update(shape=["batch", "x"]), "the exported program has"),
    "a larger output": (
        lambda doc: doc["dense"]["outputs"][0].update(shape=["batch*2", 1]),
        "the exported program has",
    ),
    "shards": (lambda doc: doc.update(num_shards=5), "num_shards is 5, and a shard is called"),
    "mode": (lambda doc: doc.update(mode="copy"), "mode is 'copy', and files of the source's format"),
    "an unknown mode": (lambda doc: doc.update(mode="fresh"), "which no package has"),
    "a lacking tensor": (lambda doc: doc["account"]["others"].pop(), "bytes are in_program"),
    "other tensors": (lambda doc: doc["account"].update(tensors=1), "it has 1 tensors, between"),
    "exported for in_program": (lambda doc: shift(doc["account"], "in_program", "exported"), "bytes are in_program"),
    "exported for dropped": (
        lambda doc: shift(doc["account"]["dropped"], "cast", doc["account"]),
        "bytes are exported",
    ),
    "dtype of the score program": (lambda doc: doc["score"]["inputs"][0].update(dtype="int32"), "score.inputs says"),
    "shape of the score program": (lambda doc: doc["score"]["inputs"][0].update(shape=[16]), "score.inputs says"),
    "output of the score program": (
        lambda doc: doc["score"]["outputs"][0].update(shape=["batch", "x"]),
        "score.outputs says",
    ),
    "conditions": (lambda doc: doc["score"].update(conditions=["batch <= 3"]), "score.conditions are ['batch <= 3']"),
    "dropped inputs": (lambda doc: doc["dense"].update(dropped_inputs=[]), "dense.input_order"),
}


@pytest.mark.parametrize("what", [None, *FORGED])
def test_what_the_files_show_otherwise_is_found(package: Path, what: str | None) -> None:
    path = package / "manifest.json"
    raw = path.read_bytes()
    doc = json.loads(raw)
    change, told = FORGED[what] if what else (lambda _: None, "")
    change(doc)
    doc["digest"] = compute_digest(doc)
    try:
        path.write_text(json.dumps(doc))
        findings = [str(finding) for finding in verify(str(package)).findings]
    finally:
        path.write_bytes(raw)
    assert bool(findings) == bool(what)
    assert not what or any(told in finding for finding in findings), findings


def test_an_emptied_list_of_rows_is_not_called_a_sample_without_ids(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package, tmp_path / "out")
    (copy / "fx_user_model" / SAMPLE_ROWS).write_text("{}")
    restate(copy, f"fx_user_model/{SAMPLE_ROWS}")
    told = [text for text in verify(str(copy)).checked if text.startswith("sample:")]
    assert told == ["sample: fx_user_model/sample_rows.json names no id, so there was no row to compare"]


def findings_of(seen: float, atol: float, rounding: torch.Tensor | None) -> list[str]:
    """Compare scores that are 3e-5 apart."""
    parity = ParityEntry(batch_sizes=(2,), atol=atol, rtol=1e-5, max_abs={"ctr": seen}, max_rel={})
    entry = DenseEntry(
        folder="f", program="p", archive_format="pt2", inputs=(), outputs=(), dropped_inputs=(), max_batch_size=2
    )
    base = torch.tensor([[0.5], [0.25]])
    findings: list[str] = []
    _Judge(parity, "ctr", lambda: rounding).compare(entry, base + 3e-5, base, findings)
    return findings


def test_the_tolerance_is_what_rounding_and_the_figures_need() -> None:
    """A network whose rounding the export had measured was unsound to verify; a larger atol let any score pass."""
    assert findings_of(0.0, 1e-6, torch.tensor([1e-4])) == []
    assert findings_of(4e-5, 1e-3, None) == []
    assert findings_of(0.0, 1e-6, None)
    assert findings_of(0.0, 1e-3, None)


class SequenceSparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(40, 4)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"clicks": self.item(ids), "views": self.item(ids[:, :3]), "weights": ids.float()}


class SequenceDense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        clicks, views = self.linear(blocks["clicks"]), self.linear(blocks["views"])
        return {
            "each": clicks[..., 0] * blocks["weights"],
            "both": torch.cat([clicks, views], dim=1)[..., 0],
            "flat": clicks.reshape(-1, 1),
            "twice": torch.cat([clicks, clicks, clicks.sum(1, keepdim=True)], dim=1),
        }


@pytest.mark.parametrize("archive_format", ["pt2", "legacy"])
def test_free_dimensions_and_what_follows_from_them_are_sound(archive_format: str, tmp_path: Path) -> None:
    model = nn.Module()
    model.sparse_arch, model.dense_arch = SequenceSparse(), SequenceDense()
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    dims = {"clicks": {1: "history"}, "weights": {1: "history"}, "views": {1: "seen"}}
    exports.exporter(
        model, "sparse_arch", "dense_arch", [torch.arange(30).reshape(6, 5)], str(tmp_path / "ckpt.pt"), str(tmp_path / "out"),
        dynamic_dims=dims, archive_format=archive_format,
    ).export(progress=False)  # fmt: skip
    assert [str(finding) for finding in verify(str(tmp_path / "out")).findings] == []
    path = tmp_path / "out" / "manifest.json"
    doc = json.loads(path.read_bytes())
    for entry in doc["dense"]["inputs"]:
        entry["shape"] = ["seen" if size == "history" else size for size in entry["shape"]]
    doc["digest"] = compute_digest(doc)
    path.write_text(json.dumps(doc))
    assert "one name for several free dimensions" in str(verify(str(tmp_path / "out")).findings)
