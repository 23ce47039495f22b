"""One batch of the dataset through the sparse arch: the dense arch's inputs, with the checkpoint's own rows."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import keyword
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.blocks import Blocks, read_blocks
from dist_export.dense.eager import uncompiled
from dist_export.dense.model_head import ModelHead
from dist_export.dense.modes import eval_mode
from dist_export.dense.own_parameters import buffers_put_back, resharded
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.table_feed import checkpoint_rows
from dist_export.errors import DistExportError, ModelError
from dist_export.model.user_errors import blame, said

SAMPLE_ROWS = 128

SAMPLE = "the sample batch"

_TAKEN = frozenset({"self", "mod", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"})
"""Names that the code of an exported program, and torch's call of it, use; an input of that name would hide them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What the dataset gave. ``data`` may be None where it says so itself; ``is_there`` tells that apart from the end."""

    data: Any
    is_there: bool


class Batches:
    """The batches of a dataset, one after the other. Every rank for itself."""

    def __init__(self, dataset: Any) -> None:
        try:
            self._iterator = iter(dataset)
        except TypeError:
            raise ModelError(f"dataset is a {type(dataset).__name__}, which cannot be iterated over") from None

    def take(self) -> Batch:
        """Take the next batch.

        A 2-tuple that begins with a bool, an int or a one-element tensor is RecIS's ``(stop_flag, data)``; a set flag means
        that there is no data. The batch is a copy: a loader may fill one buffer again and again.
        """
        batch = _next_batch(self._iterator)
        return dataclasses.replace(batch, data=copy_containers(batch.data))


def _next_batch(iterator: Iterator[Any]) -> Batch:
    try:
        item = next(iterator)
    except StopIteration:
        return Batch(None, is_there=False)
    if isinstance(item, tuple) and len(item) == 2:
        flag, data = item
        is_flag = isinstance(flag, (bool, int)) or (isinstance(flag, torch.Tensor) and flag.numel() == 1)
        if is_flag:
            return Batch(data, is_there=not bool(flag))
    return Batch(item, is_there=True)


def run_sparse_arch(
    sparse_arch: nn.Module,
    data: Any,
    *,
    sparse_model_name: str,
    finder: RowFinder | None,
    what: str = SAMPLE,
    head: ModelHead | None = None,
) -> tuple[Blocks, SampleRows]:
    """Put one batch through the sparse arch and return what the dense arch gets. All ranks at once: it may be collective.

    Runs in eval mode, without gradients, with the checkpoint's rows (``finder`` None: with the model's own). Mode, buffers
    and rows are put back afterwards. ``what`` names the batch in messages. With ``head``, the model runs up to its dense arch,
    and calls the sparse arch itself.

    Raises:
        ModelError: it returns anything but a mapping of blocks, or a tuple that begins with one.
    """
    counts = SampleRows()
    # a sparse arch may empty the dict that it is given or write into its tensors; the batch is needed once more, and the
    # dataset may yield that very dict again
    data = copy_containers(data)
    rows = (
        contextlib.nullcontext()
        if finder is None
        else checkpoint_rows(sparse_arch, sparse_model_name=sparse_model_name, finder=finder, counts=counts)
    )
    root = sparse_arch if head is None else head.model
    with resharded(root), buffers_put_back(root), eval_mode(root), torch.no_grad(), uncompiled(), rows:
        try:
            output = sparse_arch(data) if head is None else head.run(data).blocks
        except ModelError as error:
            if not (cause := _say_pair(data)):
                raise
            raise ModelError(f"{error}{cause}") from error
        except DistExportError:
            raise
        except Exception as error:
            cause = _say_pair(data)
            kind = "sparse arch" if head is None else "model"
            raise ModelError(f"the {kind} fails on {what}: {said(error)}{blame(error)}{cause}") from error
    return _dense_inputs(output), counts


def _say_pair(data: Any) -> str:
    """Return what may be wrong with a batch that is a pair, to be put behind an error; nothing for another batch."""
    if type(data) not in (tuple, list) or len(data) < 2:
        return ""
    return (
        f". The batch is {_kind(data)}, and the export calls sparse_arch(batch) with all of it. If it is (features, labels), of "
        "which forward takes the features, let the dataset yield the features alone, or let the sparse arch take the pair"
    )


