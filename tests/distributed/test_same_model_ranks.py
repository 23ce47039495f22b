"""Ranks that build another model: rank 0's is traced, so what the others have would be lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from dist_export.errors import DistExportError
from tests.support import exports, tiny_model
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


class OtherDense(tiny_model.DenseArch):
    def forward(self, blocks):
        return {name: 1 - score for name, score in super().forward(blocks).items()}


def export_each(rank: int, source: str, folder: str) -> list[str]:
    told = []
    for case in ("class", "size"):
        model = tiny_model.build_model()
        if rank == 1 and case == "class":
            model.dense_arch = OtherDense()
        elif rank == 1:
            model.dense_arch.further = nn.Linear(2, 3)
        out = Path(folder) / case
        try:
            exports.exporter(model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, out).export()
        except DistExportError as error:
            told.append(f"exit {error.exit_code}: {error} {out.exists() and any(out.iterdir())}")
    return told


def test_another_model_on_another_rank_is_refused(tmp_path: Path) -> None:
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    for told in run_ranks(export_each, 2, tmp_path / "store", str(source), str(tmp_path), timeout=300):
        of_class, of_size = told
        assert of_class.startswith("exit 2: ")
        assert (
            "the dense arch's class differs between ranks 0 and 1 (tests.support.tiny_model.DenseArch and " in of_class
        )
        assert of_class.endswith("False")
        assert (
            "the dense arch's further differs between ranks 0 and 1 (absent and torch.nn.modules.linear.Linear)"
            in of_size
        )
