"""Run the contenders of a case in rounds: all of them once in each, next to the limit of that round."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench.generate import Source, count_denied, generate, list_denied
from scripts.bench.judge import judge_numbered, judge_package
from scripts.bench.processes import ContenderError, Started, combine, run_once

_ROOM_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to do the work of a case."""

    label: str
    kind: str = "export"
    """Which of ``contenders.py``."""
    ranks: int = 1
    threads: int = 1
    """Of each rank of an export that write; a peer has one."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of an export, besides those of the case."""
    source: Source | None = None
    """Where it is another one than the case's."""
    needs: str = ""
    """The kind that turns the source into what this contender reads, beforehand."""
    has_norm_rule: bool = False
    """Whether it also looks at the norm of each row, in a case that leaves rows behind."""

    @property
    def num_writers(self) -> int:
        """How many write at once; the limit that it is compared with has as many."""
        return self.ranks * self.threads


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders that do the same work on the same rows."""

    name: str
    source: Source
    num_shards: int
    contenders: tuple[Contender, ...]
    has_limit: bool = True
    reference: str = ""
    """The label of the contender that the others are compared with."""
    has_ids: bool = True
    """False where rows go by number: then embeddings alone are kept."""
    is_pruned: bool = False
    """Whether half of the rows of each part are left behind, by a list of their ids."""

    @property
    def kept_bytes(self) -> int:
        """What every contender has to write, headers not counted."""
        whole = self.source.kept_bytes - (0 if self.has_ids else 8 * self.source.tables * self.source.rows)
        if not self.is_pruned:
            return whole
        return whole * (self.source.rows - count_denied(self.source)) // self.source.rows


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a case runs."""

    name: str
    """tmpfs or disk."""
    directory: Path
    """Empty, and only ours."""


