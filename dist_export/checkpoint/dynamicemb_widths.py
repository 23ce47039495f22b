"""How wide the rows of a DynamicEmb dump are, and of which dtype: raw files say neither, so what else is known must agree. Pure.

Source: ``optimizer.py``, ``key_value_table.py`` and ``dynamicemb_config.py`` of dynamicemb in NVIDIA's recsys-examples, v25.09 to
v26.06. Rank 0 writes ``<table>_opt_args.json`` with ``opt_type`` and ``evict_strategy``, which has no dimension and no dtype.
Values and optimizer state are float32; a newer change writes values in the dtype of the table. Optimizer state has 2 dim
values a row of Adam, dim of Adagrad, 1 of row-wise Adagrad (16 bytes of the table's dtype before that was mended), none of SGD.
Scores are one int64 a key, or two where the strategy is {TIMESTAMP, LFU}, whose ``evict_strategy`` is LFU.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from dist_export.checkpoint.metadata import Checkpoint, TableMeta
from dist_export.errors import CheckpointError, PlanError
from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.strict_json import show
from dist_export.humanize import few

SETTING = "dynamicemb_dims"

_F32 = CODE_BY_NAME["F32"]
_STATE_DIMS = {"adam": 2, "exact_adagrad": 1}
"""Float32 values of optimizer state for each value of a row, by ``opt_type``."""
_ROW_WISE = "exact_row_wise_adagrad"
_ROW_WISE_WIDTHS = (1, 4, 8)
_NO_STATE = "sgd"
_DIM_KEYS = frozenset({"dim", "embedding_dim", "emb_dim"})
_DTYPE_KEYS = frozenset(
    {"dtype", "embedding_dtype", "emb_dtype", "value_dtype", "values_dtype", "weight_dtype", "data_type"}
)
_STRATEGY_KEYS = ("evict_strategy", "score_strategy")
_DTYPES = {
    "float32": "F32", "fp32": "F32", "float": "F32", "f32": "F32",
    "float16": "F16", "fp16": "F16", "half": "F16", "f16": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
    "float64": "F64", "fp64": "F64", "double": "F64", "f64": "F64",
}  # fmt: skip
_ONE_WORD = frozenset(
    {
        "klru",
        "lru",
        "kepochlru",
        "epoch_lru",
        "kepochlfu",
        "epoch_lfu",
        "kcustomized",
        "customized",
        "timestamp",
        "step",
    }
    | {"no_eviction"}
)


@dataclass(frozen=True, slots=True)
class Stated:
    """What the json files of one table state."""

    opt_type: str | None = None
    dims: Mapping[str, Any] = field(default_factory=dict)
    """File -> the dimension that it states; ``dtypes`` so for the dtype."""
    dtypes: Mapping[str, Any] = field(default_factory=dict)
    strategies: tuple[Any, ...] = ()
    """What decides which rows are evicted, in dynamicemb's words."""


class Width(NamedTuple):
    """One reading of the files of a table."""

    dtype: int
    """Index into ``layout.dtypes.DTYPES``."""
    dim: int
    confirmed_by: tuple[str, ...]
    """What agrees with it, for people; empty where nothing tells whether it is right."""
    contradiction: str = ""
    """Why the rows cannot be read like this; empty where nothing speaks against it."""
    missing: str = ""
    """What would tell the width and is not there; empty where nothing is known to be missing."""


def read_stated(documents: Iterable[tuple[str, Mapping[str, Any]]]) -> Stated:
    """Return what the json files of one table state, from (name of the file, content)."""
    opt_type: str | None = None
    dims: dict[str, Any] = {}
    dtypes: dict[str, Any] = {}
    strategies: list[Any] = []
    for name, document in documents:
        for key, value in document.items():
            if value is None:
                continue
            if key in _DIM_KEYS:
                dims[f"{key} of {name}"] = value
            elif key in _DTYPE_KEYS:
                dtypes[f"{key} of {name}"] = value
            elif key in _STRATEGY_KEYS:
                strategies.append(value)
            elif key == "opt_type" and isinstance(value, str):
                opt_type = value.lower()
    return Stated(opt_type, dims, dtypes, tuple(strategies))


