"""Record the files that an export has written, and check them again right before the commit."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping

from dist_export.errors import CommitError
from dist_export.storage.directory import Directory, FileStat
from dist_export.workdir.state import Receipt, has_receipt, write_receipt

Written = dict[str, FileStat]
"""File -> its size, with the inode and time on a disk, or the version on a store, which identify its content."""


def note_written(target: Directory, sizes: Mapping[str, int]) -> Written:
    """Return the state of files that were just written. Rank 0.

    Args:
        target: where they are.
        sizes: their sizes in bytes, by name.

    Raises:
        CommitError: one is missing, or of another size.
    """
    found = _look(target, sizes)
    for name, num_bytes in sizes.items():
        if name not in found:
            raise refusal_of(target, name, "is gone")
        if found[name].size != num_bytes:
            raise refusal_of(target, name, f"has {found[name].size:,} bytes, and {num_bytes:,} were written")
    return found


def find_loss(directory: Directory, sizes: Mapping[str, int]) -> str | None:
    """Return what is wrong with the first file that is missing or has another size (in bytes); None if all are right."""
    found = _look(directory, sizes)
    for name, num_bytes in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].size != num_bytes:
            return f"{name} has {found[name].size:,} bytes, not {num_bytes:,} as its manifest says"
    return None


def refuse_vanished(target: Directory, written: Written, *, in_place: bool) -> None:
    """Refuse a commit if files differ from those that were recorded and checked. Rank 0, right before the manifest.

    The receipt of such a shard is withdrawn, so that the next run writes the shard again. With ``in_place`` it is not,
    because the shards are those of the source.

    Raises:
        CommitError: a file was removed, replaced or changed by another program.
    """
    now = _look(target, written)
    wrong = [name for name, found in written.items() if now.get(name) != found]
    if not wrong:
        return
    for name in wrong:
        if has_receipt(name) and not in_place:
            write_receipt(target, Receipt(plan="", name=name, num_bytes=0, digest=""))
    raise refusal_of(target, wrong[0], "is gone" if wrong[0] not in now else "was replaced or changed")


def refusal_of(target: Directory, name: str, what: str) -> CommitError:
    """Return the error for a written file that ``what`` has happened to, such as ``is gone``."""
    return CommitError(
        f"{target.describe(name)}: {what} since it was written: something else removes or writes files there. No manifest was "
        "written, so there is no package; see to it that nothing does, and run the export again"
    )


def _look(target: Directory, names: Iterable[str]) -> dict[str, FileStat]:
    """Return the states of the files that exist; on S3 with one request for each thousand files of a directory."""
    by_folder: dict[str, list[str]] = {}
    for name in names:
        by_folder.setdefault(posixpath.dirname(name), []).append(posixpath.basename(name))
    found: dict[str, FileStat] = {}
    for folder, its in by_folder.items():
        stats = (target.child(folder) if folder else target).find_many(its)
        found |= {posixpath.join(folder, name): stat for name, stat in stats.items()}
    return found
