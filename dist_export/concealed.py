"""Credentials that this process was given: known here, so that no error, log line, report or manifest shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_MASK = "***"
_MIN_LENGTH = 6
"""Shorter texts are no secrets, and blotting them out everywhere would make messages unreadable."""

_SENSITIVE = re.compile(
    r"key|secret|token|passw|credential|signature|connection_string|sas|auth|cookie|private|^pat$", re.IGNORECASE
)
_USERINFO = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY_SECRET = re.compile(
    r"(?i)([?&](?:[\w-]*(?:sig|signature|token|secret|password|credential|key)[\w-]*)=)[^&\s'\"]+"
)

_secrets: set[str] = set()


def note_secrets(options: Mapping[str, Any] | None) -> None:
    """Remember the texts under keys of ``storage_options`` that name credentials, at any depth."""
    for key, value in (options or {}).items():
        if isinstance(value, Mapping):
            if _SENSITIVE.search(str(key)):
                _note_all(value)
            else:
                note_secrets(value)
        elif _SENSITIVE.search(str(key)):
            _note_all(value)


def _note_all(value: Any) -> None:
    if isinstance(value, str):
        if len(value) >= _MIN_LENGTH:
            _secrets.add(value)
    elif isinstance(value, Mapping):
        for inner in value.values():
            _note_all(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _note_all(inner)


def conceal(text: str) -> str:
    """Return ``text`` without credentials: those that were noted, a URL's userinfo, and signatures in its query."""
    for secret in sorted(_secrets, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, _MASK)
    if "://" in text:
        text = _QUERY_SECRET.sub(rf"\1{_MASK}", _USERINFO.sub(f"{_MASK}@", text))
    return text
