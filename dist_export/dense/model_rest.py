"""What the model has outside of both arches: it has the checkpoint's values while the reference runs, or the export says so.

A layer between the arches may do nothing as long as it is fresh, and then the sample would not show what it does once trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_export.checkpoint.model_weights import distinct_names, plain_name
from dist_export.dense.missing_values import SETTING
from dist_export.dense.origins import address_of, tensors_in
from dist_export.dense.own_parameters import put_values, say_lost, state_put_back, values_within
from dist_export.dense.rest_tables import answers_of, list_rest_tables, refuse_tables_read
from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.model.unwrap import is_lazy, is_sharded_flat, unwrap
from dist_export.runtime.ranks import Ranks


def list_rest(model: Any, arches: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """Return the parameters, and buffers that are saved, of what is outside of both arches, by plain name within the model.

    What one of the arches has too is left out, and so is what FSDP of version 1 has flattened.
    """
    root = unwrap(model)
    done = {id(child) for top in (*arches, *_flat_wrappers(root, arches)) for child in top.modules()}
    own = {id(tensor) for arch in arches for tensor in (*arch.parameters(), *arch.buffers())}
    held = [(path, tensor) for path, tensor in _saved_values(root, done) if id(tensor) not in own]
    names = distinct_names(path for path, _ in held)
    return {names[path]: tensor for path, tensor in held}


def is_of_rest(pattern: str, model: Any, arches: Sequence[nn.Module]) -> bool:
    """Whether a pattern of ``allow_missing_dense`` names something outside of both arches, and nothing of the dense arch."""
    root = unwrap(model)
    keys = [plain_name(key) for key in arches[1].state_dict()]
    is_there = any(fnmatchcase(name, pattern) for name in list_rest(root, arches))
    is_there |= any(pattern.startswith(f"{_path_of(root, flat)}.") for flat in _flat_wrappers(root, arches))
    return is_there and not any(fnmatchcase(key, pattern) for key in keys)


class ModelRest:
    """Gives the rest of the model its values for the reference. Its methods on all ranks, in the same order."""

    def __init__(
        self,
        ranks: Ranks,
        model: Any,
        arches: Sequence[nn.Module],
        *,
        dense_model_name: str,
        allowed: Sequence[str],
        tables: Collection[str] = (),
        left_out: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """Look at no value yet.

        Args:
            ranks: all of them.
            model: the caller's.
            arches: the caller's own sparse and dense arch.
            dense_model_name: the path of the latter.
            allowed: all patterns of ``allow_missing_dense``.
            tables: names of those of the checkpoint.
            left_out: gives the names of tensors in other states of the checkpoint than the model's.
        """
        self._known_tables = {plain_name(name) for name in tables}
        self._left_out = left_out
        self._ranks = ranks
        self._root = unwrap(model)
        self._arches = arches
        self._dense_model_name = dense_model_name
        self._allowed = allowed
        self._lacking: dict[str, torch.Tensor] = {}
        self._flat_lacking: list[str] = []
        self._tables = list_rest_tables(self._root, arches)
        self._reads: _Reads | None = None

    @contextlib.contextmanager
    def values(self, load: Callable[[], Mapping[str, Any]] | None) -> Iterator[None]:
        """Within this block, the rest has the checkpoint's values; None leaves it as it is."""
        if load is None:
            yield
            return
        ranks, root, rest = self._ranks, self._root, list_rest(self._root, self._arches)
        wrappers = _flat_wrappers(root, self._arches)
        if not rest and not wrappers and not self._tables:
            yield
            return
        state = ranks.check("read the model's other parameters", load)
        with contextlib.ExitStack() as held:
            below = self._dense_model_name
            put = functools.partial(values_within, root, state, path="", except_below=below, must_fit=False)
            names = ranks.check("put values into the rest of the model", lambda: held.enter_context(put()))
            there = {id(rest[name]) for name in names if name in rest}
            self._lacking = {name: tensor for name, tensor in rest.items() if id(tensor) not in there}
            for wrapper in wrappers:
                held.enter_context(state_put_back(wrapper))
                ranks.run(
                    "put values into what FSDP shards", functools.partial(self._fill, wrapper, state), may_block=True
                )
            if self._lacking or self._tables:
                self._reads = held.enter_context(_Reads(root, self._arches[1], self._lacking))
                held.enter_context(_Numbers(self._reads))
                held.enter_context(answers_of(self._tables, self._reads.mark))
            yield

    def refuse_lacking(self) -> list[str]:
        """Refuse what the model's scores read and the checkpoint lacks, after ``model(batch)`` has run.

        Returns the names that a pattern lets pass. Raises ModelError for the others, and for tables, on all ranks.
        """
        read = [] if self._reads is None else self._reads.names()
        tables = [name for name in read if name in self._tables]
        lacking = [*(name for name in read if name not in tables), *self._flat_lacking]
        passed = [name for name in lacking if any(fnmatchcase(name, pattern) for pattern in self._allowed)]
        refused = [name for name in lacking if name not in passed]

        def refuse() -> None:
            refuse_tables_read(self._tables, tables)
            if refused:
                raise ModelError(self._say_refused(refused))

        self._ranks.check("look at what the checkpoint lacks of the model", refuse)
        return passed

    def _say_refused(self, names: Sequence[str]) -> str:
        """Return what is wrong with parameters that the reference has no values for: they are a table, elsewhere, or nowhere."""
        untrained = "outside of the sparse and the dense arch, so scores would be those of untrained values. Nothing was written"
        if exported := [name for name in names if name in self._known_tables]:
            return (
                f"{few(exported)}: a table of the package, whose rows an export puts into the sparse arch alone. The model's "
                f"forward computes with it {untrained}. Make it a part of the sparse arch; or take it off treat_as_tables"
            )
        others = self._left_out()
        it = "it" if len(names) == 1 else "them"
        if aside := [name for name in names if name in others]:
            return (
                f"the checkpoint has {few(aside)} beside the states of the two arches, and no more than these is the model. The "
                f"model's forward computes with {'it' if len(aside) == 1 else 'them'} {untrained}. Save the state_dict of the "
                f"whole model as one state; or {SETTING}: [{aside[0]}] lets the model's own values pass"
            )
        return (
            f"the checkpoint lacks {few(names)}, which the model's forward computes with {untrained}. Give the checkpoint that "
            f"has {it}, in this shape; or {SETTING}: [{names[0]}] lets the model's own values pass"
        )

    def _fill(self, wrapper: nn.Module, state: Mapping[str, Any]) -> None:
        """Put values into one wrapper of FSDP; collective over the ranks that hold its parameters."""
        begin = _path_of(self._root, wrapper)
        plain = {plain_name(name): value for name, value in state.items()}
        with FullyShardedDataParallel.summon_full_params(wrapper, writeback=False):
            own = {f"{begin}.{plain_name(name)}": tensor for name, tensor in _saved_values(wrapper)}
            fitting = {name: plain[name] for name, tensor in own.items() if _fits(plain.get(name), tensor)}
        self._flat_lacking += [name for name in own if name not in fitting]
        put_values(wrapper, fitting, dense_model_name=begin)


