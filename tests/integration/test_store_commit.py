"""The commit on stores without rename: killed at each of its requests, a store holds no package or a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import dist_export
from dist_export.errors import CommitError, ConfigError
from dist_export.pipeline import steps
from dist_export.verify.verify import verify
from dist_export.workdir import lock
from tests.support.recis_writer import make_tables, write_checkpoint

OUT = "memory://store_commit/out"


class Killed(BaseException):
    pass


class Killer:
    """Lets so many requests that change something through; then the process is as good as dead."""

    def __init__(self, monkeypatch) -> None:
        self.count = 0
        self.limit = 1 << 30
        for name in ("pipe_file", "put_file", "rm_file", "rm", "_open"):
            self._wrap(monkeypatch, name)

    def _wrap(self, monkeypatch, name: str) -> None:
        real = getattr(MemoryFileSystem, name)

        def request(fs, path, *arguments, **options):
            mode = arguments[0] if arguments else options.get("mode", "rb")
            if name != "_open" or mode != "rb":
                if self.count >= self.limit:
                    raise Killed
                self.count += 1
            return real(fs, path, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, name, request)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    return tmp_path / "ckpt"


def export(source: Path, **more: object) -> dist_export.Manifest:
    settings = {"ckpt_dir": str(source), "export_dir": OUT, "filter_sparse_opt": True, "num_shards": 3, "threads": 1}
    return dist_export.export({**settings, **more})


def objects() -> dict[str, bytes]:
    fs = MemoryFileSystem()
    found = {path: fs.cat_file(path) for path in fs.find("/store_commit/out")}
    return {path: data for path, data in found.items() if not path.endswith("manifest.json")}


@pytest.fixture
def empty():
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("more", [{}, {"dtype": {"t": "int8", "u": "float16"}}], ids=["as it is", "cast"])
def test_killed_at_each_request(source: Path, more: dict[str, object], monkeypatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECS", 0.05)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.02)
    monkeypatch.setattr(lock.Lease, "_keep", lambda _: None)  # requests of another thread would blur the count
    killer = Killer(monkeypatch)
    digest = export(source, **more).digest
    expected, total = objects(), killer.count
    assert total > 12
    committed = 0
    for limit in range(total):
        MemoryFileSystem.store.clear()
        killer.count, killer.limit = 0, limit
        with pytest.raises(Killed):
            export(source, **more)
        killer.limit = 1 << 30
        fs = MemoryFileSystem()
        if fs.exists("/store_commit/out/manifest.json"):
            assert verify(OUT).findings == []
            committed += 1
        whole = [name for name in fs.find("/store_commit/out") if name.endswith(".safetensors")]
        done = export(source, **more)
        assert done.run["reused_shards"] in (0, len(whole)) or not committed
        assert verify(OUT).findings == []
        assert objects() == expected, f"after request {limit}"
        assert done.digest == digest
    assert 0 < committed < total / 2


@pytest.mark.usefixtures("empty")
def test_what_another_plan_left_is_garbage_and_goes(source: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "LEASE_SECS", 0.05)
    monkeypatch.setattr(lock, "RENEW_SECS", 0.02)
    monkeypatch.setattr(lock.Lease, "_keep", lambda _: None)
    killer = Killer(monkeypatch)
    killer.limit = 12
    with pytest.raises(Killed):
        export(source, num_shards=5)
    killer.limit = 1 << 30
    assert any("-of-000005" in path for path in objects())
    export(source)
    assert not any("-of-000005" in path for path in objects())
    with pytest.raises(ConfigError, match="committed package"):
        export(source, num_shards=5)


@pytest.mark.usefixtures("empty")
def test_an_export_that_lost_its_lease_does_not_commit(source: Path, monkeypatch) -> None:
    """Another export has taken the directory over: it looks once more, right before the manifest."""
    real = steps.refuse_changed_files

    def lose(*arguments) -> None:
        MemoryFileSystem().pipe_file(
            "/store_commit/out/.dist_export/lease", b'{"token":"x","who":"a thief","job":"","renewed":0}'
        )
        real(*arguments)

    monkeypatch.setattr(steps, "refuse_changed_files", lose)
    with pytest.raises(CommitError, match=r"has lost its claim .a thief has it"):
        export(source)
    assert not MemoryFileSystem().exists("/store_commit/out/manifest.json")
