"""A tensor that cannot be read stops only an export that needs it, and the reason is told wherever it is missed."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.checkpoint.extra_state import UntakenState
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.errors import UserError
from dist_export.inspect.describe import describe, render
from tests.support import dcp_writer, exports
from tests.support.plain_cases import dense_of, read_numbered
from tests.support.sparse_cases import export

TABLE = torch.arange(24.0).reshape(6, 4)
FLOAT8 = torch.tensor([[1.5, -2.0], [0.25, 4.0]]).to(torch.float8_e4m3fn)


class Marked(torch.Tensor):
    """A tensor of a class of the trainer's own."""


def quiet(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized, sparse and nested tensors are announced as old or new
        return make()


ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8), "quantized"),
    "by channel": (
        lambda: torch.quantize_per_channel(torch.ones(3, 4), torch.ones(3), torch.zeros(3), 0, torch.quint8),
        "quantized",
    ),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested"),
    "subclass": (lambda: torch.ones(3, 4).as_subclass(Marked), "a Marked"),
    "conjugated": (lambda: torch.ones(3, 4, dtype=torch.complex64).conj(), "conjugated"),
    "negated": (lambda: torch.ones(3, 4, dtype=torch.complex64).conj().imag, "negated"),
    "meta": (lambda: torch.ones(3, 4, device="meta"), "on the meta device"),
}


def write_foreign(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """Write a safetensors file of any dtypes: name -> dtype, shape, content."""
    header, position = {}, 0
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    text = json.dumps(header).encode()
    path.mkdir()
    content = b"".join(raw for _, _, raw in tensors.values())
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def save_odd(path: Path, name: str, tensor: torch.Tensor) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"model": {"emb.weight": TABLE, name: tensor, "dense.b": torch.ones(2)}}, path)
    return path


