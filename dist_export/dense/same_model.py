"""Whether all ranks were given the same model: rank 0's is traced and served, whatever the others have."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from dist_export.dense.clock_reads import walk_functions
from dist_export.dense.made_at_call import list_modules
from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.model.unwrap import copy_dense_arch, is_lazy, plain_class, unwrap
from dist_export.model.value_digest import Digester, name_of
from dist_export.runtime.ranks import Ranks


def copy_same_arch(ranks: Ranks, model: nn.Module, arches: tuple[nn.Module, nn.Module]) -> nn.Module:
    """Return this rank's plain copy of the dense arch. All ranks; ``arches`` are the sparse and the dense one of ``model``.

    One digest a rank travels with it; only where these differ, the models are described in full.

    Raises:
        ModelError: on all ranks, if the ranks have different models; it names the first difference and the ranks.
    """
    sparse_arch, dense_arch = arches
    kept: list[nn.Module] = []
    described: list[Structure] = []

    def copy() -> str:
        kept.append(copy_dense_arch(dense_arch))
        if ranks.world_size == 1:
            return ""
        described.append(describe_structure(model, sparse_arch, kept[0]))
        return described[0].digest

    digests = ranks.all_gather("copy the dense arch", copy, may_block=True)
    if len(set(digests)) > 1:
        every = ranks.all_gather("tell the structure of the model", lambda: described[0])
        ranks.check("compare the structure of the models", lambda: refuse_other_models(every))
    return kept[0]


@dataclass(frozen=True, slots=True)
class Structure:
    """What must be the same on all ranks. It is sent to other ranks."""

    parts: Mapping[str, str]
    """What it is, for people -> its class, or dtype and shape."""
    code: Mapping[str, frozenset[str]]
    """Full name of a function -> digests of the byte code of those that have the name."""
    python: bytes
    """The version of the byte code: that of other ranks cannot be compared if they have another one."""

    @property
    def digest(self) -> str:
        """The same where the structure is."""
        code = {name: sorted(digests) for name, digests in sorted(self.code.items())}
        return xxhash.xxh3_128_hexdigest(repr((sorted(self.parts.items()), code, self.python)).encode())


def describe_structure(model: nn.Module, sparse_arch: nn.Module, copied: nn.Module) -> Structure:
    """Describe a model. ``copied`` is the plain copy of its dense arch. Tables do not count: each rank may have its own."""
    parts = {
        "the model's class": name_of(plain_class(unwrap(model))),
        "the sparse arch's class": name_of(plain_class(unwrap(sparse_arch))),
    }
    passing = set()
    for path, module in copied.named_modules():
        parts[f"the dense arch's {path or 'class'}"] = name_of(type(module))
        unsaved = getattr(module, "_non_persistent_buffers_set", ())
        passing |= {f"{path}.{name}" if path else name for name in unsaved}
    buffers = [(name, tensor) for name, tensor in copied.named_buffers() if name not in passing]  # others may be caches
    for name, tensor in (*copied.named_parameters(), *buffers):
        parts[f"the dense arch's {name}"] = _describe(tensor)
    code: dict[str, set[str]] = {}
    for function, *_ in walk_functions(module for _, module in list_modules("", model)):
        digester = Digester()
        digester.add_bytecode(function.__code__)
        code.setdefault(name_of(function), set()).add(str(digester.digest))
    return Structure(parts, {name: frozenset(its) for name, its in code.items()}, importlib.util.MAGIC_NUMBER)


def refuse_other_models(every: Sequence[Structure]) -> None:
    """Raise ModelError for the first rank whose model is not rank 0's. ``every``: of each rank, in rank order."""
    for rank, theirs in enumerate(every):
        if found := _list_differences(every[0], theirs):
            others = f", and so {few(found[1:])}" if found[1:] else ""
            raise ModelError(
                f"{found[0]} differs between ranks 0 and {rank}{_tell(every[0], theirs, found[0])}{others}: the ranks have "
                "different models, and only rank 0's would be served. Nothing was written. Start every machine with the same "
                "code, and build the same model on every rank"
            )


def _list_differences(mine: Structure, theirs: Structure) -> list[str]:
    found = [name for name in {**mine.parts, **theirs.parts} if mine.parts.get(name) != theirs.parts.get(name)]
    if mine.python != theirs.python:
        return found
    # a rank may lack functions, as those of modules that hold its part of the tables
    common = [name for name in mine.code if name in theirs.code]
    apart = [name for name in common if mine.code[name] - theirs.code[name] and theirs.code[name] - mine.code[name]]
    return found + [f"the code of {name}" for name in sorted(apart)]


def _tell(mine: Structure, theirs: Structure, name: str) -> str:
    its: list[Any] = [parts.get(name, "absent") for parts in (mine.parts, theirs.parts)]
    return f" ({its[0]} and {its[1]})" if its[0] != its[1] else ""


def _describe(tensor: torch.Tensor) -> str:
    return "lazy" if is_lazy(tensor) else f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
