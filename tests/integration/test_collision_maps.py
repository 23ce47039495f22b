"""What maps raw ids to rows is never missed: without it a table of managed collisions is read by the wrong ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_export.errors import CheckpointError, ModelError
from tests.support import exports
from tests.support.collision_cases import MODULES, Model, make_state, make_zch_state, weight_of
from tests.support.dcp_writer import save
from tests.support.sparse_cases import export

SIZES = {"t": (12, 4), "z": (6, 4)}
MAPS = {"t": ("_mch_sorted_raw_ids", "_mch_remapped_ids_mapping"), "z": ("_hash_zch_identities",)}


def make(tmp_path: Path, *lacking: str, root: str = "") -> Path:
    """Write the state of both tables, without the tensors whose names have one of these in them."""
    state = make_state([(12, [3, 17, -5])]) | make_zch_state([7, -1, 1 << 40, -1, -9, 11])
    state |= {f"dense_arch.{name}": value for name, value in Model(SIZES).dense_arch.state_dict().items()}
    kept = {name: value for name, value in state.items() if not any(part in name for part in lacking)}
    tmp_path.mkdir(exist_ok=True)
    torch.save({"model": state, root: kept} if root else kept, tmp_path / "model.pt")
    return tmp_path


def export_model(source: Path, target: Path, model: Any = None, **settings: Any) -> Any:
    batch = {"t": torch.tensor([3, 17, -5]), "z": torch.tensor([7, -9, 11])}
    model = model or Model(SIZES)
    settings |= {"filter_sparse_opt": True, "export_dir": target}
    return exports.exporter(model, "sparse_arch", "dense_arch", [batch], source, **settings).export(progress=False)


@pytest.mark.parametrize("table", ["t", "z"])
def test_a_map_that_the_checkpoint_lacks_is_refused(table: str, tmp_path: Path) -> None:
    """The model's own is untrained: all raw ids would get rows of others, and the export would compare this with itself."""
    source = make(tmp_path / "in", f"_managed_collision_modules.{table}.")
    with pytest.raises(ModelError, match=rf"the checkpoint lacks \S+\.{table}\.{MAPS[table][0]}"):
        export_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = export_model(source, tmp_path / "out", allow_missing_dense=[f"sparse_arch.*.{table}.*"])
    told = next(note for note in manifest.notes if "taken from the model, not from the checkpoint" in note)
    assert all(f"{MODULES}{table}.{name}" in told for name in MAPS[table])


def test_a_copy_of_the_parameters_alone_has_no_map(tmp_path: Path) -> None:
    source = make(tmp_path / "in", "_managed_collision_modules", root="ema")
    with pytest.raises(ModelError, match=r"the checkpoint lacks \S+_mch_sorted_raw_ids"):
        export_model(source / "model.pt", tmp_path / "out", state_root="ema")
    export_model(source / "model.pt", tmp_path / "out", state_root="model")


def test_a_map_that_no_state_dict_has_need_not_be_there(tmp_path: Path) -> None:
    """The model's code makes it anew; torchrec's own is always saved."""
    source = make(tmp_path / "in", "_managed_collision_modules.z.")
    model = Model(SIZES)
    modules: Any = model.sparse_arch.mc.get_submodule("_managed_collision_collection")._managed_collision_modules
    identities = modules["z"]._hash_zch_identities.detach()
    del modules["z"]._hash_zch_identities
    modules["z"].register_buffer("_hash_zch_identities", identities, persistent=False)
    export_model(source, tmp_path / "out", model)


@pytest.mark.parametrize("saved_as", ["torch", "dcp"])
def test_tables_alone_tell_of_a_map_that_is_not_there(saved_as: str, tmp_path: Path) -> None:
    source = make(tmp_path / "in", "_managed_collision_modules.t.")
    if saved_as == "dcp":
        source = save(tmp_path / "dcp", {"model": torch.load(source / "model.pt")})
    manifest = export(source, tmp_path / "out")
    (told,) = [note for note in manifest.notes if "nothing that maps raw ids to rows" in note]
    assert told.startswith(f"{weight_of('t')}: ")
    assert {table.name: table.is_row_indexed for table in manifest.tables} == {
        weight_of("t"): True,
        weight_of("z"): False,
    }


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (MAPS["t"], r"t\._\w+ is there, and \S+t\._mch_sorted_raw_ids and _mch_remapped_ids_mapping are missing"),
        (MAPS["z"], r"z\._hash_zch_metadata is there, and \S+z\._hash_zch_identities is missing"),
    ],
)
def test_a_module_without_its_map_is_refused(lacking: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """Counts or segments of a module show that the state was cut."""
    with pytest.raises(CheckpointError, match=said):
        export(make(tmp_path / "in", *lacking), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_gets_no_map_of_another_collection(tmp_path: Path) -> None:
    """Two collections have a table ``t``; the checkpoint has the map of one of them."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sparse_arch = torch.nn.Module()
            self.sparse_arch.a = Model({"t": (12, 4)}).sparse_arch
            self.sparse_arch.b = Model({"t": (12, 4)}).sparse_arch
            self.sparse_arch.forward = lambda batch: {"x": self.sparse_arch.b(batch)["t"]}
            self.dense_arch = Model({"t": (12, 4)}).dense_arch

        def forward(self, batch: Any) -> Any:
            return self.dense_arch(self.sparse_arch(batch))

    state = make_state([(12, [3, 17, -5])])
    saved = {
        name.replace("sparse_arch.", f"sparse_arch.{which}."): value for which in "ab" for name, value in state.items()
    }
    saved = {name: value for name, value in saved.items() if not (".a." in name and "_modules" in name)}
    saved |= {f"dense_arch.{name}": value for name, value in Two().dense_arch.state_dict().items()}
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"the checkpoint lacks sparse_arch\.a\.\S+_mch_sorted_raw_ids"):
        export_model(tmp_path / "model.pt", tmp_path / "out", Two())
