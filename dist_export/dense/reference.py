"""The reference: what the caller's own model gives for a batch, with the checkpoint's own rows and dense parameters.

One ``model(batch)`` runs on all ranks, in eval mode and without gradients, with hooks on the caller's own arches. What the dense
arch returns there is what the written program must return. Nothing that is exported takes part in it: no copy, no cut,
no cast.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dist_export.dense.behind_arch import changes_scores
from dist_export.dense.eager import uncompiled
from dist_export.dense.modes import eval_mode, ready_to_load
from dist_export.dense.own_parameters import buffers_put_back, put_values, resharded, state_put_back
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample import SAMPLE, copy_containers
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.table_feed import checkpoint_rows
from dist_export.errors import DistExportError, ModelError
from dist_export.model.unwrap import copy_lazy, is_lazy, unwrap
from dist_export.model.user_errors import blame, said
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.runtime.ranks import Ranks

MODEL = "model"
ARCHES = "arches"

_PATIENCE_SECS = 20.0
"""A rank whose model fails alone waits so long for others that read no file: they may be in a collective that it has left."""

_BEAT_SECS = 0.25


@dataclass(frozen=True, slots=True)
class Reference:
    """What one batch gave on this rank. Tensors are copies, made before anything could change them."""

    kind: str
    """``model``: recorded during ``model(batch)``; ``arches``: of ``dense_arch(sparse_arch(batch))``. Equal on all ranks."""
    reason: str
    """Why it is not ``model``."""
    blocks: Mapping[str, Any]
    """What the sparse arch returned: names in its own order, (rows, ...) each."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    """What the dense arch was called with, before any hook of the caller's."""
    output: Any
    """What it returned, after any hook of the caller's."""
    precision: torch.dtype | None
    """The dtype that autocast or FSDP computed in; None for that of the tensors."""
    rows: SampleRows
    """What this rank's tables looked up."""
    has_more_behind: bool = False
    """Whether the model gave other scores than its dense arch returned."""


