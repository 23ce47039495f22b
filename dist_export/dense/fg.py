"""Checks of the feature generator's configuration (fg) and of the dense arch's blocks (mc).

The order of calls: :func:`~dist_export.dense.fg_load.collect_confs` reads them. :func:`check_conf` checks them with the
checkpoint's tables, or :func:`check_tables` where these are known only later. :func:`check_inputs` comes when the dense
arch's inputs are known. Each check raises one ConfigError with all that it found. None issues a collective or reads a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_export.dense.fg_rules import (
    Feature,
    FgEntries,
    FgRules,
    Finding,
    Named,
    check_entry,
    read_feature,
)
from dist_export.errors import ConfigError
from dist_export.formats.strict_json import show

__all__ = [
    "Block",
    "Feature",
    "Features",
    "FgRules",
    "check_conf",
    "check_inputs",
    "check_tables",
]

_MAX_SUGGESTIONS = 20
"""Each compares one name with all others: the wrong file must not keep its user waiting for a thousand of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of mc: a dense input, the concatenation of its features along the last dimension."""

    name: str
    features: tuple[str, ...]
    """Full names in order, a sequence's name replaced by its sub-features. The names as written if there is no fg."""
    width: int | None
    """Columns of the block. None if there is no fg."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What :func:`check_conf` found sound."""

    features: tuple[Feature, ...]
    blocks: tuple[Block, ...]
    has_mc: bool
    notes: tuple[str, ...]
    """What a user may want to know, in sentences: none of it is wrong for this export."""


# ---- reading -------------------------------------------------------------------------------------------------------


def check_conf(
    fg_conf: Mapping[str, Any] | None,
    mc_conf: Mapping[str, Any] | None,
    *,
    fg_rules: FgRules,
    already_hashed: bool = False,
    tables: Mapping[str, int] | None = None,
) -> Features:
    """Check both configurations, each as far as the other allows, and with ``tables`` also against the checkpoint.

    A feature that mc does not name is never parsed by RecIS: its faults are told in ``notes``, not refused.

    Args:
        fg_conf: As from :func:`collect_confs`; None leaves the widths of blocks unknown.
        mc_conf: As from :func:`collect_confs`; None counts every feature as used.
        fg_rules: ``rtp`` also refuses what main-search RTP does not support; ``none`` only what RecIS's parser refuses.
        already_hashed: Whether ids come hashed (:func:`has_hashed_input`), which mask cannot go with.
        tables: As for :func:`check_tables`, so that one error tells everything; None checks no table.

    Raises:
        ConfigError: Every finding, one a line, with the feature's full name.
    """
    fg = None if fg_conf is None else FgEntries(fg_conf)
    entries = fg.features if fg else {}
    findings = list(fg.findings) if fg else []
    for name, named in entries.items():
        faults = check_entry(named.entry, fg_rules=fg_rules, already_hashed=already_hashed)
        findings += [Finding(text=f"feature {show(name)}: {fault}", feature=name) for fault in faults]
    blocks = dict(_read_blocks(mc_conf, findings))
    members = _resolve_blocks(blocks, fg, findings)

    used = {named.name for block in members.values() for named in block}
    used_sequences = {named.sequence for block in members.values() for named in block}
    used_sequences |= {name for block, names in blocks.items() for name in (block, *names)}
    refused, notes = [], list(fg.notes) if fg else []
    for found in findings:
        is_named = found.feature in used if found.feature is not None else found.sequence in used_sequences
        has_owner = found.feature is not None or found.sequence is not None
        if is_named or not has_owner or not isinstance(mc_conf, Mapping):
            refused.append(found.text)
        else:
            notes.append(f"{found.text} (not refused: mc does not use it)")
    faulty = {found.feature for found in findings}
    features = {
        name: read_feature(named.entry, name=name, sequence=named.sequence, is_used=mc_conf is None or name in used)
        for name, named in entries.items()
        if name not in faulty
    }
    if tables is not None:
        refused += _compare_tables(features.values(), tables)
    _refuse_any("fg and mc", refused)

    notes += [note for block in members for note in _note_lengths(block, members[block])]
    return Features(
        features=tuple(features.values()),
        blocks=tuple(
            Block(
                name=block,
                features=tuple(named.name for named in members[block]) if fg else tuple(names),
                width=sum(features[named.name].width for named in members[block]) if fg else None,
            )
            for block, names in blocks.items()
        ),
        has_mc=mc_conf is not None,
        notes=tuple(notes),
    )


def _note_lengths(block: str, members: Sequence[Named]) -> Iterator[str]:
    lengths = sorted({named.num_steps for named in members})
    if len(lengths) > 1:
        told = ", ".join(str(length) if length else "none" for length in lengths)
        yield f"block {show(block)}: its features differ in sequence length ({told}), so RecIS cannot join them"


