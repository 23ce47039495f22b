"""A store in trouble: requests refused, cut or answered to nobody, a server that dies; and credentials in what is told."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_export
from dist_export.cli import main
from dist_export.errors import DistExportError
from dist_export.storage import retry
from dist_export.storage.traffic import TRAFFIC
from dist_export.storage.urls import open_directory
from dist_export.transfer import multipart_upload
from dist_export.verify.verify import verify
from dist_export.workdir import lock
from tests.support.s3.proxy import HALF, LOST, RESET, SLOW_DOWN, Proxy
from tests.support.s3.s3_cases import Store, files_of, without_manifest, write_large, write_small
from tests.support.s3.s3_server import KEY, SECRET, S3Server

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return Store(s3_server)


@pytest.fixture(scope="module")
def undisturbed(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """A large checkpoint on the store, and the files of its export to a quiet store."""
    store = Store(s3_server)
    source = store.put_tree(write_large(tmp_path_factory.mktemp("large") / "ckpt"), "ckpt")
    store.export(source, store.url("expected"))
    return source, without_manifest(store.files("expected"))


@contextlib.contextmanager
def proxied(store: Store, judge) -> Iterator[Proxy]:
    """Let the exports of ``store`` go through a proxy."""
    proxy = Proxy(store.server.ports[3], judge)
    direct, store.options = store.options, store.server.options(proxy.endpoint)
    try:
        yield proxy
    finally:
        store.options = direct
        proxy.close()


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, LOST, HALF])
def test_trouble_that_passes_is_no_trouble(fault: str, store: Store, undisturbed, monkeypatch) -> None:
    """Every fifth request fails; what comes out is what a quiet store gives, and the tries are counted.

    Also where the answer to a conditional write was lost: the next try finds what it wrote itself.
    """
    monkeypatch.setattr(retry, "FIRST_SECS", 0.02)
    source, expected = undisturbed
    with proxied(store, lambda method, path, number: fault if number % 5 == 4 else None) as proxy:
        manifest = store.export(source, store.url("out"))
    assert proxy.faults > 5
    told = manifest.run["store"]["retries"]
    if fault in (SLOW_DOWN, HALF):  # a connection that was cut while it was kept open aiohttp opens again, once
        assert proxy.faults * 0.5 <= told
    assert told <= proxy.faults
    assert any(f"{told:,} tried again" in line for line in _summary(manifest))
    assert without_manifest(store.files("out")) == expected
    assert verify(store.url("out"), store.options).findings == []
    assert store.uploads("out") == []


def _summary(manifest: dist_export.Manifest) -> list[str]:
    from dist_export.reporting.summary import summarize

    return summarize(manifest, [], "s3://somewhere")


def test_one_request_is_one_request(store: Store, monkeypatch) -> None:
    """No layer below tries again: a store that is overloaded gets no more than what we count."""
    monkeypatch.setattr(retry, "FIRST_SECS", 0.01)
    monkeypatch.setattr(retry, "LONGEST_SECS", 0.01)
    monkeypatch.setattr(retry, "SPAN_SECS", 3.0)
    with proxied(store, lambda method, path, number: SLOW_DOWN) as proxy:
        from dist_export.storage.urls import open_directory

        before = TRAFFIC.snapshot()
        with pytest.raises(OSError, match="reduce your request rate"):
            open_directory(store.url("ckpt"), store.options).names()
        assert proxy.count == TRAFFIC.since(before)["requests"] > 5


def test_trouble_that_stays_is_told(store: Store, tmp_path: Path, monkeypatch) -> None:
    """Uploads are refused for good: one line with the file and the store's own word, and no manifest."""
    monkeypatch.setattr(retry, "SPAN_SECS", 0.5)
    small = write_small(tmp_path / "ckpt")

    def refuse_shards(method: str, path: str, number: int) -> str | None:
        return SLOW_DOWN if method == "PUT" and "model-000001" in path and ".dist_export" not in path else None

    with proxied(store, refuse_shards), pytest.raises(DistExportError) as caught:
        store.export(small, store.url("out"))
    text = str(caught.value)
    assert "model-000001-of-000002.safetensors: Please reduce your request rate" in text
    assert "No manifest was written" in text
    assert "\n" not in text
    assert "manifest.json" not in store.files("out")
    store.export(small, store.url("out"))
    assert verify(store.url("out"), store.options).findings == []


def test_the_pauses_span_what_a_restart_takes() -> None:
    assert retry.SPAN_SECS >= 20
    assert retry.FIRST_SECS < 1 < retry.LONGEST_SECS < 10


