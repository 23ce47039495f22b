"""The caller's own model as the reference on real ranks: every wrapper, and models that fail on some ranks only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dist_export.api import Exporter
from dist_export.dense import reference
from dist_export.dense.own_parameters import reshard
from dist_export.dense.reference import ReferenceRunner
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import DistExportError
from dist_export.pipeline.planning import open_checkpoint
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.runtime.joining import join
from dist_export.storage.urls import open_directory
from tests.distributed.test_dense_ranks import (
    CPU,
    DIM,
    IDS,
    WRAPPERS,
    Dense,
    Model,
    batches,
    hooks_of,
    local_state,
    make_exporter,
    trained_state,
    wrap_fsdp2,
    write_source,
)
from tests.support import score_models as models
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


class Whole(Model):
    """With a forward of its own: a loss, which may fail on some ranks before or after the sparse arch."""

    def __init__(self) -> None:
        super().__init__()
        self.fails_before: tuple[int, ...] = ()
        self.fails_after: tuple[int, ...] = ()
        self.reading_secs = 0.0
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rank = dist.get_rank()
        if rank in self.fails_before:
            raise ValueError("before")
        self.steps += 1
        scores = self.dense(self.sparse(batch))
        until = time.monotonic() + self.reading_secs
        while time.monotonic() < until:  # as if tables were scanned
            ACTIVITY.done += 1
            time.sleep(0.05)
        if rank in self.fails_after:
            raise ValueError("after")
        return scores["ctr"].mean() + scores["like"].mean()


def expected(rank: int) -> torch.Tensor:
    dense = Dense()
    dense.load_state_dict({name.removeprefix("dense."): t for name, t in trained_state("dense.").items()})
    rows = torch.tensor(np.stack([np.full(DIM, i % 97, np.float32) for i in IDS[rank * 10 : rank * 10 + 5]]))
    with torch.no_grad():
        return dense.eval()({"user": rows, "price": torch.full((5, 1), float(rank))})["ctr"]


def run_each(rank: int, folder: str) -> list[str]:
    """Return what is wrong with the reference of each wrapper."""
    wrong: list[str] = []
    with join(timeout_secs=60) as ranks:
        checkpoint = open_checkpoint(ranks, open_directory(f"{folder}/ckpt"))
        for wrap in [*WRAPPERS, None]:
            model = Whole()
            name = "whole model in DDP" if wrap is None else wrap.__name__
            whole: nn.Module = model
            if wrap is None:
                whole = nn.parallel.DistributedDataParallel(model)
            else:
                model.dense = wrap(model.dense)
            model.train()
            if wrap is not None and "compiled" not in name:  # FSDP keeps whole parameters of its root afterwards
                with torch.no_grad():
                    model.dense.eval()({"user": torch.ones(4, DIM), "price": torch.ones(4, 1)})
                model.dense.train()
            runner = ReferenceRunner(
                ranks, whole, model.sparse, model.dense, sparse_model_name="sparse", dense_model_name="dense"
            )
            finder = RowFinder(SourceRows(checkpoint=checkpoint))
            reshard(model)
            before, hooks = local_state(model), hooks_of(model)
            for turn in range(2):
                with runner.dense_values(lambda: trained_state("dense.")):
                    found = runner.run(batches(rank)[0][1], finder.unmodified())
                if (found.kind, found.reason) != ("model", ""):
                    wrong.append(f"{name}: {found.kind} {found.reason}")
                if not torch.allclose(found.output["ctr"], expected(rank), atol=1e-6):
                    wrong.append(f"{name}: scores of turn {turn}")
                after = local_state(model)
                wrong += [f"{name}: {key} changed" for key in before if not torch.equal(before[key], after[key])]
            if hooks_of(model) != hooks or not all(module.training for module in model.modules()):
                wrong.append(f"{name}: hooks or mode")
            plain = Model().dense.eval()
            model.dense.eval()
            inputs = {"user": torch.ones(4, DIM), "price": torch.ones(4, 1)}
            with torch.no_grad():
                if not torch.allclose(model.dense(inputs)["ctr"], plain(inputs)["ctr"], atol=1e-6):
                    wrong.append(f"{name}: the caller's model has other values than before")
    return wrong


def test_the_reference_of_every_wrapper_has_the_checkpoints_values(tmp_path: Path) -> None:
    """DDP, compiled DDP, FSDP of both versions, tensor parallel: scores by hand, and the model as it was."""
    write_source(tmp_path / "ckpt")
    for wrong in run_ranks(run_each, 2, tmp_path / "store", str(tmp_path)):
        assert wrong == []


def export(rank: int, folder: str, settings: dict[str, Any], patience: float) -> dict[str, Any]:
    reference._PATIENCE_SECS = patience
    model = Whole()
    model.dense = wrap_fsdp2(model.dense)
    for name, value in settings.items():
        setattr(model, name, value if name != "reading_secs" or rank == 0 else 0.0)
    before = local_state(model)
    found: dict[str, Any] = {"text": "", "kind": ""}
    try:
        manifest = make_exporter(model, batches(rank), folder, "out").export()
        found |= {"parity": manifest.parity, "notes": manifest.notes}
    except DistExportError as error:
        found |= {"text": str(error), "kind": type(error).__name__}
    reshard(model)
    after = local_state(model)
    found["is_left"] = all(torch.equal(before[name], after[name]) for name in before)
    return found


def test_a_sharded_dense_arch_is_exported_against_the_whole_model(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    for found in run_ranks(export, 2, tmp_path / "store", str(tmp_path), {}, 20.0, timeout=240):
        assert found["text"] == ""
        assert (found["parity"].reference, found["parity"].from_files.reference) == ("model", "model")
        assert max(*found["parity"].max_abs.values(), *found["parity"].from_files.max_abs.values()) < 1e-6
        assert not [note for note in found["notes"] if "model(batch)" in note]
        assert found["is_left"]


@pytest.mark.parametrize(
    "settings",
    [
        {"fails_after": (0, 1)},
        {"fails_after": (1,)},
        {"fails_before": (0, 1)},
        {"fails_after": (1,), "reading_secs": 6.0},
    ],
)
def test_ranks_agree_on_the_arches_where_the_model_fails_on_any(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also where the failing rank waits for one that still reads rows, longer than its patience."""
    write_source(tmp_path / "ckpt", "dense.")
    for found in run_ranks(export, 2, tmp_path / "store", str(tmp_path), settings, 4.0, timeout=240):
        assert found["text"] == ""
        assert (found["parity"].reference, found["parity"].from_files.reference) == ("arches", "arches")
        (note,) = [note for note in found["notes"] if "model(batch)" in note]
        assert "model(batch) fails: ValueError" in note
        assert "on rank" not in note, "the manifest does not depend on the ranks"
        assert found["is_left"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_model_that_fails_on_one_rank_while_the_others_wait_in_its_collective_ends_the_export(
    failing: int, tmp_path: Path
) -> None:
    write_source(tmp_path / "ckpt", "dense.")
    settings = {"fails_before": (failing,)}
    other = 1 - failing
    results = run_ranks(export, 2, tmp_path / "store", str(tmp_path), settings, 1.0, may_end=(other,), timeout=240)
    assert results[failing]["kind"] == "ModelError"
    assert "ValueError: before" in results[failing]["text"]
    # what it knows, and no more: the other rank may be slow
    assert (
        "Of 2 ranks 1 have come this far, this one included; the others have read no file for 1 s"
        in results[failing]["text"]
    )
    assert "Either they still compute, or they wait for this rank" in results[failing]["text"]
    assert "must fail on every rank or on none" in results[failing]["text"]
    assert results[other] is None or results[other]["kind"]
    assert not (tmp_path / "out" / "manifest.json").exists()


class Gated(models.Model):
    """The layer between the arches does nothing as long as it is fresh."""

    def __init__(self) -> None:
        look = models.WAYS["embedding"][1]
        super().__init__(models.Lookups(nn.Embedding(models.ROWS, models.DIM), look), models.DIM + 1)
        self.gate = nn.Linear(1, 1)
        nn.init.ones_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "price": self.gate(blocks["price"])})


