"""A model in memory as a source: its tensors as files, what ranks hold put together, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.checkpoint.row_reader import RowReader
from dist_export.cli import main
from dist_export.config.schema import ExportConfig
from dist_export.errors import CheckpointError, CommitError, ConfigError, ModelError, PlanError
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.live import memory
from dist_export.live.assemble import assemble
from dist_export.live.discover import LiveShard, find_live_tables, key_of
from dist_export.live.memory import HeldTensors, LookedUpRows, TensorRows
from dist_export.plan.census import UniqueTask, deal_unique_tasks, share_parts
from tests.support import ROOT, exports, tiny_model
from tests.support.live_models import LiveTable, RecisImpl, Tables, bytes_of, embedding, read_rows
from tests.support.recis_writer import read_back

F32 = CODE_BY_TORCH["float32"]


def export(model: nn.Module | None, out: Path, **settings: Any) -> dist_export.manifest.Manifest:
    return exports.exporter(model, "sparse_arch", "dense_arch", None, None, out, **settings).export()


# ---- reading ----


@pytest.mark.parametrize("chunk", [1, 40, 4 << 20])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(30, 7),
        torch.randn(7, 30).t(),
        torch.randn(30, 20)[:, 3:9],
        torch.randn(60, 5)[::2],
        torch.randn(30, 3).to(torch.bfloat16),
        torch.arange(50),
        nn.Parameter(torch.randn(8, 2)),
    ],
    ids=["rows", "transposed", "columns", "every second", "bfloat16", "ids", "parameter"],
)
def test_a_tensor_reads_as_the_bytes_of_its_values(tensor: torch.Tensor, chunk: int) -> None:
    """From any byte on, any number of bytes, however it lies in memory."""
    expected = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    rows = TensorRows(tensor, chunk_bytes=chunk)
    assert rows.num_bytes == len(expected)
    for begin, end in itertools.combinations([0, 1, 5, 13, 24, len(expected) - 3, len(expected)], 2):
        found = bytearray(max(0, end - begin))
        rows.read_into(memoryview(found), begin)
        assert bytes(found) == expected[begin:end]


class LateCopy(torch.Tensor):
    """A pinned buffer whose copies arrive when an event is waited for, in their order, as those of a GPU do."""

    pending: ClassVar[list[Any]] = []

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking
        self.pending.append((self.as_subclass(torch.Tensor), source.clone()))
        return self


class Event:
    def record(self, _: object) -> None:
        self.number = len(LateCopy.pending)

    def synchronize(self) -> None:
        for buffer, piece in LateCopy.pending[: self.number]:
            buffer.copy_(piece)
        LateCopy.pending[: self.number] = [(torch.zeros(0), torch.zeros(0))] * self.number


@pytest.mark.parametrize("num_bytes", [1, 99, 100, 101, 350, 1000])
def test_bytes_leave_a_gpu_through_two_buffers(num_bytes: int, monkeypatch: Any) -> None:
    """A buffer is emptied once its copy has arrived, and not filled before it is empty. Here with copies that are late."""
    buffers = [torch.zeros(100, dtype=torch.uint8).as_subclass(LateCopy) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    flat, out = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    memory._copy_from_gpu(flat, out, buffers)
    assert torch.equal(flat, out)


def test_recis_own_table_is_looked_up_in_chunks() -> None:
    """Its embeddings() would copy the whole table."""
    ids, values = torch.arange(90, 0, -1), torch.randn(90, 5)
    impl = RecisImpl(ids, values)
    rows = LookedUpRows(lambda some: impl.embedding_lookup(some, True)[1], ids, ids.device, "t", chunk_bytes=100)
    found = bytearray(rows.num_bytes)
    rows.read_into(memoryview(found), 0)
    assert bytes(found) == values.numpy().tobytes()
    assert impl.largest == 5


def test_a_thread_holds_one_copy_of_embeddings() -> None:
    """A table whose embeddings() copies is asked again only where nobody holds what it gave."""
    held, calls = HeldTensors(), []

    def give(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.zeros(2)

    for name in ("a", "a", "b", "b", "a"):
        held.get(name, lambda name=name: give(name))
    assert calls == ["a", "b", "a"]


# ---- putting together ----


def shard(first_row: int, first_column: int, rows: int, columns: int, shape: tuple[int, int] = (10, 6)) -> LiveShard:
    return LiveShard(
        table="t",
        is_hashed=False,
        dtype=F32,
        shape=shape,
        rows=rows,
        first_row=first_row,
        first_column=first_column,
        columns=columns,
    )


GRIDS = {
    "replicas": [[shard(0, 0, 10, 6)]] * 3,
    "replicas on two ranks": [[shard(0, 0, 10, 6)], [], [shard(0, 0, 10, 6)]],
    "rows": [[shard(0, 0, 4, 6)], [shard(4, 0, 4, 6)], [shard(8, 0, 2, 6)]],
    "columns": [[shard(0, 0, 10, 2)], [shard(0, 2, 10, 2)], [shard(0, 4, 10, 2)]],
    "several of one rank": [[shard(0, 4, 10, 2), shard(0, 0, 10, 2)], [shard(0, 2, 10, 2)]],
    "tables of rows by columns": [
        [shard(0, 0, 5, 3)],
        [shard(0, 3, 5, 3)],
        [shard(5, 0, 5, 3)],
        [shard(5, 3, 5, 3)],
    ],
    "mesh of replicas": [[shard(0, 0, 5, 6)], [shard(5, 0, 5, 6)], [shard(0, 0, 5, 6)], [shard(5, 0, 5, 6)]],
    "uneven": [[shard(0, 0, 7, 4), shard(7, 0, 3, 6)], [shard(0, 4, 7, 2)]],
}


@pytest.mark.parametrize("held", GRIDS.values(), ids=GRIDS)
def test_shards_of_any_grid_give_the_rows(held: list[list[LiveShard]]) -> None:
    """Each byte of the table is some rank's to write, and is what the table holds there."""
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    written = np.full((10, 24), 255, np.uint8)
    times = np.zeros((10, 24), int)
    for rank, mine in enumerate(held):
        sources = {
            key_of(s, "embedding"): TensorRows(
                whole[s.first_row : s.first_row + s.rows, s.first_column : s.first_column + s.columns]
            )
            for s in mine
        }
        checkpoint = assemble(held, sources, rank)
        with RowReader(checkpoint) as reader:
            for part in range(len(checkpoint.parts)):
                owner = checkpoint.memory.owner  # type: ignore[union-attr]
                file = checkpoint.blocks.file[part, 1]
                pieces = reader.held_pieces(part, 1)
                if pieces is None:
                    its = [file] if file >= 0 else checkpoint.strips.file[list(checkpoint.strips.of(part, 1))]
                    pieces = [(0, 24)] if all(owner[number] == rank for number in its) else []
                if not pieces:
                    continue
                first, count = checkpoint.parts.first_row_of(part), int(checkpoint.parts.rows[part])
                rows = np.zeros(count * 24, np.uint8)
                reader.read_into(rows, part, 1, 0, count, held_only=True)
                for begin, end in pieces:
                    written[first : first + count, begin:end] = rows.reshape(count, 24)[:, begin:end]
                    times[first : first + count, begin:end] += 1
    assert (times == 1).all()
    assert np.array_equal(written, bytes_of(whole))


