"""Which program an export takes over, where it traces none."""

from __future__ import annotations

from dist_export.package.reader import Package
from dist_export.pipeline.state import ExportState
from dist_export.pipeline.trainer_delta import note_dense_of_base
from dist_export.plan.plan import SparsePlan


def look_for_program(export: ExportState, plan: SparsePlan, base: Package | None) -> list[str]:
    """Look for a program to take over: of a dump's base, or of a source that is a package; return notes. All ranks."""
    task, read, where = export.task, export.source, export.paths.source
    if plan.checkpoint.dump is not None and base is not None:
        task.ranks.broadcast("look for the program of the base", lambda: export.taken_over.take_base(base))
        return note_dense_of_base(base.manifest, plan.checkpoint)
    if where is None or export.in_place or not read.has_manifest:
        return []
    has_own = task.objects.model is not None or read.fg_conf is not None or read.mc_conf is not None
    with_scores = task.config.score_program != "off"
    return task.ranks.broadcast(
        "look for a program to take over",
        lambda: export.taken_over.look(where, plan, has_own=has_own, with_scores=with_scores),
    )
