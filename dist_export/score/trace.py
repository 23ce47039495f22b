"""Trace the model from batch to scores with ``torch.export``: flat tensors by keyword, free sizes, lookups as operators."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from dist_export.archive.traced_sizes import holds_always, input_shapes, list_conditions, sizes_of
from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import DenseSample, exporting
from dist_export.dense.model_head import DenseCall, ModelHead
from dist_export.dense.reference import MODEL, blocks_of
from dist_export.dense.used_inputs import find_used_inputs, find_written_state
from dist_export.errors import ModelError
from dist_export.model.alone import refuse_collectives
from dist_export.model.unwrap import unwrap
from dist_export.model.user_errors import blame, said
from dist_export.score.decompositions import decompose
from dist_export.score.inputs import FlatBatch
from dist_export.score.needed_inputs import find_needed, free_dims
from dist_export.score.refused_programs import refuse_changed_state, refuse_operators, refuse_untrained
from dist_export.score.refused_reads import RefusedReads
from dist_export.score.table_weight import NotExportableError
from dist_export.score.tables import SPARSE

_SYMBOL = re.compile(r"[a-z]+\d+")


@dataclass(frozen=True, slots=True)
class TracedScores:
    """The program, and its inputs of the sample in call order."""

    program: ExportedProgram
    inputs: dict[str, torch.Tensor]
    dropped: tuple[str, ...]
    sizes: dict[str, tuple[Any, ...]]
    """The shapes of all tensors of the batch, the dropped ones too. Sizes that are always equal have one symbol."""
    conditions: list[str]
    """What the model's code demands of free sizes, in the symbols of the program."""


def trace_scores(scored: ScoredModel, batch: FlatBatch) -> TracedScores:
    """Trace all that makes scores as one. The tables were replaced before. Rank 0; no collective takes place.

    Inputs that reach no output, such as labels, are left out: neither by value, nor by a size that no other input tells.

    Raises:
        NotExportableError: torch cannot trace it, or the program holds an operator that a server without the model's code
            lacks. The text names the operator and the model's line.
    """
    names = list(batch.tensors)
    program = export_arches(scored, batch, names, {})
    if not find_used_inputs(program, {}):
        raise NotExportableError("no tensor of the batch has a data path to an output")
    used = find_needed(program, batch.tensors, names, from_zero=scored.from_zero)
    dropped = [name for name in names if name not in used]
    fixed = [name for name in dropped if len(free_dims(batch.tensors[name])) < batch.tensors[name].dim()]
    if fixed:  # whether a fixed size of theirs matters is seen only where it is free
        program = export_arches(scored, batch, names, {}, all_free=fixed)
        used = find_needed(program, batch.tensors, names, all_free=fixed, from_zero=scored.from_zero)
        dropped = [name for name in names if name not in used]
    sizes = input_shapes(program, names)
    if dropped:
        stand_ins = _stand_ins(program, names, dropped, batch)
        program = export_arches(scored, batch, used, stand_ins, all_free=fixed)
    with sizes_from_zero(scored.from_zero):
        conditions = list_conditions(program, used, from_zero=scored.from_zero)
        program = decompose(program)
    refuse_operators(program)
    refuse_changed_state(program)
    program.graph.eliminate_dead_code()  # such as a loss
    _drop_unused_state(program)
    if scored.head is not None and not scored.is_live:
        arches = scored.sparse_arch, scored.sample.dense_arch
        refuse_untrained(program, scored.head.model, arches, own_dense_arch=scored.head.own_dense_arch)
    own_changed_state(program)
    traced = TracedScores(program, {name: batch.tensors[name] for name in used}, tuple(dropped), sizes, conditions)
    _refuse_constant_dims(traced)
    return traced


@dataclass(frozen=True, slots=True)
class ScoredModel:
    """What is traced, with lookups in the place of tables."""

    sparse_arch: nn.Module
    sample: DenseSample
    """Of the copied dense arch."""
    head: ModelHead | None
    """Runs the model. None: the dense arch gets what the sparse arch returns for the batch."""
    is_live: bool = False
    """Whether the values in the model are the trained ones."""
    from_zero: bool = True
    """Whether sizes of 0 and 1 are free as others are, or torch's trace may take each size for 2 or more."""
    blocks: tuple[str, ...] | None = None
    """The inputs of the dense arch that the program returns; None: it returns the scores."""

    @property
    def sparse_path(self) -> str:
        """The path of the sparse arch within what is traced."""
        return SPARSE if self.head is None else f"{MODEL}.{self.head.sparse_path}"


