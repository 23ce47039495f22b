"""Compare the dense programs of two packages, and the scores of both for one stored sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dist_export.checkpoint.model_weights import plain_name
from dist_export.diff.entries import DenseDiff, ScoresDiff
from dist_export.diff.rows import largest_change
from dist_export.errors import DistExportError
from dist_export.manifest import DenseEntry, Manifest, ScoreEntry, TensorEntry
from dist_export.package.reader import Package

if TYPE_CHECKING:
    import torch

_FG = "fg.json"


def compare_dense(a: Package, b: Package) -> DenseDiff:
    """Compare parameters, inputs, outputs and code of the dense programs. PackageError if one cannot be loaded."""
    ours, theirs = a.manifest.dense, b.manifest.dense
    if ours is None or theirs is None:
        has = [name for name, entry in (("A", ours), ("B", theirs)) if entry is not None]
        return DenseDiff(others=(f"only {has[0]} has a dense arch",) if has else ())
    others = _compare_entries(ours, theirs)
    if _has_same_file(a.manifest, b.manifest, ours.program, theirs.program):
        return DenseDiff(others=tuple(others))
    found = compare_programs(a.load_program(), b.load_program())
    return msgspec.structs.replace(found, others=(*others, *found.others))


def compare_programs(one: Any, two: Any, what: str = "the dense program") -> DenseDiff:
    """Compare parameters, buffers, constants and code of two programs."""
    others: list[str] = []
    before, after = _values_of(one), _values_of(two)
    both = [name for name in before if name in after]
    changed = {}
    for name in both:
        if _has_same_bits(before[name], after[name]):
            continue
        if before[name].shape != after[name].shape or before[name].dtype != after[name].dtype:
            others.append(f"parameter {name!r} is {_say(before[name])} in A, {_say(after[name])} in B")
        else:
            changed[name] = largest_change(_to_numpy(before[name]), _to_numpy(after[name]))
    if _code_of(one) != _code_of(two):
        others.append(f"the code of {what} differs")
    return DenseDiff(
        same=len(both) - len(changed),
        changed=changed,
        only_in_a=tuple(name for name in before if name not in after),
        only_in_b=tuple(name for name in after if name not in before),
        others=tuple(others),
    )


def compare_state(held: Mapping[str, Any], values: Mapping[str, torch.Tensor], *, is_first: bool) -> DenseDiff | None:
    """Compare the parameters of a checkpoint with those of a package's programs, as their dtypes hold them.

    Args:
        held: by name, as the checkpoint has them; of what cannot be read something else than a tensor.
        values: parameters and buffers of the programs, under the names of the checkpoint.
        is_first: whether the checkpoint is A.

    Returns:
        What differs. What the checkpoint has besides is not looked at: much of it is of no dense arch. None if the checkpoint
        has no such name.
    """
    import torch

    both = {name: held[name] for name in values if isinstance(held.get(name), torch.Tensor)}
    if values and not both:
        return None
    others, changed = [], {}
    for name, tensor in both.items():
        if tensor.shape != values[name].shape:
            pair = (_say(tensor), _say(values[name])) if is_first else (_say(values[name]), _say(tensor))
            others.append(f"parameter {name!r} is {pair[0]} in A, {pair[1]} in B")
        elif not _has_same_bits(cast := tensor.to(values[name].dtype), values[name]):
            changed[name] = largest_change(_to_numpy(cast), _to_numpy(values[name]))
    lacking = tuple(name for name in values if name not in both)
    return DenseDiff(
        same=len(both) - len(changed) - len(others),
        changed=changed,
        only_in_a=() if is_first else lacking,
        only_in_b=lacking if is_first else (),
        others=tuple(others),
    )


def list_state(package: Package, held: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return what the programs of a package hold, by the names of a checkpoint, and what has no such name.

    The score program has parameters of the sparse arch, and of what is between the arches, which the dense program lacks.

    Args:
        package: open, with a dense arch.
        held: by name, as the checkpoint has them.
    """
    values: dict[str, torch.Tensor] = dict(package.load_program().state_dict)
    if package.manifest.score is msgspec.UNSET:
        return values, []
    account = package.manifest.account
    exported = () if account is msgspec.UNSET else account.others
    known = {plain_name(other.name) for other in exported if other.fate == "in_program"}
    program, unnamed = package.load_score_program(), []
    for own, tensor in _values_of(program).items():
        name = _name_in_checkpoint(own, held)
        if name in values or own.startswith("dense_arch."):
            continue  # the dense program's
        if name in held or name in known:
            values[name] = tensor
        elif own in program.state_dict:  # a constant is no parameter
            unnamed.append(name)
    return values, unnamed


