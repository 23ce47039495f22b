"""What a file of ``torch.save`` holds: parameters by name and place, and what stands beside them. Reads no payload.

Source: the files that torch's own ``save`` writes since 1.6, each a zip. A state_dict, or a dict with one under a key such
as ``state_dict``; optimizer state is known by its two members ``state`` and ``param_groups``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dist_export.checkpoint.dcp_items import Item, open_range
from dist_export.checkpoint.payload import STATE, OtherTensor, other_tensor
from dist_export.checkpoint.row_layout import Piece
from dist_export.checkpoint.state_archive import StateArchive, check_state_archive
from dist_export.checkpoint.torch_pickle import PickledTensor, as_tensor, itemsize_of, load_archive
from dist_export.errors import CheckpointError
from dist_export.layout.strict_json import is_text
from dist_export.pickle_machine import PickleError
from dist_export.readers import RangeReader

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""What training loops call the model in what they save; the first part of a parameter's name is then not of the model."""

NOT_OF_MODEL = "not of the model"

_MAX_DEPTH = 32
_MAX_NAME = 4_096
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Begins what torch wrote before 1.6."""


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
    rest: tuple[OtherTensor, ...] = ()
    """Tensors that are not read: what is no plain tensor, is not of the model, or is optimizer state by number."""


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
    root, archive = _load_without_payload(reader, size)
    if not isinstance(root, Mapping):
        raise CheckpointError(f"{where} holds a {type(root).__name__}, expected a state_dict or a dict that has one")
    most = len(archive.pickled)  # each member takes a byte at least, where it does not lie in several places
    model, beside, notes = _find_model(root, where, most)
    members = _Members(where, most)
    tensors: list[Located] = []
    seen: set[str] = set()
    left_out: list[str] = []
    rest: list[OtherTensor] = []
    for name, tensor in members.walk(model):
        if name in seen:
            raise CheckpointError(f"{where} holds two tensors called {name!r}; rename one of them")
        seen.add(name)
        if tensor.reason:
            left_out.append(f"{name} ({tensor.reason})")
            rest.append(other_tensor(name, tensor.dtype, tensor.shape, tensor.reason))
            continue
        item = _place_of(tensor, archive)
        piece = Piece((0,) * len(tensor.shape), tensor.shape, number, item.offset, item.strides)
        tensors.append(Located(name, tensor.dtype, piece))
    rest += [tensor for its in beside.values() for tensor in its]
    rest += _list_numbered(members, where, most)
    if members.numbered:
        told = ", ".join(path or "the file itself" for path in members.numbered)
        notes.append(f"optimizer state by number ({told}) belongs to no table and is not read")
    if left_out:
        notes.append(f"no plain tensors, and left out: {', '.join(left_out)}")
    return TorchFile(tuple(tensors), tuple(f"{where}: {note}" for note in notes), tuple(rest))


def _list_beside(key: str, value: Any, where: str, most: int) -> list[OtherTensor]:
    """Return what lies beside the model under a key."""
    members = _Members(where, most)
    found = [
        other_tensor(name, tensor.dtype, tensor.shape, NOT_OF_MODEL) for name, tensor in members.walk({key: value})
    ]
    return [*found, *_list_numbered(members, where, most)]


def _list_numbered(members: _Members, where: str, most: int) -> list[OtherTensor]:
    """Return the tensors of optimizers whose state goes by number."""
    states = {f"{path}.state".lstrip("."): state for path, state in members.numbered.items()}
    found = _Members(where, most, is_all=True).walk(states)
    return [other_tensor(name, tensor.dtype, tensor.shape, STATE) for name, tensor in found]


def _load_without_payload(reader: RangeReader, size: int) -> tuple[Any, StateArchive]:
    """Return what the file holds, with tensors that know no more than their place, and what the zip says."""
    where = reader.where
    archive = check_state_archive(open_range(reader, 0, size), where=where)
    if archive.is_big_endian:
        raise CheckpointError(f"{where} was written on a machine of big-endian bytes; save it again on another one")
    try:
        return load_archive(archive), archive
    except PickleError as error:
        raise CheckpointError(
            f"{where} cannot be read (torch.load with weights_only=True): {error}. Save the state_dict alone"
        ) from None


def _place_of(tensor: PickledTensor, archive: StateArchive) -> Item:
    itemsize = itemsize_of(tensor.dtype)
    begin = archive.storages[tensor.storage.key][0] if tensor.storage is not None else 0
    return Item(begin + tensor.first * itemsize, tuple(stride * itemsize for stride in tensor.strides))


def _find_model(
    root: Mapping[Any, Any], where: str, most: int
) -> tuple[dict[str, Any], dict[str, list[OtherTensor]], list[str]]:
    """Return what holds the parameters and named optimizer state, by the begin of their names; what else does; and notes."""
    keys = [
        key for key in MODEL_KEYS if isinstance(root.get(key), Mapping) and root[key] and not _is_optimizer(root[key])
    ]
    if len(keys) != 1:
        return {"": root}, {}, []
    states = {key: value for key, value in root.items() if isinstance(key, str) and _is_optimizer(value)}
    others = {str(key): value for key, value in root.items() if key != keys[0] and key not in states}
    beside = {key: _list_beside(key, value, where, most) for key, value in others.items()}
    told = [key for key, its in beside.items() if any(tensor.kind == NOT_OF_MODEL for tensor in its)]
    notes = [f"the model is what {keys[0]!r} holds; left out: {', '.join(told)}"] if told else []
    return {"": root[keys[0]], **states}, beside, notes


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("state"), Mapping) and "param_groups" in value


class _Members:
    """Walks through nested dicts and lists. What lies in many places is walked through as often, up to a limit."""

    def __init__(self, where: str, most: int, *, is_all: bool = False) -> None:
        """``is_all``: tensors are listed whatever they are of; else optimizer state by number is put apart."""
        self._where = where
        self._left = most
        self._is_all = is_all
        self.numbered: dict[str, Any] = {}
        """Path of an optimizer -> its state, where that goes by number."""

    def walk(self, roots: Mapping[str, Any]) -> Iterator[tuple[str, PickledTensor]]:
        for prefix, value in roots.items():
            yield from self._walk(prefix, value, _MAX_DEPTH)

    def _walk(self, path: str, value: Any, depth: int) -> Iterator[tuple[str, PickledTensor]]:
        self._left -= 1
        if not depth or self._left < 0:
            raise CheckpointError(f"{self._where}: what {path!r:.200} holds is nested too deeply, or without end")
        tensor = as_tensor(value)
        if tensor is not None:
            if not self._is_all and (not path or not is_text(path)):
                raise CheckpointError(
                    f"{self._where} holds a tensor called {path!r}; a table or parameter needs a name"
                )
            yield path, tensor
        elif _is_optimizer(value) and not self._is_all:
            if all(isinstance(key, str) for key in value["state"]):
                yield from self._walk(f"{path}.state".lstrip("."), value["state"], depth - 1)
            else:
                self.numbered[path] = value["state"]
        elif type(value) in (dict, list, tuple):
            for key, member in value.items() if type(value) is dict else enumerate(value):
                if isinstance(key, (str, int)) and not isinstance(member, (str, int, float, type(None))):
                    yield from self._walk(self._join(path, key), member, depth - 1)

    def _join(self, path: str, key: str | int) -> str:
        joined = f"{path}.{key}" if path else str(key)
        if len(joined) > _MAX_NAME:
            raise CheckpointError(f"{self._where} holds a name of more than {_MAX_NAME:,} characters: {joined!r:.200}")
        return joined
