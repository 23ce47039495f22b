"""See how a sparse arch reads the weights of its tables, whatever it calls: each operator that gets memory of a weight is seen.

A module's hook sees calls of that module alone. ``F.embedding(ids, self.emb.weight)``, ``self.emb.forward(ids)``,
``onehot @ self.emb.weight`` and code that ``torch.jit`` has compiled go past it, and none of them past the dispatcher. Views of
a weight read nothing; what they are given to is seen by the storage that they share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_export.dense.modes import written_by
from dist_export.dense.origins import Origins, address_of, tensors_in

_MOST_ROWS = 1024
"""A part of a table that is read as it lies counts as ids up to here, and as the whole table above."""

_RENORM = "aten::embedding_renorm_"

_IDS_OF: dict[str, int] = {
    "aten::embedding": 1,
    _RENORM: 1,
    "aten::_embedding_bag": 1,
    "aten::_embedding_bag_forward_only": 1,
}
"""Operators that look rows of their first argument up -> place of the ids among their arguments."""

_ALONG = {"aten::index_select": 2, "aten::gather": 2}
"""The same for those whose second argument is the dimension."""

_READS_NOTHING = frozenset(
    f"aten::{name}"
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full", "is_pinned", "record_stream"),
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size", "_is_zerotensor"),
    )
)

_PAST_THE_DISPATCHER = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr"})
"""Methods of a tensor that give its memory away."""

DATA_PTR = "data_ptr"
"""Of these, the one that may be asked for without a look at the values."""


class Feed(Protocol):
    """What puts rows into a weight before they are read."""

    weight: torch.Tensor
    """(rows, columns)."""

    def take(self, ids: np.ndarray) -> None:
        """Put these rows (int64, any order) there."""

    def take_whole(self, how: str) -> None:
        """Put all rows there, for the operator ``how`` does not say which it reads."""

    def note_write(self, how: str) -> None:
        """Note that the operator ``how`` is about to write into the weight."""

    def note_renorm(self, max_norm: float) -> None:
        """Note that a lookup is about to shorten the rows that it reads."""

    def note_ambiguous(self, how: str) -> None:
        """Note that an operator reads the weight of several tables, and none of their modules is called."""


class _Watched(NamedTuple):
    """A range of bytes of a storage."""

    begin: int
    end: int
    feed: Feed | Callable[[str], None]


class TableReads:
    """Watches the memory of weights while a sparse arch runs. Any rank, for itself."""

    def __init__(self, origins: Origins | None = None, is_within_table: Callable[[], bool] = bool) -> None:
        """``origins`` is shown what operators get and give, except while ``is_within_table``: then a table uses its memory."""
        self._origins = origins
        self._is_within_table = is_within_table
        self._watched: dict[int, list[_Watched]] = {}
        """Address of a storage -> what is watched in it."""
        self._called: list[Feed] = []
        """Of the modules that are being called, the innermost last."""
        self._is_busy = False

    def watch(self, feed: Feed) -> None:
        """Let ``feed`` put rows into its weight before an operator reads them."""
        self._add(feed.weight, feed)

    def watch_memory(self, tensor: torch.Tensor, tell: Callable[[str], None]) -> None:
        """Call ``tell`` with the operator that reads a tensor."""
        self._add(tensor, tell)

    def forget(self, tell: Callable[[str], None]) -> None:
        """Watch no longer what was to be told to ``tell``."""
        for its in self._watched.values():
            its[:] = [watched for watched in its if watched.feed != tell]

    def _add(self, tensor: torch.Tensor, feed: Feed | Callable[[str], None]) -> None:
        address = address_of(tensor)
        if address:
            self._watched.setdefault(address, []).append(_Watched(*_bytes_of(tensor), feed))

    @contextlib.contextmanager
    def within(self, sparse_arch: nn.Module) -> Iterator[None]:
        """Within this block, see what happens while ``sparse_arch`` is called; what others read says nothing of blocks."""
        held: list[contextlib.ExitStack] = []

        def begin(_: nn.Module, given: Any) -> None:
            if self._origins is not None:
                self._origins.begin(given)
            stack = contextlib.ExitStack()
            stack.enter_context(_Operators(self))
            stack.enter_context(_Methods(self))
            held.append(stack)

        def end() -> None:
            if held:
                held.pop().close()

        def after(_: nn.Module, __: Any, output: Any) -> None:
            end()
            if self._origins is not None:
                self._origins.end(output)

        # a scripted module refuses the bound methods, and calls the hooks all the same
        handles = [
            nn.Module.register_forward_pre_hook(sparse_arch, begin, prepend=True),
            nn.Module.register_forward_hook(sparse_arch, after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            while held:
                end()

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Within this block nothing is seen: our own code reads."""
        before, self._is_busy = self._is_busy, True
        try:
            yield
        finally:
            self._is_busy = before

    def enter(self, feed: Feed) -> None:
        """Note that the module of ``feed`` is called: of tables that share a weight, it is that one's rows that are read."""
        self._called.append(feed)

    def leave(self, feed: Feed) -> None:
        """Note that it has returned."""
        if self._called and self._called[-1] is feed:
            self._called.pop()

    def see_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at one operator before it runs."""
        if self._is_busy:
            return
        schema = getattr(func, "_schema", None)
        name = str(func) if schema is None else schema.name
        if name in _READS_NOTHING:
            return
        with self.unseen():
            for tensor in written_by(func, args, kwargs):
                self._see_write(tensor, name, float(args[2]) if name == _RENORM else None)
            if self._origins is not None and not self._is_within_table():
                for tensor in (*tensors_in(args), *tensors_in(kwargs)):
                    self._origins.look(tensor, name)
            for place, value in enumerate(args):
                is_view = schema is not None and place < len(schema.arguments) and _is_view(schema.arguments[place])
                if not is_view:
                    for tensor in tensors_in(value):
                        self._see(tensor, _ids_in(name, place, args), name)
            for tensor in tensors_in(kwargs):
                self._see(tensor, None, name)

    def see_result(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what an operator has given."""
        if self._origins is not None:
            self._origins.made(output, (args, kwargs))

    def see_method(self, tensor: Any, name: str) -> None:
        """Look at a method that gives memory away."""
        if not self._is_busy and isinstance(tensor, torch.Tensor):
            with self.unseen():
                self._see(tensor, None, name)

    def _see_write(self, tensor: torch.Tensor, how: str, max_norm: float | None) -> None:
        begin, end = _bytes_of(tensor) if tensor.numel() else (0, 0)
        for watched in self._watched.get(address_of(tensor), ()):
            if begin < watched.end and end > watched.begin and not callable(watched.feed):
                if max_norm is None:
                    watched.feed.note_write(how)
                else:  # of rows that it reads, so they are kept and put back
                    watched.feed.note_renorm(max_norm)

    def _see(self, tensor: torch.Tensor, ids: torch.Tensor | None, how: str) -> None:
        its = self._watched.get(address_of(tensor)) if self._watched else None
        if not its or not tensor.numel():
            return
        begin, end = _bytes_of(tensor)
        found: dict[tuple[int, int], list[Feed]] = {}
        for watched in its:
            if begin >= watched.end or end <= watched.begin:
                continue
            if callable(watched.feed):
                watched.feed(how)
            else:
                found.setdefault((watched.begin, watched.end), []).append(watched.feed)
        for feeds in found.values():
            called = next((feed for feed in reversed(self._called) if any(feed is its for its in feeds)), None)
            if called is None and len(feeds) > 1:
                feeds[0].note_ambiguous(how)
            _tell(called or feeds[0], tensor, ids, how)


