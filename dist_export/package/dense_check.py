"""Check the dense arch of a package: the program loads, runs on the stored sample, and its outputs have their names."""

from __future__ import annotations

import json
import re
from typing import Any

from dist_export.errors import DistExportError, PackageError
from dist_export.manifest import DenseEntry
from dist_export.package.package import Package
from dist_export.storage import Directory


def check_dense(package: Package, entry: DenseEntry, findings: list[str], checked: list[str]) -> None:
    """Load the program (after a look into its archive), call it on the stored sample, compare names and shapes."""
    folder = package.directory
    try:
        program = package.load_program()
        inputs = _read_json(folder, f"{entry.folder}/inputs_dict.json")
        outputs = _read_json(folder, f"{entry.folder}/output_info.json")["OutputNodes"]
        order = _read_json(folder, f"{entry.folder}/params_order.json")
    except (DistExportError, FileNotFoundError, KeyError, TypeError) as error:
        findings.append(f"{entry.program}: {error}")
        return
    names = [output.get("OutputNodeName") for output in outputs]
    if names != [output.name for output in entry.outputs]:
        findings.append(f"{entry.folder}/output_info.json: outputs {names}, the manifest says otherwise")
    if order != [tensor.name for tensor in entry.inputs]:
        findings.append(f"{entry.folder}/params_order.json: inputs {order}, the manifest says otherwise")
    try:
        found = _call(program, inputs, order)
    except Exception as error:  # noqa: BLE001 -- whatever a foreign program raises, it does not run
        first = next(iter(str(error).strip().splitlines()), "")
        findings.append(f"{entry.program}: fails on the stored sample: {type(error).__name__}: {first}")
        return
    if len(found) != len(names):
        findings.append(f"{entry.program}: returns {len(found)} outputs, output_info.json names {len(names)}")
    for tensor, output in zip(found, outputs, strict=False):
        if list(tensor.shape) != output.get("shape") or str(tensor.dtype) != output.get("dtype"):
            findings.append(
                f"{entry.program}: output {output.get('OutputNodeName')!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"output_info.json says {output.get('dtype')} {output.get('shape')}"
            )
    checked.append(f"dense program: loads, runs on the stored sample, outputs {', '.join(map(str, names))}")


def _call(program: Any, inputs: dict[str, Any], order: list[str]) -> list[Any]:
    import torch

    kwargs = {}
    for name in order:
        entry = inputs[name]
        dtype = getattr(torch, re.sub(r"^torch\.", "", entry["dtype"]))
        kwargs[name] = torch.tensor(entry["values"], dtype=dtype).reshape(entry["shape"])
    with torch.no_grad():
        output = program.module()(**kwargs)
    return [output] if isinstance(output, torch.Tensor) else list(output)


def _read_json(directory: Directory, name: str) -> Any:
    try:
        return json.loads(directory.read(name))  # the sample may hold NaN, which Python's json reads and writes
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{name}: {error}") from None
