"""Compare what the serving contract gives with what the model gives, for the sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from dist_export.archive.output_diff import find_far
from dist_export.config.needs import Tolerance
from dist_export.dense.eager import DenseSample
from dist_export.dense.rounding import Rounding, compare_scores
from dist_export.errors import ParityError
from dist_export.formats.serving_entries import DenseInputEntry, ServingEntry

_ATOL, _RTOL = 1e-5, 1e-4
"""At least; numpy adds the rows of a list in another order than torch."""
_NO_PACKAGE = "No manifest was written, so there is no package"


def to_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the tensors of a batch as numpy has them; bfloat16 becomes float32."""
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
        for name, tensor in tensors.items()
    }


def compare_blocks(entry: DenseInputEntry, serving: ServingEntry, computed: np.ndarray, own: torch.Tensor) -> None:
    """Compare one dense input that the contract gives with the model's. ParityError, which names what differs."""
    found = torch.from_numpy(np.ascontiguousarray(computed)).to(own.dtype)
    if found.shape != own.shape:
        raise ParityError(
            f"the serving contract gives dense input {entry.name!r} with shape {list(found.shape)}, the model "
            f"{list(own.shape)}{_name_source(entry, serving, 0)}. {_NO_PACKAGE}"
        )
    wrong = find_far(found, own)
    if wrong is None:
        return
    column = wrong[-1] if own.dim() > 1 else 0
    raise ParityError(
        f"the serving contract gives dense input {entry.name!r} otherwise than the model: in example {wrong[0]}, column "
        f"{column} is {found[wrong].item():.6g}, the model has {own[wrong].item():.6g}"
        f"{_name_source(entry, serving, column)}. {_NO_PACKAGE}; mend the source that is wrong, or set serving: off"
    )


def compare_outputs(
    sample: DenseSample, expected: Any, found: Any, given: Mapping[str, torch.Tensor], *, config: Tolerance
) -> dict[str, float]:
    """Compare the outputs of the dense program on the contract's inputs with those on the model's.

    Returns the largest difference by output. ParityError, if one is too large.
    """
    pairs = [[value] if isinstance(value, torch.Tensor) else list(value) for value in (expected, found)]
    device = next(iter(sample.inputs.values())).device
    rounding = Rounding(sample, {name: tensor.to(device) for name, tensor in given.items()})
    max_abs = {}
    for place, (name, own, its) in enumerate(zip(sample.output_names, *pairs, strict=True)):
        worst = compare_scores(
            own.cpu(), its.cpu(), place, rounding, atol=max(config.atol, _ATOL), rtol=max(config.rtol, _RTOL)
        )
        if not worst.is_close:
            raise ParityError(
                f"output {name!r} differs by up to {worst.max_abs:.3g} from the model's where the serving contract gives the "
                f"dense inputs. {_NO_PACKAGE}"
            )
        max_abs[name] = worst.max_abs
    return max_abs


def _name_source(entry: DenseInputEntry, serving: ServingEntry, column: int) -> str:
    """Return where a column of a dense input comes from, and who says so."""
    its = next((one for one in entry.columns if one.begin <= column < one.end), None)
    if its is None:
        return ""
    if its.feature is msgspec.UNSET:
        return f" (tensor {its.tensor!r})"
    feature = next(one for one in serving.features if one.name == its.feature)
    stated = ", ".join(f"{field} by {source}" for field, source in sorted(feature.stated_by.items()))
    return f" (feature {feature.name!r}: table {feature.table!r}, pooling {feature.pooling}; stated: {stated})"
