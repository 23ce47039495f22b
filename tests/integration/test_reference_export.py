"""Whole exports against the caller's own model: each transformation is broken on purpose, and the export must see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dist_export
from dist_export.dense import copied_arch, sample_run, trace
from dist_export.dense.blocks import Blocks
from dist_export.dense.row_check import expected_name
from dist_export.errors import DistExportError, ModelError, ParityError
from dist_export.formats.row_encodings import RowCast
from dist_export.model import unwrap
from dist_export.plan import table_view as plan_tables
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model


class Dense(nn.Module):
    """Depends on the order of its blocks, and on no width of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = torch.sigmoid(self.out(torch.cat([block.mean(1, keepdim=True) for block in blocks.values()], 1)))
        return {"ctr": scores[:, :1], "like": scores[:, 1:]}


class Model(nn.Module):
    def __init__(self, dense: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.sparse_arch = tiny_model.SparseArch()
        self.dense_arch = dense or Dense()

    def between(self, blocks):
        return blocks

    def forward(self, batch):
        scores = self.dense_arch(self.between(self.sparse_arch(batch)))
        return {"loss": sum(score.mean() for score in scores.values()), "clipped": scores["ctr"].clamp(0.4, 0.6)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    torch.manual_seed(11)
    torch.save({f"dense_arch.{name}": t for name, t in Dense().state_dict().items()}, folder / "model.pt")
    return folder


def export(source: Path, model: nn.Module | None = None, *, rows: int = 140, **settings) -> dist_export.Manifest:
    return exports.exporter(
        model or Model(), "sparse_arch", "dense_arch", tiny_model.build_dataset(rows), source, source.parent / "out",
        filter_sparse_opt=True, **settings,
    ).export()  # fmt: skip


def expected_scores(source: Path, rows: int, model: nn.Module) -> torch.Tensor:
    """What the caller's model gives by hand, with the checkpoint's rows and values."""
    for attribute, table in (("user", "user_emb"), ("item", "item_emb")):
        for part in tiny_model.tables()[table]:
            ids, found = torch.from_numpy(part.ids), torch.from_numpy(part.slots["embedding"])
            getattr(model.sparse_arch, attribute).insert(ids, found)
    model.load_state_dict(torch.load(source / "model.pt", weights_only=True), strict=False)
    with torch.no_grad():
        return model.eval().dense_arch(model.sparse_arch(tiny_model.build_dataset(rows)[0][1]))["ctr"]


@pytest.mark.parametrize(
    ("rows", "limit", "sizes"),
    [(140, 204800, (128, 1, 2, 301, 140)), (1, 204800, (2, 1, 301)), (140, 100, (100, 1, 2))],
)
def test_the_whole_batch_is_compared_with_the_model(rows: int, limit: int, sizes, source: Path) -> None:
    manifest = export(source, rows=rows, max_batch_size=limit)
    parity = manifest.parity
    assert (parity.reference, parity.from_files.reference) == ("model", "model")
    assert parity.batch_sizes == sizes
    assert parity.from_files.rows == min(rows, limit)
    assert max(*parity.max_abs.values(), *parity.from_files.max_abs.values()) < 1e-6
    assert not any("dense_arch(sparse_arch(batch))" in note for note in manifest.notes)
    assert verify(str(source.parent / "out")).findings == []


def test_a_model_that_fails_as_a_whole_is_noted(source: Path) -> None:
    class Failing(Model):
        def between(self, blocks):
            raise ValueError("no label")

    manifest = export(source, Failing())
    assert (manifest.parity.reference, manifest.parity.from_files.reference) == ("arches", "arches")
    note = next(note for note in manifest.notes if "ValueError: no label" in note)
    assert "scores are those of dense_arch(sparse_arch(batch))" in note


def test_scores_that_are_made_behind_the_dense_arch_are_noted(source: Path) -> None:
    """The package has what the dense arch returns: nobody else would tell that the model's own are others."""
    model = Model()
    assert any(note.startswith("model(batch) gives other scores") for note in export(source, model, rows=4).notes)


def swap_order(patch) -> None:
    real = Blocks.fill
    patch.setattr(Blocks, "fill", lambda self, tensors: dict(reversed(list(real(self, tensors).items()))))


def cut_columns(patch) -> None:
    real = sample_run.cut_sample

    def cut(blocks, **more):
        return real(blocks.with_tensors({name: t[:, :3] for name, t in blocks.tensors.items()}), **more)

    patch.setattr(sample_run, "cut_sample", cut)


def mix_rows(patch) -> None:
    real = sample_run.cut_sample

    def cut(blocks, **more):
        done = real(blocks, **more)
        return done.with_tensors({name: t.flip(0) if name == "price" else t for name, t in done.tensors.items()})

    patch.setattr(sample_run, "cut_sample", cut)


def spoil_repeat(patch) -> None:
    real = sample_run.cut_sample

    def cut(blocks, **more):
        done = real(blocks, **more)
        for tensor in done.tensors.values():
            tensor[1:] += 1
        return done

    patch.setattr(sample_run, "cut_sample", cut)


def lose_hooks(patch) -> None:
    patch.setattr(unwrap, "_is_foreign", lambda hook: True)


def lose_a_module(patch) -> None:
    """The copy takes any module that has a ``module`` for a wrapper."""
    real = unwrap.unwrap
    patch.setattr(unwrap, "unwrap", lambda module: real(getattr(module, "module", module)))


def drop_an_input(patch) -> None:
    real = trace.find_used_inputs
    patch.setattr(trace, "find_used_inputs", lambda program, dims: [n for n in real(program, dims) if n != "price"])


def load_halves(patch) -> None:
    real = copied_arch.load_dense_parameters

    def load(copied, state, **more):
        return real(copied, {name: value / 2 for name, value in state.items()}, **more)

    patch.setattr(copied_arch, "load_dense_parameters", load)


def load_nothing(patch) -> None:
    patch.setattr(copied_arch, "load_dense_parameters", lambda copied, state, **more: ())


def spoil_casts(patch) -> None:
    real = RowCast.encode_into

    def encode(self, out, rows):
        doubled = (rows.reshape(-1).view("<f4") * 1.02).astype("<f4").view("u1").reshape(rows.shape)
        return real(self, out, doubled)

    patch.setattr(RowCast, "encode_into", encode)


def swap_names(patch) -> None:
    real = plan_tables._rename

    def rename(names, rules):
        done = real(names, rules)
        return [done[1], done[0]]

    patch.setattr(plan_tables, "_rename", rename)


class Hooked(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.out.register_forward_hook(lambda _, __, output: output * 1.5)


class Exported(Dense):
    """Computes something else where it is marked as exported."""

    exported = False

    def forward(self, blocks):
        scores = super().forward(blocks)
        return {name: score * 2 if self.exported else score for name, score in scores.items()}


class Stronger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) * 1.5


class Stacked(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.out = Stronger()


WRONG = "differs from the dense arch in model"
BROKEN = {
    "order": (swap_order, {}, WRONG),
    "cut": (cut_columns, {}, "fails on the whole batch|sample's input"),
    "cut, other rows": (mix_rows, {}, "the sample's input 'price' is not what the sparse arch gives"),
    "repeat": (spoil_repeat, {"rows": 1}, "the sample's input '.*' is not what"),
    "hooks": (lose_hooks, {"model": lambda: Model(Hooked())}, WRONG),
    "wrappers": (lose_a_module, {"model": lambda: Model(Stacked()), "stacked": True}, WRONG),
    "dropped inputs": (drop_an_input, {}, "differs from the dense arch"),
    "dense values": (load_halves, {}, WRONG),
    "dense values, the model's own": (load_nothing, {}, WRONG),
    "casts to bfloat16": (spoil_casts, {"dtype": {"*": "bfloat16"}}, "the cast of the checkpoint's does not explain"),
    "casts to float16": (spoil_casts, {"dtype": {"*": "float16"}}, "the cast of the checkpoint's does not explain"),
    "casts to int8": (spoil_casts, {"dtype": {"*": "int8"}}, "the cast of the checkpoint's does not explain"),
    "rename": (swap_names, {"rename_tables": {"*_emb": "t_{0}"}}, "_emb' is written as 't_(item|user)', but rename_tables"),
    "nothing but exported": (lambda patch: None, {"model": lambda: Model(Exported())}, WRONG),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_transformation_fails_the_export(case: str, source: Path, monkeypatch) -> None:
    break_it, settings, told = BROKEN[case]
    settings = dict(settings)
    if settings.pop("stacked", False):
        torch.save({f"dense_arch.{n}": t for n, t in Stacked().state_dict().items()}, source / "model.pt")
    model = settings.pop("model", Model)
    break_it(monkeypatch)
    with pytest.raises(ParityError, match=told) as caught:
        export(source, model(), **settings)
    assert caught.value.exit_code == 1
    assert not (source.parent / "out" / "manifest.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_casts_as_they_are_pass(dtype: str, source: Path) -> None:
    manifest = export(source, rows=5, dtype={"*": dtype}, rename_tables={"*_emb": "t_{0}"})
    assert manifest.parity.reference == "model"
    assert manifest.parity.from_files.reference == "copy", "the rows are others than the model's"
    assert max(manifest.parity.max_abs.values()) < 1e-6, "the program itself is compared on the checkpoint's own rows"


def test_gathered_parameters_of_a_live_model_are_held_against_its_own(tmp_path: Path, monkeypatch) -> None:
    """Without a checkpoint, the values of the copy are those that were gathered."""
    model = Model()
    for table in (model.sparse_arch.user, model.sparse_arch.item):
        table.embeddings = lambda its=table: torch.stack([its._rows[i] for i in sorted(its._rows)])
    expected_scores(_write(tmp_path), 5, model)
    monkeypatch.setattr(unwrap, "_gather", lambda tensor, owner: tensor.detach() * 2)
    with pytest.raises(DistExportError, match=WRONG):
        exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(5), None, tmp_path / "out", format="live"
        ).export()


def _write(folder: Path) -> Path:
    source = tiny_model.write_tiny_checkpoint(folder / "ckpt")
    torch.save({f"dense_arch.{name}": t for name, t in Dense().state_dict().items()}, source / "model.pt")
    return source


class Scaling(Model):
    def between(self, blocks):
        return {**blocks, "price": blocks["price"] * 2}


class Adding(Model):
    def between(self, blocks):
        return {**blocks, "bias": torch.ones(len(blocks["price"]), 1)}


class Sorting(Model):
    def between(self, blocks):
        return dict(sorted(blocks.items()))


class Harmless(Model):
    def between(self, blocks):
        return {name: block.double().float() for name, block in blocks.items()}


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Scaling, "'price' is changed between"), (Sorting, "another order between")],
)
def test_what_forward_does_between_the_arches_is_refused_before_anything_is_written(kind, told, source: Path) -> None:
    """Serving has what the sparse arch returns, and no forward in between."""
    with pytest.raises(ModelError, match=told) as caught:
        export(source, kind())
    assert caught.value.exit_code == 2
    assert not (source.parent / "out").exists() or not list((source.parent / "out").iterdir())


def test_what_changes_no_score_between_the_arches_is_fine(source: Path) -> None:
    assert export(source, Harmless(), rows=5).parity.reference == "model"


def test_the_package_gives_the_models_scores(source: Path) -> None:
    """By hand, from the caller's model alone."""
    from dist_export.archive.safe_load import load_program

    export(source, rows=7)
    out = source.parent / "out"
    package = dist_export.open_package(out)
    batch = tiny_model.build_dataset(7)[0][1]
    blocks = {
        name: torch.from_numpy(package.lookup(f"{name}_emb", batch[name].numpy())[0].copy())
        for name in ("user", "item")
    }
    program = load_program(out / package.manifest.dense.program)
    found = program.module()(**blocks, price=batch["price"])
    torch.testing.assert_close(found[0], expected_scores(source, 7, Model()))


@pytest.mark.parametrize(
    ("name", "rules", "expected"),
    [
        ("user_emb", {"*_emb": "t_{0}"}, "t_user"),
        ("a.b.c", {"*.?.*": "{2}/{1}/{0}"}, "c/b/a"),
        ("a.b.c", {"x": "y", "a*": "q", "*": "never"}, "q"),
        ("x1", {"x[0-9]": "num"}, "num"),
        ("x]", {"x[]]": "bracket"}, "bracket"),
        ("xa", {"x[!0-9]": "letter"}, "letter"),
        ("plain", {"other*": "z"}, "plain"),
    ],
)
def test_the_expected_name_is_that_of_the_setting(name: str, rules, expected: str) -> None:
    assert expected_name(name, rules) == expected
    pattern = next((pattern for pattern in rules if plan_tables._compile(pattern)(name)), None)
    hit = None if pattern is None else plan_tables._compile(pattern)(name)
    assert (name if pattern is None else plan_tables._fill(pattern, hit, rules[pattern])) == expected
