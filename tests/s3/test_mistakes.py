"""What is told of mistakes about a store: the wrong address, secret, bucket or place, and what lies in the way."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

import dist_export
from dist_export.cli import main
from dist_export.errors import ConfigError, PackageError
from dist_export.storage import retry
from dist_export.storage.s3 import S3
from dist_export.storage.traffic import TRAFFIC
from dist_export.workdir import lock
from dist_export.workdir.state import UPLOADS
from tests.support.s3.s3_cases import Store, write_large, write_small
from tests.support.s3.s3_server import S3Server

pytestmark = pytest.mark.s3

REASON = "The request signature we calculated does not match"


@pytest.fixture
def store(s3_server: S3Server) -> Store:
    return Store(s3_server)


@pytest.fixture
def package(store: Store, tmp_path: Path) -> str:
    store.export(write_small(tmp_path / "ckpt"), store.url("out"))
    return store.url("out")


def run(capsys: Any, *arguments: str, options: Any = None) -> tuple[int, str]:
    """Return the exit code and the one line of an error."""
    given = [] if options is None else ["--storage_options", json.dumps(options)]
    code = main([*arguments, *given])
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("dist_export:")] or [shown.err]
    assert code == 0 or not shown.out
    return code, line


def wrong_secret(store: Store) -> dict[str, Any]:
    return {**store.options, "secret": "wr0ng-s3cr3t-of-the-tests"}


def at(endpoint: str) -> dict[str, Any]:
    return {
        "key": "AKNOBODYATALL",
        "secret": "n0b0dy-at-all",
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
    }


def test_a_wrong_secret_is_no_unsound_package(package: str, store: Store, tmp_path: Path, capsys) -> None:
    """Exit code 2 and the store's reason from every command, with nothing about exports from those that are none."""
    export = ["--ckpt_dir", str(tmp_path / "ckpt"), "--export_dir", store.url("new"), "--filter_sparse_opt", "true"]
    commands = (["verify", package], ["verify", "--json", package], ["inspect", package], ["plan", *export], export)
    for command in commands:
        code, line = run(capsys, *command, options=wrong_secret(store))
        assert code == 2, command
        assert REASON in line, command
        assert ".." not in line, command
        if package in command:
            assert "export again" not in line
            assert "Nothing was written" not in line
    with pytest.raises(PackageError, match=REASON):
        dist_export.open_package(package, storage_options=wrong_secret(store))


def test_a_host_that_nobody_knows_is_told_at_once(package: str, monkeypatch, capsys) -> None:
    """It is named, with where to name another; it is not tried for a minute, for this store has never answered."""

    def find_nobody(*_: object, **__: object) -> None:  # whatever name service there is where this runs
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", find_nobody)
    before = TRAFFIC.snapshot()
    ghost = at("http://no-such-host.invalid:9000")
    for command in ("verify", "inspect"):
        code, line = run(capsys, command, package, options=ghost)
        assert code == 2
        assert "no server is reached at http://no-such-host.invalid:9000" in line
        assert "client_kwargs.endpoint_url" in line
        assert "AWS_ENDPOINT_URL" in line
    with pytest.raises(PackageError, match=r"no server is reached at http://no-such-host\.invalid:9000"):
        dist_export.open_package(package, storage_options=ghost)
    assert TRAFFIC.since(before)["retries"] == 3 * retry.LEAST_RETRIES


def test_a_server_that_is_away_is_tried_again_and_told(package: str, monkeypatch, caplog) -> None:
    """Also who opens a package, and has no logging set up, hears of it: at the level of a warning."""
    monkeypatch.setattr(retry, "FIRST_SECS", 0.02)
    monkeypatch.setattr(retry, "LONGEST_SECS", 0.1)
    monkeypatch.setattr(retry, "SPAN_SECS", 1.0)
    monkeypatch.setattr(retry, "_TOLD_FROM", retry.LEAST_RETRIES)  # however slow the machine, so often it tries
    with pytest.raises(PackageError, match=r"no server is reached at http://127\.0\.0\.1:9 "):
        dist_export.open_package(package, storage_options=at("http://127.0.0.1:9"))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "127.0.0.1:9" in told[0]
    assert "trying again" in told[0]


