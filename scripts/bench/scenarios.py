"""The scenarios that compare exports with the limit and with peers: filter, merge, split, reshard, giant."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.generate import Source
from scripts.bench.processes import ContenderError
from scripts.bench.report import render_case, summarize
from scripts.bench.rounds import Case, Contender, Place, run_case

REFERENCE = "1 rank, digests"
DIMS = (64, 16, 8)


@dataclass(kw_only=True)
class Bench:
    """One run of the benchmarks in one place, and what it has found so far."""

    place: Place
    size: float
    """Kept bytes of a case, in GB."""
    rounds: int
    settings: dict[str, Any]
    """Of every export."""
    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def kept_bytes(self) -> float:
        """Kept bytes of a case."""
        return self.size * 1e9

    @property
    def is_disk(self) -> bool:
        """Whether this is the slow place, where each scenario runs a part of its cases."""
        return self.place.name == "disk"

    def run(self, case: Case, *, rounds: int | None = None) -> dict[str, Any] | None:
        """Run a case, print its table and keep its figures; None where it failed, which is told and kept too."""
        try:
            self._need_room(case)
            result = run_case(case, self.place, rounds=rounds or self.rounds, settings=self.settings)
        except Exception as error:  # noqa: BLE001 -- whatever it was is told, and the benchmarks end with exit code 1
            self.fail(case.name, error)
            return None
        result["summary"] = [
            {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in row.items()}
            for row in summarize(result)
        ]
        self.results.append(result)
        print(render_case(result), flush=True)
        return result

    def fail(self, name: str, error: BaseException) -> None:
        """Tell of a failure; the benchmarks go on, and end with exit code 1."""
        text = str(error) if isinstance(error, ContenderError) else "".join(traceback.format_exception(error))
        self.failures.append(f"{name} ({self.place.name})")
        print(f"\n### {name}, {self.place.name}: FAILED\n\n{text}", flush=True)

    def note(self, text: str) -> None:
        """Print a remark on what was just measured."""
        print(f"\n{text}", flush=True)

    def exports(self, ranks: tuple[int, ...], *, without_digests: bool = True) -> Iterator[Contender]:
        """Yield exports with so many ranks, each with digests, and without."""
        for number in ranks:
            label = f"{number} rank{'s' if number > 1 else ''}"
            yield Contender(label=f"{label}, digests", ranks=number)
            if without_digests:
                yield Contender(label=f"{label}, no digests", ranks=number, settings={"digest": "none"})

    def _need_room(self, case: Case) -> None:
        """Refuse a case that would fill the file system: sources, the limit's files and one output."""
        sources = {contender.source or case.source for contender in case.contenders}
        needed = case.source.kept_bytes * (1 + case.has_limit)
        for source in sources:
            dropped = source.num_dropped * source.tables * source.rows * source.dim * 4
            needed += source.kept_bytes + (dropped if source.holes == "none" else 0)
        for needs in {contender.needs for contender in case.contenders if contender.needs}:
            needed += case.source.kept_bytes * (3 if needs.startswith("torchrec") else 1)  # the moments are there too
        free = shutil.disk_usage(self.place.directory).free
        if needed * 1.05 > free:
            raise ContenderError(
                f"needs {needed / 1e9:.1f} GB in {self.place.directory}, where {free / 1e9:.1f} are free; give a smaller --size"
            )


def run_filter(bench: Bench) -> None:
    """The trainer's sharding stays; optimizer slots go. At dim 64 the peers too. On disk: dim 64."""
    for dim in DIMS[:1] if bench.is_disk else DIMS:
        peers = () if dim != DIMS[0] else (
            Contender(label="peer: safetensors", kind="safetensors"),
            Contender(label="peer: DCP", kind="dcp", needs="dcp_source"),
            Contender(label="peer: torch", kind="torch", needs="torch_source"),
        )  # fmt: skip
        bench.run(
            Case(
                name=f"filter 2 -> 2, dim {dim}",
                source=Source.of_size(bench.kept_bytes, dim=dim),
                num_shards=2,
                contenders=(*bench.exports((1, 2)), *peers),
                reference=REFERENCE,
            )
        )


