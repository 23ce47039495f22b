"""Decode JSON as strictly as untrusted files require, and fast if a program wrote it. Pure.

msgspec decodes ten times as fast as the standard library. Like it, msgspec keeps the last of two equal keys. If encoding
the result gives the input again, the input had no duplicate key, no unnecessary escapes and no numbers in another
spelling. Only such documents are decoded by msgspec; the standard library decodes all others, and has the messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec

from dist_export.errors import CheckpointError
from dist_export.formats.tuning import STANDARD

T = TypeVar("T")
Result = TypeVar("Result")

_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


def decode_object(raw: bytes | str, *, what: str) -> dict[str, Any]:
    """Decode a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no deep nesting, no half surrogates.

    Raises:
        CheckpointError: beginning with ``what``.
    """
    value = decode_canonical(raw, _ANY) if isinstance(raw, bytes) else None
    return _as_object(_decode_slowly(raw, what) if value is None else value, what)


def is_text(name: str) -> bool:
    """Return whether a text can be written as JSON: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def show(value: Any) -> str:
    """Return any ``value`` as one short line for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists within lists
        return f"({type(value).__name__})"
    return text if len(text) <= 200 else f"{text[:160]}... ({len(text):,} characters)"


def decode_canonical(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    """Decode JSON that msgspec itself would write like this, compact or indented by four spaces; return None otherwise.

    Such a document has no duplicate key. Spaces and newlines may follow it.
    """
    try:
        value = decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    text = raw.rstrip(b" \n")
    again = msgspec.json.encode(value)
    if again != text:
        again = msgspec.json.format(again, indent=4)
    return value if again == text else None


class KeyTwiceError(Exception):
    """Raised by the ``take`` of :func:`read_members`, if a key of an earlier piece comes again."""


def read_members(
    raw: bytes,
    decoder: msgspec.json.Decoder[dict[str, T]],
    take: Callable[[Iterable[dict[str, Any]]], Result],
    *,
    what: str,
    piece_bytes: int = STANDARD.json_bytes,
) -> Result:
    """Decode a JSON object as strictly as :func:`decode_object` does, in pieces, and return the result of ``take``.

    Args:
        decoder: of the type that the members should have. A piece that is not of that type, or not canonical, is passed
            as plain values instead.
        take: gets the pieces, dicts of the members in their order. It may be called a second time, with one piece that
            holds all members. Raises KeyTwiceError for a key that two pieces have.
        piece_bytes: the size of a piece, about.

    Raises:
        CheckpointError: beginning with ``what``.
    """
    try:
        return take(_decode_pieces(raw, decoder, what, piece_bytes))
    except KeyTwiceError:
        return take([_as_object(_decode_slowly(raw, what), what)])


def _decode_pieces(
    raw: bytes, decoder: msgspec.json.Decoder[dict[str, T]], what: str, piece_bytes: int
) -> Iterator[dict[str, T] | dict[str, Any]]:
    for piece in _split(raw, piece_bytes):
        members = decode_canonical(piece, decoder)
        if members is not None:
            yield members
            continue
        try:
            yield decode_object(piece, what=what)
        except CheckpointError:
            raise KeyTwiceError from None  # decode the whole again, so that the message counts lines from its start


def _split(raw: bytes, piece_bytes: int) -> Iterator[bytes]:
    """Cut an object that is indented by four spaces into objects of its next members; any other stays whole.

    If each piece is a JSON object, ``raw`` is one too, and has exactly the members of the pieces.
    """
    stop = len(raw)
    while stop and raw[stop - 1] in b" \n":
        stop -= 1
    if stop <= piece_bytes or not raw.startswith(b'{\n    "') or not raw.endswith(b"\n}", 0, stop):
        yield raw
        return
    view = memoryview(raw)
    first, stop = 2, stop - 2
    while first < stop:
        cut = raw.find(b',\n    "', first + piece_bytes, stop)
        last = cut if cut >= 0 else stop
        yield b"".join((b"{\n", view[first:last], b"\n}"))
        first = last + 2


def _decode_slowly(raw: bytes | str, what: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} stands there twice")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
        if "\\u" in text:  # half a surrogate pair is valid JSON but not a text, and could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply to be genuine; save or copy it again") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{what} is not the JSON it should be: {error}; save or copy it again") from None
    return value


def _as_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} should be a JSON object, found {type(value).__name__}; save or copy it again")
    return value
