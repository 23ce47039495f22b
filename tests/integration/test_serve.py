"""The server: the Open Inference Protocol by a client of another project, many requests at once, and a swap under load."""

from __future__ import annotations

import gzip
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient import http as triton

import dist_export
from dist_export.errors import PackageError, UserError
from dist_export.serve.run import listen
from dist_export.serve.served import Watcher
from dist_export.workdir import swap
from tests.support import score_models as models
from tests.support.served import infer, running


def export(folder: Path, seed: int) -> Path:
    """Export a trained model of three tables, one of them a hash table."""
    checkpoint = models.save(
        models.train(models.Model(models.ThreeTables(), 3 * models.DIM + 1), seed), folder / f"{seed}.pth"
    )
    exporter = dist_export.Exporter(
        models.Model(models.ThreeTables(), 3 * models.DIM + 1),
        "sparse_arch",
        "dense_arch",
        [models.inputs_of(models.Model(models.ThreeTables(), 3 * models.DIM + 1), models.batch_of())],
        checkpoint,
        folder / f"out-{seed}",
        score_program="require",
        serving="off",
        to_hash_tables=["sparse_arch.user.weight"],
        max_batch_size=1000,
        progress=False,
    )
    exporter.export()
    return folder / f"out-{seed}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("serve")
    return [export(folder, seed) for seed in (5, 6)]


@pytest.fixture(scope="module")
def address(packages: list[Path]) -> Iterator[str]:
    with running(Watcher(str(packages[0]))) as address:
        yield address


def inputs_of(package: Path, seed: int = 0, num_examples: int = 6) -> dict[str, np.ndarray]:
    taken = [entry.name for entry in dist_export.open_package(package).manifest.score.inputs]
    return {name: value.numpy() for name, value in models.batch_of(num_examples, seed).items() if name in taken}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_another_projects_client_gets_the_scores(
    address: str, packages: list[Path], binary: bool, compression: str | None
) -> None:
    inputs = inputs_of(packages[0], num_examples=33)
    expected = dist_export.open_package(packages[0]).score(inputs)
    with triton.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in expected]
        result = infer(
            client, "score", inputs, binary=binary, outputs=outputs, request_compression_algorithm=compression
        )
    for name, value in expected.items():
        assert np.array_equal(result.as_numpy(name), value)


def test_models_are_described_by_names_dtypes_and_shapes(address: str, packages: list[Path]) -> None:
    with triton.InferenceServerClient(address) as client:
        found = client.get_model_metadata("score")
        assert client.is_model_ready("score", found["versions"][0])
        assert not client.is_model_ready("score", "2")
        assert not client.is_model_ready("other")
        dense = client.get_model_metadata("dense")
        lookup = client.get_model_metadata("lookup")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    manifest = dist_export.open_package(packages[0]).manifest
    assert {entry["name"] for entry in found["inputs"]} == {entry.name for entry in manifest.score.inputs}
    assert found["outputs"] == [{"name": "ctr", "datatype": "FP32", "shape": [-1, 1]}]
    assert all(entry["shape"][0] == -1 for entry in dense["inputs"])
    assert {"name": "sparse_arch.user.weight", "datatype": "INT64", "shape": [-1]} in lookup["inputs"]
    assert {"name": "sparse_arch.user.weight.found", "datatype": "BOOL", "shape": [-1]} in lookup["outputs"]


def test_rows_and_the_dense_arch_are_models_too(address: str, packages: list[Path]) -> None:
    package = dist_export.open_package(packages[0])
    ids = np.array([3, 99_999, 3])
    rows, has_row = package.lookup("sparse_arch.user.weight", ids)
    with triton.InferenceServerClient(address) as client:
        found = infer(client, "lookup", {"sparse_arch.user.weight": ids})
        assert np.array_equal(found.as_numpy("sparse_arch.user.weight"), rows)
        assert found.as_numpy("sparse_arch.user.weight.found").tolist() == has_row.tolist() == [True, False, True]
        random = np.random.default_rng(0)
        blocks = {
            entry.name: random.random((7, *entry.shape[1:]), np.float32) for entry in package.manifest.dense.inputs
        }
        found = infer(client, "dense", blocks)
    with torch.no_grad():
        expected = package.load_program().module()(**{name: torch.from_numpy(v) for name, v in blocks.items()})
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    assert np.array_equal(found.as_numpy("ctr"), expected.numpy())


def test_a_thousand_requests_at_once_equal_score(address: str, packages: list[Path]) -> None:
    package = dist_export.open_package(packages[0])
    batches = [inputs_of(packages[0], seed, 1 + seed % 5) for seed in range(50)]
    expected = [package.score(batch)["ctr"] for batch in batches]
    wrong: list[Any] = []

    def ask(first: int) -> None:
        with triton.InferenceServerClient(address) as client:
            for number in range(first, 1000, 16):
                found = infer(client, "score", batches[number % 50]).as_numpy("ctr")
                if not np.array_equal(found, expected[number % 50]):
                    wrong.append(number)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- bad requests ----


