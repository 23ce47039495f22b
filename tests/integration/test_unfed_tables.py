"""A hash table whose rows no export can put in, in the dense arch or unregistered in the sparse arch, is refused by its place."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from dist_export.errors import ModelError
from dist_export.manifest import Manifest
from tests.support import exports, tiny_model
from tests.support.recis_writer import write_checkpoint


class Kept(tiny_model.LookalikeTable):
    """Keeps its rows in tensors: where, its subclass says."""

    def __init__(self, name: str, value: float = 3.0) -> None:
        super().__init__(name)
        ids = np.concatenate([part.ids for part in tiny_model.tables()[name]])
        self.keep(torch.from_numpy(ids), torch.full((len(ids), tiny_model.DIM), value))

    def keep(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        raise NotImplementedError

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def ids(self) -> torch.Tensor:
        return self.held()[0]

    def embeddings(self) -> torch.Tensor:
        return self.held()[1]

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        old, rows = self.held()
        stays = ~torch.isin(old, ids)
        self.keep(torch.cat([old[stays], ids]), torch.cat([rows[stays], embeddings]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own, rows = self.held()
        return (ids[..., None] == own).float() @ rows


class Attribute(Kept):
    def keep(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.numbers, self.vectors = ids, rows

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.numbers, self.vectors


class Box(Kept):
    def keep(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.box = {"ids": ids, "rows": rows}

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.box["ids"], self.box["rows"]


class Buffer(Kept):
    persistent = True

    def keep(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        self.register_buffer("numbers", ids, persistent=self.persistent)
        self.register_buffer("vectors", rows, persistent=self.persistent)

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.numbers, self.vectors


class Passing(Buffer):
    persistent = False


class Sparse(tiny_model.SparseArch):
    """Gives the ids, too."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**super().forward(batch), "ids": batch["item"]}


class Dense(tiny_model.DenseArch):
    """Looks these ids up by itself."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.bias = table

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bias(ids)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().forward({**blocks, "price": blocks["price"] + self.rows(blocks["ids"]).sum(1, keepdim=True)})


class InList(Dense):
    def __init__(self, table: nn.Module) -> None:
        super().__init__(nn.Identity())
        self.held = [table]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.held[0](ids)


class Deep(Dense):
    """Has it within a module that it registers, in a closure, and with a function of another name."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__(nn.Identity())
        self.tower = nn.Sequential(nn.Identity())
        self.tower.look = functools.partial(lambda ids, own: table.forward(ids), own=self)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tower.look(ids)


class Classed(Dense):
    shared: ClassVar[dict[str, nn.Module]] = {}

    def __init__(self, table: nn.Module) -> None:
        super().__init__(nn.Identity())
        self.shared["item"] = table

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.shared["item"](ids)


class PastForward(Dense):
    """Reads memory of the table, and calls no method."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids[:, None] == self.bias.numbers).float() @ self.bias.vectors


class Unused(Dense):
    """Has the table for training alone."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bias(ids) if self.training else ids[:, None] * torch.ones(1)


class Two(nn.Module):
    def __init__(self, sparse_arch: nn.Module, dense_arch: nn.Module) -> None:
        super().__init__()
        self.sparse_arch = sparse_arch
        self.dense_arch = dense_arch

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


def export(tmp_path: Path, model: nn.Module, **settings: Any) -> Manifest:
    state = {f"dense_arch.{name}": torch.ones_like(value) for name, value in model.dense_arch.state_dict().items()}
    source = tmp_path / "in"
    write_checkpoint(source, tiny_model.tables(), model_state=state)
    batches = settings.pop("batches", None) or [batch for _, batch in tiny_model.build_dataset()]
    settings = {"export_dir": tmp_path / "out", "filter_sparse_opt": True, **settings}
    return exports.exporter(model, "sparse_arch", "dense_arch", batches, source, **settings).export(progress=False)


DENSE = {
    Dense: r"dense_arch\.bias",
    InList: r"dense_arch\.held\[0\]",
    Deep: r"dense_arch\.tower\.look\.table",
    Classed: r"dense_arch\.shared\['item'\]",
}


