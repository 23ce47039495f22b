"""What events and metrics say of versions that ``watch`` publishes."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from dist_export.manifest import Manifest
from dist_export.redact import redact_text


class Published:
    """Counts the versions that this process publishes. Used on rank 0."""

    def __init__(self, publish: str) -> None:
        """Nothing is published yet. ``publish`` is the URI of the directory of versions."""
        self.saved_at = 0.0
        """When the save of the checkpoint that is exported ended, in Unix time."""
        self._publish = redact_text(publish)
        self._num_versions = 0
        self._samples: list[tuple[str, dict[str, str], float]] = []
        self._version = ""
        self._seconds = 0.0

    def note(self, export_dir: str, manifest: Manifest) -> None:
        """Note that a package became the current version just now."""
        self._num_versions += 1
        self._version = export_dir.rstrip("/").rpartition("/")[2]
        self._seconds = time.time() - self.saved_at
        labels = {"publish": self._publish}
        fields = self.describe(manifest)
        self._samples = [
            ("dist_export_current_saved_timestamp_seconds", labels, self.saved_at),
            ("dist_export_publish_seconds", labels, self._seconds),
            ("dist_export_published_versions", labels, float(self._num_versions)),
            *(
                ("dist_export_delta_rows", {**labels, "change": change}, float(fields[change]))
                for change in ("changed", "new", "deleted")
            ),
        ]

    def describe(self, manifest: Manifest) -> dict[str, Any]:
        """Return the fields of the event ``published``, of the version that was noted last."""
        deltas = [table.delta for table in manifest.tables if table.delta is not msgspec.UNSET]
        return {
            "version": self._version,
            "is_delta": manifest.base is not msgspec.UNSET,
            "seconds": round(self._seconds, 3),
            "changed": sum(delta.changed for delta in deltas),
            "new": sum(delta.new for delta in deltas),
            "deleted": sum(delta.deleted for delta in deltas),
        }

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """Return the samples of the version that was published last; none before the first one."""
        return self._samples
