"""A package is replaced in one step; an unfinished export is resumed, begun anew, or refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

import dist_export
from dist_export.errors import CommitError, ConfigError, ExportError
from dist_export.pipeline import target
from dist_export.storage.directory import WORK_DIRECTORY
from dist_export.storage.urls import open_directory
from dist_export.transfer.executor import Transfer
from dist_export.verify.verify import verify
from dist_export.workdir import swap
from tests.support.recis_writer import make_tables, read_back, truth_of, write_checkpoint
from tests.support.sparse_cases import content


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt", make_tables({"t": 60, "u": 30}, 3))
    return tmp_path / "ckpt"


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "newer", make_tables({"t": 70, "v": 20}, 2, seed=5))
    return tmp_path / "newer"


def export(source: Path, out: Path, **more: object) -> dist_export.Manifest:
    settings = {"ckpt_dir": str(source), "export_dir": str(out), "filter_sparse_opt": True, "num_shards": 3, **more}
    return dist_export.export(settings)


def tables_of(out: Path) -> set[str]:
    return {table.name for table in dist_export.open_package(out).manifest.tables}


def beside(out: Path) -> list[str]:
    return [name for name in os.listdir(out.parent) if "dist_export-" in name]


def test_a_package_is_refused_and_with_overwrite_replaced(source: Path, newer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out)
    (out / "README").write_text("a user's own file")
    with pytest.raises(ConfigError, match="Set overwrite: true"):
        export(newer, out)
    assert tables_of(out) == {"t", "u"}
    export(newer, out, overwrite=True)
    assert set(read_back(out)) == {"t", "v"}
    assert verify(str(out)).findings == []
    assert (out / "README").read_text() == "a user's own file", "what was not the package's is kept"
    assert beside(out) == []


def test_the_old_package_is_whole_until_the_new_one_is(source: Path, newer: Path, tmp_path: Path, monkeypatch) -> None:
    """A reader in a loop finds one package or the other, whatever the moment."""
    out = tmp_path / "out"
    export(source, out)
    seen: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.append(json.loads((out / "manifest.json").read_bytes())["num_shards"])
            except (OSError, ValueError) as error:
                seen.append(error)

    real = Transfer.finish

    def check(self, *arguments):
        assert verify(str(out)).findings == [], "while the new one is being written"
        return real(self, *arguments)

    monkeypatch.setattr(Transfer, "finish", check)
    reader = threading.Thread(target=read)
    reader.start()
    export(newer, out, overwrite=True, num_shards=2)
    while seen[-1] != 2:
        time.sleep(0.01)
    stop.set()
    reader.join()
    assert set(seen) == {2, 3}


@pytest.mark.parametrize("has_exchange", [True, False])
def test_a_replacement_that_was_cut_off_is_finished(
    has_exchange: bool, source: Path, newer: Path, tmp_path: Path, monkeypatch
) -> None:
    """Crashes around the exchange: there is always one whole package, and the rerun ends with the new one."""
    out = tmp_path / "out"
    export(source, out)
    export(newer, tmp_path / "expected")
    expected = content(tmp_path / "expected")
    if not has_exchange:
        monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    real_rename, real_replace, real_finish = os.rename, swap.replace_directory, target.finish_commit

    class Crash(BaseException):
        pass

    def crash(*_):
        raise Crash

    def crash_between(old, new):
        real_rename(old, new)
        raise Crash

    for module, name, crashed in [
        (swap, "replace_directory", crash),
        (os, "rename", crash_between if not has_exchange else real_rename),
        (target, "finish_commit", crash),
    ]:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, crashed)
            if crashed is not real_rename:
                with pytest.raises(Crash):
                    export(newer, out, overwrite=True)
            else:
                continue
        if out.exists():
            assert verify(str(out)).findings == []
        else:
            assert not has_exchange
    manifest = export(newer, out, overwrite=True)
    assert manifest.run["reused_shards"] == 3
    assert tables_of(out) == {"t", "v"}
    assert content(out) == expected
    assert beside(out) == []
    assert real_replace is swap.replace_directory
    assert real_finish is target.finish_commit


def test_what_was_committed_before_the_crash_is_not_exported_again(source: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed between the manifest and the clean-up: the same export is done, another one is refused."""
    out = tmp_path / "out"

    class Crash(BaseException):
        pass

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(target, "finish_commit", crash)
        with pytest.raises(Crash):
            export(source, out)
    assert verify(str(out)).findings == []
    assert (out / WORK_DIRECTORY).exists()
    before = content(out)
    with pytest.raises(ConfigError, match="another source or other settings"):
        export(source, out, keep_slots=["sparse*"])
    first = dist_export.open_package(out).manifest
    assert export(source, out, on_unfinished="restart") == first
    assert not (out / WORK_DIRECTORY).exists()
    assert content(out) == {name: data for name, data in before.items() if not name.startswith(WORK_DIRECTORY)}


