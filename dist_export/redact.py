"""Hide the credentials of this process, so that no error, log line, report or manifest shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_MASK = "***"
_MIN_LENGTH = 6
"""Shorter texts do not count as secrets, because hiding them everywhere would make messages unreadable."""

_SENSITIVE = re.compile(
    r"key|secret|token|passw|credential|signature|connection_string|sas|auth|cookie|private|^pat$", re.IGNORECASE
)
_USERINFO = re.compile(r"(?<=://)([^/@\s]*)@")
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


def _note_userinfo(userinfo: str) -> None:
    """Remember the password of a URL, because a library's error may show it without the scheme: ``u:PASSWORD@host/path``."""
    _, colon, password = userinfo.partition(":")
    if colon and password and password != _MASK:
        _secrets.update(f"{form}@" for form in (userinfo, unquote(userinfo), f":{password}", f":{unquote(password)}"))
        _note_all([password, unquote(password)])


def redact_text(text: str) -> str:
    """Return ``text`` without credentials: those that were recorded, a URL's userinfo, and signatures in its query.

    A password in a URL is recorded, because later texts may contain it without the rest of the URL.
    """
    if "://" in text:
        for userinfo in _USERINFO.findall(text):
            _note_userinfo(userinfo)
        text = _USERINFO.sub(f"{_MASK}@", text)
    for secret in sorted(_secrets, key=len, reverse=True):
        if secret in text:
            text = text.replace(secret, f"{_MASK}@" if secret.endswith("@") else _MASK)
    if "=" in text:
        text = _QUERY_SECRET.sub(rf"\1{_MASK}", text)
    return text


def reason_of(error: BaseException) -> str:
    """Return the reason of an error in one line, without its file and without credentials."""
    return redact_text(getattr(error, "strerror", None) or first_line(error))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without credentials; its type if it has no text."""
    return redact_text(next(iter(str(error).strip().splitlines()), type(error).__name__))
