"""Check the dense arch of a package: its files agree, the program gives the stored outputs, and the sample's rows exist."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import msgspec
import numpy as np
import xxhash

from dist_export.errors import DistExportError, PackageError
from dist_export.formats.dtypes import explain_unread
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import (
    BLOCKS,
    DEFAULT_ROWS,
    MANIFEST,
    OUTPUTS,
    SAMPLE_ROWS,
    DenseEntry,
    ParityEntry,
    TensorEntry,
)
from dist_export.package.fx_check import check_fx_folder
from dist_export.package.reader import Package
from dist_export.package.shard_headers import Files
from dist_export.verify.dense_formats import StoredSample, check_formats
from dist_export.verify.dense_signature import check_signature

if TYPE_CHECKING:
    import torch


class _Values(TypedDict):
    """One tensor of the sample, as in inputs_dict.json."""

    dtype: str
    shape: list[int]
    values: Any


class _OutputInfo(TypedDict):
    OutputNodes: list[dict[str, Any]]


class _Blocks(TypedDict):
    input_order: list[str]
    constants: dict[str, str]


class _SampleRow(TypedDict):
    id: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
    row: str | None


_MAX_ATOL, _MAX_RTOL = 1e-6, 1e-5
"""Tolerances for a package whose manifest states no parity."""


def check_dense(
    package: Package, entry: DenseEntry, findings: list[str], checked: list[str], *, looks_up_rows: bool = True
) -> None:
    """Load the program after a check of its archive, run it on the stored sample, and compare with the stored outputs.

    This needs neither the model's code nor the job, and imports no Python code of the folder. ``looks_up_rows``: whether to
    look the sample's rows up in the tables; false if there are findings already.
    """
    folder = package.files
    try:
        program = package.load_program()
    except DistExportError as error:
        findings.append(f"{entry.program}: {_first_line(error)}")
        return
    check_signature(program, entry, findings)
    try:
        inputs, outputs = _read_sample(folder, entry, findings)
        expected = _read_outputs(folder, f"{entry.folder}/output_base.pkl")
        by_name = read_named_outputs(folder, entry, findings)
    except DistExportError as error:
        findings.append(str(error))
        return
    from dist_export.archive.output_diff import has_same_values

    names = [output.name for output in entry.outputs]
    if len(expected) != len(names):
        findings.append(f"{entry.folder}/output_base.pkl: {len(expected)} outputs, the manifest names {len(names)}")
    try:
        found = _call(program, inputs)
    except Exception as error:  # noqa: BLE001 -- any error of a foreign program is a finding
        findings.append(f"{entry.program}: fails on the stored sample: {type(error).__name__}: {_first_line(error)}")
        return
    if len(found) != len(names):
        findings.append(f"{entry.program}: returns {len(found)} outputs, the manifest names {len(names)}")
    for kind, tensor in zip(entry.inputs, inputs.values(), strict=False):
        _expect_kind(f"{entry.folder}/inputs_dict.json: input", tensor, kind, findings)
    told = []
    measures = _measures(program, inputs, found)
    for place, (name, stated, tensor, base) in enumerate(zip(names, outputs, found, expected, strict=False)):
        _expect_kind(f"{entry.program}: output", tensor, entry.outputs[place], findings)
        if name in by_name and not has_same_values(by_name[name], base):
            findings.append(
                f"{entry.folder}/output_base.pkl: output {place} is not what {OUTPUTS} has for {name!r}, which is its name "
                "in the manifest"
            )
        if list(tensor.shape) != stated.get("shape") or str(tensor.dtype) != stated.get("dtype"):
            findings.append(
                f"{entry.program}: output {name!r} is {tensor.dtype} {list(tensor.shape)}, output_info.json says "
                f"{stated.get('dtype')} {stated.get('shape')}"
            )
            continue
        judge = _Judge(package.manifest.parity, name, measures[place])
        told.append(judge.compare(entry, tensor, base, findings))
    checked.append(f"dense program: loads, gives the stored outputs on the stored sample: {'; '.join(told)}")
    stored = StoredSample(inputs, dict(zip(names, expected, strict=False)), measures)
    check_formats(package, entry, stored, findings, checked)
    check_fx_folder(package, entry, program, findings, checked)
    if package.manifest.tables and looks_up_rows:
        _check_rows(package, entry, findings, checked)
        _check_default_rows(package, entry, findings)


class _Judge:
    """Compares an output with the stored one. The tolerance is that of the manifest, within limits.

    The limits are 1e-5 relative, and 1e-6 absolute plus the largest difference that the manifest states for the output.
    """

    def __init__(self, parity: ParityEntry | None, name: str, measure: Callable[[], torch.Tensor | None]) -> None:
        """Set the tolerance. ``measure`` returns the program's rounding, which is added if the tolerance is exceeded."""
        self._name = name
        self._measure = measure
        self._stated = (_MAX_ATOL, _MAX_RTOL) if parity is None else (parity.atol, parity.rtol)
        seen = 0.0 if parity is None else parity.max_abs.get(name, 0.0)
        self._atol = min(self._stated[0], _MAX_ATOL + seen)
        self._rtol = min(self._stated[1], _MAX_RTOL)

    def compare(self, entry: DenseEntry, found: torch.Tensor, base: torch.Tensor, findings: list[str]) -> str:
        """Add findings, and return the figures as text."""
        from dist_export.archive.output_diff import compare, describe_allowed, usual_sizes

        name = self._name
        if base.shape != found.shape or base.dtype != found.dtype:
            findings.append(
                f"{entry.folder}/output_base.pkl: output {name!r} is {base.dtype} {list(base.shape)}, the program gives "
                f"{found.dtype} {list(found.shape)}"
            )
            return f"{name} is not comparable"
        atol, rtol = self._atol, self._rtol
        worst = compare(base, found, atol=atol, rtol=rtol)
        if not worst.is_close and base.is_floating_point() and (atol or rtol):
            worst = compare(base, found, atol=atol, rtol=rtol, rounding=self._measure())
        figures = f"max abs {worst.max_abs:.2g}, max rel {worst.max_rel:.2g}, {worst.max_ulp:,} ULP"
        if not worst.is_close:
            findings.append(
                f"{entry.program}: output {name!r} is not what was stored in output_base.pkl: {figures}, in row {worst.row}; "
                f"allowed is {describe_allowed(atol, rtol)}"
            )
        if base.is_floating_point() and base.numel():
            usual = float(usual_sizes(None, base).max())
            if self._stated[0] > max(_MAX_ATOL, usual) or self._stated[1] > 1:
                findings.append(
                    f"{MANIFEST}: parity.atol {self._stated[0]:g} and rtol {self._stated[1]:g} allow output {name!r} to be "
                    f"anything: its usual size is {usual:.2g}"
                )
        return f"{name} {figures}"


