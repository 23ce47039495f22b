"""The whole story of an export on one page: read, plan, sample, transfer beside trace, check, commit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from dist_export.check import TableAccount, audit_files, check_accounts
from dist_export.checkpoint.dense_state import describe_dense_state
from dist_export.checkpoint.reader import Checkpoint
from dist_export.collective import Ranks
from dist_export.commit import (
    DenseMeta,
    describe_dense_tensors,
    describe_tables,
    list_versions,
    note_small_files,
    publish,
    remove_strays,
    render_indexes,
    write_small_files,
)
from dist_export.config import ExportConfig
from dist_export.dense.fg import Features, check_conf, collect_confs, has_hashed_input
from dist_export.errors import ConfigError
from dist_export.layout.recis import EMBEDDING_SLOT, INDEX, MERGED, TENSORKEY
from dist_export.layout.safetensors import decode_object
from dist_export.manifest import MANIFEST, FileEntry, Manifest, SourceEntry, TableEntry, seal
from dist_export.objects import Objects
from dist_export.progress import Reporter, summarize
from dist_export.source import PlannedSparse, open_checkpoint, plan_sparse
from dist_export.storage import WORK_DIRECTORY, Directory, local_tree
from dist_export.threads import run_threads
from dist_export.transfer.engine import Receipt, Share, Transfer

FG = "fg.json"


def run_export(
    ranks: Ranks, config: ExportConfig, objects: Objects, *, is_shown: bool = False
) -> tuple[Manifest, list[str]]:
    """Export, and return the committed manifest and the closing summary. All ranks, each with its own objects.

    Raises:
        UserError: before anything is written, for what the user can mend.
        ExportError: later; then there is no manifest and so no package.
        StepFailedError: either, where another rank had it or several had.
    """
    started = time.time()
    reporter = Reporter(ranks, is_shown=is_shown)
    export_dir = ranks.on_rank_0("choose the place", lambda: place_of(config))
    source, target = ranks.run("check the places", lambda: open_places(ranks, config, export_dir))
    in_place = source.is_same(target)
    notes: list[str] = []

    with reporter.stage("read"):
        checkpoint = open_source(ranks, config, source)
        notes += checkpoint.warnings if checkpoint is not None else ()
        fg_conf, mc_conf, features = ranks.run("check fg and mc", lambda: read_confs(config, objects, checkpoint))
        notes += features.notes
        if in_place:
            notes += ranks.on_rank_0("look at what is there", lambda: look_at_source(config, target, fg_conf))
        # read also for the tables alone: a model.pt that is cut short tells of a save that did not finish
        dense_state = ranks.on_rank_0("read model.pt", lambda: describe_dense_state(source)) or []

    planned: PlannedSparse | None = None
    if config.need_export_sparse:
        assert checkpoint is not None
        with reporter.stage("plan"):
            planned = plan_sparse(ranks, checkpoint, config, world_size=ranks.world_size)

    dense = None
    if objects.model is not None:
        from dist_export.dense.stage import DenseStage  # torch.export costs a second that other exports need not pay

        with reporter.stage("sample"):
            dense = DenseStage(ranks, config, objects, source)
            misplaced = None if planned is None else planned.census.misplaced
            notes += dense.prepare(checkpoint, misplaced, features)

    with contextlib.ExitStack() as held:
        scratch = held.enter_context(tempfile.TemporaryDirectory(prefix="dist_export-"))

        def claim() -> None:
            held.callback(target.lock())
            refuse_package(target)  # another export may have committed one since the settings were checked

        ranks.on_rank_0("claim export_dir", claim)

        def trace() -> None:
            if dense is not None and ranks.rank == 0:
                with reporter.stage("trace"):
                    dense.trace(Path(scratch) / config.export_folder_name, mc_conf)

        tables: tuple[TableEntry, ...] = ()
        receipts: list[Receipt] = []
        shares: list[Share] = []
        reused = 0
        with reporter.stage("transfer"):
            if planned is None:
                ranks.gather("trace the dense arch", trace)
            else:
                receipts, shares, reused = transfer(
                    ranks, planned, target, reporter, beside=trace, in_place=in_place, digest=config.digest
                )
        if planned is not None:
            with reporter.stage("check"):
                tables = check(ranks, planned, target)

        def commit() -> Manifest:
            manifest = _describe(config, checkpoint, planned, tables, in_place=in_place)
            files = [FileEntry(path=r.name, num_bytes=r.num_bytes, digest=r.digest) for r in receipts]
            small = {name: (Path(scratch) / name).read_bytes() for name in local_tree(Path(scratch))}
            if fg_conf is not None:
                there = in_place and target.exists(FG)  # then it says the same, and a source file is not rewritten
                small[FG] = target.read(FG) if there else encode_fg(fg_conf)
            keep = frozenset({FG} if in_place else ())
            if planned is not None:
                small |= _render(planned, target, dense_state, in_place=in_place)
                keep |= frozenset(planned.plan.checkpoint.verbatim) | {MERGED} if in_place else frozenset()
            if not in_place:
                note_small_files(target, list(small))
                remove_strays(target, None if planned is None else planned.plan)
            files += write_small_files(target, small, digest=config.digest, keep=keep)
            manifest = msgspec.structs.replace(
                manifest,
                files=tuple(files),
                dense=None if dense is None else dense.entry,
                parity=None if dense is None else dense.parity,
                notes=tuple(notes),
                run={
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                    "world_size": ranks.world_size,
                    "seconds": {name: round(seconds, 3) for name, seconds in reporter.seconds.items()},
                    "sample": None if dense is None else dense.counts,
                    "reused_shards": reused,
                },
            )
            manifest = seal(manifest)
            publish(target, manifest)
            return manifest

        with reporter.stage("commit"):
            manifest = ranks.on_rank_0("commit", commit)
    return manifest, summarize(manifest, shares, export_dir)


def place_of(config: ExportConfig) -> str:
    """Return where the package goes, the dated subfolder of ``add_subfolder`` included (as RecIS names it)."""
    if not config.add_subfolder or config.export_dir.endswith("data"):
        return config.export_dir
    return f"{config.export_dir.rstrip('/')}/{time.strftime('%Y%m%d')}000000/data"


def open_places(ranks: Ranks, config: ExportConfig, export_dir: str) -> tuple[Directory, Directory]:
    """Return source and target; refuse a target that would destroy something, or that other ranks cannot see."""
    source = Directory(config.ckpt_dir, config.storage_options)
    target = Directory(export_dir, config.storage_options)
    for directory in (source, target):
        if ranks.world_size > 1 and not directory.is_shared:
            raise ConfigError(
                f"{directory.url} lives in the memory of one process, but {ranks.world_size} ranks export; use one rank"
            )
    is_same = source.is_same(target)
    if is_same and config.filter_sparse_opt and config.need_export_sparse:
        raise ConfigError(
            f"export_dir is ckpt_dir ({config.ckpt_dir}); filter_sparse_opt would replace the training checkpoint by one "
            "without optimizer state. Give another export_dir"
        )
    refuse_package(target)
    if target.is_local and os.path.exists(target.path) and not os.path.isdir(target.path):
        raise ConfigError(f"export_dir {target.url} is a file, not a directory")
    if not is_same and target.exists(INDEX) and not target.exists(WORK_DIRECTORY):
        raise ConfigError(
            f"export_dir {target.url} holds an {INDEX} that no export of ours left there, so it is another checkpoint or "
            "somebody's export, which would be overwritten. Give another export_dir"
        )
    if (reason := target.why_not_writable()) is not None:
        raise ConfigError(f"export_dir {target.url}: {reason}")
    return source, target


def read_confs(
    config: ExportConfig, objects: Objects, checkpoint: Checkpoint | None
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, Features]:
    """Return fg and mc, checked against their rules, each other and the checkpoint's tables, all findings in one error."""
    fg_conf, mc_conf = collect_confs(objects.fg, config.fg_conf_or_path, config.mc_conf_or_path)
    already_hashed = objects.fg is not None and has_hashed_input(objects.fg)
    features = check_conf(
        fg_conf,
        mc_conf,
        fg_rules=config.fg_rules,
        already_hashed=already_hashed,
        tables=None if checkpoint is None else dims_of(checkpoint),
    )
    return fg_conf, mc_conf, features


