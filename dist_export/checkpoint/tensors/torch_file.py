"""What a file of ``torch.save`` holds: parameters by name and place, and what stands beside them. Reads no payload.

Source: the files that torch's own ``save`` writes since 1.6, each a zip. A state_dict, or a dict with one under a key such
as ``state_dict``; optimizer state is known by its two members ``state`` and ``param_groups``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dist_export.checkpoint.extra_state import UnreadableError, UntakenState
from dist_export.checkpoint.payload import STATE, OtherTensor, other_tensor
from dist_export.checkpoint.raw_ids import Piece
from dist_export.checkpoint.tensors.extra_state import holds_foreign_objects, list_extra_states, make_extra_state
from dist_export.checkpoint.torch_items import Item, open_range
from dist_export.errors import CheckpointError
from dist_export.formats.pickle_values import PickleError, Record
from dist_export.formats.pickled_tensor import PickledTensor, itemsize_of
from dist_export.formats.strict_json import is_text
from dist_export.formats.torch_pickle import as_array, as_tensor, load_archive
from dist_export.formats.torch_zip import StateArchive, check_state_archive
from dist_export.humanize import amount, count, few
from dist_export.storage.range_reader import RangeReader

_MAX_DEPTH = 32
_MAX_NAME = 4_096
_ARRAY = "stored as an array of numpy"
_ODD_KEY = "below a key that is neither a text nor a number"
_NO_TENSOR = "a storage of no tensor that is found"
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Begins what torch wrote before 1.6."""


