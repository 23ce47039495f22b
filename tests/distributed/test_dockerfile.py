"""launch/Dockerfile, step by step in a fresh environment; then the image's entry exports with two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.distributed import dockerfile
from tests.support.recis_writer import make_tables, read_back, write_checkpoint

pytestmark = pytest.mark.distributed


def test_the_image_exports(tmp_path: Path) -> None:
    text = (ROOT / "launch" / "Dockerfile").read_text()
    with dockerfile.mounted(tmp_path) as image:
        # the index of CPU builds is not everywhere within reach; whatever pip gets here does
        image.build(text, ROOT, arguments={"TORCH_SOURCE": ""})
        assert image.user != "root"
        data = image.root / "data"
        write_checkpoint(data / "ckpt", make_tables({"t": 50, "u": 30}, 2))
        (data / "out").mkdir()
        assert image.run(["sh", "-c", "! touch /data/out/x"]).returncode == 0, "the export does not run as root"
        shutil.chown(data / "out", 10001)
        asked = ["--ckpt_dir", "/data/ckpt", "--export_dir", "/data/out", "--filter_sparse_opt", "true"]
        done = image.run([*image.entrypoint, *asked], NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-3000:]
        assert set(read_back(data / "out")) == {"t", "u"}
        told = image.run([*image.entrypoint, *image.command])
        assert "--ckpt_dir" in told.stdout, told.stderr