def refuse_package(target: Directory) -> None:
    """Refuse a target that holds a committed package."""
    if target.exists(MANIFEST):
        raise ConfigError(
            f"{target.describe(MANIFEST)} is there already: export_dir holds a committed package. Give another "
            "export_dir, or remove the old package first"
        )


def look_at_source(config: ExportConfig, target: Directory, fg_conf: dict[str, Any] | None) -> list[str]:
    """Refuse what an export into its own checkpoint could only do by rewriting a file of it; return notes. Rank 0."""
    advice = "export_dir is ckpt_dir, whose files are left as they are. Remove it, or give another export_dir"
    if (
        fg_conf is not None
        and target.exists(FG)
        and decode_object(target.read(FG), what=target.describe(FG)) != fg_conf
    ):
        raise ConfigError(f"{target.describe(FG)} is there already and is not the one to be exported; {advice}")
    if config.model is not None and target.exists(config.export_folder_name) and not target.exists(WORK_DIRECTORY):
        raise ConfigError(f"{target.describe(config.export_folder_name)} is there already; {advice}")
    if not config.need_export_sparse or not target.exists(MERGED):
        return []
    raw = target.read(MERGED)
    if raw.strip() == b"null":
        raise ConfigError(f"{target.describe(MERGED)} is null, so serving would find no table; {advice}")
    entries = decode_object(raw, what=target.describe(MERGED)).values()
    if all(isinstance(entry, dict) and "is_hashmap" in entry for entry in entries):
        return []
    return [
        f"{MERGED} stays in its old style, with ids and slots and without model.pt: a checkpoint's file is not rewritten"
    ]


