"""The working state in ``.dist_export`` of an uncommitted export, which a later export reads and removes."""

from __future__ import annotations

import logging

import msgspec

from dist_export.errors import PackageError
from dist_export.formats.package_signs import SIDE_SUFFIXES
from dist_export.formats.recis import is_plain_name
from dist_export.manifest import MANIFEST, PartDigest, RowIndexEntry, decode_manifest
from dist_export.storage.directory import PARTIAL_SUFFIX, WORK_DIRECTORY, Directory
from dist_export.storage.urls import open_directory
from dist_export.workdir import swap

logger = logging.getLogger(__name__)

MARKER = f"{WORK_DIRECTORY}/committing"
"""Written right before the manifest. If both exist, a commit was interrupted during its clean-up."""

UPLOADS = f"{WORK_DIRECTORY}/uploads.json"
"""The running uploads to an S3 store. Without this file a rerun aborts them instead of resuming them."""

_SMALL_FILES = f"{WORK_DIRECTORY}/small_files.json"
_WITH_RECEIPTS = (".safetensors", *SIDE_SUFFIXES)


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Records that one shard, or the file of its row indexes or row fingerprints, is finished, and its plan.

    A plan's digest covers its source's fingerprint. A file of deleted ids, which is always written anew, has one without a
    plan: it tells a later export whose file that is.
    """

    plan: str
    name: str
    num_bytes: int
    digest: str
    parts: tuple[PartDigest, ...] = ()
    """For a file of which an S3 store has copied parts: their sizes and digests, as in the manifest."""
    stored: str = ""
    """The checksum that an S3 store keeps of the whole file. With it the shard need not be read again."""
    row_indexes: dict[str, RowIndexEntry | None] = {}
    """For a file of row indexes: where they are, by the key of the id block; None for a part that has none."""


_RECEIPTS = msgspec.json.Decoder(Receipt)
_NAMES = msgspec.json.Decoder(list[str])


def write_receipt(target: Directory, receipt: Receipt) -> None:
    """Write the receipt of a shard."""
    target.write(_receipt_name(receipt.name), msgspec.json.encode(receipt))


def read_receipt(target: Directory, shard: str) -> Receipt | None:
    """Return the receipt of a shard; None if there is none, or if a crash cut it short."""
    try:
        receipt = _RECEIPTS.decode(target.read(_receipt_name(shard)))
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return receipt if receipt.name == shard else None


def withdraw_receipts(target: Directory) -> None:
    """Withdraw the receipts of shards that were found to be wrong. Otherwise a rerun would reuse them and fail again.

    The files of the receipts stay, because they show that the shards belong to an export.
    """
    for shard in _list_receipted(target):
        write_receipt(target, Receipt(plan="", name=shard, num_bytes=0, digest=""))


def has_receipt(name: str) -> bool:
    """Return whether a file of the package has a receipt while the export is not committed."""
    return name.endswith(_WITH_RECEIPTS)


def _receipt_name(shard: str) -> str:
    return f"{WORK_DIRECTORY}/{shard}.json"


def list_working_state(target: Directory) -> list[str]:
    """Return the files that an uncommitted export left in ``target``: shards, partial ones, small files, the record of uploads.

    For an export to S3 that record is the only trace until its first shard is finished, because parts are no objects.
    """
    there = target.names()
    work = target.child(WORK_DIRECTORY).names()
    shards = _receipted(work)
    left = [name for name in there if name in shards or is_partial(name)]
    left += [UPLOADS] if UPLOADS.removeprefix(f"{WORK_DIRECTORY}/") in work else []
    return sorted({*left, *(name for name in _read_small_files(target) if target.exists(name))})


def remove_working_state(target: Directory) -> None:
    """Remove the files that an uncommitted export left, so that none of them is reused."""
    for name in list_working_state(target):
        target.remove(name)
    for shard in _list_receipted(target):
        target.remove(_receipt_name(shard))
    target.remove(_SMALL_FILES)


def is_partial(name: str) -> bool:
    """Return whether a file was being written when its export ended."""
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)


def note_small_files(target: Directory, names: list[str]) -> None:
    """Record the names of files to be written, and remove those that only an earlier, uncommitted export wrote."""
    for name in _read_small_files(target):
        if name not in names:
            target.remove(name)
    target.write(_SMALL_FILES, msgspec.json.encode(names))


def _read_small_files(target: Directory) -> list[str]:
    try:
        names = _NAMES.decode(target.read(_SMALL_FILES))
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return []  # there is none, or a crash cut it short before any of these files was written
    return [name for name in names if all(map(is_plain_name, name.split("/")))]


def remove_strays(target: Directory, planned: set[str]) -> None:
    """Remove files that an uncommitted export with another plan left: they have a receipt, but are not in this plan."""
    for shard in _list_receipted(target):
        if shard not in planned:
            target.remove(shard)


def _list_receipted(target: Directory) -> list[str]:
    return _receipted(target.child(WORK_DIRECTORY).names())


def _receipted(work: list[str]) -> list[str]:
    """Return the shards that have a receipt, from the names of the files in the working directory."""
    names = [name.removesuffix(".json") for name in work if name.endswith(".json")]
    return [name for name in names if has_receipt(name) and is_plain_name(name)]


def list_foreign_files(target: Directory, named: set[str]) -> list[str]:
    """Return the foreign files in ``target``: those of neither the package nor an unfinished export. They are kept.

    Directories have a slash at the end: an export into the parent of other exports is most likely a mistake.
    """
    known = {path.partition("/")[0] for path in named} | {MANIFEST, WORK_DIRECTORY}
    files = [name for name in target.names() if name not in known and not is_partial(name)]
    return files + [f"{name}/" for name in target.folders() if name not in known]


def begin_commit(target: Directory) -> None:
    """Record that the manifest is written next."""
    target.write(MARKER, b"")


def finish_commit(final: Directory) -> list[str]:
    """Remove the working state and a replaced package; return the foreign files of the latter that were kept.

    The package is committed. If a file cannot be removed, that is logged and the file is left.
    """
    kept: list[str] = []
    if final.is_local:
        for what in ("next", "old"):
            old = open_directory(swap.beside(final.path, what))
            if not old.exists(MANIFEST):
                continue
            try:
                manifest = decode_manifest(old.read_text(MANIFEST), where=old.describe(MANIFEST))
                kept += swap.discard(old.path, final, named={MANIFEST, *(file.path for file in manifest.files)})
            except (OSError, PackageError) as error:
                logger.warning("the old package in %s could not be removed: %s", old.path, error)
        try:
            swap.empty_trash(final.path)
        except OSError as error:
            logger.warning("old packages beside %s could not be removed: %s", final.path, error)
    try:
        final.remove_tree(WORK_DIRECTORY)
    except OSError as error:
        logger.warning("%s could not be removed: %s", final.describe(WORK_DIRECTORY), error)
    return kept