def gate_fsdp1(model: nn.Module) -> nn.Module:
    model.gate = FullyShardedDataParallel(model.gate, device_id=CPU)
    return model


def gate_fsdp1_orig(model: nn.Module) -> nn.Module:
    model.gate = FullyShardedDataParallel(model.gate, device_id=CPU, use_orig_params=True)
    return model


def gate_fsdp2(model: nn.Module) -> nn.Module:
    fully_shard(model.gate)
    return model


def gate_plain(model: nn.Module) -> nn.Module:
    return model


def whole_fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU)


def whole_fsdp1_orig(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)


def export_gated(rank: int, folder: str) -> dict[str, Any]:
    """Return what the export of each wrapper says, and what is wrong with the model afterwards."""
    found: dict[str, Any] = {}
    for wrap in (gate_plain, gate_fsdp1, gate_fsdp1_orig, gate_fsdp2, whole_fsdp1, whole_fsdp1_orig):
        model = wrap(Gated())
        before = local_state(model)
        texts = []
        for source in ("fresh", "trained", "lacking"):
            files = f"{folder}/{source}.pth", f"{folder}/{wrap.__name__}_{source}"
            arches = "sparse_arch", "dense_arch"
            try:
                exporter = Exporter(model, *arches, [models.batch_of()], *files, score_program="off")
                exporter.export(progress=False)
                texts.append("")
            except DistExportError as error:
                texts.append(str(error))
        reshard(model)
        after = local_state(model)
        found[wrap.__name__] = (texts, [name for name in before if not torch.equal(before[name], after[name])])
    return found


def test_a_layer_between_the_arches_has_the_checkpoints_values_whatever_shards_it(tmp_path: Path) -> None:
    """And what FSDP of version 1 flattens together with an arch is refused: to read views of it would end the process."""
    fresh = models.train(Gated()).state_dict() | {"gate.weight": torch.ones(1, 1), "gate.bias": torch.zeros(1)}
    torch.save(fresh, tmp_path / "fresh.pth")
    torch.save(fresh | {"gate.bias": torch.full((1,), 3.0)}, tmp_path / "trained.pth")
    torch.save({name: held for name, held in fresh.items() if name != "gate.bias"}, tmp_path / "lacking.pth")
    for found in run_ranks(export_gated, 2, tmp_path / "store", str(tmp_path), timeout=240):
        for wrapper, (texts, changed) in found.items():
            assert changed == [], wrapper
            if wrapper.startswith("whole"):
                assert all("flattens parameters of an arch together with others" in text for text in texts), texts
                continue
            assert texts[0] == "", wrapper
            assert "'price' is changed between the sparse arch and the dense arch" in texts[1], wrapper
            assert "the checkpoint lacks gate.bias, which" in texts[2], wrapper
