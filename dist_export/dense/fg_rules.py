"""The features of an fg by name, and the rules for one: what RecIS's parser refuses, what serving cannot compute.

A field that nothing reads for this kind of feature is not judged: training ran with it, so it is no reason to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from dist_export.formats.strict_json import show

FgRules = Literal["rtp", "none"]

KEY_TYPES = ("idle", "boundary", "hash", "mask", "multihash", "ev_hash", "ev_hash_mod")
VAL_TYPES = ("idle", "lookup", "multihash_lookup")
VALUE_TYPES = ("string", "double", "integer")
HASH_TYPES = ("farmhash", "murmur", "ev_hash")
EMB_TYPES = ("float", "fp16", "bf16", "int8")
VOCABULARY_FIELDS = ("vocab_dict", "vocab_list", "vocab_file")

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One feature of fg, as the later checks need it."""

    name: str
    """The full name: a sequence's sub-feature is ``<sequence_name>_<feature_name>``."""
    kind: Literal["lookup", "idle"]
    tables: tuple[str, ...]
    """The tables it looks up. Empty for idle, one for lookup; a multihash may have one for each bucket size."""
    dimension: int | None
    """Columns of each of those tables (``embedding_dimension``). None for idle."""
    width: int
    """Columns that it adds to a block: ``embedding_dimension``, or ``value_dimension`` for idle."""
    sequence: str | None
    """The name of its sequence. None for a plain feature."""
    is_used: bool
    """Whether mc names it. Without an mc every feature is used."""


def is_count(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer above zero, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_entry(entry: Entry, *, fg_rules: FgRules, already_hashed: bool) -> list[str]:
    """Return what is wrong with one feature's entry, without its name. Empty: :func:`read_feature` may be called."""
    found: list[str] = []
    key_type = _word(entry, "gen_key_type", KEY_TYPES, found)
    val_type = _word(entry, "gen_val_type", VAL_TYPES, found)
    value_type = _word(entry, "value_type", VALUE_TYPES, found, any_case=True)
    _text(entry, "feature_type", found, required=True)

    if value_type == "string" and key_type == "idle":
        found.append("value_type String cannot go with gen_key_type idle")
    if key_type == "mask" and already_hashed:
        found.append("gen_key_type mask cannot go with input that is already hashed")
    if key_type not in {"ev_hash", "ev_hash_mod"} and "hash_type" in entry:  # those two set it themselves
        _word(entry, "hash_type", HASH_TYPES, found)
    if entry.get("emb_type") is not None:
        _word(entry, "emb_type", EMB_TYPES, found)
    for field in ("combiner", "from_feature", "emb_device"):
        _text(entry, field, found)

    bucket_size = _check_bucket_size(entry, key_type, found)
    _check_boundaries(entry, key_type, found)
    _check_multihash(entry, key_type, val_type, found)
    _check_width(entry, val_type, found)
    if fg_rules == "rtp":
        found += _find_unserved(entry, key_type, val_type, bucket_size)
    return found


def read_feature(entry: Entry, *, name: str, sequence: str | None, is_used: bool) -> Feature:
    """Read an entry in which :func:`check_entry` found nothing."""
    if entry["gen_val_type"] == "idle":
        width = entry.get("value_dimension", 1)
        return Feature(
            name=name, kind="idle", tables=(), dimension=None, width=width, sequence=sequence, is_used=is_used
        )
    dimension = width = entry["embedding_dimension"]
    table = entry.get("shared_name", entry["feature_name"])  # the name without its sequence, as RecIS has it
    tables: tuple[str, ...] = (table,)
    if entry["gen_val_type"] == "multihash_lookup":
        prefix, num_buckets, combiner, is_shared = _parse_strategy(entry["compress_strategy"])
        if not is_shared:
            tables = tuple(f"{table}-{prefix}{i + 1}" for i in range(num_buckets))
        if combiner == "concat":
            width = dimension * num_buckets
    return Feature(
        name=name, kind="lookup", tables=tables, dimension=dimension, width=width, sequence=sequence, is_used=is_used
    )


def _text(entry: Entry, field: str, found: list[str], *, required: bool = False) -> str | None:
    if field not in entry:
        if required:
            found.append(f"{field} is missing")
        return None
    value = entry[field]
    if isinstance(value, str):
        return value
    if value is not None or required:
        found.append(f"{field} {show(value)} is not text")
    return None


def _word(entry: Entry, field: str, allowed: Sequence[str], found: list[str], *, any_case: bool = False) -> str | None:
    value = _text(entry, field, found, required=True)
    if value is None:
        return None
    word = value.lower() if any_case else value
    if word in allowed:
        return word
    found.append(f"{field} {show(value)} is none of {', '.join(allowed)}")
    return None


def _check_bucket_size(entry: Entry, key_type: str | None, found: list[str]) -> int | None:
    """Return the size for the key types that read it, None where it is unusable or not read."""
    if key_type not in {"hash", "ev_hash_mod", "multihash"}:
        return None
    size = entry.get("hash_bucket_size", 0)
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) <= 18:
        return int(size)
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found.append(f"hash_bucket_size {show(size)} is not an integer")
    return None


