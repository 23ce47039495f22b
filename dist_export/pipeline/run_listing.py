"""``inspect`` of a training run: its checkpoints, and which of them are complete."""

from __future__ import annotations

from typing import Any

from dist_export.checkpoint.detect import AUTO
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.manifest import MANIFEST
from dist_export.storage.urls import open_place

_STATES = {True: "complete", False: "incomplete", None: "unclear"}


def describe_run(
    path: str,
    storage_options: dict[str, Any] | None = None,
    *,
    follow_links: bool = False,
    asked: str = AUTO,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
) -> dict[str, Any] | None:
    """Return the checkpoints of a run as plain values, the newest first; None where no run is at ``path``.

    Arguments as those of :func:`~dist_export.inspect.describe.describe`, for each of the checkpoints. CheckpointError where
    the directory cannot be read.
    """
    directory = open_place(path, storage_options, follow_links=follow_links)
    if asked == AUTO and directory.exists(MANIFEST):
        return None
    from dist_export.pipeline.run_dir import list_checkpoints

    found = list_checkpoints(directory, asked=asked, settings=settings)
    if not found:
        return None
    return {
        "kind": "training run",
        "path": directory.url,
        "latest": next((each.name for each in found if each.is_complete), None),
        "checkpoints": [
            {"name": each.name, "step": each.step, "is_complete": each.is_complete, "why": each.why} for each in found
        ],
    }


def render_run(found: dict[str, Any]) -> list[str]:
    """Return the run line by line, for people."""
    lines = [f"{found['kind']}: {found['path']}"]
    steps = [each["step"] for each in found["checkpoints"]]
    width = max(len(str(step)) for step in steps)
    name_width = max(len(each["name"]) for each in found["checkpoints"])
    for each in found["checkpoints"]:
        latest = ", the latest" if each["name"] == found["latest"] else ""
        why = f": {each['why']}" if each["why"] else ""
        lines.append(
            f"  step {each['step']:>{width}}  {each['name']:<{name_width}}  {_STATES[each['is_complete']]}{latest}{why}"
        )
    return lines