class _Scored(nn.Module):
    """Runs what is traced. Subclasses have a ``forward`` with the inputs as explicit keywords."""

    def __init__(self, scored: ScoredModel, batch: FlatBatch, dropped: Mapping[str, _StandIn]) -> None:
        super().__init__()
        if scored.head is None:
            self.add_module(SPARSE, scored.sparse_arch)
            self.dense_arch = scored.sample.dense_arch
        else:  # which has both: torch gives other names to modules that are shared
            self.add_module(MODEL, unwrap(scored.head.model))
        self._scored = scored
        self._batch = batch
        self._dropped = dropped

    def call(self, inputs: dict[str, torch.Tensor]) -> Any:
        filled = inputs | {name: stand_in.make(inputs) for name, stand_in in self._dropped.items()}
        batch, head, sample = self._batch.rebuild(filled), self._scored.head, self._scored.sample
        try:
            with RefusedReads(inputs.values()), refuse_collectives():
                if head is None:
                    blocks = blocks_of(self._scored.sparse_arch(batch))
                    call = DenseCall(blocks, self.dense_arch(blocks))
                else:
                    call = head.run(batch, is_whole=True)
        except ModelError as error:
            raise NotExportableError(str(error)) from error
        except RuntimeError as error:
            if "data-dependent" in str(error):  # torch.export would print the whole graph
                raise NotExportableError(f"torch.export refused the model: {said(error)}{blame(error)}") from error
            raise
        if self._scored.blocks is not None:
            tensors = read_blocks(call.blocks).tensors
            return tuple(tensors[name] for name in self._scored.blocks)
        return call.output if sample.is_single else tuple(sample.flatten(call.output))