class ReferenceRunner:
    """Runs the unmodified model. All ranks call its methods, in the same order."""

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        sparse_arch: nn.Module,
        dense_arch: nn.Module,
        *,
        sparse_model_name: str,
        dense_model_name: str,
    ) -> None:
        """``sparse_arch`` and ``dense_arch`` are the caller's own, within ``model``, wrappers included."""
        self._ranks = ranks
        self._model = model
        self._sparse_arch = sparse_arch
        self._dense_arch = dense_arch
        self._sparse_model_name = sparse_model_name
        self._dense_model_name = dense_model_name
        self.kind = MODEL
        """How the next batch is run. Once ``model(batch)`` failed, all that follow are of the arches."""
        self.reason = ""
        self._turn = 0

    @contextlib.contextmanager
    def dense_values(self, load: Callable[[], Mapping[str, Any]] | None) -> Iterator[None]:
        """Within this block, the caller's dense arch has the checkpoint's values; None leaves it as it is. All ranks.

        ``load`` is called on every rank. Parameters, buffers and extra state are put back afterwards.
        """
        ranks = self._ranks
        own = self._dense_arch
        lazy = [tensor for tensor in (*own.parameters(), *own.buffers()) if is_lazy(tensor)]
        if lazy:  # a run would fix its shapes for good: a copy runs in its place
            self._dense_arch = copy.deepcopy(own, {id(tensor): copy_lazy(tensor) for tensor in lazy})
            self._fall_back("the dense arch has parameters without a shape (lazy modules, until the model is called)")
        try:
            with state_put_back(self._dense_arch), ready_to_load(self._dense_arch):
                if load is not None:
                    state = ranks.check("read the dense parameters for the reference", load)
                    ranks.run(
                        "put the checkpoint's values into the dense arch",
                        lambda: put_values(self._dense_arch, state, dense_model_name=self._dense_model_name),
                        may_block=True,
                    )
                yield
        finally:
            self._dense_arch = own

    def run(self, data: Any, finder: RowFinder | None) -> Reference:
        """Run one batch. All ranks at once: the model may be collective.

        Args:
            data: the batch; it is copied.
            finder: gives the rows, as ``RowFinder.unmodified()``; None takes the model's own.

        Raises:
            ModelError: the arches fail on the batch; or the model fails on this rank alone, and the others wait for it in a
                collective of the model's.
        """
        if self.kind == MODEL and not _has_forward(unwrap(self._model)):
            self._fall_back("the model has no forward")
        if self.kind == MODEL:
            found, reasons = self._try(lambda: self._run_model(data, finder))
            told = [reason for reason in reasons if reason]
            if not told:
                assert found is not None
                return found
            self._fall_back(told[0])
        return self._ranks.run(
            "run the arches for the reference", lambda: self._run_arches(data, finder), may_block=True
        )

    def run_further(self, data: Any, finder: RowFinder | None) -> tuple[Reference | None, list[str]]:
        """Run a batch after the first, as the first was run. All ranks at once.

        Returns what it gave on this rank, and of each rank why it gave nothing there (empty where it did): what fails on
        a further batch is no reason to refuse the model, and other figures than those of the first's kind say nothing.

        Raises:
            ModelError: the model fails on this rank alone, and the others wait for it in a collective of the model's.
        """

        def attempt() -> Reference | str:
            try:
                if self.kind == MODEL:
                    return self._run_model(data, finder)
                return self._run_arches(data, finder, what="it")
            except ModelError as error:
                return str(error)

        return self._try(attempt)

    def _fall_back(self, reason: str) -> None:
        self.kind, self.reason = ARCHES, reason

    def _run_model(self, data: Any, finder: RowFinder | None) -> Reference | str:
        """Return what this rank recorded, or why it is no reference."""
        recorder = _Recorder(self._sparse_arch, self._dense_arch)
        with self._prepared(self._model, finder) as counts, recorder:
            try:
                output = self._model(copy_containers(data))
            except DistExportError:
                raise
            except Exception as error:  # noqa: BLE001 -- whatever it is, the arches may run all the same
                return f"model(batch) fails: {said(error)}{blame(error)}"
        complaint = recorder.complaint()
        if complaint:
            return complaint
        found = recorder.reference(MODEL, "", counts)
        return replace(found, has_more_behind=changes_scores(output, found.output, data))

    def _try(self, attempt: Callable[[], Reference | str]) -> tuple[Reference | None, list[str]]:
        """Return what this rank recorded, and of each rank why it is no reference (empty where it is one)."""
        kept: list[Reference] = []

        def run() -> str:
            found = attempt()
            if isinstance(found, str):
                return found
            kept.append(found)
            return ""

        self._turn += 1
        step = f"reference/{self._turn}"
        reasons = self._ranks.all_gather(
            "run the model for the reference", lambda: run_with_others(self._ranks, step, run), may_block=True
        )
        return (kept[0] if kept else None), reasons

    def _run_arches(self, data: Any, finder: RowFinder | None, what: str = SAMPLE) -> Reference:
        recorder = _Recorder(self._sparse_arch, self._dense_arch)
        with self._prepared(self._model, finder) as counts, eval_mode(self._dense_arch), recorder:
            try:
                output = self._sparse_arch(copy_containers(data))
            except DistExportError:
                raise
            except Exception as error:
                raise ModelError(f"the sparse arch fails on {what}: {said(error)}{blame(error)}") from error
            try:
                self._dense_arch(blocks_of(output))
            except Exception as error:
                raise ModelError(f"the dense arch fails on {what}: {said(error)}{blame(error)}") from error
        return recorder.reference(ARCHES, self.reason, counts)

    @contextlib.contextmanager
    def _prepared(self, module: nn.Module, finder: RowFinder | None) -> Iterator[SampleRows]:
        """Set what holds while the reference runs, and put everything back."""
        counts = SampleRows()
        rows = (
            contextlib.nullcontext()
            if finder is None
            else checkpoint_rows(
                self._sparse_arch, sparse_model_name=self._sparse_model_name, finder=finder, counts=counts
            )
        )
        with resharded(module), buffers_put_back(module), eval_mode(module), torch.no_grad(), uncompiled(), rows:
            yield counts


