"""Load the dense arch that AOTInductor compiled. This runs native code of the package, so it is never done unasked."""

from __future__ import annotations

import os
import platform
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from dist_export.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_FLAGS = ("flags", "Features")
"""The line of /proc/cpuinfo with the processor's features, on x86 and on ARM."""


def read_processor_features() -> frozenset[str]:
    """Return the features of this machine's processor by Linux's names; nothing where Linux does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in _FLAGS:
                    return frozenset(value.split())
    except OSError:
        return frozenset()
    return frozenset()


def explain_wrong_machine(machine: str, features: Sequence[str]) -> str:
    """Return why this machine cannot run code for another one; empty if nothing is known against it."""
    if machine != platform.machine():
        return f"it was compiled for {machine}, this machine is {platform.machine()}"
    known = read_processor_features()
    lacking = sorted(set(features) - known) if known else []
    return f"it uses {', '.join(lacking)}, which this processor lacks" if lacking else ""


class NativeProgram:
    """The compiled dense arch as something that is called like the exported program. It runs on the CPU."""

    def __init__(self, content: bytes, *, where: str) -> None:
        """Load the native code of an archive of AOTInductor.

        Raises:
            PackageError: torch cannot load it.
        """
        import torch

        with tempfile.TemporaryDirectory(prefix="dist_export-") as folder:
            path = os.path.join(folder, "model.pt2")
            with open(path, "wb") as file:
                file.write(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self._program: Any = torch._inductor.aoti_load_package(path)  # noqa: SLF001 -- torch documents it
            except Exception as error:
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise PackageError(
                    f"{where}: torch {torch.__version__} cannot load the compiled dense arch: {first[:400]}; load it with the "
                    "torch that wrote it"
                ) from error

    def module(self) -> NativeProgram:
        """Return itself, as ``ExportedProgram.module`` returns what is called."""
        return self

    def metadata(self) -> dict[str, str]:
        """Return what the archive says of itself: ``outputs`` and ``inputs`` as JSON lists, and the machine."""
        return dict(self._program.loader.get_metadata())

    def __call__(self, **inputs: torch.Tensor) -> Any:
        """Return a Tensor, or a tuple in the order of the program's outputs."""
        import torch

        with torch.no_grad():
            return self._program(**inputs)
