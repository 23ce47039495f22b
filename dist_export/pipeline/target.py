"""Where an export reads and writes: what may stand in export_dir, and what happens to it."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dist_export.config.needs import ReplacedPackage, UserCallables
from dist_export.config.schema import ExportConfig
from dist_export.dense.own_values_entry import OwnValues
from dist_export.errors import ConfigError, PackageError
from dist_export.formats.recis import INDEX, MERGED, TENSORKEY
from dist_export.manifest import MANIFEST, Manifest, decode_manifest
from dist_export.pipeline.identity import find_incomparable, has_settings
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory, open_place
from dist_export.workdir import lock as lock_file
from dist_export.workdir import swap
from dist_export.workdir.presence import find_loss
from dist_export.workdir.state import MARKER, finish_commit, list_working_state, remove_working_state

_MENDED_IN_SETTINGS = (errno.EACCES, errno.EPERM, errno.EHOSTUNREACH)
"""A store that lets nobody in, or is not reached at all. Other errors of a store may be gone the next time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPaths:
    """The directories of an export; the same on all ranks."""

    source: Directory | None
    """None where the source is the model in memory."""
    final: Directory
    """export_dir."""
    target: Directory
    """Where the files are written: ``final``, or a directory beside it while an old package is in ``final``."""
    in_place: bool
    """The target is the source, whose files stay as they are."""
    has_package: bool
    """Whether a package was in ``final`` at first."""
    model: OwnValues = field(default_factory=OwnValues)
    """Of the caller's model, what no checkpoint tells."""

    @property
    def way_out(self) -> str:
        """What can be done about a package that is in the way, for messages."""
        return _say_way_out(self.final, in_place=self.in_place)

    @property
    def claimed(self) -> tuple[Directory, ...]:
        """The directories that nobody else may write to meanwhile."""
        return (self.final, self.target) if self.is_replacing else (self.final,)

    @property
    def is_replacing(self) -> bool:
        """Whether an old package stays readable in ``final`` until the new one takes its place."""
        return self.target is not self.final


def place_of(export_dir: str, *, add_subfolder: bool) -> str:
    """Return where the package goes, the dated subfolder of ``add_subfolder`` included (as RecIS names it)."""
    if not add_subfolder or export_dir.endswith("data"):
        return export_dir
    return f"{export_dir.rstrip('/')}/{time.strftime('%Y%m%d')}000000/data"


def open_paths(ranks: Ranks, config: ExportConfig, export_dir: str, model: Any = None) -> ExportPaths:
    """Look at source and target; refuse what would destroy something, or what other ranks cannot see. All ranks.

    ``model`` is the caller's, whose own values a package may have.
    """

    def check() -> tuple[Directory | None, Directory]:
        try:
            return _check_paths(ranks, config, export_dir)
        except OSError as error:
            if "://" not in str(error.filename) or error.errno not in _MENDED_IN_SETTINGS:
                raise
            raise ConfigError(f"{error.filename} cannot be looked at: {error.strerror}. Nothing was written") from error

    source, final = ranks.check("check the places", check)
    in_place = source is not None and source.is_same(final)

    def look() -> tuple[bool, bool]:
        """Return whether there is an old package that is to be replaced, and whether there is any."""
        if final.is_local and swap.is_cut_off(final.path):
            release = lock_file.lock(open_directory(swap.beside(final.path, "old")))  # whoever cut it off is gone then
            try:
                swap.recover(final.path)
            finally:
                release()
        is_old = final.exists(MANIFEST) and not may_be_committed(final) and not _may_be_same(final, config)
        if is_old:
            _refuse_package(final, config, in_place=in_place)
        if config.on_unfinished == "error" and not _has_restarted():
            _refuse_working_state(_next_to(final) if is_old else final)
        return is_old, final.exists(MANIFEST)

    is_replacing, has_package = ranks.broadcast("look at export_dir", look)
    return ExportPaths(
        source=source,
        final=final,
        target=_next_to(final) if is_replacing else final,
        in_place=in_place,
        has_package=has_package,
        model=OwnValues(model, config.dense_model_name, config.sparse_model_name),
    )


