"""Extra state of modules in a checkpoint: what ``get_extra_state`` gave, under a name that ends in ``_extra_state``.

Source: torch's ``nn/modules/module.py`` for the name, and ``distributed/checkpoint/_nested_dict.py`` for how DCP takes
dicts and lists apart: each leaf is an item of its own, and ``planner_data`` has the path of keys that leads to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, NamedTuple

from dist_export.errors import CheckpointError
from dist_export.formats.torch_pickle import load_archive
from dist_export.formats.torch_zip import check_state_archive, say_refusal

EXTRA_STATE = "_extra_state"
"""Last element of the name that a state_dict has it under."""


class UntakenState(NamedTuple):
    """Extra state that is in the checkpoint and cannot be read."""

    reason: str


class UnreadableError(Exception):
    """A part of a module's extra state cannot be read; says why."""


class Inert:
    """Stands for an object of a class that is not read, whatever it would be made of."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:  # noqa: D102 -- the class says it
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def is_extra_state(name: str) -> bool:
    """Whether a state_dict has the extra state of a module under this name."""
    return name.rpartition(".")[2] == EXTRA_STATE


def find_extra_state(path: Sequence[Any]) -> int:
    """Return how many keys of ``path`` lead to the extra state that a leaf belongs to; 0 where it belongs to none."""
    for count, key in enumerate(path, 1):
        if isinstance(key, str) and is_extra_state(key):
            return count
    return 0


def rebuild(leaves: Iterable[tuple[Sequence[Any], Any]]) -> Any:
    """Return the nested dicts and lists whose leaves these are, as (path of keys, value), in the order that they were saved.

    An empty path is that of the whole. A dict that was empty has no leaf, so it is lost.

    Raises:
        ValueError: the leaves cannot be put together as they were.
    """
    root: dict[Any, Any] = {}
    for path, value in leaves:
        at, key = root, None
        for step in path:
            at, key = at.setdefault(key, {}), step
            if type(at) is not dict:
                raise ValueError(f"it has a value, and others below it at {list(path)}")
        if key in at:
            raise ValueError(f"it has two values at {list(path)}")
        at[key] = value if type(value) is not dict else _Whole(value)
    return _close(root[None])


class _Whole(NamedTuple):
    """A dict that was one value, so that nothing may be put into it."""

    value: dict[Any, Any]


def _close(value: Any) -> Any:
    """Turn dicts by position into lists."""
    if isinstance(value, _Whole):
        return value.value
    if type(value) is not dict:
        return value
    members = {key: _close(member) for key, member in value.items()}
    if all(type(key) is int for key in members):
        if sorted(members) != list(range(len(members))):
            raise ValueError(f"a list lacks members; it has those at {sorted(members)}")
        return [members[place] for place in range(len(members))]
    if any(type(key) is int or key.lstrip("-").isdecimal() for key in members):
        raise ValueError("DCP saves the keys of a dict as text, so nobody can tell whether they were numbers")
    return members


def load_object(file: IO[bytes], *, where: str) -> Any:
    """Return what a file of ``torch.save`` holds, read with ``weights_only=True``.

    Raises:
        UnreadableError: it holds objects that are not plain data.
        CheckpointError: it is damaged.
    """
    import torch

    try:
        load_archive(check_state_archive(file, where=where), is_any_known=True)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 -- a damaged pickle can make torch's reader raise anything
        raise UnreadableError(f"torch.load with weights_only=True does not read it: {say_refusal(error)}") from None


def load_without_foreign_state(load: Callable[[], Any], file: IO[bytes], refusal: str) -> dict[str, Any] | None:
    """Return a state_dict whose extra state has objects that torch refuses, with :class:`UntakenState` in their place.

    Args:
        load: calls ``torch.load`` with ``weights_only=True``.
        file: the zip that it reads.
        refusal: why it was refused before.

    Returns None where something else than extra state is refused too.
    """
    import torch

    try:
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            state = load()
    except Exception:  # noqa: BLE001 -- the refusal that the caller has says more
        return None
    if not isinstance(state, dict):
        return None
    foreign = {name for name, value in state.items() if not isinstance(value, torch.Tensor) and _holds_inert(value)}
    if not all(isinstance(name, str) and is_extra_state(name) for name in foreign):
        return None
    return {name: UntakenState(refusal) if name in foreign else value for name, value in state.items()}


def _holds_inert(value: Any) -> bool:
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if isinstance(found, Inert):
            return True
        if id(found) not in seen and isinstance(found, (dict, list, tuple, set, frozenset)):
            seen.add(id(found))
            waiting += [*found.keys(), *found.values()] if isinstance(found, dict) else found
    return False