def test_the_environment_says_where_the_store_is(package: str, store: Store, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.options["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert main(["verify", package, "--storage_options", "{skip_instance_cache: true}"]) == 0


def test_options_one_by_one(package: str, store: Store, capsys) -> None:
    """As an export takes them; what is no mapping is told with one that is."""
    options = [f"--storage_options.{name}={store.options[name]}" for name in ("key", "secret")]
    options += [f"--storage_options.client_kwargs.{k}={v}" for k, v in store.options["client_kwargs"].items()]
    for command in ("verify", "inspect"):
        assert run(capsys, command, package, *options)[0] == 0
        code, line = run(capsys, command, package, "--storage_options", f"endpoint_url={store.server.endpoint}")
        assert code == 2
        assert """expected a YAML mapping such as '{"client_kwargs": {"endpoint_url": "http""" in line


def test_buckets_that_are_not_there(package: str, store: Store, capsys) -> None:
    """Every command says that it is the bucket; of a checkpoint also what was looked for, of any format."""
    export = ["--export_dir", store.url("new"), "--ckpt_dir"]
    for command in (["verify", "s3://trainin/job"], ["inspect", "s3://trainin/job"], [*export, "s3://trainin/job"]):
        code, line = run(capsys, *command, options=store.options)
        assert code == 2
        assert "s3://trainin/job: there is no bucket 'trainin'" in line
        if command[0] != "verify":
            assert "looked for" in line
            assert "*.safetensors (safetensors)" in line
    with pytest.raises(dist_export.errors.UserError, match="no bucket 'trainin'"):
        dist_export.open_package("s3://trainin/job", storage_options=store.options)


@pytest.mark.parametrize(
    ("url", "said"), [("s3:///x", "names no bucket; expected s3://BUCKET/PREFIX"), ("s3://no%good/x", "Invalid bucket")]
)
def test_buckets_that_cannot_be(url: str, said: str, store: Store, tmp_path: Path, capsys) -> None:
    small = str(write_small(tmp_path / "ckpt"))
    commands = (["verify", url], ["inspect", url], ["--ckpt_dir", url, "--export_dir", store.url("new")])
    for command in (*commands, ["--ckpt_dir", small, "--export_dir", url]):
        code, line = run(capsys, *command, options=store.options)
        assert code == 2, command
        assert said in line


def test_a_run_in_the_place_of_a_checkpoint(store: Store, tmp_path: Path, capsys) -> None:
    for step in (100, 200):
        store.put_tree(write_small(tmp_path / f"ckpt_{step}"), f"job/ckpt_{step}")
    code, line = run(capsys, "verify", store.url("job"), options=store.options)
    assert code == 2
    assert line.endswith("It holds the directories ckpt_100, ckpt_200: give one of them")
    assert main(["inspect", store.url("job"), "--storage_options", json.dumps(store.options)]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(":")[0].split() for line in listed] == [
        ["step", "200", "ckpt_200", "complete,", "the", "latest"],
        ["step", "100", "ckpt_100", "complete"],
    ]


def test_a_package_in_the_way(package: str, store: Store, tmp_path: Path) -> None:
    """What is advised can be done on a store."""
    with pytest.raises(ConfigError, match="in one step: give another export_dir") as caught:
        store.export(tmp_path / "ckpt", package, num_shards=3)
    assert "overwrite" not in str(caught.value)
    assert "manifest.json" in store.files(store.export(tmp_path / "ckpt", store.url("new"), overwrite=True) and "new")


def test_an_export_that_was_killed_before_its_first_shard(store: Store, tmp_path: Path, monkeypatch) -> None:
    """``on_unfinished: error`` stops where nothing but the record of uploads tells of it; ``restart`` goes on."""
    monkeypatch.setattr(lock, "LEASE_SECS", 0.05)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.02)
    monkeypatch.setattr(lock.Lease, "_keep", lambda _: None)
    source = store.put_tree(write_large(tmp_path / "ckpt"), "ckpt")

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(S3, "upload_part", die)
        patched.setattr(S3, "copy_part", die)
        patched.setattr(lock.Lease, "release", lambda _: None)
        with pytest.raises(Killed):
            store.export(source, store.url("out"))
    assert set(store.files("out")) == {UPLOADS, ".dist_export/lease"}
    with pytest.raises(ConfigError, match=r"unfinished export .*on_unfinished is error"):
        store.export(source, store.url("out"), on_unfinished="error")
    assert set(store.files("out")) == {UPLOADS, ".dist_export/lease"}
    store.export(source, store.url("out"), on_unfinished="restart")
    assert store.uploads("out") == []
    assert "manifest.json" in store.files("out")
