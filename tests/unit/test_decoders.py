"""msgspec's first look at a type crashes the process if several threads take it at once; a decoder looks when it is made."""

from __future__ import annotations

import ast
import subprocess
import sys

from dist_export.manifest import encode_manifest, seal
from tests.support import ROOT
from tests.unit.report.test_page import manifest_of

THREADS = """
import os, sys, threading
from dist_export.errors import PackageError
from dist_export.manifest import decode_manifest

sys.setswitchinterval(1e-6)
raw = sys.stdin.buffer.read()

def read():
    start.wait()
    try:
        found.append(decode_manifest(raw, where="x").digest)
    except PackageError as error:
        found.append(str(error))

for _ in range(20):
    child = os.fork()
    if child == 0:
        start, found = threading.Barrier(4), []
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(len(set(found)) != 1 or len(found) != 4)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_threads_that_read_their_first_manifest_at_once() -> None:
    raw = encode_manifest(seal(manifest_of(["a", "b"])))
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, input=raw, check=False)
    assert done.returncode == 0, done.stderr


def test_no_type_is_looked_at_first_by_whatever_thread_decodes_it() -> None:
    found = []
    for path in sorted((ROOT / "dist_export").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "decode":
                is_first = any(keyword.arg == "type" for keyword in node.keywords)
                found += [f"{path.relative_to(ROOT)}:{node.lineno}"] if is_first else []
    assert not found, f"make a msgspec Decoder of the type at import: {found}"