def run_case(case: Case, place: Place, *, rounds: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one case and return its figures as plain values: ``rounds`` lists, for each round, limit and contenders.

    The first run of each contender is not counted; an export's output is checked then.
    """
    runner = _Runner(case, place, settings)
    try:
        runner.make_inputs()
        runner.warm_up()
        measured = [runner.run_round(number) for number in range(rounds)]
    finally:
        runner.close()
    return {
        "case": case.name,
        "where": place.name,
        "kept_bytes": case.kept_bytes,
        "num_shards": case.num_shards,
        "reference": case.reference,
        "contenders": [
            {"label": contender.label, "kind": contender.kind, "writers": contender.num_writers}
            for contender in case.contenders
        ],
        "rounds": measured,
    }


class _Runner:
    """The files of one case, and the order of its runs."""

    def __init__(self, case: Case, place: Place, settings: dict[str, Any]) -> None:
        self._case = case
        self._settings = {"num_shards": case.num_shards, **settings}
        self._home = place.directory / "case"
        self._target = self._home / "out"
        self._limit = self._home / "limit"
        self._deny = self._home / "deny.npy"
        self._inputs: dict[tuple[Source, str], Path] = {}
        self._turn = itertools.count()

    def make_inputs(self) -> None:
        """Write what the contenders read."""
        self._home.mkdir()
        needed = {(self._source_of(contender), contender.needs): None for contender in self._case.contenders}
        for source, needs in sorted(needed, key=lambda pair: pair[1]):
            if (source, "") not in self._inputs:
                self._inputs[source, ""] = generate(self._home / f"source-{next(self._turn)}", source)
            if needs:
                made = self._home / f"{needs}-{next(self._turn)}"
                job: dict[str, object] = {
                    "kind": needs,
                    "source": str(self._inputs[source, ""]),
                    "target": str(made),
                    "settings": {},
                }
                run_once(needs, job, scratch=self._scratch())
                self._inputs[source, needs] = made
        if self._case.is_pruned:
            np.save(self._deny, list_denied(self._case.source))

    def warm_up(self) -> None:
        """Run each contender once, look at what it wrote, and keep an export's files as what the limit copies."""
        with contextlib.ExitStack() as held:
            started = [held.enter_context(self._start(contender)) for contender in self._case.contenders]
            for one in started:
                one.wait_until_ready()
            for contender, one in zip(self._case.contenders, started, strict=True):
                one.work()
                self._judge(contender)
                self._clear()

    def run_round(self, number: int) -> dict[str, Any]:
        """Run the limit and every contender once; who comes first changes from round to round."""
        with contextlib.ExitStack() as held:
            started = [(one, held.enter_context(self._start(one))) for one in self._case.contenders]
            limit = held.enter_context(self._start_limit()) if self._case.has_limit else None
            for one in (*(one for _, one in started), *([limit] if limit is not None else [])):
                one.wait_until_ready()
            limits = {} if limit is None else limit.work()[0]["limits"]
            found = {}
            first = number % len(started)
            for contender, one in (*started[first:], *started[:first]):
                found[contender.label] = combine(one.work())
                self._clear()
            return {"limits": limits, "contenders": found}

    def close(self) -> None:
        """Remove all files of the case."""
        shutil.rmtree(self._home)

    def _judge(self, contender: Contender) -> None:
        source = self._source_of(contender)
        if contender.kind != "export":
            written = sum(path.stat().st_size for path in self._target.rglob("*") if path.is_file())
            needed = self._case.kept_bytes if source == self._case.source else source.kept_bytes
            if written < needed:
                raise ContenderError(f"{contender.label}: wrote {written:,} of {needed:,} bytes")
            return
        if not self._case.has_ids:
            judge_numbered(self._target, source, self._inputs[source, ""], label=contender.label)
        else:
            num_denied = count_denied(source) if self._case.is_pruned else 0
            judge_package(
                self._target, source, self._inputs[source, ""], label=contender.label, rows=source.rows - num_denied
            )
        if self._case.has_limit and not self._limit.exists():
            self._limit.mkdir()
            for path in self._target.glob("*.safetensors"):
                path.rename(self._limit / path.name)

    def _start(self, contender: Contender) -> Started:
        scratch = self._scratch()
        scratch.mkdir(parents=True)
        return Started(contender.label, self._job(contender), ranks=contender.ranks, scratch=scratch)

    def _start_limit(self) -> Started:
        scratch = self._scratch()
        scratch.mkdir(parents=True)
        writers = sorted({contender.num_writers for contender in self._case.contenders})
        job: dict[str, object] = {
            "kind": "limit",
            "source": str(self._limit),
            "target": str(self._target),
            "writers": writers,
        }
        job["touch"] = self._touch
        return Started("the limit", job, ranks=1, scratch=scratch)

    def _job(self, contender: Contender) -> dict[str, Any]:
        return {
            "kind": contender.kind,
            "source": str(self._inputs[self._source_of(contender), contender.needs]),
            "target": str(self._target),
            "settings": {
                **self._settings,
                "threads": contender.threads,
                **self._rules(contender),
                **contender.settings,
            },
            "touch": self._touch,
        }

    def _rules(self, contender: Contender) -> dict[str, Any]:
        if not self._case.is_pruned:
            return {}
        rules: list[dict[str, Any]] = [{"tables": "*", "deny": str(self._deny)}]
        return {"prune": rules + ([{"tables": "*", "norm_at_most": 0}] if contender.has_norm_rule else [])}

    @property
    def _touch(self) -> int:
        """Bytes that a contender is about to need: its output, and room for what it holds."""
        return int(self._case.source.kept_bytes * 1.1) + _ROOM_BYTES

    def _source_of(self, contender: Contender) -> Source:
        return contender.source or self._case.source

    def _scratch(self) -> Path:
        return self._home / "scratch" / str(next(self._turn))

    def _clear(self) -> None:
        if self._target.exists():
            shutil.rmtree(self._target)