@dataclass(frozen=True, slots=True)
class _StandIn:
    """Zeros in the place of an input that reaches no output."""

    template: torch.Tensor
    sizes: tuple[int | tuple[str, int], ...]
    """By dimension: a size, or the input and the dimension that have the same one."""

    def make(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        sizes = [size if isinstance(size, int) else inputs[size[0]].shape[size[1]] for size in self.sizes]
        return self.template.new_zeros(sizes)


def _stand_ins(
    program: ExportedProgram, names: Sequence[str], dropped: Sequence[str], batch: FlatBatch
) -> dict[str, _StandIn]:
    shapes = input_shapes(program, names)
    known: dict[str, tuple[str, int]] = {}
    for name in names:
        for dim, size in enumerate(shapes[name] if name not in dropped else ()):
            known.setdefault(str(size), (name, dim))
    for (
        lists
    ) in batch.jagged:  # the code need not compare them: a size that only the batch tells, such as that of weights
        if used := [name for name in lists.values if name not in dropped]:
            for name in lists.values:
                known.setdefault(str(shapes[name][0]), (used[0], 0))
    return {
        name: _StandIn(
            batch.tensors[name],
            tuple(
                int(batch.tensors[name].shape[dim])
                if isinstance(size, int)
                else known.get(str(size), int(batch.tensors[name].shape[dim]))
                for dim, size in enumerate(shapes[name])
            ),
        )
        for name in dropped
    }


def export_arches(
    scored: ScoredModel,
    batch: FlatBatch,
    names: Sequence[str],
    dropped: Mapping[str, _StandIn],
    *,
    all_free: Sequence[str] = (),
) -> ExportedProgram:
    """Return what ``scored.sample.dense_arch`` gives for a batch as a program of these inputs.

    Args:
        scored: what is run.
        batch: the sample.
        names: the tensors of the batch that the program takes, by keyword, in this order.
        dropped: what is in the place of the other tensors.
        all_free: tensors all of whose sizes are free, whatever their dtype.

    Raises:
        NotExportableError: torch cannot trace it.
    """
    pairs = ", ".join(f"{name!r}: {name}" for name in names)
    source = f"def forward(self, *, {', '.join(names)}):\n    return self.call({{{pairs}}})\n"
    namespace: dict[str, Any] = {}
    exec(source, namespace)  # noqa: S102 -- the names were checked to be identifiers
    kind = type("Scored", (_Scored,), {"forward": namespace["forward"]})
    wrapper: nn.Module = kind(scored, batch, dropped).eval()
    kwargs = {name: batch.tensors[name].clone() for name in names}
    shapes = {name: free_dims(tensor, all_free=name in all_free) for name, tensor in kwargs.items()}
    try:
        with exporting(wrapper), torch.no_grad(), sizes_from_zero(scored.from_zero):
            return torch.export.export(wrapper, args=(), kwargs=kwargs, dynamic_shapes=shapes, strict=False)
    except NotExportableError as error:
        place = blame(error)
        raise NotExportableError(f"{error}{'' if place in str(error) else place}") from error
    except Exception as error:
        raise NotExportableError(f"torch.export refused the model: {said(error)}{blame(error)}") from error


def sizes_from_zero(from_zero: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Let sizes of 0 and 1 be free too. torch before 2.9 cannot; then such a size of the sample is a constant."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):
        return contextlib.nullcontext()
    return _config.patch(backed_size_oblivious=from_zero)  # type: ignore[attr-defined,no-any-return]


def own_changed_state(program: ExportedProgram) -> None:
    """Give the program copies of what it writes into: the tensors are the caller's, and the export runs the program."""
    for name in find_written_state(program):
        for held in (program.state_dict, program.constants):
            if name in held:
                held[name] = held[name].clone()


def _drop_unused_state(program: ExportedProgram) -> None:
    """Take parameters, buffers and constants that nothing reads out of the program."""
    from torch.export.graph_signature import InputKind

    signature = program.graph_signature
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in signature.input_specs:
        node = placeholders.get(getattr(spec.arg, "name", ""))
        if spec.kind is InputKind.USER_INPUT or node is None or node.users:
            kept.append(spec)
            continue
        program.graph.erase_node(node)
    signature.input_specs[:] = kept
    targets = {spec.target for spec in kept if spec.target is not None}
    for name in [name for name in program.state_dict if name not in targets]:
        del program.state_dict[name]
    for name in [name for name in program.constants if name not in targets]:
        del program.constants[name]
    program.graph_module.recompile()


def _refuse_constant_dims(traced: TracedScores) -> None:
    for name, shape in input_shapes(traced.program, list(traced.inputs)).items():
        if shape and isinstance(shape[0], int):
            raise NotExportableError(
                f"the first dimension of input {name!r} stays {shape[0]} whatever the batch: the model's code fixes it"
            )


def describe_shapes(
    traced: TracedScores, first_sizes: Mapping[str, str]
) -> tuple[dict[str, tuple[int | str, ...]], list[tuple[int | str, ...]], tuple[str, ...]]:
    """Return the shapes of inputs and outputs, and the conditions on sizes, for the manifest.

    A free size has a name, or is an expression of names.

    ``first_sizes``: what is known of the first sizes of inputs, in terms of ``batch``. If nothing is known, the size that the
    first output begins with is called ``batch``, and other sizes are expressed by it if they follow from it.
    """
    inputs = input_shapes(traced.program, list(traced.inputs))
    values = {node.name: node.meta.get("val") for node in traced.program.graph.nodes}
    outputs = [sizes_of(values.get(str(node))) for node in traced.program.graph_signature.user_outputs]
    first = {str(shape[0]): first_sizes[name] for name, shape in inputs.items() if name in first_sizes}
    words = {text: word for text, word in first.items() if _SYMBOL.fullmatch(text)} or _batch_words(outputs)
    for name, shape in inputs.items():
        for dim, size in enumerate(shape):
            for symbol in _SYMBOL.findall(str(size)):
                words.setdefault(symbol, f"{name}_size_{dim}" if dim else f"{name}_size")
    known = {name: (word,) for name, word in first_sizes.items()}
    return (
        {
            name: (known.get(name) or _in_words(shape[:1], words)) + _in_words(shape[1:], words)
            for name, shape in inputs.items()
        },
        [_in_words(shape, words) for shape in outputs],
        tuple(
            sorted(text for text in {_put_words(text, words) for text in traced.conditions} if not holds_always(text))
        ),
    )


def _batch_words(outputs: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    """Return what the symbol is called from which the size of the batch follows."""
    for size in (shape[0] for shape in outputs if shape and not isinstance(shape[0], int)):
        text = str(size)
        if _SYMBOL.fullmatch(text):
            return {text: "batch"}
        if match := re.fullmatch(r"\(?\(?([a-z]+\d+)\)?//(\d+)\)?", text):
            return {match[1]: f"{match[2]}*batch"}
        if match := re.fullmatch(r"([a-z]+\d+) - (\d+)", text):
            return {match[1]: f"batch + {match[2]}"}
    return {}


def _in_words(shape: tuple[Any, ...], words: Mapping[str, str]) -> tuple[int | str, ...]:
    named: list[int | str] = []
    for size in shape:
        if isinstance(size, int):
            named.append(size)
            continue
        text = str(size)
        if text in words:
            named.append(words[text])
            continue
        named.append(_simplified(_put_words(text, words)))
    return tuple(named)


def _put_words(text: str, words: Mapping[str, str]) -> str:
    for symbol, word in words.items():
        text = re.sub(rf"\b{symbol}\b", word if word.isidentifier() else f"({word})", text)
    return text


def _simplified(text: str) -> str:
    if re.fullmatch(r"\(?\(?\(?(\d+)\*batch\)?\)?//\1\)?", text):
        return "batch"
    match = re.fullmatch(r"\(batch \+ (\d+)\) - (\d+)", text)
    return "batch" if match and match[1] == match[2] else text