def run_merge(bench: Bench) -> None:
    """8 shards become 2: whole parts are copied. Not on disk."""
    _run_change(bench, "merge", shards=8, num_shards=2, without_digests=True)


def run_split(bench: Bench) -> None:
    """2 shards become 8: rows are gathered by shard. Not on disk."""
    _run_change(bench, "split", shards=2, num_shards=8, without_digests=False)


def run_reshard(bench: Bench) -> None:
    """3 shards become 4: some parts stay whole, the rows of others are gathered. On disk: dim 64."""
    _run_change(bench, "reshard", shards=3, num_shards=4, without_digests=False)


def _run_change(bench: Bench, name: str, *, shards: int, num_shards: int, without_digests: bool) -> None:
    """Run a change of the sharding, on 1 rank at every dim and on 2 ranks at dim 64."""
    for dim in DIMS[:1] if bench.is_disk else DIMS:
        ranks = (1, 2) if dim == DIMS[0] else (1,)
        bench.run(
            Case(
                name=f"{name} {shards} -> {num_shards}, dim {dim}",
                source=Source.of_size(bench.kept_bytes, dim=dim, shards=shards),
                num_shards=num_shards,
                contenders=tuple(bench.exports(ranks, without_digests=without_digests)),
                reference=REFERENCE,
            )
        )


def run_cast(bench: Bench) -> None:
    """The filter's work with rows in another dtype, beside the plain copy of the kept bytes. Not on disk."""
    for dim in DIMS:
        casts = (
            Contender(label=f"1 rank, {dtype}", settings={"dtype": {"*": dtype}})
            for dtype in ("float16", "bfloat16", "int8")
        )
        bench.run(
            Case(
                name=f"cast 2 -> 2, dim {dim}",
                source=Source.of_size(bench.kept_bytes, dim=dim),
                num_shards=2,
                contenders=(*bench.exports((1,), without_digests=False), *casts),
                reference=REFERENCE,
            )
        )


def run_prune(bench: Bench) -> None:
    """Half of the rows stay behind, by a list of ids; and also with a rule that looks at every row's norm. Not on disk."""
    bench.run(
        Case(
            name="prune 2 -> 2, dim 64, half of the rows",
            source=Source.of_size(2 * bench.kept_bytes, dim=64),
            num_shards=2,
            contenders=tuple(
                Contender(
                    label=f"{ranks} rank{'s' if ranks > 1 else ''}, {label}", ranks=ranks, has_norm_rule=has_norm_rule
                )
                for ranks in (1, 2)
                for label, has_norm_rule in (("digests", False), ("digests, norms", True))
            ),
            reference=REFERENCE,
            is_pruned=True,
        )
    )


def run_giant(bench: Bench) -> None:
    """One giant table on 1, 2 and 4 ranks, into 1 file and into 4; the trainer had 4. Not on disk."""
    source = Source.of_size(bench.kept_bytes, dim=64, tables=1, shards=4)
    for num_shards in (1, 4):
        bench.run(
            Case(
                name=f"giant table 4 -> {num_shards}, dim 64",
                source=source,
                num_shards=num_shards,
                contenders=tuple(bench.exports((1, 2, 4), without_digests=False)),
                reference=REFERENCE,
            )
        )


def run_torchrec(bench: Bench) -> None:
    """A TorchRec job's DCP checkpoint on 2 ranks, sharded by rows and by columns, becomes 2 shards. At dim 64, not on disk."""
    for by in ("rows", "columns"):
        needs = f"torchrec_{by}"
        exports = (
            Contender(label=c.label, ranks=c.ranks, settings=c.settings, needs=needs) for c in bench.exports((1, 2))
        )
        bench.run(
            Case(
                name=f"TorchRec by {by}, 2 -> 2, dim {DIMS[0]}",
                source=Source.of_size(bench.kept_bytes, dim=DIMS[0], num_dropped=0),
                num_shards=2,
                contenders=(
                    *exports,
                    Contender(label="peer: DCP", kind="dcp_whole", needs=needs),
                    Contender(label="peer: dcp_to_torch_save", kind="dcp_to_torch", needs=needs),
                ),
                reference=REFERENCE,
                has_ids=False,
            )
        )
