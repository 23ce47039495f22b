"""Tables of a RecIS checkpoint that are no hash tables: embeddings in the sparse arch whose weights are in ``model.pt``."""

from __future__ import annotations

from collections.abc import Iterable

from dist_export.checkpoint.model_weights import ModelWeights, plain_name
from dist_export.checkpoint.recis.model_pt import describe_dense_state
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.torch_save import TorchReader
from dist_export.formats.recis import DENSE_STATE
from dist_export.humanize import few
from dist_export.storage.directory import Directory

_WEIGHT = ".weight"


def find_state_tables(directory: Directory, weights: ModelWeights, known: Iterable[str]) -> ModelWeights | None:
    """Return what the model says, cut down to the tables that ``model.pt`` holds and no other file; None where there are none.

    Args:
        directory: the checkpoint.
        weights: what the model says.
        known: names of the tables in the sparse files.

    Raises:
        CheckpointError: ``model.pt`` cannot be read.
    """
    if not weights.tables:
        return None
    names = [name for name, _, _ in describe_dense_state(directory) or []]
    paths = {plain_name(name).removesuffix(_WEIGHT) for name in known}
    begin = f"{weights.sparse_name}." if weights.sparse_name else ""
    own = {
        name
        for name in weights.tables
        if paths.isdisjoint({name.removesuffix(_WEIGHT), name.removesuffix(_WEIGHT).removeprefix(begin)})
    }
    cut = weights._replace(tables=frozenset(own))
    return cut if cut.sort(names).exported else None


def open_state(directory: Directory, weights: ModelWeights) -> TorchReader:
    """Open the tables of ``model.pt``; ``weights`` are those of :func:`find_state_tables`."""
    return TorchReader(directory, TensorSettings(weights=weights), names=(DENSE_STATE,))


def note_state_tables(directory: Directory, weights: ModelWeights) -> str:
    """Return what is to be told where the files are copied as they are."""
    return (
        f"{few(sorted(weights.tables))}: the model's sparse arch looks rows up there, and {directory.describe(DENSE_STATE)} "
        "holds them. Copied files are the sparse ones alone, so these rows are in no file of the package, although the sample "
        "has them; filter_sparse_opt: true exports them as tables"
    )