def post(address: str, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    host, _, port = address.partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, json.loads(raw)


def tensors(inputs: dict[str, np.ndarray], **changes: dict[str, Any]) -> bytes:
    described = [
        {
            "name": name,
            "datatype": {"int64": "INT64", "float32": "FP32"}[str(value.dtype)],
            "shape": list(value.shape),
            "data": value.ravel().tolist(),
        }
        | changes.get(name, {})
        for name, value in inputs.items()
    ]
    return json.dumps({"inputs": described}).encode()


SCORE = "/v2/models/score/infer"


def test_bad_requests_are_answered_in_one_sentence(packages: list[Path]) -> None:
    good = inputs_of(packages[0])
    large = inputs_of(packages[0], num_examples=1001)
    without = {name: value for name, value in good.items() if name != "user"}
    cases: list[tuple[int, str, tuple[str, bytes, dict[str, str]]]] = [
        (200, "", (SCORE, tensors(good), {})),
        (200, "", (SCORE, gzip.compress(tensors(good)), {"Content_Encoding": "gzip"})),
        (400, "has no input 'more'; it takes", (SCORE, tensors({**good, "more": np.zeros(1, np.float32)}), {})),
        (400, "input 'user' is missing; model score takes", (SCORE, tensors(without), {})),
        (
            400,
            "input 'user' of model score is FP32, expected INT64",
            (
                SCORE,
                tensors(good, user={"datatype": "FP32"}),
                {},
            ),
        ),
        (400, "has the shape [6, 1], expected [batch]", (SCORE, tensors(good, user={"shape": [6, 1]}), {})),
        (400, "they must be equal", (SCORE, tensors(good, user={"shape": [5], "data": [1] * 5}), {})),
        (
            400,
            "the batch has 1,001 examples, and the largest that model score takes is 1,000",
            (SCORE, tensors(large), {}),
        ),
        (400, "not valid JSON", (SCORE, b"hello", {})),
        (400, "the body is no gzip", (SCORE, b"hello", {"Content_Encoding": "gzip"})),
        (
            400,
            "ends before its gzip data does",
            (SCORE, gzip.compress(tensors(good))[:-9], {"Content_Encoding": "gzip"}),
        ),
        (415, "Content-Encoding 'br' is not known", (SCORE, b"", {"Content_Encoding": "br"})),
        (413, "send fewer examples at once", (SCORE, gzip.compress(bytes(1 << 20)), {"Content_Encoding": "gzip"})),
        (404, "there is no model 'other'; the package has score, dense, lookup", ("/v2/models/other/infer", b"{}", {})),
        (404, "has no version '1'", ("/v2/models/score/versions/1/infer", b"{}", {})),
        (404, "Not Found", ("/v3", b"{}", {})),
        (405, "Method Not Allowed", ("/v2/models/score", b"{}", {})),
        (
            400,
            "has no input 'x'; it takes ids by table",
            (
                "/v2/models/lookup/infer",
                tensors({"x": np.zeros(1, np.int64)}),
                {},
            ),
        ),
    ]
    with running(Watcher(str(packages[0])), most_bytes=200_000) as address:
        for status, message, (path, body, headers) in cases:
            found, answer = post(address, path, body, **headers)
            assert found == status, answer
            if status != 200:
                assert list(answer) == ["error"]
                assert message in answer["error"]
                assert "\n" not in answer["error"]


def test_metrics_count_the_requests(address: str, packages: list[Path]) -> None:
    post(address, SCORE, tensors(inputs_of(packages[0])))
    host, _, port = address.partition(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert 'dist_export_requests_total{code="200",model="score"}' in text
    assert "dist_export_swaps 0.0" in text
    assert "dist_export_request_seconds_bucket" in text


# ---- a package that is replaced ----


def put(package: Path, live: Path) -> None:
    """Replace the package at ``live`` as a commit does."""
    fresh = shutil.copytree(package, swap.beside(str(live), "next"))
    old = swap.replace_directory(str(fresh), str(live))
    shutil.rmtree(old)


def test_a_swap_under_load_gives_answers_of_one_package_or_the_other(packages: list[Path], tmp_path: Path) -> None:
    live = shutil.copytree(packages[0], tmp_path / "live")
    batch = inputs_of(packages[0], num_examples=9)
    expected = [dist_export.open_package(package).score(batch)["ctr"] for package in packages]
    watcher = Watcher(str(live), poll_secs=0.05)
    stop, wrong, counts = threading.Event(), [], [0, 0]

    def ask(address: str) -> None:
        with triton.InferenceServerClient(address) as client:
            while not stop.is_set():
                try:
                    found = infer(client, "score", batch).as_numpy("ctr")
                except Exception as error:
                    wrong.append(error)
                    continue
                same = [np.array_equal(found, scores) for scores in expected]
                if not any(same):
                    wrong.append(found)
                else:
                    counts[same.index(True)] += 1

    with running(watcher) as address:
        threads = [threading.Thread(target=ask, args=(address,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(4):
            swaps = watcher.num_swaps
            put(packages[(turn + 1) % 2], live)
            while watcher.num_swaps == swaps and not wrong:
                time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert min(counts) > 0


@pytest.mark.parametrize("asks", [True, False])
def test_a_request_for_a_version_gets_no_answer_of_another(
    packages: list[Path], tmp_path: Path, monkeypatch, asks: bool
) -> None:
    """Also where files of the version are gone in the middle of the request. Any other request gets the new package."""
    watcher = Watcher(str(shutil.copytree(packages[0], tmp_path / "live")), poll_secs=1000)
    with running(watcher) as address:
        before = watcher.current
        put(packages[1], tmp_path / "live")

        def is_gone(_: Any) -> Any:
            raise PackageError("it was replaced")

        monkeypatch.setattr(before.models["score"], "infer", is_gone)
        path = f"/v2/models/score/versions/{before.version}/infer" if asks else "/v2/models/score/infer"
        code, found = post(address, path, tensors(inputs_of(packages[0])))
    now = dist_export.open_package(packages[1]).manifest.digest.rpartition(":")[2][:16]
    if asks:
        assert (code, found) == (404, {"error": f"model 'score' has no version '{before.version}'; {now} is served"})
    else:
        assert (code, found["model_version"]) == (200, now)


def test_two_tables_of_which_one_is_called_as_what_is_found_of_the_other(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(5, 2), "a.found": torch.full((5, 2), 7.0)}, tmp_path / "tables.pth")
    dist_export.export(
        {"ckpt_dir": str(tmp_path / "tables.pth"), "export_dir": str(tmp_path / "out"), "treat_as_tables": ["*"]}
    )
    model = Watcher(str(tmp_path / "out")).current.models["lookup"]
    ids = np.array([1, 9])
    assert model.infer({"a": ids})["a.found"].tolist() == [True, False]
    assert model.infer({"a.found": ids})["a.found"].tolist() == [[7.0, 7.0], [0.0, 0.0]]
    for names in (("a", "a.found"), ("a.found", "a")):
        with pytest.raises(UserError, match="in two requests"):
            model.infer(dict.fromkeys(names, ids))


def test_a_damaged_new_package_is_refused_and_the_old_one_is_served_on(packages: list[Path], tmp_path: Path) -> None:
    live = shutil.copytree(packages[0], tmp_path / "live")
    batch = inputs_of(packages[0])
    expected = dist_export.open_package(packages[0]).score(batch)["ctr"]
    damaged = shutil.copytree(packages[1], tmp_path / "damaged")
    shard = next(damaged.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    watcher = Watcher(str(live))
    put(damaged, live)
    watcher.check_now()
    watcher.check_now()
    assert (watcher.num_refused, watcher.num_swaps) == (1, 0)
    assert np.array_equal(watcher.current.models["score"].infer(batch)["ctr"], expected)
    put(packages[1], live)
    watcher.check_now()
    assert watcher.num_swaps == 1
    with pytest.raises(PackageError, match=r"is unsound: .* \(1 findings\)"):
        Watcher(str(damaged))


# ---- the command ----


def test_small_pieces_of_an_answer_are_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY on connections whose socket states its protocol."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_the_command_serves_and_needs_none_of_the_models_code(packages: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dist_export", "serve", str(packages[0]), "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        try:
            assert line.startswith("serving package ")
            assert line.endswith("/v2: score, dense, lookup\n")
            status, answer = post(line.split("http://")[1].split("/")[0], SCORE, tensors(inputs_of(packages[0])))
        finally:
            server.terminate()
    assert status == 200
    assert answer["outputs"][0]["name"] == "ctr"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "99999"], "--port is 99999; give a number from 0 to 65535"),
        (["--host", "203.0.113.1"], "cannot be listened on"),
        (["--poll_secs", "0"], "give seconds above 0"),
        (["--workers", "0"], "give a number from 1 up"),
    ],
)
def test_mistakes_of_the_command_are_one_line(packages: list[Path], options: list[str], message: str, capsys) -> None:
    from dist_export.cli import main

    assert main(["serve", str(packages[0]), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_file_in_place_of_a_package_is_one_line(tmp_path: Path, capsys) -> None:
    from dist_export.cli import main

    path = tmp_path / "file"
    path.write_text("no package")
    assert main(["serve", str(path)]) == 2
    assert (
        capsys.readouterr().err
        == f"dist_export: {path} cannot be read: Not a directory. Give the directory of a package\n"
    )
