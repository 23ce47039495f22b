"""The traced dense arch compiled by AOTInductor: a shared library for this machine's processor, without its sources."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dist_export.archive.native_program import read_processor_features
from dist_export.config.dense_settings import compiler
from dist_export.dense.trace import TracedDense
from dist_export.errors import TraceError
from dist_export.model.user_errors import blame_text, said

_SOURCES = (".cpp", ".cc", ".c", ".h", ".hpp", ".S", ".o", ".kernel_metadata.json")
"""Members of torch's archive that loading does not need."""

_SETTINGS = {
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.debug_symbols": False,
    "compile_threads": 1,
}
"""No lines of sources in the library, and no worker processes that outlive the export."""

_OTHER_NAMES = {
    "bmi": "bmi1",
    "pclmul": "pclmulqdq",
    "rdrnd": "rdrand",
    "sha": "sha_ni",
    "sse3": "pni",
    "mwait": "monitor",
}
"""A feature's name of the compiler -> of Linux, where a sign more or less is not the only difference."""


@dataclass(frozen=True, slots=True)
class CompiledDense:
    """The archive, and what it needs of a machine."""

    content: bytes
    machine: str
    """``x86_64`` or ``aarch64``."""
    features: tuple[str, ...]
    """Features of the processor that the compiler was allowed to use, by Linux's names."""
    versions: dict[str, str]


def compile_dense(traced: TracedDense, output_names: Sequence[str]) -> CompiledDense:
    """Compile the program for this machine's processor. Rank 0.

    Two runs give different bytes: the archive has an id of its own, and compilers promise no equal bytes.

    Raises:
        TraceError: AOTInductor or the compiler refuses the program. The message names the operator, and the model's line if
            torch tells it.
    """
    from torch._inductor import aoti_compile_and_package, config

    known = config.get_config_copy()
    metadata = {"inputs": json.dumps(list(traced.inputs)), "outputs": json.dumps(list(output_names))}
    # torch reads CXX only when it is imported
    settings = {name: value for name, value in {**_SETTINGS, "cpp.cxx": (None, compiler())}.items() if name in known}
    with tempfile.TemporaryDirectory(prefix="dist_export-") as folder:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                path = aoti_compile_and_package(
                    traced.program,
                    package_path=os.path.join(folder, "model.pt2"),
                    inductor_configs={**settings, "aot_inductor.metadata": metadata},
                )
        except Exception as error:
            raise TraceError(
                f"dense_formats: AOTInductor cannot compile the dense arch: {_why(traced, error)}. Use other operators there, "
                "or leave aoti out of dense_formats"
            ) from error
        content = _without_sources(path)
    version = _ask_compiler("-dumpfullversion").strip()
    return CompiledDense(content, platform.machine(), _list_features(), {os.path.basename(compiler()): version})


def _without_sources(path: str) -> bytes:
    """Return the archive without sources, times, and the paths of torch and of its cache in this machine."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    private = [prefix.encode() for prefix in (os.path.dirname(torch.__file__), cache_dir()) if len(prefix) > 1]
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if name.endswith(_SOURCES):
                continue
            data = old.read(name)
            if name.endswith(".so"):  # of the same length, so that nothing moves
                for prefix in private:
                    data = data.replace(prefix, b"/" * len(prefix))
            new.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def _list_features() -> tuple[str, ...]:
    """Return the features that ``-march=native`` lets the compiler use, as far as Linux lists them by the same name."""
    listing = _ask_compiler("-march=native", "-Q", "--help=target")
    enabled = re.findall(r"^\s*-m([\w.-]+)\s+\[enabled\]", listing, re.MULTILINE)
    names = {re.sub(r"[.-]", "_", name) for name in enabled}
    names |= {
        re.sub(r"^avx(512)?", r"\g<0>_", name) for name in names
    }  # the compiler's avx512vnni is avx512_vnni there
    names |= {_OTHER_NAMES[name] for name in names if name in _OTHER_NAMES}
    return tuple(sorted(names & read_processor_features()))


def _ask_compiler(*arguments: str) -> str:
    program = shutil.which(compiler())
    if program is None:  # the settings were checked, so it was removed since
        raise TraceError(f"dense_formats: the compiler {compiler()} is no longer there. No manifest was written")
    found = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout


def _why(traced: TracedDense, error: Exception) -> str:
    """Return the operator that cannot be compiled and the user's line that calls it, else what torch says."""
    text = str(error)
    target = re.search(r"target: ([\w.:]+)", text) or re.search(
        r"missing (?:lowering|decomposition)[^\w]*([\w.:]+)", text
    )
    place = blame_text(text)
    for node in traced.program.graph.nodes if target and not place else ():
        if target and str(node.target) == target[1]:
            place = blame_text(node.meta.get("stack_trace") or "")
    operator = f"{target[1]}: " if target and target[1] not in said(error) else ""
    return f"{operator}{said(error)}{place}"
