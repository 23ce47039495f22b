"""The same export again is a success, from every door; anything else that is there is refused as before."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import dist_export
from dist_export import cli
from dist_export.dense import own_values
from dist_export.errors import ConfigError
from dist_export.manifest import MANIFEST
from dist_export.pipeline import run as job
from dist_export.pipeline import steps, target
from dist_export.storage import local_io
from dist_export.storage.urls import open_directory
from dist_export.verify.verify import verify
from tests.support import ROOT, exports, tiny_model
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import content

SHARD = "model-000001-of-000003.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    return tmp_path / "ckpt"


def settings_of(source: Path | str, out: Path | str, **more: object) -> dict[str, object]:
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 3}
    return {**settings, **exports.SCORES_OFF, **more}


def export(source: Path | str, out: Path | str, **more: object) -> dist_export.Manifest:
    return exports.export(settings_of(source, out, **more))


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: nothing was written anew."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--ckpt_dir", str(source), "--export_dir", str(out), "--filter_sparse_opt", "true", "--num_shards", "3"),
        *more,
    ]


def test_on_the_command_line(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(arguments(source, out)) == 0
    before, shown = states(out), capsys.readouterr().out
    assert "already exported" not in shown
    assert cli.main(arguments(source, out)) == 0
    again = capsys.readouterr().out
    assert states(out) == before, "nothing was written, not even a lock"
    assert f"package: {out}\n  already exported at 20" in again
    assert "nothing was written" in again
    assert "model's code" not in again, "there is none"
    tables = next(line for line in shown.splitlines() if line.startswith("  rows "))
    assert tables in again, "it is the summary of the package"


def test_from_python(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = export(source, out)
    before = states(out)
    assert export(source, out) == first
    assert export(f"{source}/../{source.name}/", f"{out}/", on_unfinished="error", threads=2, timeout=77) == first
    assert states(out) == before


def test_with_a_model_the_summary_says_that_its_code_is_not_compared(tmp_path: Path, capsys, monkeypatch) -> None:
    source, out = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out"
    monkeypatch.chdir(ROOT)
    model = ["--model", tiny_model.MODEL, "--dataset", tiny_model.DATASET]
    assert cli.main(arguments(source, out, *model)) == 0
    before = states(out)
    capsys.readouterr()
    assert cli.main(arguments(source, out, *model)) == 0
    said = capsys.readouterr().out
    assert "already exported" in said
    assert "the model's code is not compared" in said
    assert states(out) == before

    def build(number: int) -> dist_export.Exporter:
        kind = type("Another", (type(tiny_model.build_model()),), {}) if number else type(tiny_model.build_model())
        model = tiny_model.build_model()
        model.__class__ = kind
        return exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, tmp_path / "exporter",
            filter_sparse_opt=True,
        )  # fmt: skip

    first = build(0).export()
    before = states(tmp_path / "exporter")
    assert build(0).export() == first
    with pytest.raises(ConfigError, match="another source or other settings"):
        build(1).export()
    assert states(tmp_path / "exporter") == before


def test_in_the_checkpoint_itself(tmp_path: Path) -> None:
    """The first one adds files to the checkpoint, and the second finds them."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    (source / "torch_rank_weights_embs_table_multi_shard.json").unlink(missing_ok=True)
    more = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    more |= {"filter_sparse_opt": False, "num_shards": None}
    first = export(source, source, **more)
    before = states(source)
    assert export(source, source, **more) == first
    assert states(source) == before
    assert verify(str(source)).findings == []
    with pytest.raises(ConfigError, match="holds a committed package"):
        export(source, source, **more, export_outputs=["other"])


def test_the_dense_arch_alone(tmp_path: Path) -> None:
    source, out = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out"
    more = {
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
        "need_export_sparse": False,
    }
    more |= {"num_shards": None}
    first = export(source, out, **more)
    assert export(source, out, **more) == first
    touch_later(source / "model.pt")
    with pytest.raises(ConfigError, match="another source or other settings"):
        export(source, out, **more)


