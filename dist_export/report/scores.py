"""Make one table of parity and drift: each comparison of the package with the model, by output. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from dist_export.humanize import count
from dist_export.manifest import DriftEntry, Manifest

COLUMNS = ("Comparison", "Output", "Largest difference", "Relative", "ULP")


def describe_scores(manifest: Manifest) -> dict[str, Any]:
    """Return what was compared, and the figures by output."""
    rows = [*_describe_parity(manifest)]
    texts = [] if rows else ["No program was compared with the model."]
    if manifest.parity is not None:
        texts.append(f"The tolerances were atol {manifest.parity.atol:g} and rtol {manifest.parity.rtol:g}.")
    drift = manifest.drift
    return {
        "texts": texts,
        "columns": COLUMNS,
        "rows": rows,
        "drift_text": "Drift was not measured." if drift is None else _say_drift(drift),
        "drift": []
        if drift is None
        else [
            [name, output.max_abs, output.mean_abs, f"{output.pairs_swapped:,} of {output.pairs:,}", output.not_finite]
            for name, output in drift.outputs.items()
        ],
    }


def _describe_parity(manifest: Manifest) -> Iterable[list[Any]]:
    if manifest.parity is not None:
        parity = manifest.parity
        yield from _by_output(f"dense program, batches of {_say_sizes(parity.batch_sizes)}", parity)
        if parity.from_files is not None:
            what = "rows of the shards" if parity.from_files.reads_rows else "no row of the shards"
            yield from _by_output(f"written files, {what}", parity.from_files)
    if manifest.dense is not None:
        for entry in manifest.dense.formats or ():
            yield from _by_output(f"{entry.format}, batches of {_say_sizes(entry.parity.batch_sizes)}", entry.parity)
    if manifest.score is not msgspec.UNSET and manifest.score.parity is not None:
        score = manifest.score.parity
        yield from _by_output(f"score program, batches of {_say_sizes(score.batch_sizes)}", score)
    if manifest.serving is not msgspec.UNSET and manifest.serving.replay is not None:
        yield from (
            ["serving contract", name, value, None, None] for name, value in manifest.serving.replay.max_abs.items()
        )


def _say_sizes(sizes: Iterable[int]) -> str:
    return ", ".join(f"{size:,}" for size in sizes)


def _by_output(what: str, figures: Any) -> Iterable[list[Any]]:
    """Yield a row for each output of an entry with ``max_abs``, ``max_rel`` and ``max_ulp``."""
    others: tuple[Mapping[str, Any], ...] = (figures.max_rel, figures.max_ulp)
    for name, value in figures.max_abs.items():
        yield [what, name, value, *(found.get(name) for found in others)]


def _say_drift(drift: DriftEntry) -> str:
    if drift.not_measured is not msgspec.UNSET:
        return f"Drift was not measured: {drift.not_measured}"
    skipped = f"; {drift.skipped:,} batches of another shape were left out" if drift.skipped else ""
    batches = "1 batch" if drift.batches == 1 else f"{drift.batches:,} batches"
    where = f"{count(drift.rows, 'row')} of {batches}{skipped}"
    return f"The package against the unmodified model, on {where}. The order of pairs of rows is compared too."