def check_input_names(inputs: Mapping[str, torch.Tensor]) -> None:
    """Refuse names that cannot be keyword arguments of the traced program, all in one ModelError."""
    bad = [name for name in inputs if not is_argument_name(name)]
    if bad:
        raise ModelError(
            f"the sparse arch gives inputs named {', '.join(map(repr, bad))}; an input is a keyword argument of the traced "
            "program, so its name must be a Python identifier, in its usual spelling (Unicode NFKC), and neither a keyword nor "
            f"self nor a name that torch's generated code takes for itself ({', '.join(sorted(_TAKEN - {'self'}))}). "
            "Rename these blocks"
        )


def is_argument_name(name: object) -> bool:
    """Whether ``name`` can be a keyword argument of the program and of its generated code."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name in _TAKEN:
        return False
    return unicodedata.normalize("NFKC", name) == name  # Python reads another spelling as this one


def cut_sample(blocks: Blocks, *, device: torch.device, max_batch_size: int) -> Blocks:
    """Return the blocks with their tensors cut to 128 rows at most and repeated to 2 where there is 1, on ``device``.

    torch.export takes a batch of 1 for a constant. ModelError where the first dimensions differ or are 0.
    """
    inputs = blocks.tensors
    sizes = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in inputs.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        told = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(inputs.items()))
        raise ModelError(f"the first dimension of every dense input is the batch, so all must be equal; found {told}")
    num_rows = next(iter(sizes.values()))
    if not num_rows:
        raise ModelError("the sample batch has no rows; let the dataset yield at least one")
    cut = {}
    for name, tensor in inputs.items():
        rows = tensor.detach()[: min(SAMPLE_ROWS, max_batch_size)]
        if num_rows == 1:
            rows = torch.cat([rows, rows])
        cut[name] = rows.to(device).contiguous().clone()
    return blocks.with_tensors(cut)


def copy_containers(data: Any) -> Any:
    """Copy dicts, lists, tuples, tensors, arrays and batch objects, all the way down; other objects are shared.

    A batch object is a dataclass, or has a method ``to``, by which trainers move a batch to a device (a
    ``KeyedJaggedTensor`` has one). Modules and classes are none.
    """
    return _copy(data, {})


def _copy(data: Any, copies: dict[int, Any]) -> Any:
    """Copy ``data``. ``copies`` has the copies of batch objects by ``id()``, because objects may refer to each other."""
    if isinstance(data, dict):
        copied = copy.copy(data)
        for key, value in data.items():
            copied[key] = _copy(value, copies)
        return copied
    if type(data) in (list, tuple):
        return type(data)(_copy(item, copies) for item in data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)._make(_copy(item, copies) for item in data)  # type: ignore[attr-defined]
    if isinstance(data, torch.Tensor):
        return data.detach().clone()
    if isinstance(data, np.ndarray):
        return data.copy()
    return _copy_object(data, copies) if _is_batch_object(data) else data


def _is_batch_object(data: Any) -> bool:
    if isinstance(data, (type, nn.Module)):
        return False
    return dataclasses.is_dataclass(data) or callable(getattr(type(data), "to", None))


def _copy_object(data: Any, copies: dict[int, Any]) -> Any:
    if id(data) in copies:
        return copies[id(data)]
    try:
        copied = copies[id(data)] = copy.copy(data)
    except TypeError:
        return data  # an object of a C++ extension that cannot be copied
    for name in [*getattr(data, "__dict__", ()), *_slots_of(type(data))]:
        if hasattr(data, name):
            # past the __setattr__ of a frozen dataclass
            object.__setattr__(copied, name, _copy(getattr(data, name), copies))
    return copied


def _slots_of(kind: type) -> list[str]:
    slots = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for its in slots for name in ([its] if isinstance(its, str) else its)]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _dense_inputs(output: Any) -> Blocks:
    first = output[0] if isinstance(output, (tuple, list)) and len(output) else output
    if isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(item, Mapping) for item in first):
        raise ModelError(
            "the sparse arch returns two dicts, which is what split_seq=True gives (sequence blocks apart); the serving "
            "side takes one dict of blocks. Build the sparse arch with split_seq=False"
        )
    if not isinstance(first, Mapping) or not first:
        raise ModelError(
            f"the sparse arch returns {_kind(output)}; expected a dict of block name -> tensor, or a tuple whose first item "
            "is that dict"
        )
    return read_blocks(first)


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