def encode_fg(fg_conf: dict[str, Any]) -> bytes:
    """Return the content of fg.json."""
    return msgspec.json.format(msgspec.json.encode(fg_conf), indent=4)


def open_source(ranks: Ranks, config: ExportConfig, source: Directory) -> Checkpoint | None:
    """Open the checkpoint; None for a dense-only export of a directory without sparse files."""
    if not config.need_export_sparse:
        names = ranks.on_rank_0("list the checkpoint", source.names)
        if INDEX not in names and TENSORKEY not in names:
            return None
    return open_checkpoint(ranks, source)


def dims_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the last dimension of each table's embedding."""
    return {
        table.name: (slot.inner_shape or (1,))[-1]
        for table in checkpoint.tables
        for slot in table.slots
        if slot.name == EMBEDDING_SLOT
    }


def transfer(
    ranks: Ranks,
    planned: PlannedSparse,
    target: Directory,
    reporter: Reporter,
    *,
    beside: Any,
    in_place: bool,
    digest: str,
) -> tuple[list[Receipt], list[Share], int]:
    """Write the shards in a thread while ``beside`` runs in this one. All ranks."""
    job = Transfer(
        ranks,
        planned.plan,
        target,
        limits=planned.limits,
        digest=digest,
        in_place=in_place,
        count_bytes=reporter.count_bytes,
    )
    try:
        job.prepare()
        with (
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="transfer") as pool,
            reporter.transferring(planned.plan.num_bytes),
        ):
            written = pool.submit(job.write)

            def wait() -> None:
                try:
                    beside()
                except BaseException:
                    ranks.announce_failure()
                    raise
                finally:
                    concurrent.futures.wait([written])
                written.result()

            try:
                receipts, shares = job.finish(wait)
            except BaseException:  # also Ctrl-C: the transfer thread and the other ranks stop at their next unit
                ranks.announce_failure()
                raise
        return receipts, shares, job.num_reused
    finally:
        job.close()


def check(ranks: Ranks, planned: PlannedSparse, target: Directory) -> tuple[TableEntry, ...]:
    """Account for every row from the written files; return the tables' entries for the manifest. All ranks."""
    threads = planned.limits.threads
    workers = range(ranks.rank * threads, (ranks.rank + 1) * threads)
    mine = [range(worker, len(planned.plan.files), ranks.world_size * threads) for worker in workers]

    def audit() -> list[dict[int, TableAccount]]:
        return run_threads(lambda numbers: audit_files(planned.plan, target, numbers), mine)

    found = [accounts for shares in ranks.gather("check the shards", audit) for accounts in shares]
    return ranks.run(
        "account for the rows",
        lambda: describe_tables(planned.plan, planned.census, check_accounts(planned.plan, planned.census, found)),
    )


def _render(planned: PlannedSparse, target: Directory, dense_state: DenseMeta, *, in_place: bool) -> dict[str, bytes]:
    """Return the json files of the sparse part, index last as RecIS writes it; in place, those of the source as they are."""
    verbatim = planned.plan.checkpoint.verbatim
    rendered = render_indexes(planned.plan, dense_state)
    if in_place:
        return {**rendered, **{name: target.read(name) for name in (MERGED, *verbatim) if target.exists(name)}}
    if planned.plan.is_copy:
        rendered |= {name: verbatim[name] for name in reversed(list(verbatim))}
    return rendered


def _describe(
    config: ExportConfig,
    checkpoint: Checkpoint | None,
    planned: PlannedSparse | None,
    tables: tuple[TableEntry, ...],
    *,
    in_place: bool,
) -> Manifest:
    kept, dropped = ((), ()) if planned is None else describe_dense_tensors(planned.plan)
    copy = "in_place" if in_place else "copy"
    mode = "dense_only" if planned is None else "filter" if config.filter_sparse_opt else copy
    return Manifest(
        mode=mode,
        num_shards=0 if planned is None else planned.plan.num_shards,
        source=SourceEntry(
            path=config.ckpt_dir,
            format="none" if checkpoint is None else checkpoint.format,
            fingerprint="" if checkpoint is None else checkpoint.fingerprint,
            num_files=0 if checkpoint is None else len(checkpoint.files),
            num_bytes=0 if checkpoint is None else checkpoint.num_bytes,
        ),
        tables=tables,
        dense_tensors=kept,
        dropped_dense_tensors=dropped,
        files=(),
        dense=None,
        parity=None,
        notes=(),
        versions=list_versions(),
    )
