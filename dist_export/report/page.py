"""Render the page: one HTML file with its style, its script and the facts as JSON. It opens offline.

The charts are drawn by ``page.js`` as SVG, without a chart library. All of them are bars from one value to another, or the
columns of a histogram, and need about 60 lines. Of the libraries that a PyPI package contains, plotly's script has 4.5 MB.
Vega-Lite's has 0.9 MB, from a package of 84 MB. Bokeh draws on a canvas, which takes no colours from the page, neither for a
dark screen nor for paper. Without a library the page has the size of its facts, and ``report`` needs no further package.

Strings of a package may be hostile. They are in the page only within the JSON, where ``<``, ``>`` and ``&`` are escapes, and the
script puts them into the document as text. The policy of the page allows this script and this style, by their digests, and no
request at all.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import msgspec

from dist_export.errors import printable

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render_page(facts: dict[str, Any]) -> bytes:
    """Return the page as UTF-8."""
    style, script = _read("page.css"), _read("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest_of(style)}'; script-src '{_digest_of(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    page = _read("page.html")
    for name, text in {"policy": policy, "style": style, "script": script, "facts": _to_json(facts)}.items():
        before, after = page.split(f"%{name}%")  # facts come last: what looks like a place in them stays as it is
        page = f"{before}{text}{after}"
    return page.encode()


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest_of(text: str) -> str:
    """Return the digest of a style or a script as a policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _to_json(facts: dict[str, Any]) -> str:
    """Return the facts as JSON that may stand within a script element."""
    text = msgspec.json.encode(_clean(facts)).decode()
    return text.translate(_ESCAPES)


def _clean(value: Any) -> Any:
    """Return a JSON value whose strings are printable, and hold no credentials."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list | tuple) else value
