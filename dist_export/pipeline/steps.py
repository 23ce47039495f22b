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

from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.commit.audit import TableAccount, audit_files, check_accounts, check_entries
from dist_export.commit.publish import (
    DenseMeta,
    add_casts,
    describe_tables,
    publish,
    render_indexes,
    write_small_files,
)
from dist_export.config.schema import ExportConfig
from dist_export.errors import CommitError
from dist_export.formats.recis import MERGED
from dist_export.manifest import FileEntry, Manifest, TableEntry, seal
from dist_export.model.user_objects import Objects
from dist_export.pipeline.account import account_export, fates_by_entry, list_dense_left, note_dense_left
from dist_export.pipeline.identity import Told, identify_export
from dist_export.pipeline.inputs import (
    FG,
    encode_fg,
    find_dense,
    look_at_source,
    note_renamed,
    open_source,
    read_confs,
    refuse_unscored,
)
from dist_export.pipeline.locate import Locations, register_package
from dist_export.pipeline.package_manifest import describe_package
from dist_export.pipeline.planning import (
    PlannedSparse,
    look_at_small_files,
    note_numbered_tables,
    open_written,
    plan_sparse,
    refuse_changed_files,
    refuse_changed_payload,
)
from dist_export.pipeline.reused_program import TakenOver
from dist_export.pipeline.target import (
    claim,
    commit_places,
    find_committed,
    find_same,
    may_copy_within,
    open_places,
    settle,
)
from dist_export.pipeline.target_state import OnDisk
from dist_export.plan.casts import casts_by_table, note_unreadable
from dist_export.plan.prune_report import note_rules
from dist_export.plan.selection import is_trainer_state
from dist_export.redact import conceal
from dist_export.reporting.progress import Reporter, summarize, summarize_same
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.storage.directory import WORK_DIRECTORY, Directory, local_tree
from dist_export.storage.retry import TRAFFIC
from dist_export.transfer.casting import Counts, refuse_unfit
from dist_export.transfer.executor import Share, Transfer
from dist_export.transfer.prune_filter import find_pruned
from dist_export.workdir.presence import Written, note_written, refuse_vanished
from dist_export.workdir.state import Receipt, list_strangers, note_small_files, remove_strays, withdraw_receipts

logger = logging.getLogger(__name__)