class _Operators(TorchDispatchMode):
    """Shows each operator, those of scripted code too, below autograd and autocast."""

    supports_higher_order_operators = True

    def __init__(self, reads: TableReads) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self._reads.see_operator(func, args, kwargs or {})
        output = func(*args, **(kwargs or {}))
        self._reads.see_result(output, args, kwargs or {})
        return output


class _Methods(TorchFunctionMode):
    """Shows what gives memory away to code that is none of torch's."""

    def __init__(self, reads: TableReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PAST_THE_DISPATCHER and args:
            self._reads.see_method(args[0], name)
        return func(*args, **(kwargs or {}))


def _tell(feed: Feed, tensor: torch.Tensor, ids: torch.Tensor | None, how: str) -> None:
    """Tell a feed which of its rows are read: those of ``ids`` in a view of its weight, or all that the view has."""
    weight = feed.weight
    num_rows = len(weight)
    row_bytes = weight.stride(0) * weight.element_size()
    is_by_row = weight.dim() == 2 and (num_rows < 2 or weight.stride(0) >= _extent(weight[0]))
    first_byte = tensor.storage_offset() * tensor.element_size() - _bytes_of(weight)[0]
    if ids is not None and tensor.dim() and _is_integer(ids):
        step, inner = tensor.stride(0) * tensor.element_size(), _extent(tensor[0]) * tensor.element_size()
        is_same = first_byte == 0 and tensor.shape == weight.shape and tensor.stride() == weight.stride()
        is_rows = is_by_row and row_bytes > 0 and step % row_bytes == 0 and first_byte % row_bytes + inner <= row_bytes
        if is_same or is_rows:
            numbers = ids.detach().reshape(-1).to("cpu", torch.int64).numpy()
            numbers = np.where(numbers < 0, numbers + len(tensor), numbers)
            first, times = (0, 1) if is_same else (first_byte // row_bytes, step // row_bytes)
            feed.take(first + numbers * times)
            return
    if is_by_row and row_bytes > 0:
        begin = max(0, first_byte // row_bytes)
        end = min(num_rows, -(-(_bytes_of(tensor)[1] - _bytes_of(weight)[0]) // row_bytes))
        if end - begin < min(num_rows, _MOST_ROWS + 1):
            feed.take(np.arange(begin, end, dtype=np.int64))
            return
    feed.take_whole(how)


def _ids_in(name: str, place: int, args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return the ids that an operator looks up in its argument at ``place``, None where it looks none up."""
    if place:
        return None
    where = _IDS_OF.get(name)
    if name in _ALONG and args[1] == 0:
        where = _ALONG[name]
    found = args[where] if where is not None and where < len(args) else None
    if name == "aten::index" and args[1]:
        found = args[1][0]
    return found if isinstance(found, torch.Tensor) else None


def _is_integer(ids: torch.Tensor) -> bool:
    return ids.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)  # a mask is bool or uint8


def _is_view(argument: Any) -> bool:
    """Whether an operator gives a view of an argument back and does not write into it."""
    alias = argument.alias_info
    return alias is not None and not alias.is_write


def _extent(tensor: torch.Tensor) -> int:
    """Return how many elements lie from the first of a tensor to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    begin = int(tensor.storage_offset())
    return begin * tensor.element_size(), (begin + _extent(tensor)) * tensor.element_size()