_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operators whose result is a Python number, or has a size, that follows from values."""

_OF_SHAPES = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")
)
"""Operators that take the shape of a tensor and none of its values."""

_TO_NUMBERS = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.__reduce_ex__,
    }
)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that an operator writes into."""
    found = []
    for number, argument in enumerate(func._schema.arguments):  # noqa: SLF001 -- the only place that tells
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return found


class _Numbers(TorchFunctionMode):
    """Tells :class:`_Reads` of tensors whose values leave torch."""

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the tensor, and call the function."""
        if func in _TO_NUMBERS:
            self._reads.note_numbers(args)
        return func(*args, **(kwargs or {}))


class _Reads(TorchDispatchMode):
    """Follows tensors through the model's operators, to the scores that the dense arch returns.

    A counter that forward increases is read, and is no part of a score.
    """

    def __init__(self, root: nn.Module, dense_arch: nn.Module, watched: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        addresses = {name: address_of(tensor) for name, tensor in watched.items() if tensor.numel()}
        self._unseen = {
            name for name, address in addresses.items() if not address
        }  # sharded: nobody sees where they go
        self._watched = {name: address for name, address in addresses.items() if address}
        self._made_of: dict[int, frozenset[str]] = {}
        """Address -> the names of what its values are made of."""
        self._alive: dict[int, torch.Tensor] = {}
        """What has these addresses. If it went, what no operator makes, such as an array of numpy, could get its memory."""
        self._read: set[str] = set()
        self._is_on = False
        begin, end = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
        self._handles = [begin(root, self._begin), end(dense_arch, self._end)]

    def names(self) -> list[str]:
        """Return the names of what reached the scores, or may have."""
        return sorted(self._read | self._unseen)

    def _begin(self, *_: object) -> None:
        self._is_on = True
        for name, address in self._watched.items():
            self._made_of[address] = self._made_of.get(address, frozenset()) | {name}

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        self._is_on = False
        self._read |= self._sources(output)
        self._made_of.clear()
        self._alive.clear()

    def _sources(self, value: Any) -> frozenset[str]:
        found = [self._made_of.get(address_of(tensor), frozenset()) for tensor in tensors_in(value)]
        return frozenset().union(*found)

    def mark(self, name: str, value: Any) -> None:
        """Take ``value``, which a table of this name returned, for made of its rows."""
        if self._is_on:
            for address, tensor in _by_address(value).items():
                if address:
                    self._made_of[address] = self._made_of.get(address, frozenset()) | {name}
                    self._alive.setdefault(address, tensor)

    def note_numbers(self, value: Any) -> None:
        """Take in what becomes Python numbers or an array of numpy, where nobody sees what they are used for."""
        if self._is_on:
            self._read |= self._sources(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and note what its results are made of."""
        result = func(*args, **(kwargs or {}))
        if self._is_on:
            given = [args, kwargs or {}]
            sources, old = self._sources(given), {address_of(tensor) for tensor in tensors_in(given)}
            if _READING & set(func.tags):
                self._read |= sources
            if func.overloadpacket in _OF_SHAPES:
                sources = frozenset()
            for address, tensor in _by_address([_written(func, args, kwargs or {}), result]).items():
                before = self._made_of.pop(address, frozenset())  # of what had this memory, unless it is the same
                if now := sources | (before if address in old else frozenset()):
                    self._made_of[address] = now
                    self._alive.setdefault(address, tensor)
        return result

    def __exit__(self, *error: object) -> None:
        """End following."""
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]


def _by_address(value: Any) -> dict[int, torch.Tensor]:
    return {address_of(tensor): tensor for tensor in tensors_in(value)}


def _flat_wrappers(root: nn.Module, arches: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the outermost wrappers of FSDP of version 1 outside of both arches."""
    done = {id(module) for arch in arches for module in arch.modules()}
    found = []
    for module in root.modules():  # parents first
        if id(module) not in done and is_sharded_flat(module):
            found.append(module)
            done.update(id(child) for child in module.modules())
    return found


def _path_of(root: nn.Module, module: nn.Module) -> str:
    return next(plain_name(path) for path, child in root.named_modules() if child is module)


def _saved_values(root: nn.Module, done: Collection[int] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a state_dict has of the modules that are not ``done``, with its path."""
    for path, module in root.named_modules():
        if id(module) in done:
            continue
        hidden = module._non_persistent_buffers_set  # noqa: SLF001 -- torch has no public way to ask
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001 -- its own alone
            if tensor is not None and not is_lazy(tensor) and name not in hidden:
                yield (f"{path}.{name}" if path else name), tensor


def _fits(value: Any, tensor: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == tensor.shape and not say_lost(value, tensor)