def test_replicas_are_shared_out_evenly() -> None:
    """Each rank writes its run of the rows."""
    checkpoint = assemble(GRIDS["replicas"], {}, 0)
    assert checkpoint.parts.rows.tolist() == [3, 3, 4]
    assert checkpoint.memory is not None
    assert checkpoint.memory.owner.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ([[shard(0, 0, 4, 6)], [shard(5, 0, 5, 6)]], "no rank holds rows 4:5 of column 0"),
        ([[shard(0, 0, 10, 2)], [shard(0, 4, 10, 2)]], "no rank holds rows 0:10 of column 2"),
        ([[shard(0, 0, 10, 4)], []], "no rank holds rows 0:10 of column 4"),
        ([[shard(0, 0, 6, 6)], [shard(4, 0, 6, 6)]], "several ranks hold different shards of rows 4:6"),
        ([[shard(0, 0, 10, 6)], [shard(0, 0, 9, 6, (9, 6))]], "on rank 0 and"),
        ([[], []], "no rank's sparse arch holds a table"),
    ],
)
def test_what_does_not_make_whole_tables_is_refused(held: list[list[LiveShard]], text: str) -> None:
    """Before anything is written, with the rows and columns."""
    with pytest.raises(CheckpointError, match=text):
        assemble(held, {}, 0)


