"""Select the slots and dense tensors to keep, by name. Pure.

Source of the optimizer names: RecIS's sparse optimizers (SparseAdam, SparseAdamW, SparseAdamWTF, SparseAdagrad,
SparseAdagradSum, SparseRowWiseAdagrad, SparseRowWiseAdagradSum). A ``step_filter`` slot is not optimizer state, because
the eviction of old rows still reads it.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dist_export.checkpoint.metadata import Checkpoint, DenseTensor, SlotMeta
from dist_export.config.mistakes import Mistakes
from dist_export.errors import PlanError
from dist_export.formats.recis import EMBEDDING_SLOT, FILTER_STEP, ID_SLOT
from dist_export.plan.table_view import refuse_brackets

OPTIMIZER_SLOTS = frozenset(
    {
        "sparse_adam_exp_avg",
        "sparse_adam_exp_avg_sq",
        "sparse_adamw_exp_avg",
        "sparse_adamw_exp_avg_sq",
        "sparse_adamw_tf_exp_avg",
        "sparse_adamw_tf_exp_avg_sq",
        "sparse_adagrad_state_sum",
        "sparse_row_wise_adagrad_state_sum",
        "sparse_row_wise_adagrad_sum_state_sum",
    }
)
OPTIMIZER_DENSE = frozenset(
    {f"sparse_{name}_{what}" for name in ("adam", "adamw", "adamw_tf") for what in ("beta1", "beta2", "step")}
    | {"sparse_adagrad_step", "sparse_row_wise_adagrad_step", "sparse_row_wise_adagrad_sum_step"}
)
_BY_TABLE = "sparse_row_wise_adagrad_"
"""The dense names of RowWiseAdagrad and RowWiseAdagradSum begin with this."""

BY_OPTIMIZER = "optimizer"
BY_PATTERN = "drop_slots"
BY_TRAINER = "trainer_state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The outcome of :func:`select`."""

    kept: tuple[tuple[SlotMeta, ...], ...]
    """For each table of the checkpoint, the slots that are kept, as they are written: id, embedding, then the others in
    source order. A row-indexed table has no id."""
    dropped: tuple[tuple[tuple[SlotMeta, str], ...], ...]
    """For each table, the slots that are dropped, each with the reason: ``optimizer`` or ``drop_slots``."""
    kept_dense: tuple[DenseTensor, ...]
    dropped_dense: tuple[tuple[DenseTensor, str], ...]


def select_all(checkpoint: Checkpoint) -> Selection:
    """Return a selection that keeps everything, for a copy without a filter."""
    return Selection(
        kept=tuple(table.slots[0 if table.is_hashed else 1 :] for table in checkpoint.tables),
        dropped=tuple(() for _ in checkpoint.tables),
        kept_dense=checkpoint.dense,
        dropped_dense=(),
    )


def select(
    checkpoint: Checkpoint,
    *,
    optimizer_slots: tuple[str, ...] = (),
    drop_slots: tuple[str, ...] = (),
    keep_slots: tuple[str, ...] = (),
) -> Selection:
    """Decide which slots, and which dense tensors among the sparse files, are kept.

    Patterns are shell-style. They match a slot (``step_filter``), a slot of one table (``user_emb.step_filter``) or the
    name of a dense tensor. ``id`` and ``embedding`` are always kept and match no pattern.

    Raises:
        PlanError: a pattern matches nothing, a name is both kept and dropped, or the shape of a kept slot does not match
            the rows of its table.
    """
    patterns = _SlotPatterns(
        checkpoint, {"optimizer_slots": optimizer_slots, "drop_slots": drop_slots, "keep_slots": keep_slots}
    )
    kept: list[tuple[SlotMeta, ...]] = []
    dropped: list[tuple[tuple[SlotMeta, str], ...]] = []
    for number, table in enumerate(checkpoint.tables):
        stays: list[SlotMeta] = []
        goes: list[tuple[SlotMeta, str]] = []
        for slot in table.slots:
            if slot.name in (ID_SLOT, EMBEDDING_SLOT):
                if slot.name == EMBEDDING_SLOT or table.is_hashed:
                    stays.append(slot)
                continue
            names = (slot.name, f"{table.name_in_source}.{slot.name}")
            reason = patterns.reason_to_drop(names, is_known=slot.is_optimizer or slot.name in OPTIMIZER_SLOTS)
            if reason is None and slot.stored_shape is not None:
                rows = int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum())
                raise PlanError(
                    f"{names[-1]!r} has shape {list(slot.stored_shape)}, which does not go with the {rows:,} rows of its "
                    "table: the save lost a part of it, or laid it out by shard. Take it out of keep_slots"
                )
            if reason is None:
                stays.append(slot)
            else:
                goes.append((slot, reason))
        kept.append(tuple(stays))
        dropped.append(tuple(goes))
    dense = [
        (tensor, patterns.reason_to_drop((tensor.name,), is_known=_is_optimizer_dense(tensor.name)))
        for tensor in checkpoint.dense
    ]
    patterns.refuse_unmatched()
    return Selection(
        kept=tuple(kept),
        dropped=tuple(dropped),
        kept_dense=tuple(tensor for tensor, reason in dense if reason is None),
        dropped_dense=tuple((tensor, reason) for tensor, reason in dense if reason is not None),
    )


