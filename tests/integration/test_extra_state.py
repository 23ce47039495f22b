"""Extra state of modules in the dense arch: what the checkpoint holds is loaded, or it is said why it cannot be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.checkpoint.dcp.dense import DcpDense
from dist_export.checkpoint.dense import DenseParameters, RecisDense
from dist_export.checkpoint.extra_state import rebuild
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.common import PlainDense
from dist_export.checkpoint.tensors.torch_save import TorchReader
from dist_export.dense.load_state import load_dense_parameters
from dist_export.dense.own_parameters import put_values
from dist_export.errors import ModelError
from dist_export.storage.urls import open_directory
from tests.support.dcp_writer import change_metadata, save


class Scaled(nn.Module):
    """A layer whose scale is no parameter and no buffer."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Foreign:
    """What no reader of plain data takes."""


STATES: dict[str, Any] = {
    "number": 3,
    "none": None,
    "text": "amax",
    "tensor": torch.arange(6.0).reshape(2, 3),
    "dict": {"scale": torch.tensor([2.0, 3.0]), "steps": 7, "names": ["a", "b"]},
    "nested": {"fwd": {"amax": torch.ones(2, 2), "k": {"x": 1}}, "list": [torch.zeros(1), {"y": 2.5}, "s"]},
    "dots": {"a.b": 1, "a": {"c.d": torch.ones(1)}},
    "list": [torch.ones(2), 5],
    "inner name": {"_extra_state": 4, "scale": 1},
}


def write(kind: str, path: Path, state: dict[str, Any]) -> DenseParameters:
    path.mkdir()
    if kind == "recis":
        torch.save(state, path / "model.pt")
        return RecisDense(open_directory(str(path)))
    if kind == "torch":
        torch.save({"state_dict": state, "epoch": 3}, path / "ck.pt")
        return PlainDense(open_directory(str(path)), TorchReader, TensorSettings())
    save(path, {"model": state} if kind == "dcp below a key" else state)
    return DcpDense(open_directory(str(path)))


KINDS = ["recis", "torch", "dcp", "dcp below a key"]


def load(net: nn.Module, parameters: DenseParameters, **settings: Any) -> tuple[str, ...]:
    settings = {"allow_missing": (), "dense_model_name": "dense_arch", **settings}
    return load_dense_parameters(net, parameters.load(), where=parameters.where, **settings)


