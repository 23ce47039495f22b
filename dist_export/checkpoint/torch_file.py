"""What a file of ``torch.save`` holds: parameters by name and place, and what stands beside them. Reads no payload.

Source: the files that torch's own ``save`` writes since 1.6, each a zip. A state_dict, or a dict with one under a key such
as ``state_dict``; optimizer state is known by its two members ``state`` and ``param_groups``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dist_export.checkpoint.dcp_items import Item, open_range
from dist_export.checkpoint.extra_state import Inert
from dist_export.checkpoint.row_layout import Piece
from dist_export.checkpoint.state_archive import check_state_archive, say_refusal
from dist_export.errors import CheckpointError
from dist_export.layout.strict_json import is_text
from dist_export.readers import RangeReader

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""What training loops call the model in what they save; the first part of a parameter's name is then not of the model."""

_MAX_DEPTH = 32
_MAX_MEMBERS = 10_000_000
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Begins what torch wrote before 1.6."""


_HARMLESS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath"),
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta")),
)
"""What training loops keep beside tensors: the best score, the arguments, the time. None of it is made: see ``Inert``."""


class Located(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: str
    """Torch's name."""
    piece: Piece


class TorchFile(NamedTuple):
    """What one file holds."""

    tensors: tuple[Located, ...]
    notes: tuple[str, ...]
    """What is left out, each a sentence."""


def is_torch_file(head: bytes) -> bool:
    """Whether a file begins (16 bytes) as what ``torch.save`` writes now, or wrote once."""
    return head.startswith((_ZIP, _LEGACY))


def read_torch_file(reader: RangeReader, size: int, number: int) -> TorchFile:
    """Find the tensors in an open file of ``size`` bytes, the ``number``-th of the checkpoint.

    Raises:
        CheckpointError: it is no zip of torch's, is damaged, asks for code, or holds no tensors by name.
    """
    where = reader.where
    head = bytearray(min(size, 16))
    reader.read_into(memoryview(head), 0)
    if not head.startswith(_ZIP):
        what = "is in the format of torch before 1.6" if head.startswith(_LEGACY) else "is no file of torch.save"
        raise CheckpointError(
            f"{where} {what}; expected its zip format: load it with torch.load and write it again with torch.save"
        )
    root = _load_without_payload(reader, size)
    if not isinstance(root, Mapping):
        raise CheckpointError(f"{where} holds a {type(root).__name__}, expected a state_dict or a dict that has one")
    model, notes = _find_model(root, where)
    members = _Members(where)
    tensors: list[Located] = []
    seen: set[str] = set()
    left_out: list[str] = []
    for name, tensor in members.walk(model):
        if name in seen:
            raise CheckpointError(f"{where} holds two tensors called {name!r}; rename one of them")
        seen.add(name)
        reason = _why_not(tensor)
        if reason:
            left_out.append(f"{name} ({reason})")
            continue
        item = _place_of(tensor, size, where=f"{where}: {name!r}")
        shape = tuple(map(int, tensor.shape))
        piece = Piece((0,) * len(shape), shape, number, item.offset, item.strides)
        tensors.append(Located(name, str(tensor.dtype).removeprefix("torch."), piece))
    if members.numbered:
        notes.append(f"optimizer state by number ({', '.join(members.numbered)}) belongs to no table and is not read")
    if left_out:
        notes.append(f"no plain tensors, and left out: {', '.join(left_out)}")
    return TorchFile(tuple(tensors), tuple(f"{where}: {note}" for note in notes))


def _load_without_payload(reader: RangeReader, size: int) -> Any:
    """Return what the file holds, with tensors that know no more than their place."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    where = reader.where
    file = open_range(reader, 0, size)
    if check_state_archive(file, where=where).is_big_endian:
        raise CheckpointError(f"{where} was written on a machine of big-endian bytes; save it again on another one")
    file.seek(0)
    stand_ins: list[Any] = [(Inert, name) for name in _HARMLESS]
    try:
        with warnings.catch_warnings(), FakeTensorMode(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can make torch's reader raise anything
        raise CheckpointError(
            f"{where} cannot be read (torch.load with weights_only=True): {say_refusal(error)}. Save the state_dict alone"
        ) from None


def _place_of(tensor: Any, size: int, *, where: str) -> Item:
    itemsize = tensor.element_size()
    storage = tensor.untyped_storage()
    first = int(tensor.storage_offset())
    last = first + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and (last + 1) * itemsize > storage.nbytes():
        raise CheckpointError(f"{where} reaches beyond the {storage.nbytes():,} bytes that are stored of it")
    offset = int(getattr(storage, "_checkpoint_offset", None) or 0)
    if tensor.numel() and not 0 < offset <= size - storage.nbytes():
        raise CheckpointError(f"{where}: torch.load does not tell where its {storage.nbytes():,} bytes lie")
    return Item(offset + first * itemsize, tuple(int(stride) * itemsize for stride in tensor.stride()))


def _find_model(root: Mapping[Any, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return what holds the parameters and named optimizer state, by the begin of their names, and notes."""
    keys = [
        key for key in MODEL_KEYS if isinstance(root.get(key), Mapping) and root[key] and not _is_optimizer(root[key])
    ]
    if len(keys) != 1:
        return {"": root}, []
    states = {key: value for key, value in root.items() if isinstance(key, str) and _is_optimizer(value)}
    others = {str(key): value for key, value in root.items() if key != keys[0] and key not in states}
    beside = [key for key, value in others.items() if any(True for _ in _Members(where).walk({key: value}))]
    notes = [f"the model is what {keys[0]!r} holds; left out: {', '.join(beside)}"] if beside else []
    return {"": root[keys[0]], **states}, notes


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("state"), Mapping) and "param_groups" in value


def _why_not(tensor: Any) -> str:
    """Return why a tensor is none whose bytes could be taken; empty where they can."""
    import torch

    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return "quantized"
    if hasattr(tensor, "_local_tensor"):
        return "a DTensor, of which the file holds one shard"
    return "conjugated" if tensor.is_conj() or tensor.is_neg() else ""


class _Members:
    """Walks through nested dicts and lists."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = _MAX_MEMBERS
        self.numbered: list[str] = []
        """Optimizers whose state goes by number."""

    def walk(self, roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for prefix, value in roots.items():
            yield from self._walk(prefix, value, _MAX_DEPTH)

    def _walk(self, path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
        import torch

        self._left -= 1
        if not depth or self._left < 0:
            raise CheckpointError(f"{self._where}: what {path!r:.200} holds is nested too deeply, or without end")
        if isinstance(value, torch.Tensor):
            if not path or not is_text(path):
                raise CheckpointError(
                    f"{self._where} holds a tensor called {path!r}; a table or parameter needs a name"
                )
            yield path, value
        elif _is_optimizer(value):
            if all(isinstance(key, str) for key in value["state"]):
                yield from self._walk(f"{path}.state".lstrip("."), dict(value["state"]), depth - 1)
            else:
                self.numbered.append(path or "the file itself")
        elif isinstance(value, Mapping):
            for key, member in value.items():
                if isinstance(key, (str, int)):
                    yield from self._walk(f"{path}.{key}" if path else str(key), member, depth - 1)
        elif isinstance(value, (list, tuple)) and type(value) is not torch.Size:
            for place, member in enumerate(value):
                yield from self._walk(f"{path}.{place}", member, depth - 1)
