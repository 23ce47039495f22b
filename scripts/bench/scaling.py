"""The scenarios that ask what an export's cost depends on: dropped slots, kept bytes, the number of blocks."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time

from scripts.bench.generate import METADATA_SCALE, Source, generate
from scripts.bench.processes import combine, run_once
from scripts.bench.report import fit_line, render_table, seconds_of, spread, summarize
from scripts.bench.rounds import Case, Contender
from scripts.bench.scenarios import REFERENCE, Bench

GROWTH = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the size."""


def run_slots(bench: Bench) -> None:
    """0 to 3 real dropped slots, at half the size for all four sources stand side by side. Not on disk."""
    sources = [Source.of_size(bench.kept_bytes / 2, dim=64, num_dropped=number, holes="none") for number in range(4)]
    labels = [f"{number} dropped slots" for number in range(4)]
    result = bench.run(
        Case(
            name="dropped slots, filter 2 -> 2, dim 64",
            source=sources[0],
            num_shards=2,
            contenders=tuple(
                Contender(label=label, source=source) for label, source in zip(labels, sources, strict=True)
            ),
            has_limit=False,
            reference=labels[0],
        )
    )
    if result is None:
        return
    rows = summarize(result)
    lines = []
    for row, source in zip(rows, sources, strict=True):
        further = row["read_bytes"] - rows[0]["read_bytes"]
        dropped = source.num_dropped * source.tables * source.rows * source.dim * 4
        lines.append([row["label"], f"{dropped / 1e6:,.0f}", f"{row['read_bytes']:,}", f"{further:,}"])
    header = ["source", "dropped MB", "bytes read", "more than without slots"]
    bench.note("\n".join(render_table(header, lines)))


def run_growth(bench: Bench) -> None:
    """A quarter of the size to four times the size: seconds should lie on a line, memory should not grow. Not on disk."""
    points, peaks = [], []
    for factor in GROWTH:
        source = Source.of_size(bench.kept_bytes * factor, dim=64)
        contender = Contender(label=REFERENCE)
        result = bench.run(
            Case(
                name=f"growth x{factor:g}, filter 2 -> 2, dim 64",
                source=source,
                num_shards=2,
                contenders=(contender,),
                has_limit=False,
            )
        )
        if result is not None:
            points.append((source.kept_bytes / 1e9, statistics.median(seconds_of(result, REFERENCE))))
            peaks.append(summarize(result)[0]["peak_anonymous"] / 1e6)
    if len(points) < len(GROWTH):
        return
    slope, intercept, r_squared, worst = fit_line([x for x, _ in points], [y for _, y in points])
    bench.note(
        f"growth: seconds = {intercept:.3f} + {slope:.3f} x GB; R^2 {r_squared:.5f}; worst deviation {100 * worst:.1f} % of the "
        f"point; peak anonymous memory {', '.join(f'{peak:.0f}' for peak in peaks)} MB"
    )
    bench.results.append(
        {
            "case": "growth, the line",
            "where": bench.place.name,
            "points": points,
            "slope": slope,
            "intercept": intercept,
            "r_squared": r_squared,
            "worst_deviation": worst,
            "peak_anonymous_megabytes": peaks,
        }
    )


def run_metadata(bench: Bench) -> None:
    """A million blocks in 4,096 files: the plan, and the files that describe the package. 2 rounds. Not on disk."""
    home = bench.place.directory / "metadata"
    # a smoke run asks for few bytes; it gets few shards
    scale = min(1.0, bench.size)
    source = dataclasses.replace(
        METADATA_SCALE, shards=max(2, round(METADATA_SCALE.shards * scale)), rows=round(METADATA_SCALE.rows * scale)
    )
    try:
        home.mkdir()
        started = time.monotonic()
        checkpoint = generate(home / "source", source)
        generated = time.monotonic() - started
        rounds = []
        for number in range(min(2, bench.rounds)):
            job = {
                "kind": "plan",
                "source": str(checkpoint),
                "target": str(home / "out"),
                "settings": {**bench.settings, "num_shards": "source"},
            }
            rounds.append(combine(run_once("plan", job, scratch=home / f"scratch-{number}")))
    except Exception as error:  # noqa: BLE001 -- whatever it was is told, and the benchmarks end with exit code 1
        bench.fail("metadata", error)
        return
    finally:
        shutil.rmtree(home, ignore_errors=True)
    result = {"case": "metadata", "where": bench.place.name, "num_blocks": source.num_blocks, "rounds": rounds}
    bench.results.append(result)
    stages = rounds[0]["stages"]
    table = [[name, str(spread(found["stages"][name] for found in rounds))] for name in stages]
    table.append(["all", str(spread(found["seconds"] for found in rounds))])
    bench.note(
        f"### metadata: {source.num_blocks:,} blocks, {source.shards * source.files_per_shard:,} files, {source.tables} tables, "
        f"{bench.place.name}\n\n" + "\n".join(render_table(["stage", "seconds"], table))
    )
    peaks = [max(found[name] for found in rounds) / 1e6 for name in ("peak_of_plan", "peak_anonymous")]
    bench.note(
        f"peak anonymous memory: plan {peaks[0]:.0f} MB, all {peaks[1]:.0f} MB; "
        f"rendered {rounds[0]['rendered_bytes'] / 1e6:.0f} MB of JSON; generated in {generated:.0f} s"
    )