def _check_boundaries(entry: Entry, key_type: str | None, found: list[str]) -> None:
    boundaries = entry.get("boundaries")
    if boundaries is None:
        if key_type == "boundary":
            found.append("gen_key_type boundary needs boundaries")
        return
    if not isinstance(boundaries, str):
        found.append(f"boundaries {show(boundaries)} is not text such as '0.0,2.0,3.0'")
        return
    for part in boundaries.split(","):
        try:
            is_number = not math.isnan(float(part))
        except ValueError:
            is_number = False
        if not is_number:
            found.append(f"boundaries holds {show(part)}, which is not a number")
            return


def _check_multihash(entry: Entry, key_type: str | None, val_type: str | None, found: list[str]) -> None:
    strategy = entry.get("compress_strategy")
    if strategy is None:
        users = [
            f"{field} {value}"
            for field, value in (("gen_key_type", key_type), ("gen_val_type", val_type))
            if value in {"multihash", "multihash_lookup"}
        ]
        if users:
            found.append(f"{' and '.join(users)} needs a compress_strategy")
        return
    try:
        _parse_strategy(strategy)
    except ValueError:
        found.append(f"compress_strategy {show(strategy)} is not of the form 'prefix:b1,b2,..:combiner:0|1'")


def _parse_strategy(strategy: object) -> tuple[str, int, str, bool]:
    """Return prefix, number of bucket sizes, combiner and whether one table serves them all; ValueError if malformed.

    The last number is a flag in RecIS's code, 1 for a shared table, while its documentation writes the number of
    buckets there: both are accepted.
    """
    if not isinstance(strategy, str):
        raise ValueError(strategy)  # noqa: TRY004 -- callers ask one question: is it well formed
    prefix, buckets, combiner, flag = strategy.split(":")
    sizes = [int(size) for size in buckets.split(",")]
    if not prefix or not combiner or min(sizes) <= 0:
        raise ValueError(strategy)
    return prefix, len(sizes), combiner, int(flag) == 1


def _check_width(entry: Entry, val_type: str | None, found: list[str]) -> None:
    if val_type is None:
        return
    dimension = entry.get("value_dimension", 1)
    if val_type == "idle":
        if not is_count(dimension):
            found.append(f"value_dimension {show(dimension)} is not a positive integer")
        return
    # Ids may be many, so 0 or null ("any number") is no fault where the values are looked up.
    if dimension not in (0, None) and not is_count(dimension):
        found.append(f"value_dimension {show(dimension)} is not a positive integer")
    if "embedding_dimension" not in entry:
        found.append(f"gen_val_type {val_type} needs an embedding_dimension")
    elif not is_count(entry["embedding_dimension"]):
        found.append(f"embedding_dimension {show(entry['embedding_dimension'])} is not a positive integer")
    table = entry.get("shared_name", "default")
    if not isinstance(table, str) or not table:
        found.append(f"shared_name {show(table)} is not the name of a table")
    found += [
        f"{hook} {show(entry[hook])} is not an object"
        for hook in ("admit_hook", "filter_hook")
        if not isinstance(entry.get(hook), Mapping | None)
    ]


