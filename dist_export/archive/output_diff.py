"""Measure the difference of two output tensors: absolute, relative, and in units in the last place."""

from __future__ import annotations

from typing import NamedTuple

import torch

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""Integers of the same width, which have the same order as the floats."""


class Difference(NamedTuple):
    """The largest differences over all elements. NaN equals NaN, an infinity equals itself, +0 equals -0."""

    max_abs: float
    max_rel: float
    """For values below ``atol``, relative to ``atol``, because such values count as zero."""
    max_ulp: int
    """The number of floats between the two, plus one. For NaN against a number: the number of floats of the dtype."""
    row: int
    """The index in the first dimension with the largest absolute difference."""
    is_close: bool
    """``|found - expected| <= atol + rtol * max(|expected|, usual size)`` everywhere; integers and bools must be equal."""


def compare(
    expected: torch.Tensor,
    found: torch.Tensor,
    *,
    atol: float,
    rtol: float,
    like: torch.Tensor | None = None,
    rounding: torch.Tensor | None = None,
) -> Difference:
    """Compare two tensors of one shape and dtype.

    The usual size of a value is the median of the magnitudes in its column, over the first dimension. A value near zero may be
    a small difference of large terms, with the rounding of those terms. A few huge values do not change a median.

    Args:
        like: (rows, ...) the same output for more rows, to compute usual sizes; None takes ``expected``.
        rounding: (...) the observed effect of rounding on values, by column; it is added to the tolerance.
    """
    expected, found = expected.detach().cpu(), found.detach().cpu()
    if not expected.numel():
        return Difference(0.0, 0.0, 0, 0, is_close=True)
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
        like = None if like is None else torch.view_as_real(like)
    wide, other = expected.to(torch.float64), found.to(torch.float64)
    if not expected.is_floating_point():
        apart = (wide - other).abs()
        largest = float(apart.max())
        return Difference(largest, largest, int(largest), _row_of(apart), is_close=bool(torch.equal(expected, found)))
    is_same = (wide == other) | (wide.isnan() & other.isnan())
    apart = torch.where(is_same, torch.zeros_like(wide), (other - wide).abs())
    relative = apart / wide.abs().clamp_min(atol or torch.finfo(torch.float64).tiny)
    relative = torch.where(is_same, torch.zeros_like(wide), relative)
    allowed = atol + rtol * torch.maximum(wide.abs(), usual_sizes(like, expected))
    if rounding is not None and expected.dim() and rounding.shape == expected.shape[1:]:
        allowed = allowed + rounding.cpu()
    return Difference(
        float(apart.max()),
        float(relative.max()),
        _max_ulp(expected, found, is_same),
        _row_of(apart),
        is_close=bool((is_same | (apart.isfinite() & (apart <= allowed))).all()),
    )


def has_same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same dtype (any), shape and values. NaN equals NaN, +0 equals -0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = _comparable(one), _comparable(other)
    return bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124 -- NaN is itself


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in a dtype that torch can compare: for newer dtypes it has little more than casts."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        return torch.view_as_real(
            tensor.to(torch.complex64) if tensor.dtype == torch.complex32 else tensor.resolve_conj()
        )
    if tensor.is_floating_point() and tensor.dtype not in _BITS:
        return tensor.to(torch.float32)
    return tensor.view(_SIGNED[tensor.dtype]) if tensor.dtype in _SIGNED and tensor.dim() else tensor


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def usual_sizes(like: torch.Tensor | None, expected: torch.Tensor) -> torch.Tensor:
    """Return the median magnitude of each column (..., float64), of ``like`` if its columns are those of ``expected``.

    Columns run over the first dimension. Values that are not finite are ignored; a column without finite values has size 0.
    """
    is_like = like is not None and like.dim() and like.shape[1:] == expected.shape[1:] and like.shape[0]
    values = (like if is_like and like is not None else expected).detach().cpu().to(torch.float64).abs()
    if not values.dim():
        return values.nan_to_num(0, 0, 0)
    return values.where(values.isfinite(), torch.nan).nanmedian(dim=0).values.nan_to_num(0, 0, 0)


def find_far(found: torch.Tensor, own: torch.Tensor) -> tuple[int, ...] | None:
    """Return where a dense input is not what the model gives, apart from the order of sums; None if it is that everywhere.

    ``found`` and ``own`` have one shape and dtype. Values may be apart by a share of their own size and of the usual size in
    their column: 1e-4, or 2e-2 for float16 and bfloat16.
    """
    if own.is_floating_point():
        share = 2e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
        allowed = share * (own.double().abs() + usual_sizes(None, own)) + 1e-7
        is_near = (found.double() - own.double()).abs() <= allowed
        is_near |= (found == own) | (found.isnan() & own.isnan())
    else:
        is_near = found == own
    far = torch.nonzero(~is_near)
    return tuple(far[0].tolist()) if len(far) else None


_TIMES = 4
"""How many times the measured rounding two programs may be apart: each has its own, and the sample does not show the largest."""

_MOST = 1e-3
"""The most that a measurement adds, of an output's usual size: a network that rounding moves further is refused."""

