"""What an export keeps in ``.dist_export`` while it is not committed, and what a later one finds there and clears away."""

from __future__ import annotations

import logging

import msgspec

from dist_export.errors import PackageError
from dist_export.formats.recis import is_plain_name
from dist_export.manifest import MANIFEST, PartDigest, decode_manifest
from dist_export.storage.directory import PARTIAL_SUFFIX, WORK_DIRECTORY, Directory
from dist_export.storage.urls import open_directory
from dist_export.workdir import swap

logger = logging.getLogger(__name__)

MARKER = f"{WORK_DIRECTORY}/committing"
"""Written right before the manifest: where both are, a commit was cut off in its clean-up."""

UPLOADS = f"{WORK_DIRECTORY}/uploads.json"
"""The uploads to an S3 store that are under way; without it a rerun gives them up instead of going on with them."""

_SMALL_FILES = f"{WORK_DIRECTORY}/small_files.json"
_SHARD_SUFFIX = ".safetensors"


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Says that one shard file is whole, and of which plan it is; a plan's digest covers its source's fingerprint."""

    plan: str
    name: str
    num_bytes: int
    digest: str
    parts: tuple[PartDigest, ...] = ()
    """Of a file that an S3 store has copied parts of: their sizes and digests, as in the manifest."""
    stored: str = ""
    """The checksum that an S3 store keeps of the whole file: with it a shard need not be read again."""


def write_receipt(target: Directory, receipt: Receipt) -> None:
    """Vouch for a shard."""
    target.write(_receipt_name(receipt.name), msgspec.json.encode(receipt))


def read_receipt(target: Directory, shard: str) -> Receipt | None:
    """Return what vouches for a shard; None where nothing does, or the receipt was cut short by a crash."""
    try:
        receipt = msgspec.json.decode(target.read(_receipt_name(shard)), type=Receipt)
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return receipt if receipt.name == shard else None


def withdraw_receipts(target: Directory) -> None:
    """Let nothing vouch for the shards, which were found to be wrong: else a rerun would take them over and fail like this one.

    The receipts stay, for they say whose the shards are.
    """
    for shard in _list_receipted(target):
        write_receipt(target, Receipt(plan="", name=shard, num_bytes=0, digest=""))


def _receipt_name(shard: str) -> str:
    return f"{WORK_DIRECTORY}/{shard}.json"


def list_attempt(target: Directory) -> list[str]:
    """Return what an uncommitted export left in ``target``: shards, partial ones, small files, the record of uploads.

    Of an export to S3 that record is all that tells of it until its first shard is whole, for parts are no objects.
    """
    there = target.names()
    work = target.child(WORK_DIRECTORY).names()
    shards = _receipted(work)
    left = [name for name in there if name in shards or is_partial(name)]
    left += [UPLOADS] if UPLOADS.removeprefix(f"{WORK_DIRECTORY}/") in work else []
    return sorted({*left, *(name for name in _read_small_files(target) if target.exists(name))})


def remove_attempt(target: Directory) -> None:
    """Remove what an uncommitted export left, so that nothing of it is taken over."""
    for name in list_attempt(target):
        target.remove(name)
    for shard in _list_receipted(target):
        target.remove(_receipt_name(shard))
    target.remove(_SMALL_FILES)


def is_partial(name: str) -> bool:
    """Whether a file was being written when its export ended."""
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)


def note_small_files(target: Directory, names: list[str]) -> None:
    """Write down what is about to be written, and remove what an earlier, uncommitted attempt wrote and this one does not."""
    for name in _read_small_files(target):
        if name not in names:
            target.remove(name)
    target.write(_SMALL_FILES, msgspec.json.encode(names))


def _read_small_files(target: Directory) -> list[str]:
    try:
        names = msgspec.json.decode(target.read(_SMALL_FILES), type=list[str])
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return []  # none, or cut short by a crash, before any of these files was written
    return [name for name in names if all(map(is_plain_name, name.split("/")))]


def remove_strays(target: Directory, planned: set[str]) -> None:
    """Remove shards that an uncommitted attempt of another plan left: those that have a receipt but no use."""
    for shard in _list_receipted(target):
        if shard not in planned:
            target.remove(shard)


def _list_receipted(target: Directory) -> list[str]:
    return _receipted(target.child(WORK_DIRECTORY).names())


def _receipted(work: list[str]) -> list[str]:
    """Return the shards whose receipts are among the names of the work directory's files."""
    shards = [name.removesuffix(".json") for name in work if name.endswith(f"{_SHARD_SUFFIX}.json")]
    return [shard for shard in shards if is_plain_name(shard)]


def list_strangers(target: Directory, named: set[str]) -> list[str]:
    """Return what lies in ``target`` and is neither the package's nor an attempt's: it is left alone.

    Files, and directories with a slash at the end: an export into the parent of other exports is most likely a slip.
    """
    known = {path.partition("/")[0] for path in named} | {MANIFEST, WORK_DIRECTORY}
    files = [name for name in target.names() if name not in known and not is_partial(name)]
    return files + [f"{name}/" for name in target.folders() if name not in known]


def begin_commit(target: Directory) -> None:
    """Say that the manifest comes next."""
    target.write(MARKER, b"")


def finish_commit(final: Directory) -> list[str]:
    """Clear away what only a rerun would need, and a package that was replaced; return what was kept of that one.

    The package is committed: what cannot be removed is told, and left.
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