def test_a_restarted_job_whose_package_is_committed_is_done(source: Path, tmp_path: Path, monkeypatch) -> None:
    """torchrun starts all ranks anew when one dies after the commit."""
    out = tmp_path / "out"
    first = export(source, out)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert export(source, out) == first
    with pytest.raises(ConfigError, match="another source or other settings"):
        export(source, out, num_shards=2)


def test_a_restarted_job_may_replace_a_package_too(source: Path, newer: Path, tmp_path: Path, monkeypatch) -> None:
    """The old package is another export's, whatever torchrun's count says."""
    out = tmp_path / "out"
    export(source, out)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    export(newer, out, overwrite=True, on_unfinished="error")
    assert tables_of(out) == {"t", "v"}


def test_a_marker_that_was_left_does_not_keep_others_from_replacing(source: Path, newer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out)
    (out / WORK_DIRECTORY).mkdir()
    (out / WORK_DIRECTORY / "committing").touch()
    export(newer, out, overwrite=True)
    assert tables_of(out) == {"t", "v"}
    assert not (out / WORK_DIRECTORY).exists()


def test_half_an_old_package_is_never_the_beginning_of_a_new_one(
    source: Path, newer: Path, tmp_path: Path, monkeypatch
) -> None:
    """Killed while the old package was being removed: the next export clears it away."""
    out = tmp_path / "out"
    export(source, out)

    real = shutil.rmtree

    def crash(path, *arguments, **options) -> None:
        if "trash" not in str(path):
            real(path, *arguments, **options)
            return
        os.unlink(os.path.join(path, "manifest.json"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dist_export.workdir.swap.shutil.rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            export(newer, out, overwrite=True)
    assert verify(str(out)).findings == []
    assert beside(out)
    export(newer, out, overwrite=True)
    assert beside(out) == []
    export(source, out, overwrite=True)
    assert verify(str(out)).findings == []


def test_a_users_file_that_the_new_package_has_too_is_kept_beside_it(source: Path, newer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out)
    (out / "model-000000-of-000002.safetensors").write_text("a user's own file")
    export(newer, out, overwrite=True, num_shards=2)
    export(newer, out, overwrite=True, num_shards=2)
    (kept,) = beside(out)
    assert (tmp_path / kept / "model-000000-of-000002.safetensors").read_text() == "a user's own file"


@pytest.mark.parametrize("name", ["model-000001-of-000003.safetensors", "tensorkey.json"])
def test_a_file_that_is_not_ours_is_not_written_over(name: str, source: Path, tmp_path: Path) -> None:
    """As the copy of RecIS's own Exporter: shards, and no index that would tell."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("somebody's")
    with pytest.raises(
        ConfigError, match=rf"{name} is there already, and dist_export did not write it \(1 such files\)"
    ):
        export(source, out)
    assert content(out) == {name: b"somebody's"}
    (out / name).rename(out / "elsewhere")
    export(source, out)
    assert verify(str(out)).findings == []


def test_a_checkpoint_with_a_work_directory_is_not_overwritten(source: Path, newer: Path) -> None:
    """An export into the checkpoint itself was interrupted there."""
    (newer / WORK_DIRECTORY).mkdir()
    before = content(newer)
    with pytest.raises(ConfigError, match="would be overwritten"):
        export(source, newer)
    assert content(newer) == before


def interrupt(source: Path, out: Path, monkeypatch, **more: object) -> None:
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error", "manifest.json")

    with monkeypatch.context() as patched:
        patched.setattr("dist_export.pipeline.steps.publish", fail)
        with pytest.raises(ExportError):
            export(source, out, **more)


def test_an_unfinished_export_is_resumed_begun_anew_or_refused(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    interrupt(source, out, monkeypatch)
    (out / "notes.txt").write_text("a user's own file")
    (out / "ckpt_9").mkdir()
    before = content(out)
    with pytest.raises(ConfigError, match=r"holds an unfinished export \(\d files, such as .*on_unfinished is error"):
        export(source, out, on_unfinished="error")
    assert content(out) == before, "nothing was touched"
    interrupt(source, out, monkeypatch, on_unfinished="restart")
    assert export(source, out, on_unfinished="resume").run["reused_shards"] == 3
    again = tmp_path / "again"
    interrupt(source, again, monkeypatch)
    assert export(source, again, on_unfinished="restart").run["reused_shards"] == 0
    assert (out / "notes.txt").read_text() == "a user's own file"
    assert dist_export.open_package(out).manifest.run["left_alone"] == ["notes.txt", "ckpt_9/"]


def test_on_existing_error_takes_a_new_directory(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path / "out", on_unfinished="error")
    assert set(read_back(tmp_path / "out")) == {"t", "u"}


def test_overwrite_says_before_the_work_what_it_cannot_replace(source: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    export(source, out)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(out))
    with pytest.raises(ConfigError, match="is a mount point"):
        export(source, out, overwrite=True)


def test_overwrite_follows_a_link_and_leaves_it(source: Path, newer: Path, tmp_path: Path) -> None:
    """``current -> packages/a``: the directory that it leads to is replaced, the link stays."""
    real = tmp_path / "packages" / "a"
    export(source, real)
    (tmp_path / "current").symlink_to(real)
    export(newer, tmp_path / "current", overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert tables_of(real) == {"t", "v"}
    assert beside(real) == []


def test_overwrite_is_refused_on_a_store_and_in_a_checkpoint(source: Path) -> None:
    dist_export.export({"ckpt_dir": str(source), "export_dir": str(source)})
    with pytest.raises(ConfigError, match="in the checkpoint itself"):
        dist_export.export({"ckpt_dir": str(source), "export_dir": str(source), "overwrite": True})
    settings = {"ckpt_dir": str(source), "export_dir": "memory://replace/out", "filter_sparse_opt": True}
    dist_export.export(settings)
    with pytest.raises(ConfigError, match="give a new export_dir"):
        dist_export.export({**settings, "overwrite": True})
    open_directory("memory://replace").fs.rm("/replace", recursive=True)


def test_an_exchange_that_fails_leaves_the_old_package(source: Path, newer: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    export(source, out)

    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(swap, "_exchange", fail)
        with pytest.raises(
            (CommitError, ExportError), match="cannot take the place of the old one, which is untouched"
        ):
            export(newer, out, overwrite=True)
    assert tables_of(out) == {"t", "u"}
    assert export(newer, out, overwrite=True).run["reused_shards"] == 3


def test_a_source_whose_index_changes_meanwhile_fails_the_export(source: Path, tmp_path: Path, monkeypatch) -> None:
    real = Transfer.finish

    def touch(self, *arguments):
        os.utime(source / "index", ns=(1, 1))
        return real(self, *arguments)

    monkeypatch.setattr(Transfer, "finish", touch)
    with pytest.raises(ExportError, match=r"index: changed while it was being exported"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_rows_are_right_after_all_this(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(source, out)
    export(source, out, overwrite=True)
    found, truth = read_back(out), truth_of(make_tables({"t": 60, "u": 30}, 3))
    assert {name: len(slots["id"]) for name, slots in found.items()} == {
        name: len(slots["id"]) for name, slots in truth.items()
    }
