"""The whole ``verify`` of a package whose sample or weights are pickles, or texts, that are made to take for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_package import restate
from tests.integration.test_pickle_attacks import pack
from tests.support import pickle_attacks, tiny_model
from tests.support.sparse_cases import export
from tests.support.warm import run_script

SIZE = pickle_attacks.SIZE
MEMORY = 256 << 20
"""Threads and the libraries that a verify loads take most of it."""
SAMPLES = ("inputs_dict.pkl", "output_base.pkl")
STATE = "user_model/state_dict.pt"
TEXTS = {
    "deep": b"[" * SIZE,
    "deep and closed": b"[" * (SIZE // 2) + b"]" * (SIZE // 2),
    "a number of a megabyte": b'{"a":' + b"9" * SIZE + b"}",
    "many names": b"{" + b",".join(b'"k%d":1' % number for number in range(SIZE // 12)) + b"}",
    "empty lists": b'{"ctr":{"idx":0,"shape":[1],"dtype":"torch.float32","values":[' + b"[]," * (SIZE // 3) + b"[]]}}",
    "a shape of a terabyte": b'{"ctr":{"idx":0,"shape":[1000000000000],"dtype":"torch.float32","values":[]}}',
    "a shape of many sizes": b'{"ctr":{"idx":0,"shape":['
    + b"0," * (SIZE // 2)
    + b'0],"dtype":"torch.float32","values":[]}}',
    "a quantized dtype": b'{"ctr":{"idx":0,"shape":[1],"dtype":"torch.qint8","values":[1]}}',
    "zeros": bytes(1000),
}
TEXT_FILES = (
    "inputs_dict.json",
    "outputs_dict.json",
    "default_rows.json",
    "sample_rows.json",
    "blocks.json",
    "output_info.json",
    "graph.txt",
)

CHILD = """
import sys
import warnings
from pathlib import Path
from tests.support.hostile_cases import limited_memory
from tests.integration.test_verify_attacks import MEMORY, attacks, put
from dist_export.package.reader import Package
from dist_export.verify.verify import verify
warnings.simplefilter("error")
package = Path(sys.argv[1])
real, programs = Package.load_program, []
def load_once(self):  # no attack is on the program, and loading it takes most of a verify
    programs or programs.append(real(self))
    return programs[0]
Package.load_program = load_once
verify(str(package))
for name, file, make in attacks(sys.argv[2]):
    print(name, file, flush=True)
    with put(package, file, make()), limited_memory(MEMORY):
        report = verify(str(package))
    assert report.findings, name
    assert all(line.isprintable() for line in report.findings)
print("done")
"""


def attacks(kind: str):
    """Yield (name, file, what makes its content)."""
    if kind == "samples":
        for number, (name, make) in enumerate({**pickle_attacks.SAMPLES, **pickle_attacks.ANYWHERE}.items()):
            yield name, SAMPLES[number % 2], make
    elif kind == "weights":
        for name, make in {**pickle_attacks.TORCH, **pickle_attacks.ANYWHERE}.items():
            yield name, STATE, lambda make=make: pack(make())
    else:
        for number, (name, text) in enumerate(TEXTS.items()):  # each with the file that it is made for, and two others
            others = (TEXT_FILES[number % len(TEXT_FILES)], TEXT_FILES[(number + 3) % len(TEXT_FILES)])
            yield from ((name, file, lambda text=text: text) for file in dict.fromkeys(("outputs_dict.json", *others)))


class put:
    """Within this block, a file of the dense folder has another content, and the manifest vouches for it."""

    def __init__(self, package: Path, file: str, content: bytes) -> None:
        self._package, self._file, self._content = package, f"fx_user_model/{file}", content

    def __enter__(self) -> None:
        self._before = (self._package / self._file).read_bytes()
        self._write(self._content)

    def __exit__(self, *_: object) -> None:
        self._write(self._before)

    def _write(self, content: bytes) -> None:
        (self._package / self._file).write_bytes(content)
        restate(self._package, self._file)


@pytest.mark.parametrize("kind", ["samples", "weights", "texts"])
def test_verify_takes_neither_much_memory_nor_for_ever(kind: str, tmp_path: Path) -> None:
    """In a process of its own, because a hash of 2^60 steps cannot be interrupted."""
    source = tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")
    model = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    export(source, tmp_path / "out", num_shards=2, **model)
    child = run_script(tmp_path, CHILD, str(tmp_path / "out"), kind, timeout=600)
    assert child.returncode == 0, child.stdout[-200:] + child.stderr[-2000:]
    assert child.stdout.splitlines()[-1] == "done"
    assert len(child.stdout.splitlines()) == len(list(attacks(kind))) + 1
