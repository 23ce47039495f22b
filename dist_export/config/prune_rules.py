"""Parse the rules of ``prune``, which say which rows to leave out. They are checked before any file is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_export.errors import ConfigError

SLOT_VALUE = "slot_value"
NORM = "norm"
DENY_LIST = "deny_list"
ALLOW_LIST = "allow_list"

EMPTY = "empty"
"""A row of a managed-collision table that no id has. It is pruned without a rule in the settings."""

SAME = "same"
"""A row that a delta package leaves to its base, which has the same bytes."""

REPLACED = "replaced"
"""A row of a base that the delta replaces or deletes, where both are made one package. No manifest counts such rows."""

REASONS = (SLOT_VALUE, NORM, DENY_LIST, ALLOW_LIST, EMPTY, SAME, REPLACED)
"""Reasons why a row was pruned, as named in ``rows_dropped``."""

_KEYS = ("tables", "slot", "below", "norm_at_most", "deny", "allow")
_FORMS = "{tables, slot, below}, {tables, norm_at_most}, {tables, deny} or {tables, allow}"


_EXPONENT = re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+", re.ASCII)
"""``1e-7`` is a number in JSON and YAML 1.2, but text in YAML 1.1, which requires a dot. The YAML reader keeps it as text,
because PyYAML writes a password of that form without quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRule:
    """One rule. A row that it applies to is pruned with all its slots."""

    tables: tuple[str, ...]
    """Patterns of tables, by their names in the checkpoint."""
    reason: str
    slot: str = ""
    """``slot_value``: the slot to compare, with one number per row."""
    limit: int | float = 0
    """``slot_value``: rows below it are pruned. ``norm``: rows whose embedding has at most this L2 norm. NaN is kept."""
    path: str = ""
    """The file of ids. ``deny_list`` prunes rows with one of these ids, ``allow_list`` all other rows."""


def parse_rules(rules: Sequence[Mapping[str, Any]]) -> tuple[RowRule, ...]:
    """Parse the setting ``prune``, in its order.

    Raises:
        ConfigError: a rule is not valid. The message has the index of the rule and the key.
    """
    if not isinstance(rules, (list, tuple)):
        raise ConfigError(f"prune is {rules!r}; expected a list of rules such as {_FORMS}")
    return tuple(_parse(rule, f"prune[{place}]") for place, rule in enumerate(rules))


def _parse(rule: Mapping[str, Any], where: str) -> RowRule:
    if not isinstance(rule, Mapping):
        raise ConfigError(f"{where} is {rule!r}; expected a mapping such as {_FORMS}")
    unknown = next((key for key in rule if key not in _KEYS), None)
    if unknown is not None:
        raise ConfigError(f"{where}: {unknown!r} is no key of a rule; a rule is {_FORMS}")
    tables = _patterns(rule.get("tables"), where)
    given = {key for key in rule if key != "tables"}
    if given == {"slot", "below"}:
        slot = _text(rule, "slot", where)
        if slot == "id":
            raise ConfigError(f"{where}.slot is 'id'; ids are kept or left behind by lists, with deny or allow")
        return RowRule(tables=tables, reason=SLOT_VALUE, slot=slot, limit=_number(rule, "below", where))
    if given == {"norm_at_most"}:
        limit = _number(rule, "norm_at_most", where)
        if limit < 0:
            raise ConfigError(f"{where}.norm_at_most is {limit}; no norm is below 0, so give 0 or more")
        return RowRule(tables=tables, reason=NORM, limit=limit)
    if given == {"deny"}:
        return RowRule(tables=tables, reason=DENY_LIST, path=_text(rule, "deny", where))
    if given == {"allow"}:
        return RowRule(tables=tables, reason=ALLOW_LIST, path=_text(rule, "allow", where))
    told = ", ".join(sorted(given)) or "nothing beside tables"
    raise ConfigError(f"{where} has {told}; a rule is one of {_FORMS}")


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise ConfigError(f'{where}.tables is {value!r}; give a pattern of tables, such as "user_*", or a list of them')
    return tuple(patterns)


def _text(rule: Mapping[str, Any], key: str, where: str) -> str:
    value = rule[key]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}.{key} is {value!r}; give text")
    return value


def _number(rule: Mapping[str, Any], key: str, where: str) -> int | float:
    value: Any = rule[key]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -1e308 < value < 1e308:  # refuses integers too that no float can represent
        raise ConfigError(f"{where}.{key} is {value!r}; give a finite number")
    number: int | float = value
    return number
