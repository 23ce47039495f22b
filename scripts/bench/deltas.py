"""Deltas against a full export of the same state, and against a plain copy of the full package.

The base has row fingerprints, as a directory of versions has them; what comes after it has none. The later state is the
source of the base with one bit changed in rows that are chosen at random. One rank of one thread in this process; all
contenders run once in each round, after one round to warm up. Ratios are medians over the rounds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import dist_export
from scripts.bench.generate import Source, generate
from scripts.bench.kernels import measure
from scripts.bench.opening import measure_opening
from scripts.bench.processes import ContenderError
from scripts.bench.report import ratios, render_table, spread
from scripts.bench.scenarios import Bench
from scripts.bench.torchrec_source import read_tables, table_fqn

TABLES = 2
SHARES = (0.001, 0.01, 0.1, 0.5)
"""Shares of changed rows; in ascending order, because the later state only gains changes."""
MIDDLE = 0.01
"""The share of the small tables, and the one that has targets."""
SMALL = 0.25
"""The size of the small tables, against the large ones."""
ASKED_BYTES = 0.02
"""Of the full package, at the middle share."""
ASKED_LOOKUP = 1.3
"""Processor time of a lookup, against that in the full package."""
_LOOKED_UP = 100_000
FULL, DELTA, EXACT, COPY = "full export", "delta", "delta, compare: exact", "copy of the package"
HEADER = (
    "contender", "changed", "cpu s", "least", "wall s", "least", "cpu / full", "asked", "wall / full", "cpu / copy",
    "wall / copy", "bytes / full", "asked",
)  # fmt: skip


class Kind(NamedTuple):
    """Tables of one kind, and what is asked of their deltas."""

    name: str
    dim: int
    has_ids: bool
    asked: float
    """Processor time of a delta, against a full export, at the middle share."""


KINDS = (
    Kind("hash tables, dim 64", 64, True, 0.7),
    Kind("hash tables, dim 8", 8, True, 1.2),
    Kind("row-indexed tables, dim 64", 64, False, 0.7),
)


@dataclass
class Runs:
    """What the rounds of one contender took."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def run_deltas(bench: Bench) -> None:
    """Export deltas of hash tables at dims 64 and 8 and of row-indexed tables at dim 64, and look ids up. Not on disk."""
    for kind in KINDS:
        for size, shares in ((1.0, SHARES), (SMALL, (MIDDLE,))):
            folder = bench.place.directory / "deltas"
            try:
                _run_case(bench, kind, folder, bench.kept_bytes * size, shares)
            except Exception as error:  # noqa: BLE001 -- whatever it was is reported, and the benchmarks end with exit code 1
                bench.fail(f"deltas of {kind.name}", error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _run_case(bench: Bench, kind: Kind, folder: Path, kept_bytes: float, shares: tuple[float, ...]) -> None:
    source = Source.of_size(kept_bytes, dim=kind.dim, tables=TABLES)
    _need_room(folder.parent, source)
    later = write_source(folder / "later", source, has_ids=kind.has_ids)
    _export(bench, later, folder / "base", row_fingerprints=True)  # before any row of it changes
    blocks = map_blocks(later, "embedding" if kind.has_ids else "weight")
    lines, notes, done = [], [], 0.0
    for share in shares:
        num_changed = change_rows(blocks, done, share)
        done = share
        runs = _run_rounds(bench, folder)
        _check_accounts(folder, num_changed)
        lines += render_lines(runs, share, num_bytes=_sizes(folder), asked=kind.asked)
        notes.append(_compare_lookups(folder, share, has_ids=kind.has_ids))
        if share == MIDDLE:
            notes += _describe_openings(folder)
    title = f"deltas of {kind.name}: {TABLES} tables of {source.rows:,} rows, {source.kept_bytes / 1e9:.3g} GB kept"
    bench.note(f"### {title}, {bench.place.name}\n\n" + "\n".join(render_table(HEADER, lines)))
    bench.note("\n".join(notes))


def _need_room(folder: Path, source: Source) -> None:
    """Refuse a case that would fill the file system: source, base, full package, its copy and two deltas of half of it."""
    needed, free = source.kept_bytes * 6 + 8 * source.rows * source.tables, shutil.disk_usage(folder).free
    if needed * 1.1 > free:
        raise ContenderError(
            f"needs {needed * 1.1 / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} are free; give a smaller --size"
        )


def write_source(folder: Path, source: Source, *, has_ids: bool) -> Path:
    """Write a checkpoint: hash tables as RecIS saves them, or row-indexed tables in one file of safetensors."""
    if has_ids:
        return generate(folder, source)
    from safetensors.numpy import save_file

    generated = generate(folder.with_name("generated"), source)
    folder.mkdir()
    save_file({table_fqn(name): rows for name, rows in read_tables(generated)}, folder / "model.safetensors")
    shutil.rmtree(generated)
    return folder


def map_blocks(folder: Path, slot: str) -> dict[str, np.memmap[Any, Any]]:
    """Return the blocks of a slot by key, mapped for writing: ids (rows,), or rows (rows, dim) as unsigned integers."""
    found: dict[str, np.memmap[Any, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for key, entry in header.items():
            if key.partition("/")[0].endswith(f".{slot}"):
                dtype = np.int64 if entry["dtype"] == "I64" else np.uint32
                offset = 8 + length + entry["data_offsets"][0]
                found[key] = np.memmap(path, dtype, "r+", offset, tuple(entry["shape"]))
    if not found:
        raise ContenderError(f"no file of {folder} has a block of {slot}")
    return found


def change_rows(blocks: dict[str, np.memmap[Any, Any]], before: float, share: float) -> int:
    """Change rows of each block by one bit, until ``share`` of them differ in place of ``before``. Return their number."""
    num_changed = 0
    for number, rows in enumerate(blocks.values()):
        order = np.random.default_rng(number).permutation(len(rows))  # the same for each share
        first, last = round(before * len(rows)), round(share * len(rows))
        rows[order[first:last], 0] ^= 1
        num_changed += last
    return num_changed


def _run_rounds(bench: Bench, folder: Path) -> dict[str, Runs]:
    """Run all contenders in turn; what the last round wrote stays."""
    source, base = folder / "later", str(folder / "base")
    works: dict[str, Callable[[Path], Any]] = {
        FULL: lambda out: _export(bench, source, out),
        DELTA: lambda out: _export(bench, source, out, base=base),
        EXACT: lambda out: _export(bench, source, out, base=base, compare="exact"),
        COPY: lambda out: shutil.copytree(_path_of(folder, FULL), out, copy_function=shutil.copyfile),
    }
    runs = {name: Runs() for name in works}
    for number in range(bench.rounds + 1):
        for name, work in works.items():
            out = _path_of(folder, name)
            shutil.rmtree(out, ignore_errors=True)
            wall, cpu = time.perf_counter(), time.process_time()
            work(out)
            taken_cpu, taken_wall = time.process_time() - cpu, time.perf_counter() - wall
            if number:  # the first warms up
                runs[name].cpu.append(taken_cpu)
                runs[name].wall.append(taken_wall)
    return runs


def _path_of(folder: Path, contender: str) -> Path:
    return folder / contender.replace(": ", " ").replace(", ", " ").replace(" ", "_")


def _export(bench: Bench, source: Path, out: Path, **further: Any) -> None:
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 2}
    fixed = {"threads": 1, "progress": False, "row_index": True, "row_fingerprints": False}
    dist_export.export({**bench.settings, **settings, **fixed, **further})


def _check_accounts(folder: Path, num_changed: int) -> None:
    """Refuse deltas that do not hold just the changed rows."""
    for name in (DELTA, EXACT):
        manifest = json.loads((_path_of(folder, name) / "manifest.json").read_text())
        accounts = [table["delta"] for table in manifest["tables"]]
        found = {what: sum(account[what] for account in accounts) for what in ("changed", "new", "deleted")}
        if found != {"changed": num_changed, "new": 0, "deleted": 0}:
            raise ContenderError(f"{name}: {num_changed:,} rows changed, the account has {found}")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each package: of all its files."""
    return {
        name: sum(path.stat().st_size for path in _path_of(folder, name).rglob("*") if path.is_file())
        for name in (FULL, DELTA, EXACT, COPY)
    }


def render_lines(runs: dict[str, Runs], share: float, *, num_bytes: dict[str, int], asked: float) -> list[list[str]]:
    """Return the lines of the table for one share of changed rows. What is asked stands with the delta, at the middle share."""

    def cells(name: str) -> Iterator[str]:
        own, is_asked = runs[name], name == DELTA and share == MIDDLE
        yield from (name, f"{share:.1%}")
        for taken in (own.cpu, own.wall):
            yield from (f"{spread(taken).median:.3f}", f"{min(taken):.3f}")
        yield from (f"{ratios(own.cpu, runs[FULL].cpu).median:.2f}", f"{asked:.2f}" if is_asked else "")
        yield f"{ratios(own.wall, runs[FULL].wall).median:.2f}"
        yield from (f"{ratios(own.cpu, runs[COPY].cpu).median:.2f}", f"{ratios(own.wall, runs[COPY].wall).median:.2f}")
        yield from (f"{num_bytes[name] / num_bytes[FULL]:.2%}", f"{ASKED_BYTES:.0%}" if is_asked else "")

    return [list(cells(name)) for name in runs]


def _compare_lookups(folder: Path, share: float, *, has_ids: bool) -> str:
    """Look random ids up in the delta on its base and in the full package: the rows must be equal. Return the figures."""
    with (
        dist_export.open_package(_path_of(folder, FULL)) as full,
        dist_export.open_package(_path_of(folder, DELTA)) as delta,
        dist_export.open_package(_path_of(folder, EXACT)) as exact,
    ):
        table = full.manifest.tables[0]
        every = np.arange(table.rows_out)
        if has_ids:
            columns = map_blocks(folder / "later", "id").items()
            every = np.concatenate([ids for key, ids in columns if key.startswith(f"{table.name}.")])
        sought = every[np.random.default_rng(0).integers(0, len(every), _LOOKED_UP)]
        expected, _ = full.lookup(table.name, sought)
        for name, package in ((DELTA, delta), (EXACT, exact)):
            rows, has_row = package.lookup(table.name, sought)
            if not has_row.all() or rows.tobytes() != expected.tobytes():
                raise ContenderError(f"{name}: looked-up rows of {table.name} are not those of the full package")
        on_base, whole = measure([lambda: delta.lookup(table.name, sought), lambda: full.lookup(table.name, sought)])
    asked = f" (asked: {ASKED_LOOKUP:.2f})" if share == MIDDLE else ""
    return (
        f"- {share:.1%} changed: {_LOOKED_UP:,} random ids take {on_base / 1e6:.1f} ms of processor time in the delta on its "
        f"base, {whole / 1e6:.1f} ms in the full package: {on_base / whole:.2f}{asked}"
    )


def _describe_openings(folder: Path) -> Iterator[str]:
    for name in (DELTA, FULL):
        opening = measure_opening(_path_of(folder, name))
        what = "the delta with its base" if name == DELTA else "the full package"
        yield (
            f"- {MIDDLE:.1%} changed: opening {what} takes {opening.seconds * 1e3:.2f} ms of processor time, "
            f"{opening.anonymous_bytes / 1e3:.0f} kB of anonymous and {opening.mapped_bytes / 1e3:.0f} kB of mapped memory"
        )