def _measures(
    program: Any, inputs: Mapping[str, torch.Tensor], found: list[Any]
) -> list[Callable[[], torch.Tensor | None]]:
    return [functools.partial(_measure, program, inputs, place, tensor) for place, tensor in enumerate(found)]


def _measure(program: Any, inputs: Mapping[str, torch.Tensor], place: int, found: torch.Tensor) -> torch.Tensor | None:
    """Return how far rounding moves an output, measured by a run in float64; None if the program cannot run in float64."""
    from dist_export.archive.output_diff import measure_rounding

    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    try:
        exact = _call(program, wide, is_wide=True)[place]
    except Exception:  # noqa: BLE001 -- then nothing is added to the tolerance
        return None
    return measure_rounding(exact, found)


def _read_sample(
    folder: Files, entry: DenseEntry, findings: list[str]
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the sample's inputs by name, and the outputs of output_info.json. Report files that disagree."""
    from dist_export.archive.output_diff import has_same_values
    from dist_export.archive.safe_pickle import read_sample_pickle

    full = _read_json(folder, f"{entry.folder}/inputs_dict.json", dict[str, _Values])
    lite = _read_json(folder, f"{entry.folder}/inputs_dict_lite.json", dict[str, dict[str, Any]])
    order = _read_json(folder, f"{entry.folder}/params_order.json", list[str])
    outputs = _read_json(folder, f"{entry.folder}/output_info.json", _OutputInfo)["OutputNodes"]
    where = f"{entry.folder}/inputs_dict.pkl"
    pickled = read_sample_pickle(folder.read(where), where=where)
    _expect_names(f"{entry.folder}/params_order.json", order, entry.inputs, findings)
    every = [*(tensor.name for tensor in entry.inputs), *entry.dropped_inputs]
    if entry.input_order and sorted(entry.input_order) != sorted(every):
        findings.append(
            f"{MANIFEST}: dense.input_order is {list(entry.input_order)}, the inputs and dropped inputs are {sorted(every)}"
        )
    _check_blocks(folder, entry, findings)
    _expect_names(
        f"{entry.folder}/output_info.json", [o.get("OutputNodeName") for o in outputs], entry.outputs, findings
    )
    for name, found in (("inputs_dict.json", full), ("inputs_dict_lite.json", lite), ("inputs_dict.pkl", pickled)):
        if not isinstance(found, Mapping) or list(found) != order:
            told = list(found) if isinstance(found, Mapping) else type(found).__name__
            findings.append(f"{entry.folder}/{name}: inputs {told}, params_order.json has {order}")
    inputs = {}
    for place, name in enumerate(order):
        if name not in full:
            raise PackageError(f"{entry.folder}/inputs_dict.json: has no input {name!r}, which params_order.json names")
        inputs[name] = _to_tensor(full[name], f"{entry.folder}/inputs_dict.json: input {name!r}")
        row_indexed = {key: value for key, value in full[name].items() if key != "values"}
        if row_indexed != lite.get(name) or row_indexed.get("idx") != place:
            findings.append(f"{entry.folder}/inputs_dict_lite.json: input {name!r} is not as in inputs_dict.json")
        if isinstance(pickled, dict) and name in pickled and not has_same_values(pickled[name], inputs[name]):
            findings.append(f"{entry.folder}/inputs_dict.pkl: input {name!r} is not that of inputs_dict.json")
    return inputs, outputs


def _check_blocks(folder: Files, entry: DenseEntry, findings: list[str]) -> None:
    """Compare what the dense arch got, the order of its inputs and its constants, with the file that the export wrote."""
    where = f"{entry.folder}/{BLOCKS}"
    found = _read_json(folder, where, _Blocks)
    constants = {} if entry.constants is msgspec.UNSET else entry.constants
    for name, stated in (("input_order", list(entry.input_order)), ("constants", constants)):
        if found[name] != stated:
            findings.append(f"{where}: {name} is {found[name]}, the manifest's dense.{name} is {stated}")


def _expect_names(where: str, names: Any, stated: tuple[TensorEntry, ...], findings: list[str]) -> None:
    if names != [tensor.name for tensor in stated]:
        findings.append(f"{where}: {names}, the manifest says {[tensor.name for tensor in stated]}")


def _expect_kind(what: str, tensor: torch.Tensor, stated: TensorEntry, findings: list[str]) -> None:
    """Compare dtype and shape of a tensor of the sample with the manifest's. A size with a name there may be any number."""
    is_shape = tensor.dim() == len(stated.shape) and all(
        isinstance(size, str) or size == found for size, found in zip(stated.shape, tensor.shape, strict=True)
    )
    if f"torch.{stated.dtype}" != str(tensor.dtype) or not is_shape:
        findings.append(
            f"{what} {stated.name!r} is {tensor.dtype} {list(tensor.shape)}, the manifest says {stated.dtype} "
            f"[{', '.join(map(str, stated.shape))}]"
        )


def read_named_inputs(folder: Files, entry: DenseEntry) -> dict[str, torch.Tensor]:
    """Return the sample's inputs by name, as the export wrote them."""
    where = f"{entry.folder}/inputs_dict.json"
    found = _read_json(folder, where, dict[str, _Values])
    return {name: _to_tensor(values, f"{where}: input {name!r}") for name, values in found.items()}


def read_named_outputs(folder: Files, entry: DenseEntry, findings: list[str]) -> dict[str, torch.Tensor]:
    """Return the sample's outputs by name, as the export wrote them."""
    where = f"{entry.folder}/{OUTPUTS}"
    found = _read_json(folder, where, dict[str, _Values])
    _expect_names(where, list(found), entry.outputs, findings)
    return {name: _to_tensor(values, f"{where}: output {name!r}") for name, values in found.items()}


def _read_outputs(folder: Files, where: str) -> tuple[torch.Tensor, ...]:
    from dist_export.archive.safe_pickle import read_sample_pickle

    found = read_sample_pickle(folder.read(where), where=where)
    if isinstance(found, dict):
        raise PackageError(f"{where}: a dict, expected a tensor or a tuple of tensors")
    return found if isinstance(found, tuple) else (found,)


def _to_tensor(entry: _Values, where: str) -> torch.Tensor:
    import torch

    dtype = getattr(torch, entry["dtype"].removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or explain_unread(str(dtype).removeprefix("torch.")):
        raise PackageError(f"{where} is of the unknown dtype {entry['dtype'][:100]!r}")
    try:
        if not dtype.is_complex:
            return torch.tensor(entry["values"], dtype=dtype).reshape(entry["shape"])
        parts = torch.tensor(entry["values"], dtype=dtype.to_real()).reshape(*entry["shape"], 2)
        return torch.view_as_complex(parts)
    except (ValueError, TypeError, RuntimeError) as error:  # torch's words for values that are no numbers of that shape
        raise PackageError(f"{where} has no values of shape {entry['shape']}: {_first_line(error)}") from None


def _call(program: Any, inputs: Mapping[str, torch.Tensor], *, is_wide: bool = False) -> list[Any]:
    """Run the program on copies of the inputs, as it may write into them. ``is_wide``: with float64 copies of its weights."""
    import torch

    module = program.module()
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    with torch.no_grad():
        if is_wide:  # the module's tensors are the program's, so they are not cast in place
            wide = {name: tensor.double() if tensor.is_floating_point() else tensor.clone() for name, tensor in own}
            output = torch.func.functional_call(module, wide, kwargs=given)
        else:
            output = module(**given)
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    if not all(isinstance(found, torch.Tensor) for found in outputs):
        raise PackageError("it returns what is no tensor")
    return outputs


def _check_rows(package: Package, entry: DenseEntry, findings: list[str], checked: list[str]) -> None:
    """Look the sample's ids up in the shards, and report by table and id if a row is not the one that was scored."""
    where = f"{entry.folder}/{SAMPLE_ROWS}"
    before = len(findings)
    total = there = 0
    for table, rows in _read_json(package.files, where, dict[str, list[_SampleRow]]).items():
        ids = np.array([row["id"] for row in rows], np.int64)
        found, has_row = package.lookup(table, ids, slot=EMBEDDING_SLOT, raw=True)
        total += len(ids)
        there += int(np.count_nonzero(has_row))
        for place, row in enumerate(rows):
            digest = xxhash.xxh3_64_hexdigest(found[place].tobytes()) if has_row[place] else None
            if digest != row["row"]:
                findings.append(f"{where}: table {table!r} no longer has the row of id {row['id']} that was scored")
                break  # one finding is enough for a table
    if len(findings) > before:
        return
    if there:
        checked.append(f"sample: the rows of its {total:,} ids are those that were scored")
    else:
        asked = f"the package has none of its {total:,} ids" if total else f"{where} names no id"
        checked.append(f"sample: {asked}, so there was no row to compare")


def _check_default_rows(package: Package, entry: DenseEntry, findings: list[str]) -> None:
    """Compare the row that lookups give for out-of-vocabulary ids with the row that the sample had for them."""
    where = f"{entry.folder}/{DEFAULT_ROWS}"
    recorded = _read_json(package.files, where, dict[str, str])
    names = {table.name for table in package.manifest.tables}
    findings += [
        f"{where}: {'lacks' if name in names else 'names'} {name!r}, which the manifest {'has' if name in names else 'lacks'}"
        for name in sorted(names ^ set(recorded))
    ]
    findings += [
        f"{where}: ids that table {name!r} lacks had another row in the sample than the default row in the manifest"
        for name in sorted(names & set(recorded))
        if xxhash.xxh3_64_hexdigest(package.default_row(name).tobytes()) != recorded[name]
    ]


def _read_json(directory: Files, name: str, kind: Any) -> Any:
    """Return the content of a JSON file. Raises PackageError if it is not of type ``kind``."""
    try:
        found = json.loads(directory.read(name))  # the sample may hold NaN, which Python's json reads and writes
        msgspec.convert(found, kind)  # only to check the type: the result lacks fields that the type does not name
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{name}: {error}") from None
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