def _next_to(final: Directory) -> Directory:
    return open_directory(swap.beside(final.path, "next"))


def _check_paths(ranks: Ranks, config: ExportConfig, export_dir: str) -> tuple[Directory | None, Directory]:
    source = None
    if config.ckpt_dir is not None:
        source = open_place(config.ckpt_dir, config.storage_options, follow_links=config.follow_links)
    final = open_directory(export_dir, config.options_of_target)
    for directory in (source, final) if source is not None else (final,):
        if ranks.world_size > 1 and not directory.is_shared:
            raise ConfigError(
                f"{directory.url} lives in the memory of one process, but {ranks.world_size} ranks export; use one rank"
            )
    is_same = source is not None and source.is_same(final)
    where = "" if source is None else source.url
    if is_same and config.filter_sparse_opt and (config.need_export_sparse or config.is_refresh):
        raise ConfigError(
            f"export_dir is ckpt_dir ({where}); filter_sparse_opt would replace the training checkpoint by one "
            "without optimizer state. Give another export_dir"
        )
    if is_same and config.follow_links:
        raise ConfigError(
            f"export_dir is ckpt_dir ({where}), and a package holds its files itself: links that lead out of it "
            "cannot be followed. Give another export_dir"
        )
    if final.is_local and os.path.exists(final.path) and not os.path.isdir(final.path):
        raise ConfigError(f"export_dir {final.url} is a file, not a directory")
    if not is_same and final.exists(INDEX) and not final.exists(MANIFEST) and INDEX not in list_working_state(final):
        raise ConfigError(
            f"export_dir {final.url} holds an {INDEX} that dist_export did not write, so it is another checkpoint or "
            "somebody's export, which would be overwritten. Give another export_dir"
        )
    is_there = final.exists(MANIFEST) and not config.overwrite  # nothing is written then, or it is refused for that
    if not is_there and (reason := final.why_not_writable()) is not None:
        raise ConfigError(f"export_dir {final.url}: {reason}")
    return source, final


def may_be_committed(final: Directory) -> bool:
    """Whether the package in ``final`` may be what an attempt of this very export committed before it was cut off."""
    return final.exists(MARKER) or _has_restarted()


def _has_restarted() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _settle(paths: ExportPaths, config: ReplacedPackage, identity: str, shards: list[str]) -> bool:
    """Return whether a package in export_dir is replaced, now that it is known which export this is. Rank 0.

    Raises:
        ConfigError: a package of another export that may not be replaced; a file that no export of ours left, under the
            name of one of ``shards`` or of an index.
    """
    final = paths.final
    refuse_foreign_files(paths, shards)
    if paths.is_replacing or not final.exists(MANIFEST) or not may_be_committed(final):
        return paths.is_replacing
    if _read_same(paths, config, identity) is not None:
        return False
    _refuse_package(final, config, in_place=paths.in_place)
    return True


def refuse_foreign_files(paths: ExportPaths, shards: list[str]) -> None:
    """Refuse a file that no export of ours left, under the name of one of ``shards`` or of an index. ConfigError. Rank 0."""
    final = paths.final
    if final.exists(MANIFEST) or paths.in_place or list_working_state(final):
        return  # where an export of ours was at work, a shard that lost its receipt is written anew
    planned = [*shards, *((TENSORKEY, MERGED) if shards else ())]
    foreign = sorted(set(final.names()) & set(planned))
    if foreign:
        raise ConfigError(
            f"{final.describe(foreign[0])} is there already, and dist_export did not write it ({len(foreign)} such files): it "
            "would be overwritten. Move it away, or give another export_dir"
        )