def test_each_rank_counts_what_it_holds() -> None:
    """A hash table's ids are counted by the threads of its own rank."""
    tables = [
        find_live_tables(
            Tables(t=LiveTable("t", torch.arange(3), torch.ones(3, 2))).sparse_arch,
            sparse_model_name="",
            rank=rank,
            world_size=3,
        )
        for rank in range(3)
    ]
    checkpoint = assemble([found.shards for found in tables], tables[0].sources, 0)
    shares = share_parts(checkpoint, 6)
    owner = checkpoint.memory.owner  # type: ignore[union-attr]
    assert [part for share in shares for part in share] == [0, 1, 2]
    assert all(owner[checkpoint.blocks.file[part, 0]] == n // 2 for n, share in enumerate(shares) for part in share)
    assert checkpoint.parts.end.tolist() == [21846, 43691, 65536]


# ---- models ----


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (LiveTable("t", torch.arange(3), torch.ones(2, 2)), r"gives \[2, 2\], but ids\(\) gave 3 ids"),
        (LiveTable("t", torch.ones(3), torch.ones(3, 2)), "a tensor of integers"),
        (
            LiveTable("t", torch.arange(3), torch.ones(3, 2, dtype=torch.complex64)),
            "complex64, which no package can hold",
        ),
        (LiveTable("", torch.arange(3), torch.ones(3, 2)), "neither a name nor a _name"),
        (LiveTable("t", torch.arange(3), torch.ones(3, 2), (5, 2, 10)), "5:2 of 10 is not valid"),
        (nn.Embedding(3, 2, device="meta"), "not in memory"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(table: nn.Module, text: str, tmp_path: Path) -> None:
    """In one line, before anything is written."""
    with pytest.raises((CheckpointError, ModelError), match=text):
        export(Tables(t=table), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_two_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    """A package has one name for each table."""
    tables = Tables(a=LiveTable("t", [1], torch.ones(1, 2)), b=LiveTable("t", [2], torch.ones(1, 2)))
    with pytest.raises(ModelError, match="two tables of the model have the name 't'"):
        export(tables, tmp_path / "out")


def test_one_table_under_two_paths_is_one_table(tmp_path: Path) -> None:
    """A shared hash table has one name; a shared weight stands under both paths, as in a state_dict."""
    table, weight = LiveTable("t", [1], torch.ones(1, 2)), embedding(torch.ones(2, 3))
    manifest = export(Tables(a=table, b=table, c=weight, d=weight), tmp_path / "out")
    assert [entry.name for entry in manifest.tables] == ["t", "sparse_arch.c.weight", "sparse_arch.d.weight"]


def test_rows_of_one_rank_are_repaired_and_counted(tmp_path: Path) -> None:
    """Where one rank holds the whole table, misplaced and repeated ids are settled as those of a checkpoint."""
    rows = torch.arange(8, dtype=torch.float32).reshape(4, 2)
    table = LiveTable("t", [70, 3, 70, 65535], rows, (0, 100, 65536))
    manifest = export(Tables(t=table), tmp_path / "out", on_duplicate="first", num_shards=2)
    assert (manifest.tables[0].rows_out, manifest.tables[0].misplaced, manifest.tables[0].duplicates) == (3, 1, 1)
    found = read_back(tmp_path / "out")["t"]
    assert found["id"].tolist() == [3, 70, 65535]
    assert found["embedding"].tolist() == [[2, 3], [0, 1], [6, 7]]


def test_an_empty_table_and_an_empty_rank_are_exported(tmp_path: Path) -> None:
    """With their shapes."""
    tables = Tables(t=LiveTable("t", torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3)), e=nn.Embedding(0, 2))
    manifest = export(tables, tmp_path / "out", num_shards=1)
    assert [entry.rows_out for entry in manifest.tables] == [0, 0]


def test_what_an_export_left_unfinished_is_not_taken_over(tmp_path: Path, monkeypatch: Any) -> None:
    """The model may have been trained on since: whole shards of the same shape are written anew."""
    model = Tables(e=embedding(torch.ones(5, 2)), f=embedding(torch.ones(5, 2)))
    with monkeypatch.context() as patched:
        patched.setattr(dist_export.pipeline.steps, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(model, tmp_path / "out")
    assert list((tmp_path / "out").glob("model-*"))
    with torch.no_grad():
        model.sparse_arch.e.weight.fill_(7)
    manifest = export(model, tmp_path / "out")
    assert manifest.run["reused_shards"] == 0
    assert (read_rows(tmp_path / "out")["sparse_arch.e.weight"].view(np.float32) == 7).all()


def test_two_exports_never_count_as_one(tmp_path: Path) -> None:
    """A committed package of the model at another time is another export's: it needs overwrite."""
    model = Tables(e=embedding(torch.ones(5, 2)))
    first = export(model, tmp_path / "out")
    with pytest.raises(ConfigError, match="overwrite: true"):
        export(model, tmp_path / "out")
    second = export(model, tmp_path / "out", overwrite=True)
    assert first.run["identity"] != second.run["identity"]
    assert first.source == second.source
    assert first.digest == second.digest


# ---- settings ----


def test_none_means_the_live_model_in_python() -> None:
    """A None in Python is meant; ``filter_sparse_opt`` has no say, for new shards are written."""
    config = exports.exporter(Tables(), "sparse_arch", "dense_arch", None, None, "out", num_shards=3).config
    assert (config.format, config.ckpt_dir, config.filter_sparse_opt) == ("live", None, True)


def test_a_forgotten_ckpt_dir_is_still_an_error(tmp_path: Path) -> None:
    """An empty key of a file must not export a model that was never trained: there ``format: live`` says so."""
    (tmp_path / "export.yaml").write_text("ckpt_dir:\nexport_dir: out\nmodel: tests.support.tiny_model:build_model\n")
    with pytest.raises(ConfigError, match="ckpt_dir must be set"):
        dist_export.export(str(tmp_path / "export.yaml"))
    with pytest.raises(ConfigError, match="ckpt_dir is not set"):
        ExportConfig(export_dir="out")
    with pytest.raises(ConfigError, match="set ckpt_dir: null"):
        ExportConfig(ckpt_dir="in", export_dir="out", format="live")


def test_the_command_line_builds_the_model_and_exports_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """``format: live`` with a callable that returns a trained model."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "export.yaml").write_text(
        f"ckpt_dir: null\nformat: live\nexport_dir: {tmp_path / 'out'}\nmodel: tests.integration.test_live:build_trained\n"
    )
    assert main(["--config", str(tmp_path / "export.yaml")]) == 0
    assert "source   the live model, in memory" in capsys.readouterr().out
    assert (read_rows(tmp_path / "out")["sparse_arch.e.weight"].view(np.float32) == 2).all()
    assert main(["plan", "--config", str(tmp_path / "export.yaml")]) == 2
    assert "format is live" in capsys.readouterr().err
    (tmp_path / "export.yaml").write_text(f"format: live\nexport_dir: {tmp_path / 'other'}\n")
    assert main(["--config", str(tmp_path / "export.yaml")]) == 2
    assert "there is no model" in capsys.readouterr().err


def build_trained() -> nn.Module:
    return Tables(e=embedding(torch.full((4, 3), 2.0)))


# ---- memory ----

SCRIPT = """
import json, sys, threading
import torch
import dist_export
from tests.support.live_models import LiveTable, Tables, embedding

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def export(rows, out):
    ids = torch.arange(rows) * 0x1F3D5B79
    tables = Tables(t=LiveTable("t", ids, torch.ones(rows, 16)), e=embedding(torch.ones(rows, 16)))
    base, peak, done = anonymous(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    settings = {"num_shards": 3, "max_memory": "64MiB", "threads": 2}
    dist_export.Exporter(tables, "sparse_arch", "dense_arch", None, None, out, **settings).export()
    done.set()
    watcher.join()
    return peak - base

export(10, sys.argv[1] + "/small")
print(json.dumps(export(3_000_000, sys.argv[1] + "/large")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
def test_nothing_of_table_size_is_copied(tmp_path: Path) -> None:
    """Two tables of 192 MB each leave memory within max_memory."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) < 64 << 20


def test_rows_that_no_rank_has_whole_are_not_looked_at() -> None:
    """Whoever asks for whole rows of column shards is refused, rather than given some of their bytes."""
    held = GRIDS["columns"]
    sources = {key_of(held[0][0], "embedding"): TensorRows(torch.zeros(10, 2))}
    with RowReader(assemble(held, sources, 0)) as reader:
        assert reader.held_pieces(0, 1) == [(0, 8)]
        assert not reader.is_held(0, 1)
        with pytest.raises(CheckpointError, match="in the memory of other ranks"):
            reader.read_into(np.zeros(240, np.uint8), 0, 1, 0, 10)


def test_a_row_that_changed_on_its_way_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    """A model that trains on while it is exported, or a disk that loses a row, gives no package."""
    model = Tables(e=embedding(torch.ones(50, 4)))
    real = dist_export.pipeline.steps.check

    def check_and_train(*args: Any, **more: Any) -> Any:
        with torch.no_grad():
            model.sparse_arch.e.weight[49, 3] += 1
        return real(*args, **more)

    monkeypatch.setattr(dist_export.pipeline.steps, "check", check_and_train)
    with pytest.raises(
        CommitError, match=r"row 49 of table 'sparse_arch.e.weight' is not what the model has in memory"
    ):
        export(model, tmp_path / "out", num_shards=3)
    assert not (tmp_path / "out" / "manifest.json").exists()


# ---- with the dense arch ----


def trained_tiny_model() -> nn.Module:
    """The model whose checkpoint ``write_tiny_checkpoint`` writes, as training would have left it in memory."""
    model = tiny_model.build_model()
    for attribute, name in (("user", "user_emb"), ("item", "item_emb")):
        specs = tiny_model.tables()[name]
        ids, rows = (
            np.concatenate(columns) for columns in zip(*((s.ids, s.slots["embedding"]) for s in specs), strict=True)
        )
        setattr(model.sparse_arch, attribute, LiveTable(name, ids, rows))
    state = {name.removeprefix("dense_arch."): value for name, value in tiny_model.trained_dense_state().items()}
    model.dense_arch.load_state_dict(state)
    return model


def test_the_package_is_that_of_the_saved_model(tmp_path: Path) -> None:
    """Rows, indexes, the manifest that serving reads and the program's outputs; the model is left as it was."""
    saved = tiny_model.write_tiny_checkpoint(tmp_path / "saved")
    model, dataset = trained_tiny_model(), tiny_model.build_dataset()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    common = {"num_shards": 3, "filter_sparse_opt": True}
    exports.exporter(model, "sparse_arch", "dense_arch", dataset, saved, tmp_path / "a", **common).export()
    model = trained_tiny_model()
    rows = model.sparse_arch.user.embeddings().clone()
    live = exports.exporter(model, "sparse_arch", "dense_arch", dataset, None, tmp_path / "b", **common).export()
    assert torch.equal(model.sparse_arch.user.embeddings(), rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    for name in ("index", "tensorkey.json", "torch_rank_weights_embs_table_multi_shard.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    expected, found = read_back(tmp_path / "a"), read_back(tmp_path / "b")
    assert expected.keys() == found.keys()
    for table, slots in expected.items():
        assert all(np.array_equal(slots[slot], found[table][slot]) for slot in ("id", "embedding"))
    assert live.parity is not None
    assert live.parity.from_files is not None
    assert live.parity.from_files.reads_rows
    inputs = {"user": torch.ones(4, 4), "item": torch.ones(4, 4), "price": torch.ones(4, 1)}
    outputs = [dist_export.open_package(tmp_path / out).load_program().module()(**inputs) for out in ("a", "b")]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


def test_the_dense_arch_alone_leaves_memory(tmp_path: Path) -> None:
    """``need_export_sparse`` false: no table is looked at."""
    manifest = exports.exporter(
        trained_tiny_model(),
        "sparse_arch",
        "dense_arch",
        tiny_model.build_dataset(),
        None,
        tmp_path / "out",
        need_export_sparse=False,
    ).export()
    assert manifest.mode == "dense_only"
    assert manifest.source.format == "live"
    assert manifest.tables == ()
    assert not list((tmp_path / "out").glob("model-*"))


def test_ids_are_searched_where_they_are() -> None:
    """A table that one rank alone has rows of may have any slices; of one on several ranks the slices must prove all."""
    whole = (0, 65536, 65536)
    cases = {
        "one rank": (torch.arange(3), torch.zeros(0, dtype=torch.int64)),
        "two ranks": (torch.arange(3), torch.arange(5, 7)),
    }
    for name, ids in cases.items():
        tables = [
            find_live_tables(
                Tables(t=LiveTable("t", its, torch.ones(len(its), 2), whole)).sparse_arch,
                sparse_model_name="",
                rank=rank,
                world_size=2,
            )
            for rank, its in enumerate(ids)
        ]
        checkpoint = assemble([found.shards for found in tables], tables[0].sources, 0)
        tasks = [UniqueTask(0, (0, 1), 0, 0)]
        if name == "one rank":
            assert deal_unique_tasks(checkpoint, tasks, 0, 2) == [UniqueTask(0, (0,), 0, 0)]
            assert deal_unique_tasks(checkpoint, tasks, 1, 2) == []
        else:
            with pytest.raises(PlanError, match="memory of ranks 0, 1, and some rows"):
                deal_unique_tasks(checkpoint, tasks, 0, 2)
