"""``dist_export score``: the rows of a file are scored in batches, and the file that is written appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import dist_export
from dist_export.cli import main
from dist_export.errors import UserError
from dist_export.manifest import TensorEntry
from dist_export.serve.columns import Lists, read_batches, to_inputs
from dist_export.serve.score_file import score_file
from tests.support import score_models as models

TAGS = ("tags_values", "tags_offsets")
RANGE = ": the program takes -2147483648 to 2147483647"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score_file")
    build = lambda: models.Model(models.ThreeTables(), 3 * models.DIM + 1)
    checkpoint = models.save(models.train(build()), folder / "model.pth")
    dist_export.Exporter(
        build(),
        "sparse_arch",
        "dense_arch",
        [models.batch_of()],
        checkpoint,
        folder / "out",
        score_program="require",
        progress=False,
    ).export()
    return folder / "out"


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in models.batch_of(100, seed=3).items()}


@pytest.fixture(scope="module")
def expected(package: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    scores: np.ndarray = dist_export.open_package(package).score(batch)["ctr"][:, 0]
    return scores


def rows_of(batch: dict[str, np.ndarray]) -> list[dict[str, object]]:
    """The batch as rows with lists, as a file has them."""
    ends = batch["tags_bounds"][1:]
    return [
        {
            "user": int(batch["user"][row]),
            "clicks": batch["clicks"][row].tolist(),
            "tags": batch["tags_values"][batch["tags_bounds"][row] : ends[row]].tolist(),
            "price": batch["price"][row].tolist(),
            "request": f"r{row}",
        }
        for row in range(len(ends))
    ]


def write(batch: dict[str, np.ndarray], folder: Path, kind: str) -> str:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows_of(batch))) + "\n\n")
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows_of(batch)), path, row_group_size=30)
    else:
        np.savez(path, **{name: batch[name] for name in ("user", "clicks", "price", *TAGS)})
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz"])
@pytest.mark.parametrize("batch_size", [1, 7, 4096])
def test_each_row_gets_its_score(
    kind: str,
    batch_size: int,
    package: Path,
    batch: dict[str, np.ndarray],
    expected: np.ndarray,
    tmp_path: Path,
    capsys,
) -> None:
    out = tmp_path / "scores.parquet"
    given = ["--input", write(batch, tmp_path, kind), "--output", str(out), "--batch_size", str(batch_size)]
    assert main(["score", str(package), *given]) == 0
    assert capsys.readouterr().out == f"{out}: 100 rows scored\n"
    found = parquet.read_table(out)["ctr"].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_columns_are_kept(package: Path, batch: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    given = ["--input", write(batch, tmp_path, "jsonl"), "--output", str(out), "--keep", "request", "--keep", "tags"]
    assert main(["score", str(package), *given]) == 0
    table = parquet.read_table(out).to_pylist()
    assert [row["request"] for row in table] == [f"r{row}" for row in range(100)]
    assert [row["tags"] for row in table] == [row["tags"] for row in rows_of(batch)]


def test_mistakes_are_one_line_and_nothing_is_written(
    package: Path, batch: dict[str, np.ndarray], tmp_path: Path, capsys
) -> None:
    rows = rows_of(batch)
    cases = {
        "no column for the input 'user'": [{k: v for k, v in row.items() if k != "user"} for row in rows],
        "column 'clicks' has lists of several lengths": [*rows[:-1], {**rows[-1], "clicks": [1]}],
        "column 'user' has 1 rows without a value": [*rows[:-1], {**rows[-1], "user": None}],
        "column of the input 'user' is float64, expected int64": [{**row, "user": 1.5} for row in rows],
        "has no rows": [],
    }
    out = tmp_path / "scores.parquet"
    for message, changed in cases.items():
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, changed)))
        assert main(["score", str(package), "--input", str(path), "--output", str(out)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert message in lines[0]
        assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"a,b", "inputs are read from .parquet, .jsonl, .npz"),
        ("rows.jsonl", b"{", "line 1 is no JSON object"),
        ("rows.jsonl", b"[1]", "line 1 is no JSON object"),
        ("rows.jsonl", b'{"user": 9223372036854775808000}', "is no sound jsonl file"),
        ("rows.jsonl", b'{"user": 1}\n{"user": "a"}', "is no sound jsonl file"),
        ("rows.parquet", b"hello", "is no sound parquet file"),
        ("rows.npz", b"hello", "is no sound npz file"),
        ("gone.jsonl", None, "No such file or directory"),
    ],
)
def test_a_file_that_is_none_is_named(
    name: str, content: bytes | None, message: str, package: Path, tmp_path: Path, capsys
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "scores.parquet"
    assert main(["score", str(package), "--input", str(tmp_path / name), "--output", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not out.exists()


def test_a_file_that_is_there_is_not_overwritten(package: Path, batch: dict[str, np.ndarray], tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    out.write_text("mine")
    assert main(["score", str(package), "--input", write(batch, tmp_path, "npz"), "--output", str(out)]) == 2
    assert out.read_text() == "mine"


def test_weights_of_other_lists_are_refused() -> None:
    """As many in all, but not row by row: each value would get another one's weight."""
    entries = [
        TensorEntry(name=f"tags_{part}", dtype=dtype, shape=("n",))
        for part, dtype in (("values", "int64"), ("weights", "float32"))
    ]
    lists = {"tags": Lists(np.arange(3), np.array([0, 1, 3])), "tags_weights": Lists(np.ones(3), np.array([0, 2, 3]))}
    with pytest.raises(UserError, match=r"the lists of 'tags' and of 'tags_weights' differ in length in some row"):
        to_inputs(lists, entries, where="rows.jsonl")
    lists["tags_weights"] = Lists(np.ones(3), np.array([0, 1, 3]))
    assert list(to_inputs(lists, entries, where="rows.jsonl")) == ["tags_values", "tags_weights"]


