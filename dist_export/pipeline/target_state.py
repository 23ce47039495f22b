"""What to say of the target when an export ends: looked up at that moment, for another rank may just have committed."""

from __future__ import annotations

import os
import threading

from dist_export.manifest import MANIFEST
from dist_export.storage.directory import Directory

LOOK_SECS = 2.0
"""The disk may be what hangs, and then the process must end all the same."""


class OnDisk:
    """Call it for a sentence on what is in the target now. Any rank, any thread, any time once the target is claimed."""

    def __init__(self, final: Directory, target: Directory) -> None:
        """``target`` is where files are written: another directory than ``final`` while that holds an old package."""
        self._final = final
        self._target = target
        self._old = self._find() if target is not final else None

    def __call__(self) -> str:
        """Return the sentence, without its full stop. It takes :data:`LOOK_SECS` at most, and raises nothing."""
        said: list[str] = []
        looking = threading.Thread(target=lambda: said.append(self._look()), name="look-on-disk", daemon=True)
        try:
            looking.start()
        except RuntimeError as error:  # no room for a thread
            return self._say_unknown(str(error))
        looking.join(LOOK_SECS)
        return said[0] if said else self._say_unknown(f"it has not answered for {LOOK_SECS:.0f} s")

    def _look(self) -> str:
        final, target = self._final, self._target
        try:
            if target is final:
                if final.exists(MANIFEST):
                    return f"{final.url} holds the committed package"
                return (
                    f"No manifest was written, so {final.url} is no package; shards that are whole are kept there for the next "
                    "run"
                )
            found = self._find()
        except Exception as error:  # noqa: BLE001 -- a store's own code may raise anything, and the end must be told
            return self._say_unknown(getattr(error, "strerror", None) or str(error))
        if found is None:
            return (
                f"Nothing is in {final.url} at this moment: the old package lies beside it and the new one is in {target.url}; "
                "the next run puts one of them there"
            )
        if found != self._old:
            return f"{final.url} holds the new, committed package"
        return (
            f"{final.url} still holds the old package; shards that are whole are kept in {target.url} for the next run"
        )

    def _find(self) -> tuple[int, int, int] | None:
        """Return what tells one manifest from another on a disk, where alone packages are replaced; None for none."""
        try:
            found = os.stat(self._final.join(MANIFEST))
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _say_unknown(self, reason: str) -> str:
        return f"{self._final.url} cannot be looked at ({reason}): it holds a package if {MANIFEST} is there"
