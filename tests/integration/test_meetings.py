"""How often the ranks of an export wait for each other: it is what a large job pays for, whatever the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import dist_export
from dist_export.runtime.ranks import Ranks
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.score_models import DIM, ROWS, Lookups, Model, batch_of, inputs_of, save, train


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps in which all ranks meet. A single process goes through the same ones, and here settles checks as several do."""
    steps: list[str] = []
    exchange, settle_checks = Ranks._exchange, Ranks.settle_checks

    def note_exchange(self, step, *arguments, **options):
        steps.append(step)
        try:
            return exchange(self, step, *arguments, **options)
        finally:
            self._owes_checks = False

    def note_settling(self, step):
        if self._owes_checks:
            self._exchange(step, None, None)
        settle_checks(self, step)

    monkeypatch.setattr(Ranks, "_exchange", note_exchange)
    monkeypatch.setattr(Ranks, "settle_checks", note_settling)
    return steps


def test_a_fresh_export_of_tables_meets_19_times(met: list[str], tmp_path: Path) -> None:
    """docs/scale.md says this number."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    dist_export.export(
        {"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    )
    assert len(met) == 19, met
    assert met.index("compare the plans") < met.index("claim export_dir") < met.index("write shards")


def test_an_export_with_model_and_three_batches_meets_81_times(met: list[str], tmp_path: Path) -> None:
    """And twice for each other batch that the score program is compared on, as docs/scale.md says."""
    model = train(Model(Lookups(nn.Embedding(ROWS, DIM), lambda its, batch: its.table(batch["user"])), DIM + 1))
    dist_export.Exporter(
        model=model,
        dataset=[inputs_of(model, batch_of(seed=seed)) for seed in range(3)],
        ckpt_dir=save(model, tmp_path / "model.pt"),
        export_dir=str(tmp_path / "out"),
        sparse_model_name="sparse_arch",
        dense_model_name="dense_arch",
    ).export()
    of_other_batches = [
        step for step in met if step in ("run the sparse arch on a cut batch", "compare the score program")
    ]
    assert len(met) - len(of_other_batches) == 81, met
    assert met.count("run the model for the reference") == 3
