"""The whole story of an export on one page: read, plan, sample, transfer beside trace, check, commit."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from dist_export.attempt import Receipt, list_strangers, note_small_files, remove_strays, withdraw_receipts
from dist_export.check import TableAccount, audit_files, check_accounts, check_entries
from dist_export.checkpoint.dense_state import describe_dense_state
from dist_export.checkpoint.formats import DCP, RECIS, detect_format
from dist_export.checkpoint.reader import Checkpoint
from dist_export.collective import Ranks
from dist_export.commit import (
    DenseMeta,
    describe_dense_tensors,
    describe_tables,
    list_versions,
    publish,
    render_indexes,
    write_small_files,
)
from dist_export.concealed import conceal
from dist_export.config import ExportConfig
from dist_export.dense.fg import Features, check_conf, collect_confs, has_hashed_input
from dist_export.errors import CheckpointError, CommitError, ConfigError
from dist_export.layout.recis import EMBEDDING_SLOT, INDEX, MERGED, TENSORKEY
from dist_export.layout.safetensors import decode_object
from dist_export.manifest import FileEntry, Manifest, SourceEntry, TableEntry, seal
from dist_export.objects import Objects
from dist_export.places import (
    claim,
    commit_places,
    find_committed,
    identify_export,
    may_copy_within,
    open_places,
    place_of,
    settle,
)
from dist_export.progress import Reporter, summarize
from dist_export.retries import TRAFFIC
from dist_export.source import (
    PlannedSparse,
    look_at_small_files,
    open_checkpoint,
    plan_sparse,
    refuse_changed_files,
)
from dist_export.storage import WORK_DIRECTORY, Directory, local_tree
from dist_export.threads import run_threads
from dist_export.transfer.engine import Share, Transfer

FG = "fg.json"

logger = logging.getLogger(__name__)


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
    traffic = TRAFFIC.snapshot()
    reporter = Reporter(ranks, is_shown=is_shown)
    export_dir = ranks.on_rank_0("choose the place", lambda: place_of(config))
    places = open_places(ranks, config, export_dir)
    source, target, in_place = places.source, places.target, places.in_place
    notes: list[str] = []
    state = ranks.on_rank_0("look at the checkpoint", lambda: look_at_small_files(source))

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
            dropped_in = None if planned is None else planned.plan.dropped.rows_in
            notes += dense.prepare(checkpoint, misplaced, features, dropped_in=dropped_in)

    with contextlib.ExitStack() as held:
        given = f"{objects.model is not None} {objects.fg is not None}"  # objects that the settings do not name
        identity = identify_export(config, "" if planned is None else planned.plan.digest, {**state, "objects": given})
        shards = [] if planned is None else [file.name for file in planned.plan.files]
        places = settle(ranks, places, config, identity, shards)
        target = places.target
        refuse_if_lost = claim(ranks, places, config, held.callback)
        committed = ranks.on_rank_0("look for a committed package", lambda: find_committed(places, identity))
        if committed is not None:
            return committed, [f"package: {export_dir}", "  was committed by an attempt before this one"]
        ranks.note_on_disk(places.on_disk)
        scratch = ranks.on_rank_0("make a temporary directory", lambda: held.enter_context(_scratch(target)))

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
                    ranks,
                    planned,
                    target,
                    reporter,
                    beside=trace,
                    in_place=in_place,
                    digest=config.digest_algorithm,
                    may_copy=may_copy_within(places, config),
                )
        if planned is not None:
            with reporter.stage("check"):
                tables = check(ranks, planned, target)

        def write_rest() -> list[FileEntry]:
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
                remove_strays(target, set() if planned is None else {file.name for file in planned.plan.files})
            return write_small_files(target, small, digest=config.digest_algorithm, keep=keep)

        with reporter.stage("write"):
            small_files = ranks.on_rank_0("write the small files", write_rest)
        if dense is not None:
            with reporter.stage("score"):
                written = None if planned is None else open_checkpoint(ranks, target, asked=RECIS)
                dense.score(written, target)

        exchanged = None
        if source.s3 is not None or target.s3 is not None:
            counts = ranks.gather("count the requests", lambda: TRAFFIC.since(traffic))
            exchanged = {name: sum(its[name] for its in counts) for name in TRAFFIC.NAMES}

        def commit() -> Manifest:
            manifest = _describe(config, checkpoint, planned, tables, in_place=in_place)
            files = [
                FileEntry(path=r.name, num_bytes=r.num_bytes, digest=r.digest, parts=r.parts or msgspec.UNSET)
                for r in receipts
            ]
            files += small_files
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
                    "left_alone": [] if in_place else list_strangers(target, {file.path for file in files}),
                    "identity": identity,
                    **({} if exchanged is None else {"store": exchanged}),
                },
            )
            manifest = seal(manifest)
            refuse_changed_files(source, state)
            refuse_if_lost()
            ranks.refuse_orphans()
            publish(target, manifest)
            ranks.note_on_disk(f"{places.target.url} holds the committed package")
            for name in commit_places(places):
                logger.info("%s was not part of the old package, and was kept", name)
            ranks.note_on_disk(f"{export_dir} holds the committed package")
            return manifest

        with reporter.stage("commit"):
            manifest = ranks.on_rank_0("commit", commit)
    return manifest, summarize(manifest, shares, export_dir)


def _scratch(target: Directory) -> tempfile.TemporaryDirectory[str]:
    """Return a directory for what is traced: where the target is local within it, so that a killed export leaves no litter."""
    return tempfile.TemporaryDirectory(
        prefix="scratch-" if target.is_local else "dist_export-",
        dir=target.join(WORK_DIRECTORY) if target.is_local else None,
        ignore_cleanup_errors=True,  # by then the export has failed for a better reason, or is committed
    )


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


def look_at_source(config: ExportConfig, target: Directory, fg_conf: dict[str, Any] | None) -> list[str]:
    """Refuse what an export into its own checkpoint could only do by rewriting a file of it; return notes. Rank 0."""
    advice = "export_dir is ckpt_dir, whose files are left as they are. Remove it, or give another export_dir"
    if (
        fg_conf is not None
        and target.exists(FG)
        and decode_object(target.read_text(FG), what=target.describe(FG)) != fg_conf
    ):
        raise ConfigError(f"{target.describe(FG)} is there already and is not the one to be exported; {advice}")
    if config.model is not None and target.exists(config.export_folder_name) and not target.exists(WORK_DIRECTORY):
        raise ConfigError(f"{target.describe(config.export_folder_name)} is there already; {advice}")
    if not config.need_export_sparse or not target.exists(MERGED):
        return []
    raw = target.read_text(MERGED)
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
        names = ranks.on_rank_0("list the checkpoint", lambda: list_names(source))
        is_dcp = ranks.on_rank_0("look for the format", lambda: detect_format(source, asked=config.format)) == DCP
        if INDEX not in names and TENSORKEY not in names and not is_dcp:
            return None
    return open_checkpoint(ranks, source, asked=config.format)


def list_names(source: Directory) -> list[str]:
    """Return the names of the source's files."""
    try:
        return source.names()
    except OSError as error:
        raise CheckpointError(f"{source.url} cannot be read: {error.strerror or error}") from error


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
    may_copy: bool,
) -> tuple[list[Receipt], list[Share], int]:
    """Write the shards in a thread while ``beside`` runs in this one. All ranks."""
    job = Transfer(
        ranks,
        planned.plan,
        target,
        limits=planned.limits,
        digest=digest,
        in_place=in_place,
        may_copy=may_copy,
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
        with _withdrawing(target):
            return run_threads(lambda numbers: audit_files(planned.plan, target, numbers), mine)

    found = [accounts for shares in ranks.gather("check the shards", audit) for accounts in shares]

    def account() -> tuple[TableEntry, ...]:
        with _withdrawing(target):
            entries = describe_tables(planned.plan, planned.census, check_accounts(planned.plan, planned.census, found))
            check_entries(entries)
        return entries

    return ranks.run("account for the rows", account)


@contextlib.contextmanager
def _withdrawing(target: Directory) -> Iterator[None]:
    """Withdraw what vouches for the shards where they turn out not to be what was planned."""
    try:
        yield
    except CommitError:
        try:
            withdraw_receipts(target)
        except OSError as error:  # what was found is what the user must hear of
            logger.warning("the receipts in %s could not be withdrawn: %s", target.url, error)
        raise


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
            path=conceal(config.ckpt_dir),
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
