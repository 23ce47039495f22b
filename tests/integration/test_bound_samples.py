"""Parts of a package that were exchanged, with all digests made anew: the recorded sample binds them, and ``verify`` sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from dist_export.manifest import Manifest
from dist_export.verify.verify import verify
from tests.integration.test_package import reseal, restate
from tests.support import tiny_model
from tests.support.sparse_cases import export

FOLDER = "fx_user_model"
STATE = f"{FOLDER}/user_model/state_dict.pt"
CODE = f"{FOLDER}/user_model/module.py"
MODEL = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bound")
    source = tiny_model.write_tiny_checkpoint(base / "ckpt")
    settings = {"default_row": {"user_emb": [1.0, 2.0, 3.0, 4.0]}, "dtype": {"user_emb": "int8"}}
    export(source, base / "out", num_shards=2, **MODEL, **settings)
    return base / "out"


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "out")


def change_state(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], list[str]]:
    def damage(package: Path) -> list[str]:
        state = torch.load(package / STATE, weights_only=True)
        torch.save(change(state), package / STATE)
        return [STATE]

    return damage


def nudge(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = next(iter(state))
    state[name] = torch.nextafter(state[name], torch.full_like(state[name], 9.0))
    return state


def change_text(name: str, old: str, new: str) -> Callable[[Path], list[str]]:
    def damage(package: Path) -> list[str]:
        text = (package / name).read_text()
        assert old in text
        (package / name).write_text(text.replace(old, new))
        return [name]

    return damage


def change_manifest(change: Callable[[Manifest], dict[str, Any]]) -> Callable[[Path], list[str]]:
    def damage(package: Path) -> list[str]:
        reseal(package, lambda manifest: msgspec.structs.replace(manifest, **change(manifest)))
        return []

    return damage


def with_default(table: str, row: Any) -> Callable[[Path], list[str]]:
    def change(manifest: Manifest) -> dict[str, Any]:
        return {
            "tables": tuple(
                msgspec.structs.replace(entry, default_row=row) if entry.name == table else entry
                for entry in manifest.tables
            )
        }

    return change_manifest(change)


def with_dense(change: Callable[[Any], dict[str, Any]]) -> Callable[[Path], list[str]]:
    return change_manifest(
        lambda manifest: {"dense": msgspec.structs.replace(manifest.dense, **change(manifest.dense))}
    )


def swap_outputs(package: Path) -> list[str]:
    with_dense(lambda dense: {"outputs": dense.outputs[::-1]})(package)
    info = json.loads((package / FOLDER / "output_info.json").read_text())
    info["OutputNodes"].reverse()
    (package / FOLDER / "output_info.json").write_text(json.dumps(info))
    return [f"{FOLDER}/output_info.json"]


def swap_names_everywhere_but_values(package: Path) -> list[str]:
    """The recorded outputs are listed in the new order too, each under its own name."""
    where = package / FOLDER / "outputs_dict.json"
    found = json.loads(where.read_text())
    where.write_text(json.dumps(dict(reversed(list(found.items())))))
    return [*swap_outputs(package), f"{FOLDER}/outputs_dict.json"]


def drop(name: str) -> Callable[[Path], list[str]]:
    def damage(package: Path) -> list[str]:
        (package / name).unlink()
        return change_manifest(lambda m: {"files": tuple(file for file in m.files if file.path != name)})(package)

    return damage


def forget_a_default(package: Path) -> list[str]:
    where = package / FOLDER / "default_rows.json"
    where.write_text(json.dumps({"item_emb": json.loads(where.read_text())["item_emb"]}))
    return [f"{FOLDER}/default_rows.json"]


def widen(tensors: Any) -> tuple[Any, ...]:
    first, *rest = tensors
    return (msgspec.structs.replace(first, shape=(*first.shape[:-1], 9)), *rest)


FORGED = {
    "other weights": (change_state(nudge), STATE, "is not the weight of the exported program"),
    "weights of another shape": (
        change_state(lambda s: {n: t[:1] for n, t in s.items()}), STATE, "is not the weight of the exported program"),
    "weights of another dtype": (
        change_state(lambda s: {n: t.double() for n, t in s.items()}), STATE, "is not the weight of the exported"),
    "fewer weights": (change_state(lambda s: dict(list(s.items())[1:])), STATE, "not the 8 weights of the exported"),
    "no weights at all": (change_state(lambda s: [1]), STATE, "holds a list, not the"),
    "other code": (change_text(CODE, "torch.ops.aten.sigmoid", "torch.ops.aten.tanh"), CODE, "is not what the exported"),
    "code beside it": (
        change_text(f"{FOLDER}/user_model/__init__.py", "from", "import os\nfrom"), "__init__.py", "is not what the exported"),
    "another graph": (change_text(f"{FOLDER}/graph.txt", "sigmoid", "tanh"), "graph.txt", "is not what the exported"),
    "no FX module": (drop(STATE), FOLDER, "has 0 FX modules"),
    "a default row that was none": (
        with_default("item_emb", (1.0, 0.0, 0.0, 0.0)), "default_rows.json", "table 'item_emb' lacks had another row"),
    "another default row": (with_default("user_emb", (4.0, 3.0, 2.0, 1.0)), "default_rows.json", "had another row"),
    "a default row that is gone": (with_default("user_emb", msgspec.UNSET), "default_rows.json", "had another row"),
    "a default row that nothing records": (forget_a_default, "default_rows.json", "lacks 'user_emb', which the manifest has"),
    "outputs swapped": (swap_outputs, "outputs_dict.json", "the manifest says"),
    "outputs swapped, in the record too": (
        swap_names_everywhere_but_values, "output_base.pkl", "output 0 is not what outputs_dict.json has for 'like'"),
    "an input of another width": (
        with_dense(lambda d: {"inputs": widen(d.inputs)}), "inputs_dict.json", "the manifest says float32 [batch, 9]"),
    "an output of another width": (
        with_dense(lambda d: {"outputs": widen(d.outputs)}), "exported_model.pt", "the manifest says float32 [batch, 9]"),
    "no rows of the sample": (drop(f"{FOLDER}/sample_rows.json"), "sample_rows.json", "nothing vouches for it"),
    "no default rows": (drop(f"{FOLDER}/default_rows.json"), "default_rows.json", "nothing vouches for it"),
    "no outputs": (drop(f"{FOLDER}/outputs_dict.json"), "outputs_dict.json", "nothing vouches for it"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_what_was_exchanged_is_found(case: str, package: Path) -> None:
    damage, where, told = FORGED[case]
    restate(package, *damage(package))
    report = verify(str(package))
    assert {finding.check for finding in report.found} == {"dense"}
    assert any(where in finding.file + finding.message and told in finding.message for finding in report.found), report


def test_the_base_is_sound_and_says_what_was_compared(exported: Path) -> None:
    report = verify(str(exported))
    assert report.findings == []
    assert "FX module user_model: its weights and its code are the program's" in report.checked


def test_the_code_of_another_torch_is_not_compared_and_that_is_said(package: Path) -> None:
    restate(package, *change_text(CODE, "sigmoid", "sigmoid ")(package))
    with_dense(lambda dense: {"torch": "2.7.0"})(package)
    report = verify(str(package))
    assert report.findings == []
    assert any("(its code is of torch 2.7.0, and was not compared)" in line for line in report.checked)


def test_a_package_without_tables_binds_its_outputs(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    export(source, tmp_path / "out", need_export_sparse=False, filter_sparse_opt=False, **MODEL)
    assert verify(str(tmp_path / "out")).findings == []
    restate(tmp_path / "out", *swap_outputs(tmp_path / "out"))
    assert verify(str(tmp_path / "out")).findings