def export_located(
    ranks: Ranks,
    config: ExportConfig,
    objects: Objects,
    located: Locations,
    reporter: Reporter,
    weights: ModelWeights | None,
    export_dir: str,
) -> tuple[Manifest, list[str]]:
    """Export, and return the committed manifest and the closing summary. All ranks, each with its own objects.

    ``config`` has the paths that ``located`` found, ``weights`` is what the model says of a checkpoint's tensors, and
    ``export_dir`` is where the package goes, the day's subfolder included.

    Raises:
        UserError: before anything is written, for what the user can mend.
        ExportError: later; then there is no manifest and so no package.
        StepFailedError: either, where another rank had it or several had.
    """
    started = time.time()
    traffic = TRAFFIC.snapshot()
    places = open_places(ranks, config, export_dir, objects.model)
    source, target, in_place = places.source, places.target, places.in_place
    notes: list[str] = list(located.notes)
    registered: list[str] = []
    state = ranks.on_rank_0("look at the checkpoint", lambda: look_at_small_files(source))

    with reporter.stage("read"):
        checkpoint = open_source(ranks, config, source, model=objects.model, weights=weights)
        notes += checkpoint.warnings if checkpoint is not None else ()
        fg_conf, mc_conf, features = ranks.run("check fg and mc", lambda: read_confs(config, objects, checkpoint))
        notes += [*features.notes, *note_renamed(fg_conf, checkpoint)]
        if in_place:
            notes += ranks.on_rank_0("look at what is there", lambda: look_at_source(config, target, fg_conf))
        # read also for the tables alone: one that is cut short tells of a save that did not finish
        parameters = ranks.run("look for dense parameters", lambda: find_dense(config, source, checkpoint, weights))
        held_state = ranks.on_rank_0("read the dense parameters", lambda: parameters and parameters.describe()) or []
        trainer_state = [it for it in held_state if config.filter_sparse_opt and is_trainer_state(it[0])]
        dense_state = [it for it in held_state if it not in trainer_state]
        if checkpoint is None and parameters is not None:  # else the tables' reader has told
            notes += ranks.on_rank_0("look at the state", lambda: list(parameters.notes))
        told = Told(state, [fg_conf, mc_conf], ranks.world_size)
        identity = ranks.on_rank_0(
            "identify the export", lambda: identify_export(config, objects, checkpoint, source, told)
        )

    def register(manifest: Manifest) -> Manifest:
        if uri := register_package(config, located, manifest, export_dir):
            registered.append(uri)
            reporter.note_registered(uri)
        return manifest

    def look() -> Manifest | None:
        same = find_same(places, config, identity)
        return same and register(same)

    if (same := ranks.on_rank_0("look for the same export", look)) is not None:
        return same, summarize_same(same, export_dir) + _tell_version(registered)

    planned: PlannedSparse | None = None
    taken_over = TakenOver()
    if config.need_export_sparse:
        assert checkpoint is not None
        with reporter.stage("plan"):
            planned = plan_sparse(ranks, checkpoint, config, world_size=ranks.world_size)
            notes += note_numbered_tables(planned.plan)
            notes += note_unreadable(checkpoint, planned.plan.selection)
            if not in_place and (objects.model is None or objects.dataset is None):
                notes += note_dense_left(list_dense_left(dense_state, planned.plan), checkpoint)
            if source is not None and not in_place:
                has_own = objects.model is not None or fg_conf is not None or mc_conf is not None
                where, plan = source, planned.plan
                notes += ranks.on_rank_0(
                    "look for a program to take over", lambda: taken_over.look(where, plan, has_own=has_own)
                )
            notes += note_rules(checkpoint, planned.plan.pruning, planned.census.pruned)

    dense = None
    ranks.run("look for what scores need", lambda: refuse_unscored(config, objects, checkpoint))
    if objects.model is not None and objects.dataset is not None:
        from dist_export.dense.stage import DenseStage  # torch.export costs a second that other exports need not pay

        with reporter.stage("sample"):
            dense = DenseStage(ranks, config, objects, parameters)
            misplaced = None if planned is None else planned.census.misplaced
            dropped_in = None if planned is None else planned.plan.dropped.rows_in
            is_pruned = None if planned is None else find_pruned(planned.plan.checkpoint, planned.plan.pruning)
            by_table = {} if planned is None else casts_by_table(planned.plan.checkpoint, planned.plan.selection)
            notes += dense.prepare(
                checkpoint, misplaced, features, dropped_in=dropped_in, is_pruned=is_pruned, casts=by_table
            )
            dense_state = dense_state or dense.parameters

    with contextlib.ExitStack() as held:
        shards = [] if planned is None else [file.name for file in planned.plan.files]
        places = settle(ranks, places, config, identity, shards)
        target = places.target
        refuse_if_lost = claim(ranks, places, config, identity, held.callback)
        committed = ranks.on_rank_0(
            "look for a committed package", lambda: find_committed(places, config, identity, and_then=register)
        )
        if committed is not None:
            return committed, summarize_same(committed, export_dir) + _tell_version(registered)
        ranks.note_on_disk(ranks.run("note what is in export_dir", lambda: OnDisk(places.final, places.target)))
        scratch = ranks.on_rank_0("make a temporary directory", lambda: held.enter_context(_scratch(target)))

        def trace() -> None:
            if dense is not None and ranks.rank == 0:
                with reporter.stage("trace"):
                    dense.trace(Path(scratch) / config.export_folder_name, mc_conf)

        tables: tuple[TableEntry, ...] = ()
        receipts: list[Receipt] = []
        shares: list[Share] = []
        casts: Counts = {}
        reused = 0
        with reporter.stage("transfer"):
            if planned is None:
                ranks.gather("trace the dense arch", trace)
            else:
                receipts, shares, reused, casts = transfer(
                    ranks,
                    planned,
                    target,
                    reporter,
                    beside=trace,
                    in_place=in_place,
                    digest=config.digest_algorithm,
                    may_copy=may_copy_within(places, config),
                )
        written: Written = {}

        def note(sizes: dict[str, int]) -> None:
            written.update(note_written(target, sizes))

        if planned is not None:
            with reporter.stage("check"):
                sizes = {receipt.name: receipt.num_bytes for receipt in receipts}
                ranks.on_rank_0("look at the shards", lambda: note(sizes))  # what comes later was not checked
                if config.on_unfit == "error":
                    plan = planned.plan
                    ranks.run("look for values that do not fit", lambda: refuse_unfit(plan, casts))
                tables = add_casts(planned.plan, check(ranks, planned, target), casts)
                if planned.plan.checkpoint.memory is not None:
                    compare_live(ranks, planned, target)

        def write_rest() -> list[FileEntry]:
            small = {name: (Path(scratch) / name).read_bytes() for name in local_tree(Path(scratch))}
            if fg_conf is not None:
                there = in_place and target.exists(FG)  # then it says the same, and a source file is not rewritten
                small[FG] = target.read(FG) if there else encode_fg(fg_conf)
            small |= taken_over.read()
            keep = frozenset({FG} if in_place else ())
            if planned is not None:
                small |= _render(planned, target, dense_state or taken_over.dense_state(), in_place=in_place)
                keep |= frozenset(planned.plan.checkpoint.verbatim) | {MERGED} if in_place else frozenset()
            if not in_place:
                note_small_files(target, list(small))
                remove_strays(target, set() if planned is None else {file.name for file in planned.plan.files})
            return write_small_files(target, small, digest=config.digest_algorithm, keep=keep)

        def write_and_note() -> list[FileEntry]:
            written = write_rest()
            note({file.path: file.num_bytes for file in written})
            return written

        with reporter.stage("write"):
            small_files = ranks.on_rank_0("write the small files", write_and_note)
        if dense is not None:
            with reporter.stage("score"):
                as_served = None if planned is None else open_written(ranks, target, planned.plan)
                dense.score(as_served, target, entries=tables, lists=None if planned is None else planned.id_lists)

        exchanged = None
        if (source is not None and source.s3 is not None) or target.s3 is not None:
            counts = ranks.gather("count the requests", lambda: TRAFFIC.since(traffic))
            exchanged = {name: sum(its[name] for its in counts) for name in TRAFFIC.NAMES}

        def commit() -> Manifest:
            manifest = describe_package(config, checkpoint, planned, tables, located, trainer_state, in_place=in_place)
            account = account_export(
                config,
                checkpoint,
                planned,
                fates_by_entry(tables),
                dense_state=held_state or dense_state,
                taken=None if dense is None else dense.taken,
            )
            files = [
                FileEntry(path=r.name, num_bytes=r.num_bytes, digest=r.digest, parts=r.parts or msgspec.UNSET)
                for r in receipts
            ]
            files += small_files
            manifest = msgspec.structs.replace(
                manifest,
                files=tuple(files),
                account=account,
                dense=None if dense is None else dense.entry,
                parity=None if dense is None else dense.parity,
                drift=None if dense is None else dense.drift,
                notes=(*notes, *(() if dense is None else dense.notes)),
                run={
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                    "export_dir": conceal(export_dir),
                    "world_size": ranks.world_size,
                    "ranks": [share._asdict() for share in shares],
                    "seconds": {name: round(seconds, 3) for name, seconds in reporter.seconds.items()},
                    "sample": None if dense is None else dense.counts,
                    **({"drift": dense.drift_counts} if dense is not None and dense.drift_counts else {}),
                    "reused_shards": reused,
                    "left_alone": [] if in_place else list_strangers(target, {file.path for file in files}),
                    "identity": identity,
                    **({} if dense is None else dense.own_values),
                    **({} if exchanged is None else {"store": exchanged}),
                },
            )
            manifest = seal(taken_over.describe(manifest))
            refuse_changed_files(source, state)
            if checkpoint is not None:
                refuse_changed_payload(checkpoint)
            refuse_if_lost()
            ranks.refuse_orphans()
            refuse_vanished(target, written, in_place=in_place)
            publish(target, manifest)
            for name in commit_places(places, and_then=lambda: register(manifest)):
                logger.info("%s was not part of the old package, and was kept", name)
            return manifest

        with reporter.stage("commit"):
            manifest = ranks.on_rank_0("commit", commit)
    reporter.note_result(manifest, shares)
    return manifest, summarize(manifest, shares, export_dir) + _tell_version(registered)


def _tell_version(registered: list[str]) -> list[str]:
    return [f"  version  {uri}" for uri in registered]


def _scratch(target: Directory) -> tempfile.TemporaryDirectory[str]:
    """Return a directory for what is traced: where the target is local within it, so that a killed export leaves no litter."""
    return tempfile.TemporaryDirectory(
        prefix="scratch-" if target.is_local else "dist_export-",
        dir=target.join(WORK_DIRECTORY) if target.is_local else None,
        ignore_cleanup_errors=True,  # by then the export has failed for a better reason, or is committed
    )


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
) -> tuple[list[Receipt], list[Share], int, Counts]:
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
            reporter.transferring(job.reused_bytes + job.num_bytes, reused_bytes=job.reused_bytes),
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
        return receipts, shares, job.num_reused, job.casts
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


def compare_live(ranks: Ranks, planned: PlannedSparse, target: Directory) -> None:
    """Compare some rows of the model in memory with the written ones. All ranks. CommitError where one differs."""
    from dist_export.live.spot_check import compare_rows

    ranks.gather("compare rows with the model's", lambda: compare_rows(planned.plan, target))


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