def test_on_a_store(source: Path) -> None:
    MemoryFileSystem.store.clear()
    first = export(source, "memory://same/out")
    objects = dict(MemoryFileSystem.store)
    assert export(source, "memory://same/out") == first
    assert MemoryFileSystem.store == objects
    with pytest.raises(ConfigError, match="overwrite would destroy it"):
        export(source, "memory://same/out", overwrite=True)
    MemoryFileSystem.store.clear()


def touch_later(file: Path) -> None:
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda source: touch_later(source / "index"),
        lambda source: touch_later(next(source.glob("model-*.safetensors"))),
        lambda source: write_checkpoint(source, make_tables({"t": 60, "u": 30}, 3, seed=9)),
    ],
    ids=["its index", "a shard", "all of it"],
)
def test_a_source_that_was_saved_anew_is_another_one(
    change: Callable[[Path], object], restarted: bool, source: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    export(source, out)
    before = states(out)
    change(source)
    if restarted:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="package of another source or other settings"):
        export(source, out)
    assert states(out) == before


@pytest.mark.parametrize(
    "more",
    [
        {"num_shards": 2},
        {"keep_slots": ["sparse*"]},
        {"dtype": {"t": "float16"}},
        {"digest": "sha256"},
        {"rename_tables": {"t": "v"}},
        {"prune": [{"tables": "t", "norm_at_most": 0.0}]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_settings_are_another_export(more: dict[str, object], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out)
    before = states(out)
    with pytest.raises(ConfigError, match=r"is there already: export_dir holds a committed package"):
        export(source, out, **more)
    assert states(out) == before


def test_the_order_of_patterns_counts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out, dtype={"t": "float16", "*": "bfloat16"})
    with pytest.raises(ConfigError, match="is there already"):
        export(source, out, dtype={"*": "bfloat16", "t": "float16"})


def test_the_content_of_a_list_counts_and_not_its_time(source: Path, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", tmp_path / "ids.npy"
    np.save(listed, np.arange(10))
    prune = [{"tables": "t", "deny": str(listed)}]
    first = export(source, out, prune=prune)
    touch_later(listed)
    assert export(source, out, prune=prune) == first
    np.save(listed, np.arange(11))
    with pytest.raises(ConfigError, match="package of another source or other settings"):
        export(source, out, prune=prune)


def test_the_content_of_fg_counts(tmp_path: Path) -> None:
    source, out, fg = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out", tmp_path / "fg.json"
    fg.write_text('{"features": []}')
    first = export(source, out, fg_conf_or_path=str(fg))
    assert export(source, out, fg_conf_or_path=str(fg)) == first
    fg.write_text('{"features": [], "more": 1}')
    with pytest.raises(ConfigError, match="package of another source or other settings"):
        export(source, out, fg_conf_or_path=str(fg))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda out: (out / SHARD).unlink(), f"{SHARD} is missing"),
        (lambda out: os.truncate(out / SHARD, 10), f"{SHARD} has 10 bytes, not "),
        (lambda out: (out / "index").unlink(), "index is missing"),
    ],
    ids=["no shard", "a shard cut", "no index"],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_package_that_is_not_whole_is_no_success(
    break_it: Callable[[Path], object], said: str, restarted: bool, source: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    export(source, out)
    break_it(out)
    if restarted:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match=rf"holds the package of this very export, but {said}.*overwrite: true"):
        export(source, out)
    export(source, out, overwrite=True)
    assert verify(str(out)).findings == []


def test_what_is_asked_to_begin_anew_does(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out)
    before = states(out)
    with pytest.raises(ConfigError, match="holds a committed package"):
        export(source, out, on_unfinished="restart")
    assert states(out) == before
    export(source, out, overwrite=True)
    assert states(out)[SHARD][0] != before[SHARD][0]


def test_a_package_to_which_nothing_can_be_written(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Sealed after the export; the tests may run as root, who may write everywhere."""
    out = tmp_path / "out"
    first = export(source, out)
    monkeypatch.setattr(
        "dist_export.storage.local_directory.LocalDirectory.why_not_writable", lambda _: "cannot be written to"
    )
    assert export(source, out) == first
    with pytest.raises(ConfigError, match="cannot be written to"):
        export(source, tmp_path / "new")


def test_one_that_was_committed_while_this_one_waited(source: Path, tmp_path: Path, monkeypatch) -> None:
    """A scheduler starts a job twice: the second waits for the first one's lock, and finds that all is done."""
    out = tmp_path / "out"
    real = steps.claim
    committed = []

    def claim(*given, **options):
        monkeypatch.setattr(steps, "claim", real)
        committed.append(export(source, out))
        return real(*given, **options)

    monkeypatch.setattr(steps, "claim", claim)
    assert export(source, out) == committed[0]
    assert not (out / ".dist_export").exists()
    assert verify(str(out)).findings == []


def test_it_is_registered_as_ever(source: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def register(_config, _located, manifest, directory):
        asked.append((manifest.digest, directory))
        return "models:/m/1"

    monkeypatch.setattr(steps, "register_package", register)
    out = tmp_path / "out"
    first = export(source, out)
    export(source, out)
    assert asked == [(first.digest, str(out))] * 2


def test_plan_says_so(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    export(source, out)
    assert cli.main(["plan", *arguments(source, out, "--score_program", "off")]) == 0
    assert "holds a package of these settings" in capsys.readouterr().out


def test_the_day_of_a_subfolder_is_looked_up_once(source: Path, tmp_path: Path, monkeypatch) -> None:
    """An export that begins at midnight has one directory, in its events as on the disk."""
    days = iter(["20260101", "20260102", "20260103"])
    real = time.strftime
    monkeypatch.setattr(time, "strftime", lambda form, *when: next(days) if form == "%Y%m%d" else real(form, *when))
    export(source, tmp_path / "out", add_subfolder=True, events=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["20260101000000"]
    assert sorted(os.listdir(tmp_path / "out" / "20260101000000")) == ["data", "data.events.jsonl"]


def test_the_same_day_again(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(target, "place_of", lambda export_dir, *, add_subfolder: f"{export_dir}/20260101000000/data")
    monkeypatch.setattr(job, "place_of", target.place_of)
    first = export(source, tmp_path / "out", add_subfolder=True)
    assert export(source, tmp_path / "out", add_subfolder=True) == first


def test_a_copy_of_the_package_is_the_package(source: Path, tmp_path: Path) -> None:
    """It was moved there by hand: the identity does not name export_dir."""
    first = export(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    assert export(source, tmp_path / "moved") == first
    assert content(tmp_path / "moved").keys() == {MANIFEST, *(file.path for file in first.files)} - {MANIFEST}


GLOBAL = [torch.ones(1)]


@dataclasses.dataclass
class Settings:
    scale: object


def read_global(_: object) -> torch.Tensor:
    return GLOBAL[0]


def scaled_by(dense_arch: Scaled, kind: str) -> torch.Tensor:
    return torch.as_tensor(OTHER_KINDS[kind][1](dense_arch))


OTHER_KINDS = {
    "array": (lambda self, held: setattr(self, "own", held.numpy()), lambda self: self.own),
    "dataclass": (lambda self, held: setattr(self, "own", Settings(held)), lambda self: self.own.scale),
    "array in it": (lambda self, held: setattr(self, "own", Settings(held.numpy())), lambda self: self.own.scale),
    "closure": (lambda self, held: setattr(self, "own", lambda: held), lambda self: self.own()),
    "class": (lambda self, held: setattr(type(self), "own", held), lambda self: self.own),
    "modules": (lambda self, held: setattr(self, "own", [Held(held)]), lambda self: self.own[0].scale),
    "modules by name": (lambda self, held: setattr(self, "own", {"a": Held(held)}), lambda self: self.own["a"].scale),
    "method": (lambda self, held: setattr(type(self), "own", lambda self: held), lambda self: self.own()),
    "global": (
        lambda self, held: (GLOBAL.__setitem__(0, held), setattr(type(self), "read_global", read_global)),
        lambda self: self.read_global(),
    ),
}
"""How a module may hold a value that torch does not register, and how it gets at it."""


class Held(torch.nn.Module):
    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(scale, requires_grad=False)


class Scaled(tiny_model.DenseArch):
    """Holds values that no checkpoint of the plain one has."""

    own: object = None

    def __init__(self, kind: str, value: float) -> None:
        super().__init__()
        held = torch.full((1,), value)
        self.kind, self.is_other = kind, kind in OTHER_KINDS
        if self.is_other:
            self.__class__ = type("Scaled", (Scaled,), {})
            OTHER_KINDS[kind][0](self, held)
            return
        if kind == "parameter":
            self.scale = torch.nn.Parameter(held)
        elif kind == "attribute":
            self.scale = held
        elif kind == "list":
            self.scales = [held]
        else:
            self.register_buffer("scale", held, persistent=kind == "saved buffer")

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scale = self.scales[0] if hasattr(self, "scales") else getattr(self, "scale", None)
        if self.is_other:
            scale = scaled_by(self, self.kind)
        return {name: scores * scale for name, scores in super().forward(blocks).items()}


@pytest.mark.parametrize("kind", ["parameter", "saved buffer", "buffer", "attribute", "list", *OTHER_KINDS])
def test_an_export_with_other_values_of_the_model_itself_is_another_one(kind: str, tmp_path: Path) -> None:
    source, out = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out"

    def run(value: float, **more: object) -> dist_export.Manifest:
        model = tiny_model.build_model()
        model.dense_arch = Scaled(kind, value)
        if kind in ("parameter", "saved buffer"):
            more["allow_missing_dense"] = ["scale"]
        return exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, out, filter_sparse_opt=True, **more
        ).export()  # fmt: skip

    first = run(1.0)
    own = "read_global" if kind == "global" else "own" if kind in OTHER_KINDS else "scale"
    assert first.run["own_values"] == ["scales" if kind == "list" else own]
    assert first.run["own_values_digest"].startswith("xxh3:")
    before = states(out)
    assert run(1.0) == first
    assert states(out) == before
    with pytest.raises(ConfigError, match=r"has values of the model itself \(run.own_values names them\).*overwrite"):
        run(5.0)
    assert states(out) == before
    assert run(5.0, overwrite=True).digest != first.digest


@pytest.mark.parametrize(
    ("make", "is_same"),
    [
        (lambda value: {"value": value}, True),
        (lambda value: np.full(3, float(value)), True),
        (lambda value: torch.full((3,), float(value)), True),
        (lambda value: types.SimpleNamespace(value=[value]), True),
        (lambda value: functools.partial(max, value), True),
        (lambda value: lambda: value, True),
        (lambda value: [threading.Lock(), value], False),
    ],
    ids=["dict", "array", "tensor", "object", "partial", "closure", "lock"],
)
def test_the_content_of_arguments_counts(make, is_same: bool, tmp_path: Path, monkeypatch) -> None:
    """Python callers may give any object. What cannot be compared is never the same, and the first export says so."""
    source, out = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out"
    monkeypatch.setattr(tiny_model, "build_with", lambda **_: tiny_model.build_model(), raising=False)
    more = {
        "model": "tests.support.tiny_model:build_with",
        "dataset": tiny_model.DATASET,
        "num_shards": 2,
    }
    first = export(source, out, **more, model_args={"its": make(1)})
    told = f"model_args.its holds a {type(threading.Lock()).__module__}.lock, whose content cannot be compared"
    assert any(told in note for note in first.notes) is not is_same
    before = states(out)
    if is_same:
        assert export(source, out, **more, model_args={"its": make(1)}) == first
    with pytest.raises(ConfigError, match="is there already: export_dir holds a committed package") as refused:
        export(source, out, **more, model_args={"its": make(2 if is_same else 1)})
    assert (told in str(refused.value)) is not is_same
    assert states(out) == before


def test_a_package_of_another_version_is_said(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    assert cli.main(arguments(source, out)) == 0
    assert cli.main(arguments(source, out)) == 0
    assert "exported it, and this is" not in capsys.readouterr().out
    monkeypatch.setattr("dist_export.reporting.summary.VERSION", "9.9")
    assert cli.main(arguments(source, out)) == 0
    assert "dist_export 0.1.0 exported it, and this is 9.9" in capsys.readouterr().out


def write_anew(file: Path) -> None:
    """Other content of the same size, in the same inode, with the time set back."""
    before = file.stat()
    if file.name == "model.pt":
        torch.save({name: value + 1 for name, value in torch.load(file, weights_only=True).items()}, file)
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_a_copy(file: Path) -> None:
    shutil.copy2(file, file.with_suffix(".copy"))
    os.replace(file.with_suffix(".copy"), file)


@pytest.mark.parametrize("change", [write_anew, put_a_copy])
@pytest.mark.parametrize("name", ["model.pt", "a shard"])
def test_a_file_that_is_written_anew_at_its_size_and_time_is_another_one(change, name: str, tmp_path: Path) -> None:
    source, out = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out"
    more = {
        "model": tiny_model.MODEL,
        "dataset": tiny_model.DATASET,
        "num_shards": 2,
    }
    first = export(source, out, **more)
    assert export(source, out, **more) == first
    change(source / name if name == "model.pt" else next(source.glob("model-*.safetensors")))
    with pytest.raises(ConfigError, match="another source or other settings"):
        export(source, out, **more)


@pytest.mark.parametrize(("kind", "num"), [("ext4", 2), ("nfs4", 1), ("fuse.gcsfuse", 0), ("", 0)])
def test_times_and_inodes_count_where_the_file_system_keeps_them(
    kind: str, num: int, source: Path, monkeypatch
) -> None:
    monkeypatch.setattr("dist_export.storage.local_io.file_system_of", lambda path: kind)
    stat = (source / "index").stat()
    expected = (stat.st_ino if num == 2 else 0, stat.st_ctime_ns) if num else ()
    assert open_directory(str(source)).stat("index").trace == expected


def test_the_file_system_of_a_path_is_that_of_the_deepest_mount(monkeypatch, tmp_path: Path) -> None:
    lines = [
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw",
        f"2 1 0:5 / {tmp_path}/a\\040b rw shared:4 - nfs4 host:/x rw",
        f"3 1 0:6 / {tmp_path}/a rw - tmpfs tmpfs rw",
        f"4 1 0:7 / {tmp_path}/a rw - xfs /dev/sdb rw",
    ]
    (tmp_path / "mounts").write_text("\n".join(lines) + "\n")
    real = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *a, **k: real(tmp_path / "mounts" if path == "/proc/self/mountinfo" else path, *a, **k),
    )
    for path, kind in (("a b/c", "nfs4"), ("a/c", "xfs"), ("ab", "ext4"), ("a", "xfs")):
        assert local_io.file_system_of(str(tmp_path / path)) == kind


def test_values_that_cannot_be_read_are_never_the_same() -> None:
    arch = Scaled("buffer", 1.0)
    digest = own_values.digest_own_values(arch, ["scale"])
    assert digest == own_values.digest_own_values(torch.nn.DataParallel(arch), ["scale"]) is not None
    assert digest != own_values.digest_own_values(Scaled("buffer", 2.0), ["scale"])
    assert own_values.digest_own_values(arch, ["scale", "gone"]) is None
    arch.scale = torch.ones(1, device="meta")
    assert own_values.digest_own_values(arch, ["scale"]) is None
    arch.held = [torch.ones(1), threading.Lock()]
    assert own_values.digest_own_values(arch, ["held"]) is None


def test_what_refers_to_registered_modules_has_no_values_of_its_own(tmp_path: Path) -> None:
    """A list of the layers, and a way back to the model: the checkpoint has these values."""
    source, out = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt"), tmp_path / "out"

    def run() -> dist_export.Manifest:
        model = tiny_model.build_model()
        model.dense_arch.listed = [*model.dense_arch.children()]
        model.dense_arch.numbers = {"scale": [1.0, 2.0], "of": model.dense_arch.children}
        return exports.exporter(
            model, "sparse_arch", "dense_arch", tiny_model.build_dataset(), source, out, filter_sparse_opt=True
        ).export()  # fmt: skip

    first = run()
    assert "own_values" not in first.run
    assert run() == first
