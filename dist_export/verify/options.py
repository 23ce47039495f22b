"""The options of the command ``verify``."""

from __future__ import annotations

from dist_export.config.describe import SETTINGS, Option
from dist_export.config.loader import PATH_OPTIONS

USAGE = (
    "usage: dist_export verify PATH [--key value ...]\n\nCheck a package, or a directory that RecIS wrote. The ids of a "
    "delta package are compared with its base; verify the base by itself for its rows. Exit code 0: sound; 1: unsound; 2: "
    "neither of the two, or it cannot be read. Under torchrun the ranks share the work."
)
OPTIONS = {
    **PATH_OPTIONS,
    "finite": Option(
        hint=bool, default=False, is_flag=True, text="Also read all float values, to find NaN and infinities."
    ),
    "base": Option(
        hint=str | None, default=None, text="Base of a delta package. Null looks at its old path, and beside PATH."
    ),
    **{name: SETTINGS[name] for name in ("max_memory", "threads", "timeout")},
}