_ROUNDINGS = 8
"""Where an output's dtype is so narrow that this many roundings are more than that, this many."""


def measure_rounding(exact: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """Return what rounding allows each column of an output: the largest difference, some times, and at most a share of its size.

    Args:
        exact: the output (rows, ...) as it was computed in float64.
        value: as it was computed in the network's own dtypes.

    Returns (...) float64; None where the output has no columns of floats.
    """
    if not (value.is_floating_point() and value.dim() and exact.shape == value.shape and value.numel()):
        return None
    apart = (exact.double() - value.double()).abs().cpu().nan_to_num(0, 0, 0).amax(dim=0)
    return torch.minimum(_TIMES * apart, largest_rounding(value.dtype) * usual_sizes(None, value))


def largest_rounding(dtype: torch.dtype) -> float:
    """Return the share of an output's usual size that :func:`measure_rounding` allows at most."""
    return max(_MOST, _ROUNDINGS * torch.finfo(dtype).eps)


def describe_allowed(atol: float, rtol: float) -> str:
    """Return the tolerance in words, for an error."""
    return f"atol {atol:g} + rtol {rtol:g} * (|value| or the output's usual size)"


def _max_ulp(expected: torch.Tensor, found: torch.Tensor, is_same: torch.Tensor) -> int:
    bits = _BITS.get(expected.dtype)
    if bits is None:  # the 8-bit floats, which outputs do not have so far
        return 0
    is_nan = expected.isnan() != found.isnan()
    if bool(is_nan.any()):
        return 1 << (8 * expected.element_size())
    positions = [_place(tensor.contiguous().view(bits).to(torch.int64), bits) for tensor in (expected, found)]
    # two float64 of different signs can be more than 2**63 apart, so the upper and lower halves are subtracted separately
    high = (positions[0] >> 32) - (positions[1] >> 32)
    low = (positions[0] & 0xFFFFFFFF) - (positions[1] & 0xFFFFFFFF)
    far = torch.where(is_same, torch.zeros_like(high), high).abs()
    candidates = (far >= far.max() - 1) & ~is_same  # a difference of the lower halves is less than one of the upper
    pairs = zip(high[candidates].tolist(), low[candidates].tolist(), strict=True)
    return max((abs((one << 32) + other) for one, other in pairs), default=0)


def _place(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Map the bits of floats to integers in the same order: both zeros to 0, negative floats below 0."""
    return torch.where(bits < 0, torch.iinfo(dtype).min - bits, bits)


def _row_of(apart: torch.Tensor) -> int:
    rows = apart.reshape(apart.shape[0], -1) if apart.dim() else apart.reshape(1, 1)
    worst = torch.nan_to_num(rows, nan=float("inf")).amax(dim=1)
    return int(worst.argmax())