@pytest.fixture(scope="module")
def narrow_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose ids are int32."""
    folder = tmp_path_factory.mktemp("narrow")
    make, look = models.WAYS["embedding"]
    build = lambda: models.Model(models.Lookups(make(), look), models.DIM + 1)
    batch = {"user": torch.arange(5, dtype=torch.int32), "price": torch.rand(5, 1)}
    checkpoint = models.save(models.train(build()), folder / "model.pth")
    dist_export.Exporter(
        build(),
        "sparse_arch",
        "dense_arch",
        [batch],
        checkpoint,
        folder / "out",
        score_program="require",
        progress=False,
    ).export()
    return folder / "out"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"user": 2**32 + 3}, "input 'user' holds 4294967299, which torch.int32 cannot hold"),
        ({"price": [1e300]}, "input 'price' is torch.float64 and holds values that torch.float32 cannot hold"),
    ],
)
def test_a_value_that_the_input_cannot_hold_is_no_other_value(
    kind: str, changed: dict[str, object], message: str, narrow_package: Path, tmp_path: Path, capsys
) -> None:
    rows = [{"user": 3, "price": [0.5]}, {"user": 3, "price": [0.5], **changed}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        np.savez(path, **{name: np.array([row[name] for row in rows]) for name in ("user", "price")})
    out = tmp_path / "scores.parquet"
    assert main(["score", str(narrow_package), "--input", str(path), "--output", str(out)]) == 2
    assert capsys.readouterr().err == f"dist_export: {path}: {message}{'' if 'price' in changed else RANGE}\n"
    assert not out.exists()


@pytest.mark.parametrize("later", ["text", 1.5, [1]])
def test_a_kept_column_of_two_types_is_one_line(later: object, narrow_package: Path, tmp_path: Path, capsys) -> None:
    rows = [{"user": 3, "price": [0.5], "extra": extra} for extra in (1, 2, later, later)]
    path, out = tmp_path / "rows.jsonl", tmp_path / "scores.parquet"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ["--input", str(path), "--output", str(out), "--keep", "extra", "--batch_size", "2"]
    assert main(["score", str(narrow_package), *given]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"dist_export: {path}: column 'extra' is int64 in the first rows and ")
    assert message.count("\n") == 1
    assert not list(tmp_path.glob("scores*"))


def test_a_kept_column_of_lists_may_be_empty_in_a_whole_batch(narrow_package: Path, tmp_path: Path) -> None:
    rows = [{"user": 3, "price": [0.5], "extra": extra} for extra in ([0.5], [], [], [], [1.5], [])]
    path, out = tmp_path / "rows.jsonl", tmp_path / "scores.parquet"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ["--input", str(path), "--output", str(out), "--keep", "extra", "--batch_size", "2"]
    assert main(["score", str(narrow_package), *given]) == 0
    assert parquet.read_table(out)["extra"].to_pylist() == [row["extra"] for row in rows]


def test_names_and_places_that_cannot_be_are_one_line(narrow_package: Path, tmp_path: Path, capsys) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "scores.parquet"
    path.write_text(json.dumps({"user": 3, "price": [0.5], "ctr": 1}))
    twice = tmp_path / "twice.parquet"
    parquet.write_table(pa.table([pa.array([3]), pa.array([4])], names=["user", "user"]), twice)
    cases = [
        ([str(path), str(out), "--keep", "ctr"], "--keep ctr: an output of the package has this name"),
        ([str(path), str(tmp_path / "gone" / "x.parquet")], "x.parquet cannot be written: No such file or directory"),
        ([str(twice), str(out)], "two columns are called 'user'"),
    ]
    for (source, target, *more), message in cases:
        assert main(["score", str(narrow_package), "--input", source, "--output", target, *more]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1, told


@pytest.fixture(scope="module")
def bounded_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose program takes offsets with the end of all lists behind them, and nothing else that has a row each."""
    folder = tmp_path_factory.mktemp("bounded")
    look = lambda its, batch: its.table(batch["tags_values"], batch["tags_offsets"])
    sparse = lambda: models.Lookups(torch.nn.EmbeddingBag(models.ROWS, models.DIM, include_last_offset=True), look)
    build = lambda: models.Model(BlockOf(sparse()), models.DIM)
    batch = {"tags_values": torch.arange(6), "tags_offsets": torch.tensor([0, 2, 3, 6])}
    checkpoint = models.save(models.train(build()), folder / "model.pth")
    dist_export.Exporter(
        build(),
        "sparse_arch",
        "dense_arch",
        [batch],
        checkpoint,
        folder / "out",
        score_program="require",
        progress=False,
    ).export()
    return folder / "out"


