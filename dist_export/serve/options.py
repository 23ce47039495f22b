"""The options of the commands ``score`` and ``serve``."""

from __future__ import annotations

from dist_export.config.describe import Option
from dist_export.config.loader import PATH_OPTIONS

_BASE = Option(
    hint=str | None, default=None, text="Base of a delta package. Null looks at its old path, and beside PATH."
)

SCORE_USAGE = (
    "usage: dist_export score PATH --input FILE --output FILE.parquet [--key value ...]\n\nScore the rows of a file with the "
    "score program of a package. The file is parquet, jsonl or npz, with a column for each input."
)
SCORE_OPTIONS = {
    **{name: PATH_OPTIONS[name] for name in ("storage_options", "registry_options")},
    "input": Option(hint=str | None, default=None, text="The file to read: .parquet, .jsonl or .npz."),
    "output": Option(hint=str | None, default=None, text="The parquet file to write."),
    "keep": Option(hint=list[str], default=[], adds=True, text="Columns of the input that are written too."),
    "batch_size": Option(hint=int, default=4096, text="Rows that are scored at once."),
    "cache_dir": Option(hint=str | None, default=None, text="Local directory for row indexes and ids of a store."),
    "base": _BASE,
}

SERVE_USAGE = (
    "usage: dist_export serve PATH [--key value ...]\n\nServe a package over HTTP by the Open Inference Protocol v2: the "
    "models score, dense and lookup. A package that replaces the one at PATH is checked, and then served in its place."
)
SERVE_OPTIONS = {
    **{name: PATH_OPTIONS[name] for name in ("storage_options", "registry_options")},
    "host": Option(hint=str, default="127.0.0.1", text="Address to listen on."),
    "port": Option(hint=int, default=8000, text="Port to listen on; 0 takes a free one."),
    "workers": Option(hint=int | None, default=None, text="Requests computed at once. Null takes the cores."),
    "poll_secs": Option(hint=float, default=1.0, text="How often PATH is looked at for a new package, in seconds."),
    "checks": Option(hint=bool, default=True, text="False serves a package without verifying it first."),
    "cache_dir": Option(hint=str | None, default=None, text="Local directory for row indexes and ids of a store."),
    "base": _BASE,
}