def state_of(net: nn.Module) -> dict[str, Any]:
    return {f"dense_arch.{name}": value for name, value in net.state_dict().items()}


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_the_module_gets_what_the_checkpoint_holds(kind: str, state: str, tmp_path: Path) -> None:
    trained = nn.ModuleDict({"norm": Scaled(STATES[state]), "out": nn.Linear(2, 1)})
    fresh = nn.ModuleDict({"norm": Scaled("fresh"), "out": nn.Linear(2, 1)})
    assert load(fresh, write(kind, tmp_path / "ck", state_of(trained))) == ()
    assert equal(fresh["norm"].state, STATES[state])
    assert torch.equal(fresh["norm"].linear.weight, trained["norm"].linear.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_extra_state_of_the_dense_arch_itself(kind: str, tmp_path: Path) -> None:
    fresh = Scaled("fresh")
    load(fresh, write(kind, tmp_path / "ck", state_of(Scaled({"scale": torch.ones(2)}))))
    assert torch.equal(fresh.state["scale"], torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", [{"it": Foreign()}, io.BytesIO(b"123")], ids=["an object", "bytes"])
def test_what_cannot_be_read_is_there_and_not_called_missing(kind: str, state: Any, tmp_path: Path) -> None:
    parameters = write(kind, tmp_path / "ck", state_of(nn.ModuleDict({"norm": Scaled(state)})))
    fresh = nn.ModuleDict({"norm": Scaled("fresh")})
    with pytest.raises(
        ModelError, match=r"norm\._extra_state is in the checkpoint and cannot be taken: .*(Foreign|BytesIO)"
    ):
        load(fresh, parameters)
    (note,) = load(fresh, parameters, allow_missing=["*_extra_state"])
    assert "norm._extra_state" in note
    assert fresh["norm"].state == "fresh"


@pytest.mark.parametrize("kind", KINDS)
def test_extra_state_that_the_file_lacks_is_missing(kind: str, tmp_path: Path) -> None:
    state = state_of(nn.ModuleDict({"norm": Scaled(1)}))
    del state["dense_arch.norm._extra_state"]
    with pytest.raises(ModelError, match=r"missing: norm\._extra_state \(allow_missing_dense"):
        load(nn.ModuleDict({"norm": Scaled("fresh")}), write(kind, tmp_path / "ck", state))


@pytest.mark.parametrize("kind", KINDS)
def test_extra_state_that_the_dense_arch_lacks_is_unexpected_under_its_own_name(kind: str, tmp_path: Path) -> None:
    parameters = write(kind, tmp_path / "ck", state_of(nn.ModuleDict({"norm": Scaled(STATES["dict"])})))
    other = nn.ModuleDict({"norm": nn.ModuleDict({"linear": nn.Linear(2, 2)})})
    with pytest.raises(ModelError, match=r"unexpected under 'dense_arch\.': norm\._extra_state \("):
        load(other, parameters)
    (note,) = load(other, parameters, allow_unexpected=["norm._extra*"])
    assert note.endswith("left out: norm._extra_state")


def test_a_module_that_refuses_its_state_is_one_line(tmp_path: Path) -> None:
    class Picky(Scaled):
        def set_extra_state(self, state: Any) -> None:
            raise KeyError("amax")

    with pytest.raises(ModelError, match=r"set_extra_state does not take .*_extra_state.*KeyError: 'amax'"):
        load(Picky(0), write("dcp", tmp_path / "ck", state_of(Scaled({"a": 1}))))


def test_keys_that_dcp_made_text_are_not_guessed(tmp_path: Path) -> None:
    parameters = write("dcp", tmp_path / "ck", state_of(Scaled({0: torch.ones(1), 1: torch.ones(2)})))
    with pytest.raises(ModelError, match=r"_extra_state is in the checkpoint and cannot be taken: .*were numbers"):
        load(Scaled("fresh"), parameters)


def test_without_planner_data_parts_are_not_guessed(tmp_path: Path) -> None:
    parameters = write("dcp", tmp_path / "ck", state_of(Scaled(STATES["dict"])))
    change_metadata(tmp_path / "ck", lambda metadata: setattr(metadata, "planner_data", None))
    with pytest.raises(ModelError, match=r"cannot be taken: it was taken apart"):
        load(Scaled("fresh"), parameters)


def test_without_planner_data_a_state_in_one_piece_is_taken(tmp_path: Path) -> None:
    parameters = write("dcp", tmp_path / "ck", state_of(Scaled(5)))
    change_metadata(tmp_path / "ck", lambda metadata: setattr(metadata, "planner_data", None))
    fresh = Scaled("fresh")
    load(fresh, parameters)
    assert fresh.state == 5


@pytest.mark.parametrize(
    "leaves",
    [
        [((), 1), (("a",), 2)],
        [(("a",), 1), ((), 2)],
        [(("a",), 1), (("a", "b"), 2)],
        [((0,), 1), ((2,), 2)],
        [(("a",), 1), (("a",), 2)],
    ],
)
def test_leaves_that_do_not_fit_are_refused(leaves: list[tuple[tuple[Any, ...], Any]]) -> None:
    with pytest.raises(ValueError):
        rebuild(leaves)


def test_a_dict_that_was_one_value_stays_closed() -> None:
    with pytest.raises(ValueError):
        rebuild([((), {"a": 1}), (("b",), 2)])
    assert rebuild([(("x",), {"0": 1})]) == {"x": {"0": 1}}


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_the_reference_has_the_extra_state_that_the_program_has(taken: bool, tmp_path: Path) -> None:
    trained = nn.ModuleDict({"norm": Scaled(4 if taken else Foreign())})
    parameters = write("recis", tmp_path / "ck", state_of(trained))
    own = nn.ModuleDict({"norm": Scaled("own")})
    put_values(own, parameters.load(), dense_model_name="dense_arch")
    assert own["norm"].state == (4 if taken else "own")
    assert torch.equal(own["norm"].linear.weight, trained["norm"].linear.weight)