class Located(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: str
    """Torch's name."""
    piece: Piece
    """Of no place where the tensor cannot be read."""
    path: tuple[str, ...]
    """The keys that lead to it."""
    reason: str
    """Why it cannot be read; empty where it can."""


class TorchFile(NamedTuple):
    """What one file holds."""

    tensors: tuple[Located, ...]
    notes: tuple[str, ...]
    """What is left out, each a sentence."""
    rest: tuple[OtherTensor, ...] = ()
    """Tensors that are not read: what is no plain tensor, is not of the model, or is optimizer state by number."""
    extra: tuple[tuple[str, ...], ...] = ()
    """Keys that lead to the extra state of modules, where that is no single tensor."""


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
    if not isinstance(root, Mapping) and not _is_list_of_states(root):
        raise CheckpointError(
            f"{where} holds {_say_kind(root)}, expected a state_dict or a dict that has one; save the state_dict"
        )
    most = len(archive.pickled)  # each member takes a byte at least, where it does not lie in several places
    members = _Members(where, most)
    tensors: list[Located] = []
    seen: set[str] = set()
    for path, tensor in members.walk(root):
        name = ".".join(path)
        if name in seen:
            raise CheckpointError(f"{where} holds two tensors called {name!r}; rename one of them")
        seen.add(name)
        item = Item(0, (0,) * len(tensor.shape)) if tensor.reason else _place_of(tensor, archive)
        piece = Piece((0,) * len(tensor.shape), tensor.shape, number, item.offset, item.strides)
        tensors.append(Located(name, tensor.dtype, piece, path, tensor.reason))
    notes = []
    if members.states_by_number:
        told = ", ".join(path or "the file itself" for path in members.states_by_number)
        notes.append(f"optimizer state by number ({told}) belongs to no table and is not read")
    of_optimizers, further = _list_of_optimizers(members, where, most)
    odd = (*members.odd, *further)
    by_reason: dict[str, list[str]] = {}
    for its in odd:
        by_reason.setdefault(its.kind, []).append(its.name)
    notes += [f"not read: {few(names)}: {why}" for why, names in by_reason.items()]
    is_known = "" not in members.storages
    lost = {k: n for k, (_, n) in archive.storages.items() if is_known and n and k not in members.storages}
    if lost:
        told = f"{amount(sum(lost.values()))} in {count(len(lost), 'storage')}"
        notes.append(
            f"{told} of the file are of no tensor that is found: they are in objects that are not read, or in none"
        )
    rest = (
        *of_optimizers,
        *odd,
        *(OtherTensor(f"{archive.root}data/{key}", "", (n,), n, _NO_TENSOR) for key, n in lost.items()),
    )
    return TorchFile(tuple(tensors), tuple(f"{where}: {note}" for note in notes), rest, tuple(list_extra_states(root)))


def read_extra_states(
    reader: RangeReader, size: int, make_tensor: Callable[[str, tuple[int, ...], Item], Any]
) -> dict[tuple[str, ...], Any]:
    """Return the extra state of modules in an open file, by the keys that lead to it; of one that is not read, why.

    ``make_tensor`` returns the tensor of a dtype (torch's name) and shape that lies at a place.
    """
    root, archive = _load_without_payload(reader, size)

    def make(tensor: PickledTensor) -> Any:
        return make_tensor(tensor.dtype, tensor.shape, _place_of(tensor, archive))

    found: dict[tuple[str, ...], Any] = {}
    for path, value in list_extra_states(root).items():
        try:
            found[path] = make_extra_state(value, make)
        except UnreadableError as error:
            found[path] = UntakenState(str(error))
    return found


def _list_of_optimizers(members: _Members, where: str, most: int) -> tuple[list[OtherTensor], list[OtherTensor]]:
    """Return the tensors of optimizers that no table can have, and what is odd there.

    That is state by number, and what is in ``param_groups``.
    """
    states = {f"{path}.state".lstrip("."): state for path, state in members.states_by_number.items()}
    every = _Members(where, most, is_all=True, storages=members.storages)
    found = [*every.walk(states), *every.walk(members.groups)]
    return [other_tensor(".".join(path), tensor.dtype, tensor.shape, STATE) for path, tensor in found], every.odd


def _is_list_of_states(root: Any) -> bool:
    return isinstance(root, (list, tuple)) and any(isinstance(member, Mapping) for member in root)


def _say_kind(root: Any) -> str:
    """Return what a file holds that holds no state, for people."""
    if not isinstance(root, (list, tuple)):
        return f"a {type(root).__name__}"
    kinds = sorted({type(member).__name__ for member in root})
    return f"a {type(root).__name__} of {len(root)} ({', '.join(kinds[:4]) or 'nothing'})"


def _load_without_payload(reader: RangeReader, size: int) -> tuple[Any, StateArchive]:
    """Return what the file holds, with tensors that know no more than their place, and what the zip says."""
    where = reader.where
    archive = check_state_archive(open_range(reader, 0, size), where=where)
    if archive.is_big_endian:
        raise CheckpointError(f"{where} was written on a machine of big-endian bytes; save it again on another one")
    try:
        return load_archive(archive), archive
    except PickleError as error:
        refusal = CheckpointError(
            f"{where} cannot be read (torch.load with weights_only=True): {error}. Save the state_dict alone"
        )
    foreign: set[str] = set()
    try:
        root = load_archive(archive, is_any_known=True, foreign=foreign)
    except PickleError:
        raise refusal from None
    if not foreign or not isinstance(root, Mapping) or holds_foreign_objects(root, foreign):
        raise refusal
    return root, archive


def _place_of(tensor: PickledTensor, archive: StateArchive) -> Item:
    itemsize = itemsize_of(tensor.dtype)
    begin = archive.storages[tensor.storage.key][0] if tensor.storage is not None else 0
    return Item(begin + tensor.first * itemsize, tuple(stride * itemsize for stride in tensor.strides))


def _say_key(key: Any) -> str:
    """Return a key that is neither text nor number, for people."""
    parts = key if isinstance(key, tuple) else (key,)
    is_plain = all(part is None or isinstance(part, (str, bytes, int, float)) for part in parts)
    return f"{key!r:.200}" if is_plain else f"a {type(key).__name__}"


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("state"), Mapping) and "param_groups" in value


def _members_of(value: Any) -> list[tuple[str, Any]]:
    """Return what a container or an object of a pickle holds, by name; what an object was made of has numbers."""
    if type(value) is Record:
        own = value.state if type(value.state) is dict else {} if value.state is None else {"state": value.state}
        found = [*enumerate(value.arguments), *own.items()]
    else:
        found = [*value.items()] if type(value) is dict else [*enumerate(value)]
    return [(str(key) if isinstance(key, (str, int)) else _say_key(key), member) for key, member in found]