class _SlotPatterns:
    """The patterns of the settings that choose slots, and which of them have matched nothing yet."""

    def __init__(self, checkpoint: Checkpoint, settings: dict[str, tuple[str, ...]]) -> None:
        self._checkpoint = checkpoint
        self._settings = settings
        self._unmatched = {(setting, pattern) for setting, patterns in settings.items() for pattern in patterns}
        self._unmatched.difference_update(("optimizer_slots", pattern) for pattern in checkpoint.optimizer_patterns)

    def _matches(self, setting: str, names: tuple[str, ...]) -> bool:
        hits = [pattern for pattern in self._settings[setting] if any(fnmatchcase(name, pattern) for name in names)]
        self._unmatched.difference_update((setting, pattern) for pattern in hits)
        return bool(hits)

    def reason_to_drop(self, names: tuple[str, ...], *, is_known: bool) -> str | None:
        """Return why a slot or tensor of these names is dropped; None if it is kept. ``is_known``: as optimizer state."""
        is_optimizer, is_dropped, is_kept = (self._matches(setting, names) for setting in self._settings)
        if is_kept and is_dropped:
            raise PlanError(f"{names[-1]!r} is named both by keep_slots and by drop_slots; take it out of one of them")
        if is_kept:
            return None
        if not is_dropped and is_trainer_state(names[0]):
            return BY_TRAINER
        return BY_PATTERN if is_dropped else BY_OPTIMIZER if is_optimizer or is_known else None

    def refuse_unmatched(self) -> None:
        """Raise PlanError for every pattern that has matched nothing, or is a name with brackets and means others."""
        mistakes, tables = Mistakes(), self._checkpoint.tables
        slots = sorted({slot.name for table in tables for slot in table.slots} - {ID_SLOT, EMBEDDING_SLOT})
        for setting, pattern in sorted(
            (setting, its) for setting, patterns in self._settings.items() for its in patterns
        ):
            if mistake := self._find_brackets(setting, pattern):
                mistakes.add(mistake)
                self._unmatched.discard((setting, pattern))
        for setting, pattern in sorted(self._unmatched):
            mistakes.add(
                PlanError(
                    f"{setting}: the pattern {pattern!r} matches no slot and no dense tensor of the checkpoint; "
                    f"its slots besides id and embedding, which always stay: {', '.join(slots) or 'none'}"
                )
            )
        mistakes.refuse()

    def _find_brackets(self, setting: str, pattern: str) -> PlanError | None:
        if "[" not in pattern:
            return None
        own = {f"{table.name_in_source}.{slot.name}" for table in self._checkpoint.tables for slot in table.slots}
        names = [*own, *(tensor.name for tensor in self._checkpoint.dense)]
        tables = (f"{table.name_in_source}." for table in self._checkpoint.tables)
        for name in (
            *(table for table in tables if pattern.startswith(table)),
            *(its for its in names if its == pattern),
        ):
            if not fnmatchcase(name, name):
                escaped = glob.escape(name) + pattern[len(name) :]
                return refuse_brackets(setting, pattern, sorted(names), what="a slot or tensor", escaped=escaped)
        return None


def is_trainer_state(name: str) -> bool:
    """Return whether a dense tensor of RecIS is a counter that only training reads."""
    return name.endswith(FILTER_STEP)


def _is_optimizer_dense(name: str) -> bool:
    # RowWiseAdagrad saves one step for each table, with the table's name in the middle. The name of a coalesced group is
    # no table on disk, so it is not compared with the tables
    return name in OPTIMIZER_DENSE or (name.startswith(_BY_TABLE) and name.endswith("_step"))
