"""Run the model's own sparse arch on other batches than the sample, and compare the score program with what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dist_export.config.needs import ScoreSettings
from dist_export.dense.blocks import Blocks
from dist_export.dense.model_head import OTHER_CALLS
from dist_export.dense.parity import BATCH_SIZES
from dist_export.dense.reference import run_with_others
from dist_export.dense.stage import DenseStage
from dist_export.errors import ModelError, ParityError
from dist_export.manifest import ScoreParityEntry
from dist_export.model.user_errors import blame, said
from dist_export.runtime.ranks import Ranks
from dist_export.score.compare import ModelFailsError, ScoreFigures
from dist_export.score.inputs import FlatBatch, flatten_batch
from dist_export.score.other_ids import IdTrial, put_ids
from dist_export.score.resize import Resizer
from dist_export.score.table_weight import NotExportableError

_Inputs = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
_Batch = tuple[Any, dict[str, torch.Tensor] | None]
"""A batch as the model takes it, and its flat tensors; None if it cannot be taken apart."""
_List = list[tuple[str, int]]
"""Tensors and dimensions that have one length."""
COPY = "copy"
_LENGTHS: dict[str, Callable[[int, int], int]] = {
    "with longer lists": lambda length, number: 2 * length + 1 + number,
    "with shorter lists": lambda length, _: (length + 1) // 2,
}
"""(length of lists in the sample, number of the list) -> length to try."""
_LEAST_LENGTHS: dict[str, Callable[[int, int], int]] = {
    "with lists of length 1": lambda *_: 1,
    "with lists of length 0": lambda *_: 0,
}
_ID_BATCHES = 4
"""Batches with other ids, if the sample cannot be repeated to more examples."""


class ScoreParity:
    """Knows the sample as flat tensors on every rank. :meth:`look` comes first."""

    def __init__(self, ranks: Ranks, config: ScoreSettings, dense: DenseStage) -> None:
        self._ranks = ranks
        self._config = config
        self._dense = dense
        self._resizer: Resizer | None = None
        self._turn = 0
        self._is_flat = False
        """Whether the batches of all ranks can be taken apart."""
        self._reference = COPY
        self._first_size = 0
        """Examples of rank 0's sample, which are compared first. The same on all ranks: they run as many batches."""
        self.batch: FlatBatch | None = None
        """This rank's sample."""
        self.from_zero = True
        """Whether the program was traced for sizes of 0 and 1 too. If not, it is tried with these. The same on all ranks."""
        self.can_resize = False
        """Whether the batches of all ranks can be cut by example."""

    def look(self) -> str:
        """Take the sample apart. All ranks. Returns why it cannot be given to a program on rank 0."""
        reasons = self._ranks.all_gather("look at the batch", self._flatten)
        if not reasons[0]:
            self._is_flat = not any(reasons)
            self._first_size = self._ranks.broadcast("count the examples", lambda: self._dense.num_rows)
            self.can_resize = all(self._ranks.all_gather("pair the elements of lists", self._pair))
        return reasons[0]

    def _flatten(self) -> str:
        reference = self._dense.reference
        assert reference is not None
        if (count := len(reference.args) + len(reference.kwargs)) != 1:
            return f"{OTHER_CALLS} with {count} arguments, and serving gives one: the blocks"
        head = self._dense.head
        if head is not None and (why := head.cannot_be_traced):
            return why
        try:
            batch = flatten_batch(self._dense.data)
            batch.rebuild(batch.tensors)
        except NotExportableError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 -- a batch may be of any class, and the export goes on without
            return f"the batch cannot be taken apart and put together: {said(error)}{blame(error)}"
        self.batch = batch
        return ""

    def _pair(self) -> bool:
        num_rows = self._dense.num_rows
        if self.batch is None or not num_rows:
            return False
        resizer = Resizer(self.batch, num_rows)
        if not resizer.unknown:
            self._resizer = resizer
        return not resizer.unknown

    def cut(self, num_examples: int) -> dict[str, torch.Tensor]:
        """Return the sample's tensors for so many examples; all of them if it cannot be cut."""
        assert self.batch is not None
        if self._resizer is None:
            return dict(self.batch.tensors)
        return self._resizer.resize(num_examples)

    def count_cut(self, num_examples: int, in_sample: int) -> int:
        """Return how many examples :meth:`cut` gives."""
        return in_sample if self._resizer is None else num_examples

    def first_sizes(self) -> dict[str, str]:
        """Return the first sizes of the sample's tensors in terms of ``batch``, if it can be cut by example."""
        return {} if self._resizer is None else self._resizer.first_sizes()

    def compare_sample(self, figures: ScoreFigures, blocks: Blocks, inputs: _Inputs) -> None:
        """Compare on the whole sample: with the model, or with the copy if settings change its rows. Rank 0. ParityError.

        ``blocks``: what the model's sparse arch gave for the sample, on rows of the written shards.
        """
        reference, limit = self._dense.reference, self._config.max_batch_size
        sample = self._dense.sample
        assert reference is not None
        assert sample is not None
        assert self.batch is not None
        num_rows = self._dense.num_rows
        figures.sizes.append(num_rows)
        is_own = reference.precision is None and not self._dense.changes_rows and num_rows <= limit
        tensors = inputs(self.batch.tensors)
        if not is_own:
            figures.with_blocks(tensors, blocks, "on the sample")
            return
        self._reference = reference.kind
        expected = [value.cpu() for value in sample.flatten(reference.output)]
        found = [value.cpu() for value in figures.run(tensors, "on the sample")]
        figures.compare(expected, found, blocks.tensors, "on the sample")

    def compare_others(
        self,
        figures: ScoreFigures | None,
        run_sparse: Callable[[Any], Blocks],
        inputs: _Inputs,
        find_lists: Callable[[], Sequence[_List]],
        find_ids: Callable[[], Sequence[IdTrial]],
    ) -> str:
        """Compare on the sample cut or repeated to other sizes, with lists of other lengths, and on further batches. All ranks.

        Args:
            figures: takes the figures. None on ranks other than 0.
            run_sparse: runs the model's sparse arch on a batch. All ranks.
            inputs: picks the program's inputs.
            find_lists: returns the free lengths of lists. Rank 0.
            find_ids: returns other ids for inputs, if there is something to be tried with them. Rank 0.

        Returns why the program is not the model; empty if it is.
        """

        def compare(batch: _Batch, where: str) -> tuple[str, bool]:
            return self._compare_one(figures, run_sparse, inputs, batch, where)

        limit = self._config.max_batch_size
        sizes = BATCH_SIZES if self.from_zero else (0, *BATCH_SIZES)
        for size in sizes if self.can_resize else ():
            if size > limit or size == self._first_size:
                continue
            reason, is_compared = compare(self._resized(size), f"at {size} examples")
            if reason:
                return reason
            if is_compared and figures is not None:
                figures.sizes.append(size)
        lists = self._ranks.broadcast("look for padded lists", find_lists) if self._is_flat else ()
        if reason := self._compare_lists(lists, compare):
            return reason
        if reason := self._compare_ids(find_ids, compare):
            return reason
        for place, data in enumerate(self._dense.further_batches, start=2):
            reason, is_compared = compare((data, _tensors_of(data)), f"on batch {place}")
            if reason:
                return reason
            if is_compared and figures is not None:
                figures.num_further += 1
        return ""

    def _compare_lists(self, lists: Sequence[_List], compare: Callable[[_Batch, str], tuple[str, bool]]) -> str:
        """Compare with all lists longer, then shorter; list by list if the model refuses that, or for a length of 0 or 1."""
        lengths = _LENGTHS if self.from_zero else {**_LENGTHS, **_LEAST_LENGTHS}
        for where, new_length in lengths.items() if lists else ():
            reason, is_compared = compare(self._with_lists(lists, new_length), where)
            if reason:
                return reason
            is_each = not is_compared or where in _LEAST_LENGTHS  # code may look at one of them
            for its in lists if len(lists) > 1 and is_each else ():
                reason, _ = compare(self._with_lists([its], new_length), f"{where} in {its[0][0]!r}")
                if reason:
                    return reason
        return ""

    def _compare_ids(
        self, find_ids: Callable[[], Sequence[IdTrial]], compare: Callable[[_Batch, str], tuple[str, bool]]
    ) -> str:
        """Compare with other ids; lot by lot if the model refuses them together."""
        trials = self._ranks.broadcast("look for other ids", find_ids) if self._is_flat else ()
        for where, chosen, parts in trials:
            was_compared = False
            for turn in range(1 if self.can_resize else _ID_BATCHES):
                reason, is_compared = compare(self._with_ids(chosen, turn), where)
                if reason:
                    return reason
                was_compared |= is_compared
            for part in () if was_compared else parts:
                reason, _ = compare(self._with_ids(part, 0), where)
                if reason:
                    return reason
        return ""

    def _with_lists(self, lists: Sequence[_List], new_length: Callable[[int, int], int]) -> _Batch:
        assert self.batch is not None
        tensors = dict(self.batch.tensors)
        for number, its in enumerate(lists):
            for name, dim in its:
                length = tensors[name].shape[dim] if name in tensors else 0
                if length:
                    # lists that may differ in length get different ones
                    chosen = torch.arange(new_length(length, number)) % length
                    tensors[name] = tensors[name].index_select(dim, chosen.to(tensors[name].device))
        return self.batch.rebuild(tensors), tensors

    def _with_ids(self, chosen: Mapping[str, Sequence[int]], turn: int) -> _Batch:
        assert self.batch is not None
        whole = self.cut(min(BATCH_SIZES[-1], self._config.max_batch_size))
        tensors = put_ids(whole, chosen, seed=_ID_BATCHES * self._ranks.rank + turn)
        return self.batch.rebuild(tensors), tensors

    def _resized(self, size: int) -> _Batch:
        assert self.batch is not None
        assert self._resizer is not None
        tensors = self._resizer.resize(size)
        return self.batch.rebuild(tensors), tensors

    def _compare_one(
        self,
        figures: ScoreFigures | None,
        run_sparse: Callable[[Any], Blocks],
        inputs: _Inputs,
        batch: _Batch,
        where: str,
    ) -> tuple[str, bool]:
        """Return why the program differs on one batch, and whether it was compared: the model itself may refuse such a batch."""
        data, tensors = batch
        kept: list[Blocks] = []

        def run() -> str:
            try:
                kept.append(run_sparse(data))
            except (ModelError, ParityError) as error:
                return str(error)
            return ""

        self._turn += 1
        step = f"score/{self._turn}"
        failed = self._ranks.all_gather(
            "run the sparse arch on a cut batch", lambda: run_with_others(self._ranks, step, run), may_block=True
        )
        if told := [
            text for text in failed if OTHER_CALLS in text
        ]:  # then the program, which calls it once, is not the model
            return f"{where} {told[0].split('. No manifest')[0]}", True
        if any(failed):
            return "", False

        def compare() -> tuple[str, bool]:
            assert figures is not None
            if tensors is None:
                return "", False
            try:
                figures.with_blocks(inputs(tensors), kept[0], where)
            except ModelFailsError:
                return "", False
            except ParityError as error:
                return str(error).split(". No manifest")[0], True
            return "", True

        return self._ranks.broadcast("compare the score program", compare)

    def entry(self, figures: ScoreFigures) -> ScoreParityEntry:
        """Return the manifest's entry. Rank 0."""
        return ScoreParityEntry(
            batch_sizes=tuple(figures.sizes),
            further_batches=figures.num_further,
            reference=self._reference,
            max_abs=figures.max_abs,
            max_rel=figures.max_rel,
            max_ulp=figures.max_ulp,
        )


def _tensors_of(data: Any) -> dict[str, torch.Tensor] | None:
    try:
        return flatten_batch(data).tensors
    except NotExportableError:
        return None