class BlockOf(torch.nn.Module):
    def __init__(self, lookups: models.Lookups) -> None:
        super().__init__()
        self.lookups = lookups

    def forward(self, batch: models.Batch) -> models.Batch:
        return {"block": self.lookups.look(self.lookups, batch)}


@pytest.mark.parametrize("batch_size", [2, 4096])
def test_an_array_as_the_program_takes_it_has_no_row_more(
    bounded_package: Path, batch_size: int, tmp_path: Path
) -> None:
    """The end of all lists was taken for the beginning of one more."""
    given = {"tags_values": np.array([3, 1, 4, 1, 5]), "tags_offsets": np.array([0, 2, 2, 5])}
    package = dist_export.open_package(bounded_package)
    assert [entry.shape for entry in package.manifest.score.inputs][1] == ("batch + 1",)
    np.savez(tmp_path / "rows.npz", **given)
    assert score_file(package, str(tmp_path / "rows.npz"), str(tmp_path / "out.parquet"), batch_size=batch_size) == 3
    found = parquet.read_table(tmp_path / "out.parquet")["ctr"].to_numpy()
    np.testing.assert_allclose(found, package.score(given)["ctr"][:, 0], rtol=1e-5, atol=1e-6)


def read_lists(folder: Path, entries: list[TensorEntry], **arrays: object) -> list[int]:
    np.savez(folder / "rows.npz", **{name: np.array(value) for name, value in arrays.items()})
    (columns,) = read_batches(str(folder / "rows.npz"), 10, entries)
    lists = columns["tags"]
    assert isinstance(lists, Lists)
    return np.diff(lists.bounds).tolist()


@pytest.mark.parametrize(
    ("shape", "others", "expected"),
    [
        ("batch", {}, [2, 1, 0]),
        ("batch + 1", {}, [2, 1]),
        ("n", {}, [2, 1, 0]),
        ("n", {"user": [7, 8]}, [2, 1]),
        ("n", {"user": [7, 8, 9]}, [2, 1, 0]),
        (None, {"user": [7, 8]}, [2, 1]),
    ],
)
def test_whether_offsets_have_the_end_is_known(
    shape: str | None, others: dict[str, list[int]], expected: list[int], tmp_path: Path
) -> None:
    entries = [] if shape is None else [TensorEntry(name="tags_offsets", dtype="int64", shape=(shape,))]
    assert read_lists(tmp_path, entries, tags_values=[5, 6, 7], tags_offsets=[0, 2, 3], **others) == expected


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"tags_offsets": [0, 1]}, r"'tags_offsets' \(the input of the program has the end behind them\) does not cut"),
        ({"tags_bounds": [0, 2, 1, 3]}, "'tags_bounds' does not cut the 3 elements of 'tags_values' into lists"),
        ({"tags_bounds": [1, 3]}, "'tags_bounds' does not cut"),
        ({"tags_bounds": []}, "'tags_bounds' does not cut"),
        ({"tags_lengths": [2, 2]}, "'tags_lengths' does not cut"),
        ({"tags_lengths": [4, -1]}, "'tags_lengths' does not cut"),
    ],
)
def test_lists_that_do_not_fit_are_refused(arrays: dict[str, list[int]], told: str, tmp_path: Path) -> None:
    """Elements that no list has, or that two have, are a mistake; they were left out, or read twice."""
    entries = [TensorEntry(name="tags_offsets", dtype="int64", shape=("batch + 1",))]
    with pytest.raises(UserError, match=told):
        read_lists(tmp_path, entries, tags_values=[5, 6, 7], **arrays)