class _Members:
    """Walks through nested dicts and lists. What lies in many places is walked through as often, up to a limit."""

    def __init__(self, where: str, most: int, *, is_all: bool = False, storages: set[str] | None = None) -> None:
        """``is_all``: tensors are listed whatever they are of; else optimizer state by number is put apart."""
        self._where = where
        self._left = most
        self._is_all = is_all
        self.states_by_number: dict[str, Any] = {}
        """Path of an optimizer -> its state, where that goes by number."""
        self.groups: dict[str, Any] = {}
        """Path of an optimizer's ``param_groups`` -> these: a learning rate may be a tensor."""
        self.storages: set[str] = set() if storages is None else storages
        """Keys of the storages that tensors lie in; an empty one where a tensor cannot be read, which tells no storage."""
        self.odd: list[OtherTensor] = []
        """Arrays of numpy, tensors below keys that make no name, and what is in objects; each with the reason."""
        self._objects: set[int] = set()

    def walk(self, root: Any) -> Iterator[tuple[tuple[str, ...], PickledTensor]]:
        """Yield the keys that lead to a tensor, and the tensor."""
        yield from self._walk((), root)

    def _walk(self, path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], PickledTensor]]:
        self._left -= 1
        if len(path) > _MAX_DEPTH or self._left < 0:
            raise CheckpointError(
                f"{self._where}: what {'.'.join(path)!r:.200} holds is nested too deeply, or without end"
                "; save the state_dict alone"
            )
        tensor, array = as_tensor(value), as_array(value)
        if array is not None:
            shape, num_bytes = array
            self.odd.append(OtherTensor(".".join(path), "", shape, num_bytes, _ARRAY))
        elif tensor is not None:
            self.storages.add("" if tensor.storage is None else tensor.storage.key)
            name = ".".join(path)
            if not self._is_all and (not name or not is_text(name)):
                raise CheckpointError(
                    f"{self._where} holds a tensor called {name!r}; a table or parameter needs a name"
                    "; save the state_dict, whose tensors have names"
                )
            yield path, tensor
        elif _is_optimizer(value) and not self._is_all:
            self.groups[".".join(self._join(path, "param_groups"))] = value["param_groups"]
            if all(isinstance(key, str) for key in value["state"]):
                yield from self._walk((*path, "state"), value["state"])
            else:
                self.states_by_number[".".join(path)] = value["state"]
            yield from self._walk(
                path, {key: its for key, its in value.items() if key not in ("state", "param_groups")}
            )
        elif type(value) is Record:
            self._look_into(path, value)
        elif type(value) in (dict, list, tuple):
            for key, member in value.items() if type(value) is dict else enumerate(value):
                if isinstance(member, (str, int, float, type(None))):
                    continue
                if isinstance(key, (str, int)):
                    yield from self._walk(self._join(path, key), member)
                else:
                    for below, found in self._walk(self._join(path, _say_key(key)), member):
                        self.odd.append(other_tensor(".".join(below), found.dtype, found.shape, _ODD_KEY))

    def _look_into(self, path: tuple[str, ...], record: Record) -> None:
        """Note the tensors and arrays in an object, which may refer to itself: each counts once. None of them is read."""
        reason = f"in an object of {record.kind.removeprefix('builtins.')}"
        waiting: list[tuple[tuple[str, ...], Any]] = [(path, record)]
        while waiting:
            where, value = waiting.pop()
            tensor, array = as_tensor(value), as_array(value)
            name = ".".join(where)[:_MAX_NAME]
            if tensor is not None:
                self.storages.add("" if tensor.storage is None else tensor.storage.key)
                self.odd.append(other_tensor(name, tensor.dtype, tensor.shape, reason))
            elif array is not None:
                self.odd.append(OtherTensor(name, "", *array, reason))
            elif type(value) in (Record, dict, list, tuple) and id(value) not in self._objects:
                self._objects.add(id(value))
                members = _members_of(value)
                waiting += [((*where, key), its) for key, its in reversed(members)]

    def _join(self, path: tuple[str, ...], key: str | int) -> tuple[str, ...]:
        joined = (*path, str(key))
        if sum(map(len, joined)) + len(path) > _MAX_NAME:
            raise CheckpointError(
                f"{self._where} holds a name of more than {_MAX_NAME:,} characters: {'.'.join(joined)!r:.200}"
                "; save the state_dict alone"
            )
        return joined
