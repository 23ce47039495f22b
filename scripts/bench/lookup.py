"""Lookups by the row index against a scan, a dict over rows in memory, and LMDB; and what it and row fingerprints cost an export.

Each figure is processor time of one thread in this process, the least of several rounds: a lookup is too short for a clock
that other processes disturb. Requests are random ids that have a row.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dist_export
from scripts.bench.generate import Source, generate
from scripts.bench.report import render_table
from scripts.bench.scenarios import Bench

DIM = 32
TABLES = 2
ROWS = 2_000_000
"""Of each table, at size 1."""
REQUESTS = (1, 1_000, 100_000)
_ROUNDS = 7
_VARIANTS = {
    "scanned": {"row_index": False, "row_fingerprints": False},
    "indexed": {"row_index": True, "row_fingerprints": False},
    "fingerprinted": {"row_index": True, "row_fingerprints": True},
}
"""Name of the package -> its settings."""
_LMDB_BATCH = 100_000


def run_lookup(bench: Bench) -> None:
    """Look random ids up in 2 tables of 2 M x 32 float32. Not on disk."""
    folder = bench.place.directory
    rows = max(10_000, round(ROWS * bench.kept_bytes / 1e9))
    source = Source(rows=rows, dim=DIM, tables=TABLES, num_dropped=0, holes="none")
    generate(folder / "ckpt", source)
    seconds = _export_both(folder, rounds=3)
    indexed, scanned = (dist_export.open_package(folder / name) for name in ("indexed", "scanned"))
    table = indexed.manifest.tables[0].name
    ids, embeddings = _read_all(scanned, table)
    contenders: dict[str, Callable[[np.ndarray], Any]] = {
        "row index": lambda asked: indexed.lookup(table, asked),
        "scan of the ids": lambda asked: scanned.lookup(table, asked),
        "dict, rows in memory": _over_dict(ids, embeddings),
    }
    try:
        contenders["LMDB"] = _over_lmdb(folder / "lmdb", ids, embeddings)
    except ImportError:
        bench.note("LMDB is not installed: pip install lmdb")
    random = np.random.default_rng(0)
    lines = []
    for count in REQUESTS:
        asked = ids[random.integers(0, len(ids), count)]
        best = {name: _time(contender, asked) for name, contender in contenders.items()}
        base = best["row index"]
        lines += [
            [f"{count:,}", name, f"{t * 1e6:,.0f}", f"{count / t:,.0f}", f"{t / base:.2f}"] for name, t in best.items()
        ]
    header = ["ids", "by", "us of processor time", "ids a second", "to the row index"]
    bench.note(f"lookup, table of {rows:,} x {DIM} float32\n\n" + "\n".join(render_table(header, lines)))
    size = sum(path.stat().st_size for path in (folder / "indexed").glob("*.row_index"))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    dist_export.open_package(folder / "indexed").close()
    opening, grown = time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    bench.note(
        f"opening the package takes {opening * 1e3:.1f} ms and {grown} kB; the row indexes have "
        f"{size / rows / TABLES:.1f} bytes a row"
    )
    _note_cost(bench, seconds, rows * TABLES, f"dim {DIM}")
    for name in ("ckpt", "lmdb", *_VARIANTS):
        shutil.rmtree(folder / name, ignore_errors=True)


def run_index_cost(bench: Bench) -> None:
    """What row index and row fingerprints add to a filter of 2 shards, at dims 64 and 8. Not on disk."""
    folder = bench.place.directory
    for dim in (64, 8):
        source = Source.of_size(bench.kept_bytes / 2, dim=dim, tables=TABLES, holes="dropped")
        generate(folder / "ckpt", source)
        _note_cost(bench, _export_both(folder, rounds=bench.rounds), source.rows * TABLES, f"dim {dim}")
        for name in ("ckpt", *_VARIANTS):
            shutil.rmtree(folder / name)


def _export_both(folder: Path, *, rounds: int) -> dict[str, float]:
    """Export with and without row indexes and row fingerprints in turn; return the least seconds of processor time of each."""
    seconds = dict.fromkeys(_VARIANTS, float("inf"))
    for _ in range(rounds + 1):  # the first warms up
        for name in seconds:
            shutil.rmtree(folder / name, ignore_errors=True)
            begin = time.process_time()
            _export(folder / "ckpt", folder / name, **_VARIANTS[name])
            seconds[name] = min(seconds[name], time.process_time() - begin)
    return seconds


def _note_cost(bench: Bench, seconds: dict[str, float], rows: int, what: str) -> None:
    for name, than, which in (("indexed", "scanned", "row index"), ("fingerprinted", "indexed", "row fingerprint")):
        added, share = (seconds[name] - seconds[than]) / rows, seconds[name] / seconds[than] - 1
        bench.note(
            f"{what}: the {which} costs {added * 1e9:.0f} ns of processor time a row, {share:+.0%} of the export"
        )


def _export(source: Path, target: Path, **variant: bool) -> None:
    settings = {"ckpt_dir": str(source), "export_dir": str(target), "filter_sparse_opt": True, "num_shards": 2}
    dist_export.export({**settings, **variant, "threads": 1, "progress": False})


def _read_all(package: Any, table: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all ids and rows of a table, by safetensors itself."""
    from safetensors.numpy import load_file

    ids, rows = [], []
    for part in package.table(table).parts:
        blocks = load_file(os.path.join(package.directory.path, part.file))
        ids.append(blocks[part.keys["id"]])
        rows.append(blocks[part.keys["embedding"]])
    return np.concatenate(ids), np.concatenate(rows)


def _over_dict(ids: np.ndarray, embeddings: np.ndarray) -> Callable[[np.ndarray], Any]:
    row_of = dict(zip(ids.tolist(), range(len(ids)), strict=True))
    return lambda asked: embeddings.take([row_of[number] for number in asked.tolist()], axis=0)


def _over_lmdb(folder: Path, ids: np.ndarray, embeddings: np.ndarray) -> Callable[[np.ndarray], Any]:
    import lmdb

    folder.mkdir()
    keys = ids.astype(">i8").view("V8")
    environment = lmdb.open(str(folder), map_size=embeddings.nbytes * 4 + (1 << 30), sync=False, metasync=False)
    for first in range(0, len(ids), _LMDB_BATCH):
        chosen = range(first, min(first + _LMDB_BATCH, len(ids)))
        with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti([(keys[row].tobytes(), embeddings[row].tobytes()) for row in chosen])

    def look_up(asked: np.ndarray) -> np.ndarray:
        raw = asked.astype(">i8").tobytes()
        with environment.begin(buffers=True) as transaction:
            found = [transaction.get(raw[at : at + 8]) for at in range(0, len(raw), 8)]
            return np.frombuffer(b"".join(found), np.float32).reshape(len(asked), -1)

    return look_up


def _time(contender: Callable[[np.ndarray], Any], asked: np.ndarray) -> float:
    """Return the seconds of processor time of one call, the least of several rounds. Short calls are repeated."""
    contender(asked)
    begin = time.process_time()
    contender(asked)
    repeats = max(1, min(2_000, round(0.02 / max(time.process_time() - begin, 1e-6))))
    best = float("inf")
    for _ in range(_ROUNDS):
        begin = time.process_time()
        for _ in range(repeats):
            contender(asked)
        best = min(best, (time.process_time() - begin) / repeats)
    return best
