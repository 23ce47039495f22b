"""A dozen kills of the crash harness: what is left is no package or a sound one, and the rerun ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_export import cli
from tests.support.distributed import crash
from tests.support.distributed.crash import Kill, Setup, content, run_kill
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.tzrec_dumps import write_dump

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setup]:
    folder = tmp_path_factory.mktemp("crash")
    write_checkpoint(folder / "ckpt", make_tables({"t": 500, "u": 300}, 4))
    write_checkpoint(folder / "other", make_tables({"t": 50, "w": 30}, 2))
    arguments = (
        "--ckpt_dir",
        str(folder / "ckpt"),
        "--filter_sparse_opt",
        "true",
        "--num_shards",
        "4",
        "--threads",
        "1",
    )
    cast = (*arguments, "--dtype", '{"t": int8, "u": float16}')
    write_checkpoint(folder / "before", make_tables({"t": 600, "u": 300}, 3))  # of t other rows, of u the same
    delta = (*arguments, "--base", str(folder / "base"))
    dumped = ("--format", "tzrec_delta", "--base", str(folder / "base"), "--since_step", "1")
    dumps = ("--ckpt_dir", str(folder / "dumps"), *arguments[2:], *dumped)
    rows = np.arange(600 * 4, dtype=np.float32).reshape(600, 4)
    for step in (2, 3):
        write_dump(folder / "dumps", step, *({"t": (np.arange(rank, 600, 2), rows[rank::2] + step)} for rank in (0, 1)))
    for name, of in (
        ("expected", arguments),
        ("old", ("--ckpt_dir", str(folder / "other"), *arguments[2:])),
        ("cast", cast),
        ("base", ("--ckpt_dir", str(folder / "before"), *arguments[2:])),
        ("delta", delta),
        ("dumped", dumps),
    ):
        assert cli.main([*of, "--export_dir", str(folder / name)]) == 0
    compacting = ("compact", "--threads", "1", str(folder / "delta"))
    assert cli.main([*compacting, str(folder / "compacted")]) == 0
    return {
        "new": Setup(folder / "ckpt", arguments, folder / "expected"),
        "replace": Setup(folder / "ckpt", (*arguments, "--overwrite", "true"), folder / "expected", old=folder / "old"),
        "cast": Setup(folder / "ckpt", cast, folder / "cast"),
        "delta": Setup(folder / "ckpt", delta, folder / "delta"),
        "dumps": Setup(folder / "dumps", dumps, folder / "dumped"),
        "compact": Setup(folder / "delta", compacting, folder / "compacted", place=()),
    }


KILLS = [
    ("new", Kill(1, "count the ids"), False),
    ("new", Kill(1, "write .dist_export/model-000001-of-000004.safetensors.json"), False),
    ("new", Kill(1, "publish model-000002-of-000004.safetensors"), False),
    ("new", Kill(1, "written index"), False),
    ("new", Kill(1, "write manifest.json"), False),
    ("new", Kill(1, "written manifest.json"), True),
    ("new", Kill(1, "end"), True),
    ("replace", Kill(1, "check the shards"), False),
    ("replace", Kill(1, "exchange"), False),
    ("replace", Kill(1, "clean up"), True),
    ("new", Kill(2, "write shards", rank=1, victims="rank"), False),
    ("new", Kill(2, "reserve space for the shards", rank=0, victims="launcher"), False),
    ("new", Kill(2, "written manifest.json", rank=0, victims="all"), True),
    ("replace", Kill(2, "commit", rank=0, victims="everything"), False),
    ("cast", Kill(1, "publish model-000002-of-000004.safetensors"), False),
    ("cast", Kill(1, "write .dist_export/losses-0.json"), False),
    ("cast", Kill(2, "check the shards", rank=1, victims="rank"), False),
    ("delta", Kill(1, "publish model-000002-of-000004.safetensors"), False),
    ("delta", Kill(1, "write model-000001-of-000004.deleted_ids"), False),
    ("delta", Kill(1, "written manifest.json"), True),
    ("delta", Kill(2, "exchange the ids that are still there", rank=1, victims="rank"), False),
    ("dumps", Kill(1, "publish model-000002-of-000004.safetensors"), False),
    ("dumps", Kill(2, "exchange the keys", rank=1, victims="rank"), False),
    ("compact", Kill(1, "publish model-000002-of-000004.safetensors"), False),
    ("compact", Kill(1, "written manifest.json"), True),
    ("compact", Kill(2, "check the shards", rank=1, victims="rank"), False),
]


@pytest.mark.parametrize(("name", "kill", "is_committed"), KILLS, ids=[f"{name}-{kill}" for name, kill, _ in KILLS])
def test_a_killed_export(name: str, kill: Kill, is_committed: bool, setups: dict[str, Setup], tmp_path: Path) -> None:
    is_cold = kill.victims == "rank" and name in ("new", "compact")  # of each command one as a user starts it
    packages = [setups["delta"].expected.with_name(name) for name in ("base", "delta")]
    before = [content(package) for package in packages]
    outcome = run_kill(setups[name], kill, tmp_path / "kill", warm_launcher=not is_cold)
    assert [content(package) for package in packages] == before
    assert outcome.was_reached
    assert outcome.was_committed == is_committed


def test_the_harness_sees_what_is_broken(setups: dict[str, Setup], tmp_path: Path) -> None:
    """A package that is not sound, a file too many, or another content is found."""
    import shutil

    setup = setups["new"]
    out = tmp_path / "out"
    shutil.copytree(setup.expected, out)
    assert crash.check_what_is_left(setup, out)
    crash.compare(setup, out)
    (out / "stray").write_text("x")
    with pytest.raises(AssertionError):
        crash.check_what_is_left(setup, out)
    (out / "stray").unlink()
    shard = out / "model-000000-of-000004.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AssertionError):
        crash.check_what_is_left(setup, out)
    (out / "manifest.json").unlink()
    assert not crash.check_what_is_left(setup, out)
    assert not crash.whole_shards(setup, out), "nothing vouches for a shard without a receipt"
