"""Format numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

from dist_export.errors import printable


def amount(num_bytes: int) -> str:
    """Return a number of bytes as text, such as ``1.5 MB``."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    size = float(num_bytes)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 999.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def few(names: Sequence[str]) -> str:
    """Return the first three names, and the number of further ones."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return printable(", ".join(names[:3])) + more


def count(number: int, what: str) -> str:
    """Return a number with a noun, such as ``1 shard`` or ``2 shards``."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
