"""Keys that states are saved under, and what they say: whether a state is a model's, or the copy of one. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""What training loops call the model in what they save; the first part of a parameter's name is then not of the model."""

COLLECTIONS = frozenset({"embedding_bags", "embeddings"})
"""What torchrec's embedding collections call the module that holds their tables."""
COPY_WORDS = frozenset({"ema", "swa", "averaged", "average", "avg", "shadow"})
"""Words in the key of what is a copy of a model."""
STATE_WORDS = frozenset({"model", "module", "state", "dict", "net", "network", "weights", "params", "parameters"})
"""Words in the key of a whole model's state, whatever it is a model of."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SHOWN = 8

Root = tuple[str, ...]
"""Keys of nested dicts, from the outermost."""


class Member(NamedTuple):
    """One tensor of a checkpoint, as far as it matters here."""

    name: str
    path: Root
    """The keys that lead to it; of the name alone where the checkpoint is flat, or does not tell."""
    shape: tuple[int, ...]


def find_roots(members: Iterable[Member]) -> set[Root]:
    """Return the keys that state_dicts were saved under: the names in one have dots, which keys of nested dicts have not.

    Where a state is nested itself, down to its tensors, a key that is a model's or a copy's tells.
    """
    found = set()
    for member in members:
        parent = member.path[:-1]
        is_outermost = len(parent) == 1 and not member.path[-1].isdigit()  # else a list of tensors
        if is_outermost or (parent and "." in member.path[-1]):
            found.add(parent)
    found = {root for root in found if not any("." in key for key in root)}
    for member in members:
        if len(member.path) > 2 and not any(member.path[:length] in found for length in range(1, len(member.path))):
            positions = [n for n, key in enumerate(member.path[:-1], 1) if key in COLLECTIONS or is_state_key(key)]
            found.update(member.path[:place] for place in positions[:1] if member.path[place - 1] not in COLLECTIONS)
    return found


def nested_root(member: Member, roots: set[Root]) -> Root:
    """Return the longest root that a tensor lies below; none where its name is not made of its keys."""
    if member.name == ".".join(member.path):
        for length in range(len(member.path) - 1, 0, -1):
            if member.path[:length] in roots:
                return member.path[:length]
    return ()


def dotted(root: Root) -> str:
    """Return a root as messages and ``state_root`` have it."""
    return ".".join(root)


def list_some(names: Sequence[str]) -> str:
    """Return the first of some names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def is_copy(key: str) -> bool:
    """Whether a key tells of the copy of a model."""
    return not COPY_WORDS.isdisjoint(words_of(key))


def is_state_key(key: str) -> bool:
    """Whether a key is a model's or that of its copy, and names nothing else."""
    return key in MODEL_KEYS or (is_copy(key) and words_of(key) <= COPY_WORDS | STATE_WORDS)


def words_of(key: str) -> set[str]:
    """Return the words that a key is made of, in small letters."""
    return {word.lower() for word in _WORD.findall(key)}


def is_copy_of(copy: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether at least half of a copy's tensors are the model's by name and shape."""
    same = sum(model.get(name) == shape for name, shape in copy.items())
    return 2 * same >= max(len(copy), 1)


def is_own(root: str, model_paths: Sequence[str]) -> bool:
    """Whether a root is the begin of a path within the model that the export asks for."""
    return bool(root) and any(path == root or path.startswith(f"{root}.") for path in model_paths)


def is_surely_copy(
    key: str, copy: Mapping[str, tuple[int, ...]], original: str, model: Mapping[str, tuple[int, ...]], *, is_rest: bool
) -> bool:
    """Whether what lies below ``key`` is the copy of a whole model, for certain. The model's own tables may be called so too.

    Args:
        key: the key that tells of a copy.
        copy: its tensors.
        original: the last key of what it may be the copy of; empty for what lies beside it.
        model: the tensors of that.
        is_rest: whether there is nothing else in the checkpoint.
    """
    words = words_of(key) - COPY_WORDS - STATE_WORDS
    is_model = not original or original in MODEL_KEYS
    if is_model and not words:
        return is_copy_of(copy, model)
    tensors = {name: shape for name, shape in copy.items() if shape}  # a copy counts its updates
    is_whole = len(tensors) > 1 and all(model.get(name) == shape for name, shape in tensors.items())
    return is_whole and (is_model or (is_rest and words in (set(), words_of(original) - STATE_WORDS)))
