"""Faults of the disk below a real export: what it shrugs off, how it fails, and that the next one completes what is there."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from errno import (
    EBADF,
    EDQUOT,
    EFBIG,
    EINTR,
    EINVAL,
    EIO,
    EMFILE,
    ENOSPC,
    ENOSYS,
    EOPNOTSUPP,
    EPERM,
    EROFS,
    ESTALE,
    EXDEV,
)

import pytest

from dist_export.errors import PackageError
from dist_export.verify.verify import verify
from tests.support.faults.fault_cases import (
    MANIFEST,
    Bench,
    assert_ends_well,
    assert_no_harm,
    assert_same_package,
    assert_told,
    command,
    ended,
    environment,
    read,
    source_state,
)
from tests.support.sparse_cases import content

# ---- what an export must shrug off ----------------------------------------------------------------------------------

ALL = "pwrite+write+pread+copy+sendfile+fsync+create+open+fallocate+truncate"
SUCCEEDS = {
    "short writes": ("reshard", "calls=pwrite+write path=/out_ what=short:7"),
    "writes of single bytes": ("merge", "calls=write path=/out_ what=short:1"),
    "short reads": ("reshard", "calls=pread path=ckpt what=short:5"),
    "short kernel copies": ("kernel", "calls=copy path=/out_ what=short:9"),
    "short sendfile": (
        "kernel",
        f"calls=copy path=/out_ what=error:{EXDEV};calls=sendfile path=/out_ what=short:9",
    ),
    "interrupted calls": ("reshard", f"calls={ALL} path=/out_ every=2 what=error:{EINTR}"),
    "interrupted copies": ("kernel", f"calls={ALL} path=/out_ every=2 what=error:{EINTR}"),
    "interrupted reads": ("reshard", f"calls=pread+open path=ckpt every=2 what=error:{EINTR}"),
    "a slow disk": ("reshard", "calls=pwrite+pread+fsync path=out_ what=slow:2;calls=fsync path=/out_ what=short:1"),
    "no room reserved": ("reshard", f"calls=fallocate path=/out_ what=error:{EOPNOTSUPP}"),
    "directories without fsync": ("reshard", f"calls=fsync path=out_ not=.partial what=error:{EINVAL}"),
    "a source whose close fails": ("reshard", f"calls=close path=/ckpt/ what=error:{EIO}"),
    "a work directory that stays": ("reshard", f"calls=unlink path=small_files.json not=.partial what=error:{EIO}"),
    "copies half-way": ("kernel", f"calls=copy path=/out_ at=5 what=error:{EXDEV}"),
    "copies from a byte on": ("kernel", f"calls=copy path=/out_ byte=2000 what=error:{EIO}"),
    "zero copies": ("kernel", "calls=copy+sendfile path=/out_ what=zero"),
    **{
        f"copies: {errno.errorcode[number]}": ("kernel", f"calls=copy path=/out_ what=error:{number}")
        for number in (ENOSYS, EXDEV, EPERM, EOPNOTSUPP, EBADF, EINVAL, EIO)
    },
    "neither kind of copy": ("kernel", f"calls=copy+sendfile path=/out_ what=error:{EPERM}"),
}


@pytest.mark.parametrize("case", SUCCEEDS)
def test_what_is_no_failure(bench: Bench, case: str) -> None:
    """The package is the same, byte for byte, and nothing but progress is told."""
    mode, spec = SUCCEEDS[case]
    assert assert_ends_well(bench, mode, spec).code == 0


# ---- what makes an export fail --------------------------------------------------------------------------------------

MERGED = "torch_rank_weights_embs_table_multi_shard.json"
FAILS = {
    # the data
    "header: EIO": ("reshard", f"calls=pwrite path=/out_ what=error:{EIO}", "byte 0 cannot be written"),
    "data: ENOSPC": ("reshard", f"calls=pwrite path=/out_ byte=2000 what=error:{ENOSPC}", "No space left on device"),
    "hashed copies: ENOSPC": ("merge", f"calls=pwrite path=/out_ byte=3000 what=error:{ENOSPC}", "No space left"),
    "second shard: EDQUOT": ("copy", f"calls=pwrite path=model-000001 what=error:{EDQUOT}", "quota exceeded"),
    "third shard: EROFS": ("copy", f"calls=pwrite path=model-000002 what=error:{EROFS}", "Read-only file system"),
    "data: ESTALE": ("merge", f"calls=pwrite path=/out_ at=4 what=error:{ESTALE}", "Stale file handle"),
    "data: zero bytes taken": ("merge", "calls=pwrite path=/out_ at=3 what=zero", "the file system took no bytes"),
    "kernel copies: ENOSPC": ("kernel", f"calls=copy path=/out_ byte=2000 what=error:{ENOSPC}", "cannot be written"),
    "kernel copies: EDQUOT": ("kernel", f"calls=copy path=/out_ at=4 what=error:{EDQUOT}", "quota exceeded"),
    "sendfile: EFBIG": (
        "kernel",
        f"calls=copy path=/out_ what=error:{EXDEV};calls=sendfile path=/out_ at=3 what=error:{EFBIG}",
        "File too large",
    ),
    "every way of copying: EIO": (
        "kernel",
        f"calls=copy+sendfile+pwrite path=/out_ at=3 what=error:{EIO}",
        "cannot be written: Input/output error",
    ),
    "fsync of a shard": ("reshard", f"calls=fsync path=safetensors.partial what=error:{EIO}", "made durable"),
    "close of a shard": ("reshard", f"calls=close path=.safetensors.partial at=3 what=error:{EIO}", "made durable"),
    "space: ENOSPC": ("reshard", f"calls=fallocate path=model-000001 what=error:{ENOSPC}", "no room for its"),
    "size: EFBIG": (
        "reshard",
        f"calls=fallocate path=/out_ what=error:{EOPNOTSUPP};calls=truncate path=model-000001 what=error:{EFBIG}",
        "no room for its",
    ),
    "new shard: EMFILE": ("reshard", f"calls=create path=.safetensors what=error:{EMFILE}", "Too many open files"),
    "open shard: EMFILE": (
        "reshard",
        f"calls=open path=safetensors.partial what=error:{EMFILE}",
        "Too many open files",
    ),
    "old shard cannot be removed": ("reshard", f"calls=unlink path=.safetensors at=3 what=error:{EIO}", "Input/output"),
    "rename of a shard": ("copy", f"calls=rename path=/model-000001 not=.json what=error:{EIO}", "Input/output error"),
    "hashing what is there": ("reshard", f"calls=pread path=safetensors.partial what=error:{EIO}", "error at byte"),
    "the check": ("reshard", f"calls=pread path=/out_ not=.partial what=error:{EIO}", "check the shards"),
    # receipts, small files, the manifest
    "receipt: ENOSPC": ("copy", f"calls=write path=000001-of-000003.safetensors.json what=error:{ENOSPC}", "No space"),
    "receipt: fsync": ("copy", f"calls=fsync path=000001-of-000003.safetensors.json what=error:{EIO}", "Input/output"),
    "receipt: rename": (
        "copy",
        f"calls=rename path=000002-of-000003.safetensors.json what=error:{EIO}",
        "Input/output",
    ),
    "receipt: directory": ("copy", f"calls=fsync path=.dist_export not=.partial at=2 what=error:{EIO}", "Input/output"),
    "small_files.json: ENOSPC": ("reshard", f"calls=write path=small_files.json what=error:{ENOSPC}", "No space left"),
    "tensorkey.json: ENOSPC": ("reshard", f"calls=write path=tensorkey.json byte=100 what=error:{ENOSPC}", "No space"),
    "tensorkey.json: zero": ("reshard", "calls=write path=tensorkey.json what=zero", "took no bytes"),
    "merged manifest: EDQUOT": ("reshard", f"calls=write path={MERGED} what=error:{EDQUOT}", "quota exceeded"),
    "index: EMFILE": ("reshard", f"calls=create path=/index what=error:{EMFILE}", "Too many open files"),
    "index: fsync": ("reshard", f"calls=fsync path=/index what=error:{EIO}", "Input/output error"),
    "index: rename": ("reshard", f"calls=rename path=/index what=error:{EROFS}", "Read-only file system"),
    "index: close": ("reshard", f"calls=close path=/index what=error:{EDQUOT}", "quota exceeded"),
    "commit marker": ("reshard", f"calls=create path=committing what=error:{ENOSPC}", "No space left on device"),
    "manifest.json: ENOSPC": (
        "reshard",
        f"calls=write path=manifest.json byte=64 what=error:{ENOSPC}",
        "No space left",
    ),
    "manifest.json: fsync": ("copy", f"calls=fsync path=manifest.json what=error:{EIO}", "Input/output error"),
    "manifest.json: rename": ("kernel", f"calls=rename path=manifest.json what=error:{EIO}", "Input/output error"),
    # two faults: the first is told
    "what is left of a file cannot be removed": (
        "reshard",
        f"calls=write path=/index.partial what=error:{ENOSPC};calls=unlink path=/index.partial at=2 what=error:{EIO}",
        "No space left on device",
    ),
    "space cannot be given back": (
        "reshard",
        f"calls=pwrite path=/out_ at=2 what=error:{ENOSPC};calls=unlink path=.safetensors at=3 what=error:{EIO}",
        "No space left on device",
    ),
    "written and closed badly": (
        "reshard",
        f"calls=pwrite path=/out_ at=2 what=error:{ENOSPC};calls=close path=/.model what=error:{EIO}",
        "No space left on device",
    ),
    # the directory and the lock
    "export_dir: EROFS": ("reshard", f"calls=mkdir path=/out_ what=error:{EROFS}", "Read-only file system"),
    "work directory: ENOSPC": ("reshard", f"calls=mkdir path=.dist_export what=error:{ENOSPC}", "No space left"),
    "lock: EMFILE": ("reshard", f"calls=create path=/lock what=error:{EMFILE}", "Too many open files"),
    "lock: ENOSPC": ("reshard", f"calls=write path=/lock what=error:{ENOSPC}", "No space left on device"),
    "scratch directory: ENOSPC": ("reshard", f"calls=mkdir path=/scratch- what=error:{ENOSPC}", "No space left"),
    # the source
    "index of the source": ("reshard", f"calls=pread path=ckpt/index what=error:{EIO}", "index cannot be read"),
    "tensorkey.json of the source": (
        "reshard",
        f"calls=open path=ckpt/tensorkey what=error:{ESTALE}",
        "cannot be read",
    ),
    "headers": ("reshard", f"calls=pread path=ckpt/model-000001 at=2 what=error:{EIO}", "error at byte 8"),
    "ids": ("reshard", f"calls=pread path=ckpt/model-000001 at=3 what=error:{EIO}", "count the ids"),
    "payload": ("reshard", f"calls=pread path=ckpt/model-000001 at=5 what=error:{EIO}", "error at byte"),
    "payload: EMFILE": ("merge", f"calls=open path=ckpt/model-000002 at=3 what=error:{EMFILE}", "Too many open files"),
    "payload copied by the kernel": (
        "kernel",
        f"calls=copy+sendfile path=/out_ at=2 what=error:{EIO};calls=pread path=ckpt/model at=12 what=error:{EIO}",
        "ckpt/model-",
    ),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_failed_export_says_why_and_the_next_one_goes_on(bench: Bench, case: str) -> None:
    """One line with the file and the error, no manifest, an untouched source; the next run completes what is there."""
    mode, spec, word = FAILS[case]
    failed = assert_ends_well(bench, mode, spec, word)
    assert failed.code == (2 if "cannot be read" in failed.told[0] else 1)


DENSE = {
    "program: ENOSPC": (f"calls=write path=/fx_user_model/exported_model.pt byte=5000 what=error:{ENOSPC}", "No space"),
    "module: fsync": (f"calls=fsync path=user_model/module.py what=error:{EIO}", "Input/output error"),
    "scratch: ENOSPC": (f"calls=write path=/scratch- what=error:{ENOSPC}", "No space left on device"),
}


@pytest.mark.parametrize("case", DENSE)
def test_faults_of_the_dense_folder(bench: Bench, case: str) -> None:
    spec, word = DENSE[case]
    assert assert_ends_well(bench, "dense", spec, word).code == 1


def last(bench: Bench, spec: str) -> int:
    """Return how many calls match in an undisturbed export."""
    return bench.export("reshard", bench.new_target(), f"{spec} what=none").seen


def test_a_manifest_that_may_not_survive_a_crash_is_taken_back(bench: Bench) -> None:
    """The last fsync makes its name durable; when that fails there is no package."""
    spec = "calls=fsync path=out_ not=.partial"
    at = last(bench, spec)
    failed = assert_ends_well(bench, "reshard", f"{spec} at={at} what=error:{EIO}", "Input/output error")
    assert failed.code == 1


def test_a_manifest_that_cannot_be_taken_back_is_told(bench: Bench) -> None:
    """Then it is there, and sound; the line does not say otherwise, and says what to do."""
    spec = "calls=fsync path=out_ not=.partial"
    fault = (
        f"{spec} at={last(bench, spec)} what=error:{EIO};calls=unlink path=manifest.json not=.partial what=error:{EIO}"
    )
    target = bench.new_target()
    failed = bench.export("reshard", target, fault)
    assert failed.code == 1
    (line,) = failed.told
    assert (
        "manifest.json: writing it failed (Input/output error), and what may be there of it cannot be removed" in line
    )
    assert "No manifest" not in line
    assert verify(str(target)).findings == []


def test_from_the_command_line(bench: Bench) -> None:
    """The same through ``python -m dist_export``, with the fault there from the start of the process."""
    target, log = bench.new_target(), bench.folder / "command_line.log"
    spec = f"calls=write path={target.name}/manifest.json what=error:{ENOSPC}"
    done = subprocess.run(
        [sys.executable, "-m", "dist_export", *command(bench.source("merge"), target, "merge")],
        env=environment(bench.shim, FAULT_SPEC=spec, FAULT_LOG=str(log)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    failed = ended(done.returncode, done.stdout, done.stderr, read(log))
    assert failed.met
    assert failed.code == 1
    assert_told(failed, "manifest.json", "No space left on device", "No manifest was written")
    assert_no_harm(bench, "merge", target)


@pytest.mark.distributed
def test_a_disk_that_is_full_for_one_of_two_ranks(bench: Bench) -> None:
    """Rank 0 tells, in one line, of the file that rank 1 could not write; the next run completes the package."""
    target, log, mode = bench.new_target(), bench.folder / "ranks.log", "copy"
    before = source_state(bench.source(mode))
    reference = bench.reference(mode)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # reserving, for that is each rank's own: of the writing rank 0 may do all
    spec = f"calls=fallocate+truncate path={target.name}/.model what=error:{ENOSPC}"
    done = subprocess.run(
        [*launcher, "-m", "dist_export", *command(bench.source(mode), target, mode)],
        env=environment(bench.shim, FAULT_SPEC=spec, FAULT_LOG=str(log), FAULT_RANK="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    failed = ended(done.returncode, done.stdout, done.stderr, read(log))
    assert failed.met
    assert failed.code == 1
    (line,) = failed.told
    assert "on rank 1 of 2" in line
    assert "No space left on device" in line
    assert "run the export again" in line
    assert not (target / MANIFEST).exists()
    assert source_state(bench.source(mode)) == before
    again = bench.export(mode, target)
    assert again.code == 0, again.stderr
    assert_same_package(target, reference)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "pread"])
def test_a_disk_that_never_answers(bench: Bench, call: str) -> None:
    """The watchdog ends the export after ``timeout`` seconds, and names the file."""
    target = bench.new_target()
    stuck = bench.export("merge", target, f"calls={call} path=model-0 at=2 what=stuck", "--timeout", "1", timeout=60)
    assert stuck.met
    assert stuck.code == 1, stuck
    (line,) = stuck.told
    assert "model-0" in line
    assert "Run the same command again to go on" in line
    assert_no_harm(bench, "merge", target)


# ---- what is changed in silence -------------------------------------------------------------------------------------


def corrupt(bench: Bench, mode: str, call: str, where: str) -> dict[int, str]:
    """Change a bit in each call in turn; return who finds each: the export, verify, or nobody."""
    found = {}
    seen = bench.export(mode, bench.new_target(), f"calls={call} path={where} what=none").seen
    assert seen
    for at in range(1, seen + 1):
        target = bench.new_target()
        done = bench.export(mode, target, f"calls={call} path={where} at={at} times=1 what=corrupt")
        assert len(done.met) == 1
        if done.code:
            assert "Traceback" not in done.stderr
            assert len(done.told) == 1
            assert_no_harm(bench, mode, target)  # above all, what was found to be wrong is not taken over
            found[at] = "export"
        elif verify(str(target)).findings:
            found[at] = "verify"
        else:
            found[at] = "nobody" if content(target) != content(bench.reference(mode)) else "no harm"
        shutil.rmtree(target)
    return found


def test_what_a_disk_changes_on_the_way_is_found(bench: Bench) -> None:
    """The digest is of what was handed to the file system; ids and headers are read back even before the commit."""
    found = corrupt(bench, "merge", "pwrite", "/out_")
    assert set(found.values()) == {"export", "verify"}


def test_what_a_disk_changes_in_small_files_is_found(bench: Bench) -> None:
    """Their digest too is of what was handed over."""
    for name in ("tensorkey.json", MERGED, "index"):
        assert corrupt(bench, "merge", "write", f"/{name}") == {1: "verify"}


def test_a_manifest_that_a_disk_changed_is_refused(bench: Bench) -> None:
    target = bench.new_target()
    done = bench.export("merge", target, "calls=write path=/manifest.json what=corrupt")
    assert (done.code, len(done.met)) == (0, 1)
    try:
        findings = verify(str(target)).findings
    except PackageError as error:
        findings = [str(error)]
    assert findings


def test_a_receipt_that_a_disk_changed_vouches_for_nothing(bench: Bench) -> None:
    """The shard is not taken over unless its digest, too, is right."""
    target = bench.new_target()
    receipt = "calls=write path=000000-of-000003.safetensors.json what=corrupt"
    failed = bench.export("copy", target, f"{receipt};calls=write path=/index what=error:{EIO}")
    assert failed.code == 1
    again = bench.export("copy", target)
    assert again.code == 0, again.stderr
    assert_same_package(target, bench.reference("copy"))


def test_without_a_digest_only_ids_and_headers_are_found(bench: Bench) -> None:
    """What ``digest: none`` gives up: rows that a disk changed are found by nobody."""
    found = corrupt(bench, "kernel", "copy", "/out_")
    assert set(found.values()) == {"export", "nobody"}


def test_gathered_rows_are_hashed_from_the_file(bench: Bench) -> None:
    """So what a disk changes in a gathered row before it is read back has a digest that fits; ids and headers are found."""
    found = corrupt(bench, "reshard", "pwrite", "/out_")
    assert set(found.values()) == {"export", "nobody"}


def test_what_the_disk_of_the_checkpoint_changes(bench: Bench) -> None:
    """Ids are read twice, so a change in one reading is found; a changed row is taken for the checkpoint's own."""
    found = corrupt(bench, "merge", "pread", "/ckpt/model")
    assert "export" in found.values()
    assert "verify" not in found.values()


def test_faults_are_met_where_they_are_put(bench: Bench) -> None:
    """The shim counts, matches and cuts as its head says: a fault that no call meets would prove nothing."""
    spec = "calls=pwrite path=model-000001 at=2 times=2 every=1"
    target = bench.new_target()
    done = bench.export(
        "reshard", target, f"{spec} what=slow:1;calls=pwrite path=model-000001 at=3 times=1 what=short:1"
    )
    assert done.code == 0
    assert all(line.startswith("pwrite ") and "model-000001" in line for line in done.met)
    assert len(done.met) == 3
    nothing = bench.export("reshard", bench.new_target(), f"calls=pwrite path=nowhere what=error:{EIO}")
    assert (nothing.code, nothing.met, nothing.seen) == (0, [], 0)