def test_a_server_that_dies_and_comes_back(store: Store, undisturbed, monkeypatch) -> None:
    """Killed in the middle of the uploads and started again: the export waits for it and goes on."""
    source, expected = undisturbed
    real, killed, back = multipart_upload.Uploads.copy, threading.Event(), []

    def restart() -> None:
        store.server.kill()
        time.sleep(1)
        store.server.start()

    def copy(self, number, place):
        if not killed.is_set():
            killed.set()
            thread = threading.Thread(target=restart)
            thread.start()
            back.append(thread)
            time.sleep(0.3)
        return real(self, number, place)

    monkeypatch.setattr(multipart_upload.Uploads, "copy", copy)
    try:
        manifest = store.export(source, store.url("out"))
    finally:
        for thread in back:
            thread.join()
    assert manifest.run["store"]["retries"] > 0
    assert without_manifest(store.files("out")) == expected
    assert verify(store.url("out"), store.options).findings == []


def test_credentials_are_told_nowhere(store: Store, tmp_path: Path, capsys, caplog, monkeypatch) -> None:
    """Neither in files nor in output, logs or errors: of exports that succeed, are refused, or find no server."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(retry, "SPAN_SECS", 0.3)
    small = write_small(tmp_path / "ckpt")
    url = store.url("out")
    options = [f"--storage_options={store.options!r}"]
    export = ["--ckpt_dir", str(small), "--export_dir", url, *options, "--filter_sparse_opt=true", "--num_shards=2"]
    assert main(["plan", *export]) == 0
    assert main(export) == 0
    assert main(export) == 0  # it is there already
    assert main([*export, "--num_shards=3"]) == 2
    assert main(["verify", url, *options]) == 0
    assert main(["inspect", url, *options]) == 0
    wrong = "wr0ng-s3cr3t-of-the-tests"
    refused = [f"--storage_options={ {**store.options, 'secret': wrong}!r}"]
    assert main([*export, *refused]) != 0
    nobody = {**store.options, "client_kwargs": {"endpoint_url": f"http://{KEY}:{SECRET}@127.0.0.1:9"}}
    assert main([*export, f"--storage_options={nobody!r}"]) != 0
    assert main([*export, f"--storage_options={SECRET}"]) == 2
    assert main(["inspect", f"s3://{KEY}:{SECRET}@{store.root}/nothing", *options]) != 0
    shown = capsys.readouterr()
    told = [shown.out, shown.err, caplog.text]
    told += [data.decode("latin1") for data in store.files("out").values()]
    for secret in (KEY, SECRET, wrong):
        for text in told:
            assert secret not in text, re.findall(f".*{secret}.*", text)[:3]


@pytest.fixture
def lease_times(monkeypatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECS", 1.5)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.3)


@pytest.mark.usefixtures("lease_times")
def test_a_lease_goes_to_one_and_is_renewed_only_by_its_holder(store: Store) -> None:

    directory = open_directory(store.url("out"), store.options)
    held = lock.Lease(directory)
    with pytest.raises(DistExportError, match="another export"):
        lock.Lease(directory)
    held._is_over.set()  # its process dies
    held._thread.join()
    outcomes: list[object] = []

    def take() -> None:
        try:
            outcomes.append(lock.Lease(directory))
        except DistExportError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (heir,) = [outcome for outcome in outcomes if isinstance(outcome, lock.Lease)]
    assert not held._renew(), "what was taken over is not renewed"
    with pytest.raises(DistExportError, match="lost its claim"):
        held.refuse_if_lost()
    heir.refuse_if_lost()
    heir.release()
    assert store.files("out") == {}


def test_an_export_to_a_bucket_that_is_not_there(store: Store, tmp_path: Path) -> None:
    small = write_small(tmp_path / "ckpt")
    with pytest.raises(DistExportError, match="there is no bucket 'nowhere'"):
        store.export(small, "s3://nowhere/out")
    assert files_of(small)


def test_a_target_with_options_of_its_own_gets_all_bytes_from_the_export(store: Store, tmp_path: Path) -> None:
    """What one set of credentials may read, another may not: so the store is not asked to copy from one to the other."""
    source = store.put_tree(write_large(tmp_path / "ckpt"), "ckpt")
    own = {**store.options, "default_fill_cache": False}
    manifest = store.export(source, store.url("out"), target_storage_options=own)
    assert manifest.run["store"]["copied"] == 0
    assert verify(store.url("out"), store.options).findings == []
