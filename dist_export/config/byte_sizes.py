"""Numbers of bytes as users write them."""

from __future__ import annotations

import re

from dist_export.errors import ConfigError

_BYTES = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?) ?((?:[kmgt]i?)?b|)", re.IGNORECASE)
MAX_NUMBER = 1 << 62


def parse_bytes(text: int | str, *, setting: str) -> int:
    """Return a number of bytes from a number or a text: ``512MiB`` (powers of 1024), ``2GB`` (powers of 1000), ``1e9``."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text > MAX_NUMBER:
            raise ConfigError(f"{setting} is more than {MAX_NUMBER:,} bytes; no machine has that much")
        return text
    found = _BYTES.fullmatch(str(text).strip())
    if found is None:
        raise ConfigError(f"{setting} is {text!r}; give bytes, or a number with a unit such as 512MiB or 2GB")
    unit = found[2].lower()
    base = 1024 if unit.endswith("ib") else 1000
    number = float(found[1]) * base ** ("kmgt".index(unit[0]) + 1 if unit[:1] in tuple("kmgt") else 0)
    if not number < 1 << 62:
        raise ConfigError(f"{setting} is {text!r}; no machine has that much")
    return int(number)