def find_same(paths: ExportPaths, config: ReplacedPackage, identity: str) -> Manifest | None:
    """Return the manifest of the package in export_dir if it is this very export's, whoever started that one. Rank 0.

    Schedulers start jobs again that have ended well. Nothing is claimed and nothing written. It is no matter for an export that
    is to begin anew, nor for one whose clean-up is still to be done (:func:`find_committed`).

    Raises:
        ConfigError: it is another export's, or not whole.
    """
    final = paths.final
    if paths.is_replacing or _begins_anew(config) or not final.exists(MANIFEST) or final.exists(MARKER):
        return None
    return _read_same(paths, config, identity)


def _begins_anew(config: ReplacedPackage) -> bool:
    """Whether a package that is there is no answer: of a model in memory nothing tells whether it is still the same."""
    return config.overwrite or config.on_unfinished == "restart" or config.ckpt_dir is None


def _may_be_same(final: Directory, config: ExportConfig) -> bool:
    """Whether the package in ``final`` may be this very export's, as far as its settings tell: more is known later."""
    if _begins_anew(config):
        return False
    try:
        return has_settings(_read_manifest(final), config)
    except (OSError, PackageError):
        return False


def _is_of(final: Directory, identity: str) -> bool:
    try:
        return _read_manifest(final).run.get("identity") == identity
    except (OSError, PackageError):
        return False


def _read_same(paths: ExportPaths, config: ReplacedPackage, identity: str) -> Manifest | None:
    """Return the manifest in ``final`` if it is of this very export, and its files are there; None where it may be replaced.

    Raises:
        ConfigError: it may not.
    """
    final = paths.final
    manifest = _read_manifest(final)
    if manifest.run.get("identity") != identity:
        if config.overwrite:
            return None
        raise ConfigError(
            f"{final.describe(MANIFEST)} is there already: export_dir holds a committed package of another source or other "
            f"settings{_say_incomparable(config)}. {paths.way_out}"
        )
    if difference := paths.model.find_difference(manifest.run):
        if config.overwrite:
            return None
        raise ConfigError(
            f"{final.describe(MANIFEST)} is there already: export_dir holds a package of these settings and this source, "
            f"but {difference}. {paths.way_out}"
        )
    loss = find_loss(final, {file.path: file.num_bytes for file in manifest.files})
    if loss is not None and not config.overwrite:
        raise ConfigError(f"export_dir {final.url} holds the package of this very export, but {loss}. {paths.way_out}")
    return manifest if loss is None else None


def _read_manifest(final: Directory) -> Manifest:
    return decode_manifest(final.read_text(MANIFEST), where=final.describe(MANIFEST))


def _refuse_package(final: Directory, config: ReplacedPackage, *, in_place: bool) -> None:
    """Refuse a target that holds a committed package, unless it may and can be replaced."""
    there = f"{final.describe(MANIFEST)} is there already: export_dir holds a committed package"
    if not config.overwrite:
        raise ConfigError(f"{there}{_say_incomparable(config)}. {_say_way_out(final, in_place=in_place)}")
    if in_place:
        raise ConfigError(f"{there}, in the checkpoint itself, which overwrite does not touch. Remove that file first")
    if not final.is_local:
        raise ConfigError(
            f"{there}. On this store files cannot be renamed, so overwrite would destroy it before the new one is whole; "
            "give a new export_dir"
        )
    if (reason := swap.why_not_replaceable(final.path)) is not None:
        raise ConfigError(f"{there}, and {final.url} {reason}; give another export_dir")


def _say_incomparable(config: UserCallables) -> str:
    why = find_incomparable(config)
    return why and f" ({why})"


def _say_way_out(final: Directory, *, in_place: bool) -> str:
    """Return what can be done about a package that is in the way, where ``overwrite`` would not only be refused."""
    if in_place:
        return f"It is the checkpoint itself, which overwrite does not touch: remove {MANIFEST} first, or give another export_dir"
    if not final.is_local:
        return "On this store a package cannot be replaced in one step: give another export_dir"
    return "Set overwrite: true to replace it, or give another export_dir, or remove the old package first"