@pytest.mark.parametrize("table", [Attribute, Box, Buffer, Passing])
@pytest.mark.parametrize("arch", DENSE)
def test_a_table_that_the_dense_arch_looks_up_is_refused(arch: type[Dense], table: type[Kept], tmp_path: Path) -> None:
    model = Two(Sparse(), arch(table("item_emb")))
    place = DENSE[arch]
    says = rf"forward computes with {place} \(table 'item_emb'\) outside of the sparse arch.*Nothing was written.*Make"
    with pytest.raises(ModelError, match=says):
        export(tmp_path, model)
    assert not (tmp_path / "out").exists()


def test_memory_of_a_table_that_the_dense_arch_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"computes with dense_arch\.bias \(table 'item_emb'\)"):
        export(tmp_path, Two(Sparse(), PastForward(Attribute("item_emb"))))


def test_a_table_of_both_arches_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sparse_arch = Sparse()
    sparse_arch.item = Passing("item_emb")
    with pytest.raises(ModelError, match=r"computes with dense_arch\.bias \(table 'item_emb'\)"):
        export(tmp_path, Two(sparse_arch, Dense(sparse_arch.item)))
    assert not (tmp_path / "out").exists()


def test_a_table_that_fails_without_rows_is_named_all_the_same(tmp_path: Path) -> None:
    class Failing(Attribute):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no rows")

    with pytest.raises(ModelError, match=r"computes with dense_arch\.bias \(table 'item_emb'\)"):
        export(tmp_path, Two(Sparse(), Dense(Failing("item_emb"))))


def test_a_table_that_the_dense_arch_does_not_read_is_exported_without_an_untrue_note(tmp_path: Path) -> None:
    manifest = export(tmp_path, Two(Sparse(), Unused(Attribute("item_emb"))))
    assert not [note for note in manifest.notes if "no checkpoint holds them" in note]


def test_a_lookup_that_is_no_table_of_the_checkpoint_has_its_buffers_from_it(tmp_path: Path) -> None:
    table = Buffer("item_emb")
    table._name = "own"
    manifest = export(tmp_path, Two(Sparse(), Dense(table)))
    assert manifest.parity.reference == "model"


class Holder:
    """An object of the caller's own."""

    def __init__(self, table: nn.Module) -> None:
        self.table = table


class Slots:
    """An object without a dict."""

    __slots__ = ("table",)

    def __init__(self, table: nn.Module) -> None:
        self.table = table


def _ask(table: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return table(ids)


class Hidden(tiny_model.SparseArch):
    """Looks items up in a table that it does not register."""

    def __init__(self, how: str, table: nn.Module) -> None:
        super().__init__()
        self.item = nn.Identity()
        self.how = how
        held = {
            "list": [table],
            "tuple": (table,),
            "dict": {"c": table},
            "nested": {"c": [(table,)]},
            "object": Holder(table),
            "slots": Slots(table),
            "closure": lambda ids: table(ids),  # noqa: PLW0108 -- it closes over the table
            "partial": functools.partial(_ask, table),
            "method": table.forward,
            "module in a list": [nn.Sequential(table)],
        }
        self.held = held.get(how)

    def look(self, ids: torch.Tensor) -> torch.Tensor:
        held: Any = self.held
        if self.how in ("list", "tuple", "module in a list"):
            return held[0](ids)
        if self.how in ("object", "slots"):
            return held.table(ids)
        if self.how in ("dict", "nested"):
            return held["c"](ids) if self.how == "dict" else held["c"][0][0](ids)
        return held(ids)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.look(batch["item"]), "price": batch["price"]}


class OfClass(Hidden):
    shared: list[nn.Module]

    def look(self, ids: torch.Tensor) -> torch.Tensor:
        return self.shared[0](ids)


ELSEWHERE: dict[str, nn.Module] = {}


class OfGlobal(Hidden):
    def look(self, ids: torch.Tensor) -> torch.Tensor:
        return ELSEWHERE["item"](ids)


PLACES = {
    "list": r"sparse_arch\.held\[0\]",
    "tuple": r"sparse_arch\.held\[0\]",
    "dict": r"sparse_arch\.held\['c'\]",
    "nested": r"sparse_arch\.held\['c'\]\[0\]\[0\]",
    "object": r"sparse_arch\.held\.table",
    "slots": r"sparse_arch\.held\.table",
    "closure": r"sparse_arch\.held\.table",
    "partial": r"sparse_arch\.held",
    "module in a list": r"sparse_arch\.held\[0\]\.0",
}


