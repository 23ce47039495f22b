"""Damage by chance from a seed: to bytes, and to JSON where its structure shows what would hurt."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

_NUMBERS = (b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01\0\0\0")

_VALUES = (
    "NaN", "-Infinity", "1e400", "-1", "0", "1", "1.0", "1e2", "-0", "true", "false", "null", "[]", "{}", '""', "[[[[1]]]]",
    "9" * 30, "9" * 5000, "9223372036854775807", "9223372036854775808", "4611686018427387904", "2147483648", "65536",
    '"\\ud800"', '"\\u0000"', '"\\u001b[31m"', '"../x"', '"a/b"', '"index"', '"user@embedding^0@1@1"', '"x@id^0@0@0"', '"F64"',
    '"I64"', '"float64"', '"^ "', "[0,1]", "[1,0]", "[-1]", "[4611686018427387904,4]", "[1099511627776,1099511627776]", "01",
    '"\u0663"', "[" * 900 + "]" * 900, "\x01", "",
)  # fmt: skip
"""As they stand in the text, some of them no JSON."""

_STYLES: tuple[dict[str, Any], ...] = (
    {"separators": (",", ":")},
    {"separators": (",", ":"), "ensure_ascii": False},
    {"indent": 4},
    {"indent": 1, "ensure_ascii": False},
    {},
)


def damage_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert, repeat, or put a telling number somewhere."""
    place = draw.randrange(max(len(raw), 1))
    kind = draw.randrange(6)
    if kind == 0:
        return raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :]
    if kind == 1:
        return raw[:place]
    if kind == 2:
        return raw[:place] + draw.randbytes(draw.randrange(1, 9)) + raw[place:]
    if kind == 3:
        return raw[:place] + raw[place + draw.randrange(1, 40) :]
    if kind == 4:
        return raw[:place] + raw[place : place + draw.randrange(1, 60)] * 2 + raw[place:]
    return raw[:place] + draw.choice(_NUMBERS) + raw[place + 4 :]


def damage_json(raw: bytes, draw: random.Random) -> bytes:
    """Damage the document in one or two places and write it in one of the styles of programs; or damage its bytes."""
    if draw.random() < 0.25:
        return damage_bytes(raw, draw)
    document = json.loads(raw)
    replaced: list[str] = []
    for _ in range(draw.choice((1, 1, 2))):
        _damage_document(document, draw, replaced)
    text = json.dumps(document, **draw.choice(_STYLES))
    for number, value in enumerate(replaced):
        text = text.replace(f'"<{number}>"', value)
    return text.encode("utf-8", "surrogatepass")


def damage_shard(raw: bytes, draw: random.Random) -> bytes:
    """Damage the header of a safetensors file, its length, or where it ends."""
    kind = draw.random()
    if kind < 0.1:
        lengths = (0, 1, 7, 8, len(raw), len(raw) - 8, len(raw) - 7, 1 << 20, 1 << 32, 1 << 60, 1 << 63, (1 << 64) - 1)
        return struct.pack("<Q", draw.choice(lengths)) + raw[8:]
    if kind < 0.2:
        return raw[: draw.randrange(len(raw))] if draw.random() < 0.7 else raw + bytes(draw.randrange(1, 9))
    (length,) = struct.unpack("<Q", raw[:8])
    text = damage_json(raw[8 : 8 + length], draw)
    stated = len(text) if draw.random() < 0.9 else length
    return struct.pack("<Q", stated) + text + raw[8 + length :]


def damage_index(raw: bytes, draw: random.Random) -> bytes:
    """Damage a file of row indexes: where it ends, or some of its bytes."""
    if draw.random() < 0.3:
        return raw[: draw.randrange(len(raw))] if draw.random() < 0.7 else raw + bytes(draw.randrange(1, 9))
    changed = bytearray(raw)
    for _ in range(draw.randrange(1, 20)):
        place = draw.randrange(len(raw)) & ~3
        changed[place : place + 4] = draw.choice((bytes(4), b"\xff" * 4, struct.pack("<I", draw.randrange(400))))
    return bytes(changed)


def _damage_document(document: Any, draw: random.Random, replaced: list[str]) -> None:
    """Change one place. A value that JSON cannot say becomes a mark, to be exchanged in the text."""
    places = _places(document)
    if not places:
        return
    holder, key = draw.choice(places)
    kind = draw.randrange(6)

    def mark(text: str) -> str:
        replaced.append(text)
        return f"<{len(replaced) - 1}>"

    if kind <= 1:
        holder[key] = mark(draw.choice(_VALUES))
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(
        holder, dict
    ):  # the same key again, plainly or escaped, with the same value or another
        value = json.dumps(holder[key]) if draw.random() < 0.5 else draw.choice(_VALUES)
        name = json.dumps(key) if draw.random() < 0.5 or not key else f'"\\u{ord(key[0]):04x}' + json.dumps(key[1:])[1:]
        first = mark(value)
        holder[key] = mark(f'"{first}",{name}:{json.dumps(holder[key])}')
        replaced[-2:] = [replaced[-1].replace(f'"{first}"', value), replaced[-1].replace(f'"{first}"', value)]
        holder[key] = first
    elif kind == 4 and isinstance(holder, dict):
        holder[draw.choice((key + "x", key[:-1], key.upper(), "", "^ ", "__metadata__", "\x1b[31m"))] = holder.pop(key)
    else:
        other, place = draw.choice(_places(document))
        if isinstance(holder[key], (str, int, float)) and isinstance(other[place], (str, int, float)):
            holder[key], other[place] = other[place], holder[key]
        elif isinstance(holder[key], int):
            holder[key] += draw.choice((-1, 1, 4, 8, 1 << 31, 1 << 62, 1 << 64))


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)) and value[key]:
            found += _places(value[key])
    return found