@pytest.mark.parametrize("case", ODD)
def test_an_odd_tensor_of_torch_save_is_no_obstacle(case: str, tmp_path: Path) -> None:
    """The table and the other parameters are exported; the note and ``inspect`` have the reason; a table of it is refused."""
    make, reason = ODD[case]
    source = save_odd(tmp_path / "ckpt.pt", "dense.odd", quiet(make))
    manifest = export(source, tmp_path / "out", treat_as_tables=["emb.weight"])
    assert torch.equal(read_numbered(tmp_path / "out")["emb.weight"], TABLE)
    assert any("not read: dense.odd" in note and reason in note for note in manifest.notes)
    found = describe(str(source), settings=TensorSettings(("emb.weight",)))
    assert [its["name"] for its in found["skipped"]] == ["dense.odd"]
    assert any("not read   dense.odd" in line and reason in line for line in render(found))
    with pytest.raises(UserError, match=f"the table 'dense.odd' cannot be exported: it is .*{reason}"):
        export(source, tmp_path / "other", treat_as_tables=["emb.weight", "dense.o*"])
    loaded = dense_of(source, ["emb.weight"]).load()
    assert isinstance(loaded["dense.odd"], UntakenState)
    assert torch.equal(loaded["dense.b"], torch.ones(2))


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"emb": self.emb(batch["ids"])}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.mlp(blocks["emb"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Sparse()
        self.dense_arch = Dense()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(batch))


@pytest.mark.parametrize("needed", [True, False])
def test_the_reason_is_in_the_error_where_the_dense_arch_needs_the_tensor(needed: bool, tmp_path: Path) -> None:
    """One that only the checkpoint has is nobody's wish, though it lies below the dense arch."""
    state = dict(Model().state_dict())
    name = "dense_arch.mlp.weight" if needed else "dense_arch.calibration"
    state[name] = quiet(lambda: torch.quantize_per_tensor(torch.ones(1, 4), 0.1, 0, torch.qint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(state, tmp_path / "ckpt.pt")
    exporter = exports.exporter(
        Model(),
        "sparse_arch",
        "dense_arch",
        [{"ids": torch.tensor([0, 5])}],
        tmp_path / "ckpt.pt",
        tmp_path / "out",
        filter_sparse_opt=True,
        treat_as_tables=["sparse_arch.emb.weight"],
        progress=False,
    )
    if not needed:
        assert any("not read: dense_arch.calibration" in note for note in exporter.export().notes)
        return
    with pytest.raises(UserError, match=r"mlp.weight is in the checkpoint and cannot be taken: it is quantized"):
        exporter.export()
    assert not (tmp_path / "out").exists()


def test_float8_of_dcp_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    """It was called an attack. Values are those that torch saved; a table of it is refused with its dtype."""
    packed = torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    state = {"model": {"emb.weight": TABLE, "mlp.w": FLOAT8, "mlp.packed": packed}}
    source = dcp_writer.save(tmp_path / "ckpt", state)
    export(source, tmp_path / "out", treat_as_tables=["emb.weight"])
    assert torch.equal(read_numbered(tmp_path / "out")["emb.weight"], TABLE)
    loaded = dense_of(source, ["emb.weight"]).load()
    assert loaded["mlp.w"].dtype == torch.float8_e4m3fn
    assert torch.equal(loaded["mlp.w"].float(), FLOAT8.float())
    with pytest.raises(UserError, match=r"'model.mlp.w' is of float8_e4m3fn, which no package can hold"):
        export(source, tmp_path / "other", treat_as_tables=["mlp.w"])


def test_a_dtype_of_dcp_that_torch_may_have_one_day_is_no_obstacle(tmp_path: Path) -> None:
    """Its name alone is known. Another name of torch's is no dtype, and refused as before."""
    source = dcp_writer.save(tmp_path / "ckpt", {"model": {"emb.weight": TABLE, "mlp.w": FLOAT8}})
    metadata = source / ".metadata"
    raw = metadata.read_bytes()
    metadata.write_bytes(raw.replace(b"float8_e4m3fn", b"float9_e4m3fn"))
    manifest = export(source, tmp_path / "out", treat_as_tables=["emb.weight"])
    assert any("not read: mlp.w: of dtype float9_e4m3fn, which is not read" in note for note in manifest.notes)
    with pytest.raises(UserError, match="float9_e4m3fn, which no package can hold"):
        export(source, tmp_path / "other", treat_as_tables=["mlp.w"])
    metadata.write_bytes(raw.replace(b"float8_e4m3fn", b"load_e4m3fn_x"))
    with pytest.raises(UserError, match=r"names torch.load_e4m3fn_x"):
        export(source, tmp_path / "other", treat_as_tables=["emb.weight"])


def test_dtypes_of_safetensors_that_nobody_asked_for_are_no_obstacle(tmp_path: Path) -> None:
    """Known ones are read, packed and unknown ones are skipped; a size that a known dtype cannot have is refused."""
    tensors: dict[str, tuple[str, list[int], bytes]] = {
        "emb.weight": ("F32", [6, 4], TABLE.numpy().tobytes()),
        "a.e8m0": ("F8_E8M0", [2, 2], b"\x7f\x80\x81\x82"),
        "a.f8": ("F8_E4M3", [2, 2], FLOAT8.view(torch.uint8).numpy().tobytes()),
        "a.f4": ("F4", [2, 2], b"\x12\x34"),
        "a.f6": ("F6_E2M3", [4], b"\x01\x02\x03"),
        "a.later": ("F9_X", [2, 2], b"\x12\x34\x56"),
    }
    source = write_foreign(tmp_path / "ckpt", tensors)
    manifest = export(source, tmp_path / "out", treat_as_tables=["emb.weight"])
    assert torch.equal(read_numbered(tmp_path / "out")["emb.weight"], TABLE)
    assert {"a.f4", "a.f6", "a.later"} == {
        name for name in tensors if any(f"not read: {name}: of dtype" in note for note in manifest.notes)
    }
    loaded = dense_of(source, ["emb.weight"]).load()
    assert torch.equal(loaded["a.f8"].float(), FLOAT8.float())
    assert loaded["a.e8m0"].dtype == torch.float8_e8m0fnu
    with pytest.raises(
        UserError, match=r"the table 'a.later' cannot be exported: it is of dtype F9_X, which is not read"
    ):
        export(source, tmp_path / "other", treat_as_tables=["emb.weight", "a.later"])
    short = write_foreign(tmp_path / "short", {**tensors, "a.f4": ("F4", [2, 2], b"\x12\x34\x56")})
    with pytest.raises(UserError, match=r"'a.f4' is F4 \[2, 2\], 2 bytes, but its data_offsets span 3"):
        export(short, tmp_path / "other", treat_as_tables=["emb.weight"])


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A device mesh of this process alone: the class of its tensors is what tells that they are shards."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("num_files", [1, 2])
def test_files_of_one_ranks_shards_are_told(num_files: int, mesh: Any, tmp_path: Path) -> None:
    """Each file has a part of each table, and none says so but by the class of its tensors."""
    from torch.distributed.tensor import Shard, distribute_tensor

    sharded = distribute_tensor(torch.ones(10, 4), mesh, [Shard(0)])
    (tmp_path / "ckpt").mkdir()
    for rank in range(num_files):
        torch.save({"user.weight": sharded, "step": 3}, tmp_path / "ckpt" / f"rank{rank}.pt")
    with pytest.raises(
        UserError,
        match=r"'user.weight'.* a DTensor, of which the file holds one rank's shards; save with torch.distributed.checkpoint",
    ):
        export(tmp_path / "ckpt", tmp_path / "out", treat_as_tables=["user.weight"])
    assert not (tmp_path / "out").exists()