@pytest.mark.parametrize("how", PLACES)
def test_a_table_that_the_sparse_arch_does_not_register_is_refused(how: str, tmp_path: Path) -> None:
    model = Two(Hidden(how, Attribute("item_emb")), tiny_model.DenseArch())
    says = rf"looks ids up in {PLACES[how]} \(table 'item_emb'\), which it does not register.*nn\.ModuleList"
    with pytest.raises(ModelError, match=says):
        export(tmp_path, model, score_program="auto", max_drift=0.1)
    assert not (tmp_path / "out").exists()


def test_a_table_of_a_class_or_a_global_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_model.LookalikeTable("item_emb")
    monkeypatch.setattr(OfClass, "shared", [table], raising=False)
    with pytest.raises(ModelError, match=r"sparse_arch\.shared\[0\] \(table 'item_emb'\), which it does not register"):
        export(tmp_path / "class", Two(OfClass("", table), tiny_model.DenseArch()))
    monkeypatch.setitem(ELSEWHERE, "item", table)
    with pytest.raises(ModelError, match=r"ELSEWHERE\['item'\] \(table 'item_emb'\), which it does not register"):
        export(tmp_path / "global", Two(OfGlobal("", table), tiny_model.DenseArch()))


def test_a_registered_table_may_be_in_a_list_too(tmp_path: Path) -> None:
    sparse_arch = Hidden("list", tiny_model.LookalikeTable("item_emb"))
    sparse_arch.kept = sparse_arch.held[0]
    manifest = export(tmp_path, Two(sparse_arch, tiny_model.DenseArch()), max_drift=0.1)
    assert manifest.drift.outputs["ctr"].max_abs == 0.0


class Wrapper(nn.Module):
    """A table that has its rows in one that it does not register."""

    def __init__(self, table: tiny_model.LookalikeTable) -> None:
        super().__init__()
        self._name = table._name
        self.inner = [table]

    def ids(self) -> torch.Tensor:
        return self.inner[0].ids()

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        self.inner[0].insert(ids, embeddings)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner[0](ids)


def test_a_registered_table_may_have_its_rows_in_another_one(tmp_path: Path) -> None:
    sparse_arch = tiny_model.SparseArch()
    sparse_arch.item = Wrapper(tiny_model.LookalikeTable("item_emb"))
    manifest = export(tmp_path, Two(sparse_arch, tiny_model.DenseArch()), max_drift=0.1)
    assert manifest.drift.outputs["ctr"].max_abs == 0.0


def test_with_the_dense_arch_alone_a_note_names_an_unregistered_table(tmp_path: Path) -> None:
    model = Two(Hidden("list", Attribute("item_emb")), tiny_model.DenseArch())
    manifest = export(tmp_path, model, need_export_sparse=False)
    assert any("sparse_arch.held[0] (table 'item_emb') is not registered" in note for note in manifest.notes)


class Between(tiny_model.TinyModel):
    """Has a table in a list, in neither arch."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [tiny_model.LookalikeTable("item_emb")]

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "price": blocks["price"] + self.held[0](batch["item"]).sum(1, keepdim=True)})


def test_an_unregistered_table_of_neither_arch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"computes with held\[0\] \(table 'item_emb'\) outside of the sparse arch"):
        export(tmp_path, Between())


def test_max_drift_does_not_pass_where_no_batch_has_a_row_of_a_table(tmp_path: Path) -> None:
    (_, batch), *_ = tiny_model.build_dataset()
    unknown = {**batch, "item": torch.full_like(batch["item"], 2**40 + 7)}
    model = tiny_model.build_model()
    with pytest.raises(ModelError, match=r"no batch has an id of item_emb that the checkpoint has a row of"):
        export(tmp_path / "one", model, batches=[unknown], max_drift=0.1)
    assert not (tmp_path / "one" / "out").exists()
    manifest = export(tmp_path / "two", tiny_model.build_model(), batches=[unknown, batch], max_drift=0.1)
    assert manifest.drift.outputs["ctr"].max_abs == 0.0