def _refuse_working_state(directory: Directory) -> None:
    left = list_working_state(directory)
    if left:
        raise ConfigError(
            f"{directory.url} holds an unfinished export ({len(left)} files, such as {left[0]}), and on_unfinished is error. "
            "Set on_unfinished: resume to go on with it, or restart to begin anew"
        )


def claim(
    ranks: Ranks,
    paths: ExportPaths,
    config: ReplacedPackage,
    identity: str,
    shards: list[str],
    release: Callable[[lock_file.Release], object],
) -> tuple[ExportPaths, Callable[[], None]]:
    """Decide about what is in export_dir, and claim the directories for this export. All ranks.

    Args:
        shards: the files that this export will write.
        release: gets what gives each claim back.

    Returns:
        Where the files are written; and what raises CommitError if the claim was lost: for rank 0, right before the commit.

    Raises:
        ConfigError: as :func:`_settle`; or another export has the directory.
    """
    final = paths.final
    checks: list[Callable[[], None]] = []

    def settled(is_replacing: bool) -> ExportPaths:
        return dataclasses.replace(paths, target=_next_to(final) if is_replacing else final)

    def lock() -> bool:
        is_replacing = _settle(paths, config, identity, shards)
        if not final.is_local:
            lease = lock_file.Lease(final)
            release(lease.release)
            checks.append(lease.refuse_if_lost)
        else:
            for directory in settled(is_replacing).claimed:
                release(lock_file.lock(directory))
        return is_replacing

    def join() -> None:
        for directory in paths.claimed if ranks.rank and final.is_local else ():
            release(lock_file.join_lock(directory))

    def refuse_if_lost() -> None:
        for check in checks:
            check()

    ranks.settle_checks("claim export_dir")
    paths = settled(ranks.broadcast("claim export_dir", lock))
    ranks.run("claim export_dir", join)
    return paths, refuse_if_lost


def clear_target(paths: ExportPaths, config: ReplacedPackage, identity: str) -> None:
    """Look again, now that nobody else is there, and clear away what a restart does not want. Rank 0."""
    final, target = paths.final, paths.target
    has_come = final.exists(MANIFEST) and not paths.is_replacing and not may_be_committed(final)
    if has_come and (_begins_anew(config) or not _is_of(final, identity)):
        raise ConfigError(
            f"{final.describe(MANIFEST)} is there already: another export has just committed a package. {paths.way_out}"
        )
    if paths.is_replacing:
        target.remove(MANIFEST)  # whole, but it never took the old one's place: its shards are taken over
    # of a model in memory nothing tells whether it is still the one that an unfinished export saw
    is_new = config.on_unfinished == "restart" or paths.source is None
    if is_new and not paths.in_place and (paths.is_replacing or not final.exists(MANIFEST)):
        remove_working_state(target)


def find_committed(
    paths: ExportPaths, config: ReplacedPackage, identity: str, and_then: Callable[[Manifest], object] = lambda _: None
) -> Manifest | None:
    """Return the manifest in ``final`` if an attempt of this very export committed it; finish what it had left. Rank 0.

    ``and_then`` is what else has to happen before nothing of the attempt is left.

    Raises:
        ConfigError: it is another export's.
    """
    final = paths.final
    if paths.is_replacing or not final.exists(MANIFEST):
        return None
    manifest = _read_same(paths, config, identity)
    if manifest is None:  # a package that came since settle
        raise ConfigError(f"{final.describe(MANIFEST)}: another export has just committed a package. {paths.way_out}")
    and_then(manifest)
    finish_commit(final)
    return manifest


def commit_paths(paths: ExportPaths, and_then: Callable[[], object] = lambda: None) -> list[str]:
    """Put the package, whole in its target, where it belongs, and clear away. Rank 0.

    What ``and_then`` does a rerun does too, until nothing of the attempt is left.

    Returns the names of what a replaced package's directory held besides, which is in the new one now.
    """
    if paths.is_replacing:
        swap.replace_directory(paths.target.path, paths.final.path)
    and_then()
    return finish_commit(paths.final)