class _Recorder:
    """Hooks on both arches that keep what goes through them. A context manager."""

    def __init__(self, sparse_arch: nn.Module, dense_arch: nn.Module) -> None:
        self._arches = sparse_arch, dense_arch
        self._handles: list[Any] = []
        self._blocks: list[Any] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._outputs: list[Any] = []
        self._precision: torch.dtype | None = None

    def __enter__(self) -> _Recorder:
        sparse_arch, dense_arch = self._arches
        # a scripted module refuses the bound methods, and calls the hooks all the same
        before, after = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
        self._handles = [
            after(sparse_arch, self._after_sparse),
            # before the caller's own hooks on what goes in, and behind those on what comes out: the program has them too
            before(dense_arch, self._before_dense, prepend=True, with_kwargs=True),
            after(dense_arch, self._after_dense),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def complaint(self) -> str:
        """Return why this is no reference, empty where it is one."""
        counts = {"sparse arch": len(self._blocks), "dense arch": len(self._outputs)}
        wrong = [f"the {arch} {_TIMES.get(n, f'{n} times')}" for arch, n in counts.items() if n != 1]
        return f"model(batch) calls {' and '.join(wrong)}" if wrong else ""

    def reference(self, kind: str, reason: str, rows: SampleRows) -> Reference:
        """Return what was recorded."""
        args, kwargs = self._calls[-1]
        blocks = blocks_of(self._blocks[-1])
        return Reference(kind, reason, blocks, args, kwargs, self._outputs[-1], self._precision, rows)

    def _after_sparse(self, _: nn.Module, __: Any, output: Any) -> None:
        self._blocks.append(copy_nested(output))

    def _before_dense(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append((tuple(copy_nested(arg) for arg in args), copy_nested(kwargs)))
        self._precision = lowest_precision(module)

    def _after_dense(self, _: nn.Module, __: Any, output: Any) -> None:
        self._outputs.append(copy_nested(output))


def _has_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


_TIMES = {0: "not at all", 2: "twice"}


def blocks_of(output: Any) -> Any:
    """Return what the dense arch takes of what the sparse arch returned: the first item of a tuple or list, or all."""
    return output[0] if isinstance(output, (tuple, list)) and len(output) else output


def copy_nested(value: Any) -> Any:
    """Return a copy of tensors within mappings, lists and tuples, whose order and kinds stay; other objects are shared."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_nested(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copy_nested(item) for item in value))
    if isinstance(value, (tuple, list)):
        return [copy_nested(item) for item in value] if isinstance(value, list) else tuple(map(copy_nested, value))
    return value


def lowest_precision(dense_arch: nn.Module) -> torch.dtype | None:
    """Return the dtype below float32 that autocast or FSDP's mixed precision computes the dense arch in, None for none."""
    found = []
    tensor = next(iter(dense_arch.parameters()), None)
    kind = "cpu" if tensor is None else tensor.device.type
    if torch.is_autocast_enabled(kind):
        found.append(torch.get_autocast_dtype(kind))
    for module in dense_arch.modules():
        policy = getattr(module, "mixed_precision", None)
        state = getattr(module, "_get_fsdp_state", None)
        if policy is None and callable(state):
            policy = getattr(state(), "_mp_policy", None)
        dtype = getattr(policy, "param_dtype", None)
        if isinstance(dtype, torch.dtype):
            found.append(dtype)
    low = [dtype for dtype in found if dtype.is_floating_point and torch.finfo(dtype).eps > _EPS]
    return max(low, key=lambda dtype: torch.finfo(dtype).eps, default=None)


_EPS = torch.finfo(torch.float32).eps


def run_with_others(ranks: Ranks, step: str, run: Callable[[], str]) -> str:
    """Return why ``run`` failed on this rank, empty where it did not, after the others have come as far. All ranks.

    ``step`` names this run alone within the export.

    Raises:
        ModelError: it gave none here, and others do not come: they may wait for this rank in a collective of the model.
    """
    if ranks.world_size == 1:
        return run()
    with _telling_of_reads(ranks, f"{step}/reads"):
        reason = run()
    arrived = ranks.shared.add(f"{step}/arrived", 1)
    seen, since = -1, time.monotonic()
    while reason and arrived < ranks.world_size:
        reads = ranks.shared.add(f"{step}/reads", 0)
        if reads != seen:  # ranks that look for rows are no ranks that wait
            seen, since = reads, time.monotonic()
            ranks.shared.add(f"{step}/heard", 1)  # so that the watchdog sees that this one does not hang
        if time.monotonic() - since > _PATIENCE_SECS:
            raise ModelError(
                f"{reason}. Of {ranks.world_size:,} ranks {arrived:,} have come this far, this one included; the others have "
                f"read no file for {_PATIENCE_SECS:g} s. Either they still compute, or they wait for this rank in a collective "
                "of the model's forward. The model must fail on every rank or on none"
            )
        time.sleep(0.02)
        arrived = ranks.shared.add(f"{step}/arrived", 0)
    return reason


@contextlib.contextmanager
def _telling_of_reads(ranks: Ranks, counter: str) -> Iterator[None]:
    """Within this block, let the other ranks see that this one reads files."""
    is_over = threading.Event()

    def tell() -> None:
        seen = ACTIVITY.done
        while not is_over.wait(_BEAT_SECS):
            if ACTIVITY.done != seen:
                seen = ACTIVITY.done
                ranks.shared.add(counter, 1)

    thread = threading.Thread(target=tell, name="reference-reads", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