def find_width(row_bytes: int, state_width: int | None, stated: Stated) -> Width:
    """Return the dtype and the number of values of a row that has ``row_bytes``.

    Args:
        row_bytes: of the values of one key.
        state_width: float32 values of optimizer state for each key, 0 where its files are empty; None where there are none.
        stated: of the json files.
    """
    codes = {_parse_dtype(value) for value in stated.dtypes.values()}
    code = next(iter(codes), _F32)
    if code is None or len(codes) > 1:
        told = ", ".join(f"{what} is {show(value)}" for what, value in stated.dtypes.items())
        return Width(_F32, max(row_bytes // 4, 1), (), f"{told}; expected one of float32, float16, bfloat16, float64")
    dtype = DTYPES[code]
    if row_bytes % dtype.itemsize or not row_bytes:
        return Width(code, 1, (), f"{row_bytes:,} bytes for each key are no whole number of {dtype.torch}")
    dim = row_bytes // dtype.itemsize
    confirmed = list(stated.dtypes)
    for what, value in stated.dims.items():
        if _parse_dim(value) != dim:
            return Width(code, dim, (), f"{what} is {show(value)}{_explain(row_bytes, _parse_dim(value), stated)}")
        confirmed.append(what)
    agrees, contradiction = _judge_state(dim, state_width, stated.opt_type)
    if contradiction:
        return Width(code, dim, (), contradiction)
    missing = ""
    if state_width is None and stated.opt_type in _STATE_DIMS:
        missing = (
            f"its optimizer is {stated.opt_type}, whose state would tell, but there are no files of optimizer state"
        )
    return Width(code, dim, (*confirmed, agrees) if agrees else tuple(confirmed), missing=missing)


def find_score_words(words: int, stated: Stated) -> str:
    """Return why scores of so many int64 for each key cannot be right; empty where they can."""
    if words not in (1, 2):
        return f"{words} scores for each key; expected 1, or 2 of the strategy {{TIMESTAMP, LFU}}"
    for strategy in stated.strategies:
        known = _count_words(strategy)
        if known is not None and known != words:
            return f"{words} score{'s' * (words > 1)} for each key, but the strategy {show(strategy)} has {known}"
    return ""


def confirm_widths(
    checkpoint: Checkpoint, dims: Mapping[str, int], model_dims: Mapping[str, Collection[int]]
) -> Checkpoint:
    """Hold the widths of tables of a dump against the settings and the model; return the checkpoint with what confirms each.

    What no one confirms is a warning of the checkpoint that comes back. Every other table is as it was.

    Args:
        dims: ``dynamicemb_dims``: pattern of tables, as the source names them -> dimension. The first match counts.
        model_dims: name of a table -> the dimensions that tables of this name have in the model.

    Raises:
        CheckpointError: a width that something contradicts.
        PlanError: a pattern that matches no table of a dump.
    """
    dumped = [table.name_in_source for table in checkpoint.tables if table.width_confirmed_by is not None]
    for pattern in dims:
        if not any(fnmatchcase(name, pattern) for name in dumped):
            raise PlanError(
                f"{SETTING}: the pattern {pattern!r} matches no table of a DynamicEmb dump; there are {few(dumped) or 'none'}"
            )
    tables = tuple(
        table if table.width_confirmed_by is None else _confirm(table, dims, model_dims, checkpoint.directory.url)
        for table in checkpoint.tables
    )
    unsure = [table for table in tables if table.width_confirmed_by == ()]
    open_ones = [f"{table.name_in_source!r} (float32 [{_dim_of(table)}])" for table in unsure]
    missing = [f"{table.name_in_source!r}: {table.width_missing}" for table in unsure if table.width_missing]
    if not open_ones:
        return replace(checkpoint, tables=tables)
    note = (
        f"the dump does not say how wide the rows of {few(open_ones)} are, and nothing else confirms it: they are read as "
        f"float32, by the sizes of their files. If that is wrong, say so with {SETTING}: {{pattern: dimension}}"
        + (f". {few(missing)}" if missing else "")
    )
    return replace(checkpoint, tables=tables, warnings=(*checkpoint.warnings, note))


def render_width(table: Mapping[str, Any]) -> list[str]:
    """Return the line of a report on a table that tells what confirms the width of its rows; none where the source states it."""
    confirmed = table.get("width_confirmed_by")
    if confirmed is None:
        return []
    by = f"confirmed by {', '.join(confirmed)}" if confirmed else "nothing confirms it"
    return [f"    width of its rows: {by}"]


def _confirm(
    table: TableMeta, dims: Mapping[str, int], model_dims: Mapping[str, Collection[int]], where: str
) -> TableMeta:
    name, dim = table.name_in_source, _dim_of(table)
    assert table.width_confirmed_by is not None
    confirmed = list(table.width_confirmed_by)
    asked = next((dim for pattern, dim in dims.items() if fnmatchcase(name, pattern)), None)
    contradiction = table.contradiction
    if not contradiction and asked is not None:
        confirmed.append(SETTING)
        contradiction = "" if asked == dim else f"{SETTING} says {asked}"
    known = model_dims.get(name, ())
    if not contradiction and known:
        confirmed.append("embedding_dim of the model")
        if dim not in known:
            contradiction = f"the model's table has embedding_dim {' or '.join(map(str, sorted(known)))}"
    if contradiction:
        slot = next(slot for slot in table.slots if slot.name == EMBEDDING_SLOT)
        raise CheckpointError(
            f"{where}: table {name!r}: its values have {slot.row_bytes:,} bytes for each key, {dim} {DTYPES[slot.dtype].torch}, "
            f"but {contradiction}. They may be of another dtype or of another dump. A file {name}_meta.json beside them may "
            f'state both, as {{"dim": 8, "dtype": "bfloat16"}}; drop_tables leaves the table out'
        )
    return replace(table, width_confirmed_by=tuple(confirmed))


def _dim_of(table: TableMeta) -> int:
    return next(slot.inner_shape[0] for slot in table.slots if slot.name == EMBEDDING_SLOT)


def _judge_state(dim: int, width: int | None, opt_type: str | None) -> tuple[str, str]:
    """Return what of the optimizer state confirms a dimension and what contradicts it, one of them empty at least."""
    if width is None or (not width and (opt_type == _NO_STATE or opt_type is None)):
        return "", ""
    if not width and opt_type in (*_STATE_DIMS, _ROW_WISE):
        return (
            "",
            f"its files of optimizer state are empty, where {opt_type} has {_STATE_DIMS.get(opt_type or '', 0) * dim or 1}",
        )
    told = f"its optimizer state has {width} float32 for each key"
    if opt_type in _STATE_DIMS:
        expected = _STATE_DIMS[opt_type] * dim
        if width == expected:
            return f"optimizer state ({opt_type})", ""
        return "", f"{told}, where {opt_type} has {expected}"
    if opt_type == _NO_STATE:
        return "", f"{told}, where {opt_type} has none"
    if opt_type == _ROW_WISE:
        return "", "" if width in _ROW_WISE_WIDTHS else f"{told}, where {opt_type} has 1"
    if opt_type is not None or width in _ROW_WISE_WIDTHS or width == 2 * dim:
        return "", ""  # 2 dim are Adam's, or Adagrad's of rows with twice as many values of 2 bytes
    if width == dim:
        return "optimizer state", ""
    return "", f"{told}, which no optimizer has for {dim} values (Adam {2 * dim}, Adagrad {dim}, row-wise Adagrad 1)"


def _explain(row_bytes: int, dim: int | None, stated: Stated) -> str:
    """Return what dtype would fit a dimension, for messages."""
    if not dim or stated.dtypes or row_bytes % dim or row_bytes // dim not in (1, 2, 8):
        return ""
    return f": that would be {row_bytes // dim} bytes for each value, and nothing states the dtype"


def _parse_dtype(value: Any) -> int | None:
    """Return the dtype that a text names, such as ``torch.bfloat16``, ``DataType.BF16`` or ``Float16``; None for all else."""
    name = _DTYPES.get(value.rpartition(".")[2].lower()) if isinstance(value, str) else None
    return None if name is None else CODE_BY_NAME[name]


def _parse_dim(value: Any) -> int | None:
    if isinstance(value, float):  # 1e400 is infinity in JSON as Python reads it, and is_integer says no
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _count_words(strategy: Any) -> int | None:
    """Return the score words of a strategy: one, two of a compound one, None where both are possible."""
    if isinstance(strategy, (list, tuple)):
        return _count_words(strategy[0]) if len(strategy) == 1 else len(strategy) or None
    text = str(strategy).lower()
    names = {part.rpartition(".")[2].strip(" '\"") for part in text.strip("()[]{}").split(",")}
    if any("lrulfu" in name.replace("_", "") for name in names) or {"timestamp", "lfu"} <= names:
        return 2
    return 1 if len(names) == 1 and names <= _ONE_WORD else None
