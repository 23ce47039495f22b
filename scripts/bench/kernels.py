"""Each compiled kernel against its twin in numpy: processor time of one thread, in turn, medians. And lookups against torch.

The arrays lie in memory and fit the sizes that an export uses. ``asked`` is the share of numpy's time that is aimed at.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dist_export.formats.row_index import count_buckets
from dist_export.ids.duplicates import HeldIds
from dist_export.kernels.compiled import CompiledKernels
from dist_export.kernels.numpy_kernels import NumpyKernels
from dist_export.kernels.protocol import Kernels
from dist_export.kernels.selection import select_kernels
from scripts.bench.report import render_table
from scripts.bench.scenarios import Bench

_ROUNDS = 9
_RUN = 1 << 16
"""Ids of a run of the audit."""
_CHUNK_BYTES = 1 << 20
"""Bytes that a gather reads at once."""
_MOST_IDS = 50_000_000
"""Of one part, at size 1. So are the rows of the row index."""
_ROWS, _DIM, _SOUGHT = 2_000_000, 32, 100_000

Line = list[str]
Work = Callable[[Kernels], Any]


def run_kernels(bench: Bench) -> None:
    """Time all kernels. Not on disk."""
    kernels = select_kernels()
    if not isinstance(kernels, CompiledKernels):
        bench.note(f"kernels: {kernels.description}; there is nothing to compare")
        return
    random = np.random.default_rng(0)
    most = max(1_000_000, round(_MOST_IDS * bench.kept_bytes / 1e9))
    timer = _Timer((kernels, NumpyKernels()))
    lines = [
        *_time_duplicates(timer, random, most),
        *_time_crafted(kernels),
        *_time_sweeps(timer, random),
        *_time_casts(timer, random),
        *_time_rows(timer, random),
        *_time_fingerprints(timer, random),
        *_time_index(timer, random, max(_SOUGHT, min(_ROWS, round(_ROWS * bench.kept_bytes / 1e9)))),
    ]
    header = ["kernel", "compiled, ns", "numpy, ns", "share", "asked"]
    bench.note(f"kernels: {kernels.description}\n\n" + "\n".join(render_table(header, lines)))


class _Timer:
    def __init__(self, pair: tuple[Kernels, Kernels]) -> None:
        self._pair = pair

    def line(self, what: str, count: int, work: Work, asked: float, *, rounds: int = _ROUNDS) -> Line:
        """Return a line of the table: ns of processor time for each of ``count`` items."""
        compiled, twin = measure([functools.partial(work, one) for one in self._pair], rounds)
        return [what, f"{compiled / count:.2f}", f"{twin / count:.2f}", f"{compiled / twin:.2f}", f"{asked:.2f}"]


def measure(works: list[Callable[[], Any]], rounds: int = _ROUNDS) -> list[float]:
    """Return the median ns of processor time of each work. They run in turn, after one round to warm up."""
    repeats = []  # short ones run several times for one figure
    for work in works:
        begin = time.process_time_ns()
        work()
        repeats.append(max(1, min(200, 2_000_000 // max(1, time.process_time_ns() - begin))))
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for number, work in enumerate(works):
            begin = time.process_time_ns()
            for _ in range(repeats[number]):
                work()
            taken[number].append((time.process_time_ns() - begin) / repeats[number])
    return [statistics.median(times) for times in taken]


def _time_duplicates(timer: _Timer, random: np.random.Generator, most: int) -> list[Line]:
    lines = []
    for bits in (14, 16, 17):
        ids = random.integers(-(1 << 63), (1 << 63) - 1, 1 << bits)
        groups = np.repeat(np.arange(16), len(ids) // 16)
        lines.append(timer.line(f"duplicates of 2^{bits} ids", len(ids), functools.partial(_search, ids, None), 0.4))
        work = functools.partial(_search, ids, groups)
        lines.append(timer.line(f"duplicates of 2^{bits} ids, 16 groups", len(ids), work, 0.4))
    for count, asked in ((1 << 19, 0.4), (most // 10, 0.5), (most, 0.5)):
        ids = random.integers(-(1 << 63), (1 << 63) - 1, count)
        work = functools.partial(_collect, ids)
        lines.append(timer.line(f"duplicates of {count:,} ids in runs", count, work, asked, rounds=3))
    return lines


def _search(ids: np.ndarray, groups: np.ndarray | None, kernels: Kernels) -> None:
    if kernels.has_duplicates(ids, groups):
        raise AssertionError("random ids are different")


def _collect(ids: np.ndarray, kernels: Kernels) -> None:
    held = HeldIds(len(ids), kernels=kernels)
    for first in range(0, len(ids), _RUN):
        held.add(ids[first : first + _RUN])
    if held.has_duplicates():
        raise AssertionError("random ids are different")


def _time_crafted(kernels: CompiledKernels) -> list[Line]:
    """Ids that all fall into the first slot of the first sweep, for the seed of these kernels, against random ones."""
    multiplier = kernels.first_multiplier()
    crafted = (np.arange(_RUN, dtype=np.uint64) * np.uint64(pow(multiplier, -1, 1 << 64))).view(np.int64)
    ids = np.random.default_rng(1).integers(-(1 << 63), (1 << 63) - 1, _RUN)
    bad, good = measure([lambda: kernels.has_duplicates(crafted), lambda: kernels.has_duplicates(ids)])
    return [
        [
            "crafted ids against random ones (both compiled)",
            f"{bad / _RUN:.2f}",
            f"{good / _RUN:.2f}",
            f"{bad / good:.2f}",
            "4.00",
        ]
    ]


def _time_sweeps(timer: _Timer, random: np.random.Generator) -> list[Line]:
    lines, first = [], np.zeros(1, np.int64)
    ids = random.integers(-(1 << 63), (1 << 63) - 1, _RUN)
    for size in (65_536, 30_000):
        breaks = np.arange(4) * (size // 4)
        owners = np.arange(4, dtype=np.uint8)
        lookup = np.repeat(owners, np.diff(np.append(breaks, size)))

        def sweep(
            one: Kernels, size: int = size, breaks: Any = breaks, owners: Any = owners, lookup: Any = lookup
        ) -> None:
            one.sweep_ids(ids, first, size=size, begins=first, ends=np.array([size]))
            one.find_owners(ids, size=size, breaks=breaks, owners=owners, lookup=lookup, num_targets=4)

        lines.append(timer.line(f"sums, slices and owners, {size:,} positions", _RUN, sweep, 0.4))
    return lines


def _time_casts(timer: _Timer, random: np.random.Generator) -> list[Line]:
    values = (random.normal(size=1 << 15) * 0.05).astype(np.float32)
    lines = []
    for target, dtype, asked in (("F16", np.float16, 0.3), ("BF16", np.uint16, 0.6)):
        out = np.empty(len(values), dtype)

        def cast(one: Kernels, out: Any = out, target: str = target) -> None:
            one.cast_floats(out, values, source="F32", target=target, dim=64)

        lines.append(timer.line(f"cast to {target}, with errors", len(values), cast, asked))
    for dim in (8, 64):
        rows = np.empty((len(values) // dim, dim + 8), np.uint8)

        def encode(one: Kernels, rows: Any = rows, dim: int = dim) -> None:
            one.encode_int8(rows, values, source="F32", dim=dim)

        def decode(one: Kernels, rows: Any = rows) -> None:
            one.decode_int8(rows)

        lines.append(timer.line(f"cast to int8, dim {dim}, with errors", len(values), encode, 0.6))
        lines.append(timer.line(f"int8 decoded, dim {dim}", len(values), decode, 1.0))
    return lines


def _time_rows(timer: _Timer, random: np.random.Generator) -> list[Line]:
    lines = []
    for width in (32, 64, 128, 256, 512):
        count = _CHUNK_BYTES // width
        owners = random.integers(0, 4, count).astype(np.uint8)
        rows = random.integers(0, 255, count * width, np.uint8)
        out = np.empty_like(rows)

        def move(one: Kernels, owners: Any = owners, rows: Any = rows, out: Any = out, width: int = width) -> None:
            order, _ = one.order_rows(owners, None, 4)
            one.move_rows(order, rows, width, out)

        lines.append(timer.line(f"rows by owner, {width} bytes", count, move, 0.65 if width >= 64 else 1.0))
    return lines


def _time_fingerprints(timer: _Timer, random: np.random.Generator) -> list[Line]:
    lines = []
    for what, width in (*((f"float32, dim {dim}", 4 * dim) for dim in (8, 16, 32, 64)), ("int8, dim 64", 64 + 8)):
        rows = random.integers(0, 256, (_CHUNK_BYTES // width, width), np.uint8)

        def fold(one: Kernels, rows: Any = rows) -> None:
            state = one.start_fingerprints(len(rows))
            one.fold_slot(state, rows)
            one.finish_fingerprints(state)

        lines.append(timer.line(f"fingerprints of rows, {what}", len(rows), fold, 0.6))
    return lines


def _time_index(timer: _Timer, random: np.random.Generator, num_rows: int) -> list[Line]:
    ids = random.permutation(np.unique(random.integers(-(1 << 63), (1 << 63) - 1, num_rows + 100)))[:num_rows]
    buckets = count_buckets(num_rows)

    def build(one: Kernels) -> list[np.ndarray]:
        keys, slots, num_slots = np.sort(one.encode_keys(ids, 0, 0)), [], 0
        for begin in range(0, num_rows, _RUN):
            more, _ = one.fill_slots(keys[begin : begin + _RUN], num_buckets=buckets, num_slots=num_slots)
            slots.append(more)
            num_slots += len(more)
        return slots

    lines = [timer.line("row index built, with np.sort", num_rows, build, 1.0, rounds=3)]
    built = build(NumpyKernels())
    rest = np.full(max(0, buckets - sum(map(len, built))) + 1, 0xFFFFFFFF, np.uint32)
    slots = np.concatenate([*built, rest])
    block = random.integers(0, 255, (num_rows, _DIM * 4), np.uint8)
    chosen = random.integers(0, num_rows, _SOUGHT)
    sought, targets = ids[chosen], np.arange(_SOUGHT)

    def look_up(one: Kernels) -> np.ndarray:
        rows, has_row = np.empty((_SOUGHT, _DIM * 4), np.uint8), np.zeros(_SOUGHT, bool)
        found = one.find_rows(
            slots, ids, sought, num_slots=len(slots), num_rows=num_rows, num_buckets=buckets, seed=0, longest_probe=300
        )
        one.take_rows(block, found, targets, rows=rows, has_row=has_row)
        return rows

    lines.append(timer.line(f"{_SOUGHT:,} ids searched, rows collected", _SOUGHT, look_up, 1.0))
    compiled, of_torch = measure([lambda: look_up(select_kernels()), _embedding(chosen, num_rows)])
    against = "the same against torch.nn.Embedding"
    asked = "1.50"
    lines.append(
        [against, f"{compiled / _SOUGHT:.2f}", f"{of_torch / _SOUGHT:.2f}", f"{compiled / of_torch:.2f}", asked]
    )
    return lines


def _embedding(chosen: np.ndarray, num_rows: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(1)
    table = torch.nn.Embedding(num_rows, _DIM)
    numbers = torch.from_numpy(chosen)

    def look_up() -> Any:
        with torch.no_grad():
            return table(numbers)

    return look_up
