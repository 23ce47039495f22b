"""Compare two packages. Rank 0 reads the manifests and the dense programs; all ranks share the rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np

from dist_export.diff.dense import compare_dense, compare_others, compare_scores
from dist_export.diff.entries import PackageDiff
from dist_export.diff.rows import Run, RunCounts, add_counts, compare_runs, cut_runs, pair_tables
from dist_export.errors import PackageError, UserError
from dist_export.humanize import few
from dist_export.manifest import Manifest
from dist_export.package.local_cache import make_scratch
from dist_export.package.reader import Package
from dist_export.registry.base import resolve
from dist_export.runtime.joining import alone
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory
from dist_export.verify.work_split import DEFAULT_MEMORY, share_out

T = TypeVar("T")

_THREADS = 2


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    storage_options: dict[str, Any] | None = None,
    registry_options: dict[str, Any] | None = None,
    max_memory: int = DEFAULT_MEMORY,
    ranks: Ranks | None = None,
    base_a: str | os.PathLike[str] | None = None,
    base_b: str | os.PathLike[str] | None = None,
) -> PackageDiff:
    """Compare the packages at ``a`` and ``b``, the older one first. All ranks of ``ranks`` call this, and each returns all.

    Args:
        a: a package, as :func:`~dist_export.package.reader.open_package` takes it.
        b: another one.
        storage_options: options for the file system of both.
        registry_options: options for the registry of both.
        max_memory: bytes that a rank may hold in addition to the metadata.
        ranks: the ranks that share the rows; by default only this process.
        base_a: where the base of A is, if A is a delta package. By default it is searched for.
        base_b: the same of B.

    Raises:
        UserError: one of them is no package, its base is not found, it is damaged in what is read of it, or was replaced
            meanwhile.
        StepFailedError: the same, on several ranks.
    """
    ranks = alone() if ranks is None else ranks
    with (
        contextlib.ExitStack() as held,
        ranks.run("open A", lambda: open_compared(a, base_a, storage_options, registry_options, held)) as one,
        ranks.run("open B", lambda: open_compared(b, base_b, storage_options, registry_options, held)) as two,
    ):
        digests = (one.manifest.digest, two.manifest.digest)
        if len(set(ranks.all_gather("compare the manifests", lambda: digests))) > 1:
            raise UserError(f"{a} or {b} was replaced while the ranks opened it; compare again")
        pairs = pair_tables(one, two)
        budget = max_memory // _THREADS
        compared = [paired for paired in pairs if not paired.not_compared]

        def cut() -> list[Run]:
            return [run for paired in compared for run in cut_runs(paired, one, two, max_bytes=budget)]

        runs = ranks.run("cut the rows", lambda: _unreadable(cut))
        mine = _share(runs, ranks)
        by_name = {paired.b.name: paired for paired in pairs}

        def read() -> list[RunCounts]:
            found = run_threads(lambda share: _unreadable(lambda: compare_runs(one, two, by_name, share)), mine)
            return [count for share in found for count in share]

        counts = [count for its in ranks.all_gather("compare the rows", read) for count in its]

        def finish() -> PackageDiff:
            return PackageDiff(
                a=os.fspath(a),
                b=os.fspath(b),
                digest_a=one.manifest.digest,
                digest_b=two.manifest.digest,
                tables=add_counts(one, two, pairs, counts),
                dense=compare_dense(one, two),
                others=compare_others(one, two),
                scores=compare_scores(one, two),
                settings=_compare_settings(one.manifest, two.manifest),
            )

        return ranks.broadcast("compare the dense arch", lambda: _unreadable(finish))


def open_compared(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    storage_options: dict[str, Any] | None,
    registry_options: dict[str, Any] | None,
    held: contextlib.ExitStack,
) -> Package:
    """Open a package at ``path``, a delta with its base. Its files are held. UserError if it cannot be read.

    Of a package in a store the ids and row indexes that are looked up are in TMPDIR until ``held`` ends.
    """

    def open_at(place: str | os.PathLike[str]) -> Directory:
        return open_directory(resolve(os.fspath(place), registry_options or {}).directory, storage_options)

    base_directory = None if base is None else open_at(base)
    directory = open_at(path)
    scratch = make_scratch(directory, held)
    package = _unreadable(lambda: Package(directory, cache_dir=scratch, base_directory=base_directory))
    package.hold()
    return package


def _unreadable(work: Callable[[], T]) -> T:
    """Run ``work``. UserError where it raises PackageError: a package that cannot be read is no difference."""
    try:
        return work()
    except PackageError as error:
        raise UserError(str(error)) from error


def _share(runs: list[Run], ranks: Ranks) -> list[list[Run]]:
    """Return this rank's runs, one list a thread."""
    costs = np.array([run.num_bytes for run in runs], np.int64)
    shares = share_out(costs, ranks.world_size * _THREADS)
    return [runs[share] for share in shares[ranks.rank * _THREADS : (ranks.rank + 1) * _THREADS]]


def _compare_settings(a: Manifest, b: Manifest) -> dict[str, tuple[str, str]]:
    """Return what is packaged otherwise: name -> how A and B have it."""

    def describe(manifest: Manifest) -> dict[str, str]:
        rules = () if manifest.prune is msgspec.UNSET else manifest.prune
        return {
            "mode": manifest.mode,
            "num_shards": f"{manifest.num_shards:,}",
            "source": manifest.source.path_for_people,
            "base": "none" if manifest.base is msgspec.UNSET else manifest.base.path,
            "slots with older values": few(manifest.list_older_slots()) or "none",
            "prune": msgspec.json.encode(rules).decode() if rules else "no rules",
            "score program": "no" if manifest.score is msgspec.UNSET else "yes",
            "serving contract": "no" if manifest.serving is msgspec.UNSET else "yes",
        }

    ours, theirs = describe(a), describe(b)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