def _name_in_checkpoint(own: str, held: Mapping[str, Any]) -> str:
    """Return the checkpoint's name of what a score program holds: the program has the model as ``model``, or the arches alone."""
    if own.startswith("model."):
        return own.removeprefix("model.")
    ending = own.removeprefix("sparse_arch")
    alike = [name for name in held if name.endswith(ending)]
    return alike[0] if own not in held and len(alike) == 1 else own


def _compare_entries(a: DenseEntry, b: DenseEntry) -> list[str]:
    told = _compare_tensors(a, b)
    if a.input_order != b.input_order:
        told.append(
            f"the dense arch gets its blocks in another order: {list(a.input_order)} in A, {list(b.input_order)} in B"
        )
    if a.max_batch_size != b.max_batch_size:
        told.append(f"the largest batch is {a.max_batch_size:,} in A, {b.max_batch_size:,} in B")
    return told + _compare_formats(a, b)


def _compare_formats(a: DenseEntry, b: DenseEntry) -> list[str]:
    """Return which further formats and layouts only one side has, or has for other runtimes. A server loads these files."""
    told = []
    ours, theirs = ({entry.format: entry for entry in its.formats or ()} for its in (a, b))
    for name in dict.fromkeys((*ours, *theirs)):
        if name not in ours or name not in theirs:
            told.append(f"the format {name!r} is only in {'A' if name in ours else 'B'}")
            continue
        needs = [(its[name].opset, its[name].machine, its[name].features) for its in (ours, theirs)]
        told += [] if needs[0] == needs[1] else [f"the file of the format {name!r} needs another runtime or processor"]
    layouts = [set(its.layouts or ()) for its in (a, b)]
    told += [f"the layout {name!r} is only in A" for name in sorted(layouts[0] - layouts[1])]
    return told + [f"the layout {name!r} is only in B" for name in sorted(layouts[1] - layouts[0])]


def _compare_tensors(a: DenseEntry | ScoreEntry, b: DenseEntry | ScoreEntry) -> list[str]:
    """Return how the inputs and outputs of two programs differ by name, order, dtype and shape, in words."""
    told = []
    for what, ours, theirs in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        names_a, names_b = [one.name for one in ours], [one.name for one in theirs]
        told += [f"{what} {name!r} is only in A" for name in names_a if name not in names_b]
        told += [f"{what} {name!r} is only in B" for name in names_b if name not in names_a]
        if sorted(names_a) == sorted(names_b) and names_a != names_b:
            told.append(f"the {what}s are in another order: {names_a} in A, {names_b} in B")
        by_name = {one.name: one for one in theirs}
        told += [
            f"{what} {one.name!r} is {_say_entry(one)} in A, {_say_entry(by_name[one.name])} in B"
            for one in ours
            if one.name in by_name and _say_entry(one) != _say_entry(by_name[one.name])
        ]
    return told


def _has_same_file(a: Manifest, b: Manifest, name_a: str, name_b: str) -> bool:
    digests = [
        next((file.digest for file in manifest.files if file.path == name), "")
        for manifest, name in ((a, name_a), (b, name_b))
    ]
    return bool(digests[0]) and digests[0] == digests[1]


def _code_of(program: Any) -> list[str]:
    """Return the code of the program and of all branches and loops in it."""
    return [module.code for module in program.graph_module.modules() if hasattr(module, "graph")]


def _has_same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    import torch

    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    flat = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in (one, two)]
    return torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))


def _values_of(program: Any) -> dict[str, torch.Tensor]:
    import torch

    constants = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    return {**program.state_dict, **constants}


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    import torch

    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    found: np.ndarray = plain.detach().to(torch.float64).numpy()
    return found


