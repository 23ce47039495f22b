"""How often the ranks of an export wait for each other: it is what a large job pays for, whatever the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

import dist_export
from dist_export.runtime.ranks import Ranks
from tests.support.recis_writer import make_tables, write_checkpoint


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps in which all ranks meet. A single process goes through the same ones."""
    steps: list[str] = []
    real = Ranks._exchange

    def exchange(self, step, *arguments, **options):
        steps.append(step)
        return real(self, step, *arguments, **options)

    monkeypatch.setattr(Ranks, "_exchange", exchange)
    return steps


def test_a_fresh_export_of_tables_meets_19_times(met: list[str], tmp_path: Path) -> None:
    """docs/scale.md says this number."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    dist_export.export(
        {"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    )
    assert len(met) == 19, met
    assert met.index("compare the plans") < met.index("claim export_dir") < met.index("write shards")