def _read_blocks(mc_conf: object, findings: list[Finding]) -> Iterator[tuple[str, list[str]]]:
    """Yield each block's name and the names in it; RecIS also writes a name as ``{"column_name": name}``."""
    if mc_conf is None:
        return
    if not isinstance(mc_conf, Mapping):
        findings.append(Finding(text=f"mc is {show(mc_conf)}, not an object of blocks"))
        return
    for block, listed in mc_conf.items():
        if not isinstance(block, str):
            findings.append(Finding(text=f"block {show(block)}: the name is not text"))
            continue
        names = []
        if not isinstance(listed, list | tuple):
            findings.append(Finding(text=f"block {show(block)}: {show(listed)} is not a list of features"))
        elif not listed:
            findings.append(Finding(text=f"block {show(block)}: names no feature"))
        else:
            for item in listed:
                name = item.get("column_name") if isinstance(item, Mapping) else item
                if isinstance(name, str):
                    names.append(name)
                else:
                    findings.append(Finding(text=f"block {show(block)}: {show(item)} is not the name of a feature"))
        yield block, names


def _resolve_blocks(
    blocks: Mapping[str, Sequence[str]], fg: FgEntries | None, findings: list[Finding]
) -> dict[str, list[Named]]:
    members: dict[str, list[Named]] = {block: [] for block in blocks}
    if fg is None or not fg.is_readable:
        return members
    suggest = _Suggestions([*fg.features, *fg.sequences])
    for block, names in blocks.items():
        for name in names:
            found = fg.resolve(block, name)
            if found is None:
                fault = f"block {show(block)}: {show(name)} is no feature of fg{suggest(name)}"
                findings.append(Finding(text=fault))
            elif not found:
                findings.append(Finding(text=f"block {show(block)}: the sequence {show(name)} has no features"))
            else:
                members[block] += found
    return members


# ---- against the checkpoint and the dense arch ---------------------------------------------------------------------


def check_tables(features: Features, tables: Mapping[str, int]) -> None:
    """Check that the checkpoint holds each table that a used feature looks up, with that feature's dimension.

    Args:
        features: From :func:`check_conf`.
        tables: Every table of the checkpoint with its columns.

    Raises:
        ConfigError: Every feature whose table is absent or has other columns.
    """
    _refuse_any("fg against the checkpoint", _compare_tables(features.features, tables))


def _compare_tables(features: Iterable[Feature], tables: Mapping[str, int]) -> list[str]:
    suggest = _Suggestions(list(tables))
    findings = []
    for feature in features:
        if not feature.is_used:
            continue
        for table in feature.tables:
            if table not in tables:
                findings.append(
                    f"feature {show(feature.name)}: its table {show(table)} is not in the checkpoint{suggest(table)}"
                )
            elif tables[table] != feature.dimension:
                findings.append(
                    f"feature {show(feature.name)}: embedding_dimension is {feature.dimension}, "
                    f"but table {show(table)} of the checkpoint has {tables[table]} columns"
                )
    return findings


def check_inputs(features: Features, inputs: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Check the width of each block that is an input of the dense arch; return what matches nothing, in sentences.

    Args:
        features: From :func:`check_conf`.
        inputs: The shape of each traced input by name, batch first.

    Raises:
        ConfigError: Every block whose width is not its input's last dimension.
    """
    if not features.has_mc:
        return ()
    findings = []
    for block in features.blocks:
        if block.width is None or block.name not in inputs:
            continue
        shape = tuple(inputs[block.name])
        if not shape or shape[-1] != block.width:
            found = f"{shape[-1]} columns" if shape else "no dimension"
            findings.append(
                f"block {show(block.name)}: its features have {block.width} columns, but the input has {found} "
                f"(features {show(', '.join(block.features))}, input shape {list(shape)})"
            )
    _refuse_any("mc against the inputs of the dense arch", findings)
    blocks = {block.name for block in features.blocks}
    return (
        *(f"input {show(name)} is not listed in mc" for name in inputs if name not in blocks),
        *(f"block {show(block.name)} of mc is no input" for block in features.blocks if block.name not in inputs),
    )


class _Suggestions:
    """Callable: a misspelt name to " (nearest: ...)", or to nothing if no name is near."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {name.lower(): name for name in reversed(names)}
        self._num_left = _MAX_SUGGESTIONS

    def __call__(self, name: str) -> str:
        if self._num_left == 0:
            return ""
        self._num_left -= 1
        near = difflib.get_close_matches(name.lower(), self._names, n=1)
        return f" (nearest: {show(self._names[near[0]])})" if near else ""


def _refuse_any(what: str, findings: Sequence[str]) -> None:
    if findings:
        count = f"{len(findings):,} finding{'s' if len(findings) > 1 else ''}"
        raise ConfigError(f"{what}: {count}. Nothing was written.", *findings)