def _say(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _say_entry(entry: TensorEntry) -> str:
    return f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"


def compare_others(a: Package, b: Package) -> tuple[str, ...]:
    """Return how the score programs, the serving contracts and fg.json differ, in words."""
    told = []
    ours, theirs = a.manifest.score, b.manifest.score
    if ours is msgspec.UNSET or theirs is msgspec.UNSET:
        told += [] if ours is theirs else [f"only {'B' if ours is msgspec.UNSET else 'A'} has a score program"]
    else:
        told += _compare_score_programs(a, b, ours, theirs)
    contracts = [_stated_of(package.manifest) for package in (a, b)]
    told += [] if contracts[0] == contracts[1] else ["the serving contract differs"]
    confs = [package.files.read(_FG) if package.files.exists(_FG) else b"" for package in (a, b)]
    return (*told, *([] if confs[0] == confs[1] else [f"{_FG} differs"]))


def _compare_score_programs(a: Package, b: Package, ours: ScoreEntry, theirs: ScoreEntry) -> list[str]:
    told = [f"score program: {text}" for text in _compare_tensors(ours, theirs)]
    if set(ours.conditions) != set(theirs.conditions):
        told.append(f"the score program demands {list(ours.conditions)} in A, {list(theirs.conditions)} in B")
    if _has_same_file(a.manifest, b.manifest, ours.program, theirs.program):
        return told
    found = compare_programs(_load_unbound(a), _load_unbound(b), "the score program")
    told += [f"score program: {name} changed by up to {value:.3g}" for name, value in found.changed.items()]
    told += [f"score program: {name} is only in A" for name in found.only_in_a]
    told += [f"score program: {name} is only in B" for name in found.only_in_b]
    return [*told, *found.others]


def _load_unbound(package: Package) -> Any:
    """Return the score program as it is in its file: bound to a package, its code would be another for each package."""
    from dist_export.archive.lookup_operator import unbind  # it imports torch

    program = package.load_score_program()
    unbind(program.graph_module)
    return program


def _stated_of(manifest: Manifest) -> bytes:
    """Return what the serving contract asks of a server.

    Left out is what the replay found, who stated a field and why an input is not known, and the default rows of the tables,
    which are compared as rows.
    """
    if manifest.serving is msgspec.UNSET:
        return b""
    defaults = {table.name: table.default_row for table in manifest.tables}
    features = tuple(
        msgspec.structs.replace(
            feature,
            stated_by={},
            default_row=msgspec.UNSET
            if feature.default_row == defaults.get(feature.table, msgspec.UNSET)
            else feature.default_row,
        )
        for feature in manifest.serving.features
    )
    inputs = tuple(
        one if one.unknown is msgspec.UNSET else msgspec.structs.replace(one, unknown="")
        for one in manifest.serving.inputs
    )
    return msgspec.json.encode(msgspec.structs.replace(manifest.serving, features=features, inputs=inputs, replay=None))


def compare_scores(a: Package, b: Package) -> ScoresDiff:
    """Score the stored sample of A with both packages. What cannot be scored is told, and is no error."""
    if a.manifest.dense is None or b.manifest.dense is None:
        return ScoresDiff(not_compared="scores need a dense arch in both")
    try:
        if msgspec.UNSET not in (a.manifest.score, b.manifest.score):
            inputs = _read_ids(a)
            before, after = a.score(inputs), b.score(inputs)
        else:
            before, after = _score_blocks(a, b)
    except (DistExportError, KeyError, TypeError, ValueError, RuntimeError) as error:  # inputs that B does not take
        return ScoresDiff(not_compared=f"B does not score the sample of A: {str(error).partition(chr(10))[0]}")
    both = [name for name in before if name in after]
    odd = [
        name
        for name in both
        if before[name].shape != after[name].shape or _is_finite(before[name]) != _is_finite(after[name])
    ]
    return ScoresDiff(
        max_abs={
            name: largest_change(before[name], after[name]) for name in both if before[name].shape == after[name].shape
        },
        odd=tuple(odd),
    )


def _is_finite(scores: np.ndarray) -> list[bool]:
    found: list[bool] = np.isfinite(scores).reshape(-1).tolist()
    return found


def _read_ids(package: Package) -> Mapping[str, Any]:
    from dist_export.package.score_sample import read_sample

    assert package.manifest.score is not msgspec.UNSET
    return read_sample(package, package.manifest.score).inputs


def _score_blocks(a: Package, b: Package) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run both dense programs on the dense inputs that A has stored."""
    import torch

    from dist_export.verify.dense import read_named_inputs

    assert a.manifest.dense is not None
    stored = read_named_inputs(a.files, a.manifest.dense)
    found = []
    for package in (a, b):
        entry = package.manifest.dense
        assert entry is not None
        with torch.no_grad():
            result = package.load_program().module()(**{one.name: stored[one.name].clone() for one in entry.inputs})
        outputs: Sequence[torch.Tensor] = [result] if isinstance(result, torch.Tensor) else list(result)
        named = zip(entry.outputs, outputs, strict=True)
        found.append({one.name: _to_numpy(output) for one, output in named})
    return found[0], found[1]