def _find_unserved(entry: Entry, key_type: str | None, val_type: str | None, bucket_size: int | None) -> list[str]:
    found = []
    if key_type == "ev_hash":
        found.append("not supported by RTP: gen_key_type ev_hash, which hashes with hash_bucket_size 0")
    elif key_type in {"hash", "ev_hash_mod"} and bucket_size is not None and bucket_size <= 0:
        found.append(f"not supported by RTP: gen_key_type {key_type} with hash_bucket_size {show(bucket_size)}")
    multihash = [
        field
        for field, is_set in (
            ("gen_key_type", key_type == "multihash"),
            ("gen_val_type", val_type == "multihash_lookup"),
            ("compress_strategy", entry.get("compress_strategy") is not None),
        )
        if is_set
    ]
    if multihash:
        found.append(f"not supported by RTP: multihash ({', '.join(multihash)})")
    if vocabulary := [field for field in VOCABULARY_FIELDS if entry.get(field)]:
        found.append(f"not supported by RTP: a vocabulary ({', '.join(vocabulary)})")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A fault, and whose it is: RecIS parses only what mc names, so the faults of the rest are no refusal."""

    text: str
    """One line, with the feature's full name."""
    feature: str | None = None
    sequence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """An entry that has a name, and is not yet known to be sound."""

    name: str
    """The full name."""
    entry: Entry
    sequence: str | None = None
    num_steps: int = 0
    """The sequence's length, 0 for a plain feature."""


class FgEntries:
    """The entries of an fg by name, and the faults found on the way there."""

    def __init__(self, conf: object) -> None:
        self.features: dict[str, Named] = {}
        self.sequences: dict[str, list[Named]] = {}
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        entries = conf.get("features") if isinstance(conf, Mapping) else None
        self.is_readable = isinstance(entries, list)
        if not isinstance(entries, list):
            self.findings.append(Finding(text="fg has no list 'features'"))
            return
        counts: dict[str, int] = {}
        for i, entry in enumerate(entries):
            for named in self._read(f"features[{i}]", entry):
                counts[named.name] = counts.get(named.name, 0) + 1
                self.features.setdefault(named.name, named)
        for name, count in counts.items():
            if count > 1:
                self.findings.append(Finding(text=f"feature {show(name)}: defined {count} times", feature=name))

    def resolve(self, block: str, name: str) -> list[Named] | None:
        """Return the features that ``name`` stands for in a block of mc. None: it is no name of this fg.

        In a block that has a sequence's name RecIS reads short names, or full ones (``with_seq_prefix``).
        """
        if block in self.sequences and (named := self.features.get(f"{block}_{name}")):
            return [named]
        if named := self.features.get(name):
            return [named]
        return self.sequences.get(name)

    def _read(self, place: str, entry: object) -> Iterator[Named]:
        if not isinstance(entry, Mapping):
            self.findings.append(Finding(text=f"{place} is {show(entry)}, not an object"))
        elif "sequence_name" in entry:
            yield from self._read_sequence(place, entry)
        elif (name := self._read_name(place, entry, "feature_name")) is not None:
            yield Named(name=name, entry=entry)

    def _read_sequence(self, place: str, entry: Entry) -> Iterator[Named]:
        sequence = self._read_name(place, entry, "sequence_name")
        if sequence is None:
            return
        members = self.sequences.setdefault(sequence, [])
        where = f"sequence {show(sequence)}"
        length = entry.get("sequence_length")
        num_steps = length if is_count(length) else 0
        if num_steps == 0:
            fault = f"{show(length)} is not a positive integer" if "sequence_length" in entry else "is missing"
            self.findings.append(Finding(text=f"{where}: sequence_length {fault}", sequence=sequence))
        if "feature_name" not in entry:
            self.notes.append(f"{where}: feature_name is missing: RecIS cannot load this fg.json again")
        if not isinstance(entry.get("features"), list):
            self.findings.append(Finding(text=f"{where}: no list 'features'", sequence=sequence))
            return
        for i, sub in enumerate(entry["features"]):
            sub_place = f"{where}: features[{i}]"
            if not isinstance(sub, Mapping):
                self.findings.append(Finding(text=f"{sub_place} is {show(sub)}, not an object", sequence=sequence))
            elif (name := self._read_name(sub_place, sub, "feature_name", sequence)) is not None:
                named = Named(name=f"{sequence}_{name}", entry=sub, sequence=sequence, num_steps=num_steps)
                members.append(named)
                yield named

    def _read_name(self, place: str, entry: Entry, field: str, sequence: str | None = None) -> str | None:
        name = entry.get(field)
        if isinstance(name, str) and name:
            return name
        fault = f"{show(name)} is not a name" if field in entry else "is missing"
        self.findings.append(Finding(text=f"{place}: {field} {fault}", sequence=sequence))
        return None
