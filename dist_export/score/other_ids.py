"""Ids of the tables that the sample does not have: a module that gives its rows for the sample's ids may do more with others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from dist_export.archive.lookup_operator import list_lookups
from dist_export.dense.row_lookup import RowFinder

_NUM_IDS = 64
"""So many of a table, at most, spread over its rows; and one more that it lacks."""
_NUM_BEYOND = 8
"""So many row numbers right behind the last row of a row-indexed table: modules that hash or cap ids take them."""

OtherIds = Mapping[str, Sequence[int]]
"""Input -> ids."""


class IdTrial(NamedTuple):
    """Ids to try together."""

    where: str
    chosen: OtherIds
    parts: Sequence[OtherIds] = ()
    """The same ids in smaller lots, if the model refuses them together."""


def find_id_inputs(program: ExportedProgram, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the inputs that ids are computed from, each with the tables that these are looked up in.

    ``names``: of the inputs, in call order.
    """
    inputs = dict(zip(program.graph_signature.user_inputs, names, strict=True))
    found: dict[str, set[str]] = {}
    for node, table in list_lookups(program.graph_module):
        for name in _inputs_before(node, inputs):
            found.setdefault(name, set()).add(table)
    return {name: sorted(tables) for name, tables in sorted(found.items())}


def _inputs_before(node: fx.Node, inputs: Mapping[str, str]) -> set[str]:
    """Return the inputs of the program that a node is computed from."""
    seen, waiting, found = {node}, [node], set()
    while waiting:
        for given in waiting.pop().all_input_nodes:
            if given not in seen:
                seen.add(given)
                waiting.append(given)
                found |= {inputs[given.name]} if given.name in inputs else set()
    return found


def choose_ids(finder: RowFinder, by_input: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Return for each input ids that its tables have, and one that they lack. Any rank; reads a piece of an id column a table.

    ``by_input``: as from :func:`find_id_inputs`, with names of tables in the package.
    """
    names = {finder.written_name(name): name for name in finder.exported_names()}
    chosen: dict[str, list[int]] = {}
    for name, tables in by_input.items():
        ids: set[int] = set()
        for table in tables:
            first_ids = next(itertools.chain(finder.read_ids(names[table]), iter([np.zeros(0, np.int64)]))).copy()
            spread = np.linspace(0, max(0, len(first_ids) - 1), min(_NUM_IDS, len(first_ids))).astype(np.int64)
            ids.update(first_ids[spread].tolist())
            if finder.rows_by_number(names[table]) is None:  # of a row-indexed table, the model has no row for others
                ids.add(int(first_ids.max(initial=0)) + 1 if len(first_ids) else 1)
        chosen[name] = sorted(number for number in ids if abs(number) < 1 << 63)
    return {name: ids for name, ids in chosen.items() if ids}


def choose_numbers_beyond(finder: RowFinder, by_input: Mapping[str, Sequence[str]]) -> list[OtherIds]:
    """Return row numbers that row-indexed tables lack, input by input and table by table. The model may map them to rows."""
    names = {finder.written_name(name): name for name in finder.exported_names()}
    found: list[OtherIds] = []
    for name, tables in by_input.items():
        numbers = [finder.rows_by_number(names[table]) for table in tables]
        counts = sorted({rows for rows in numbers if rows is not None})
        found += [{name: list(range(rows, rows + _NUM_BEYOND))} for rows in counts]
    return found


def list_trials(finder: RowFinder, program: ExportedProgram, inputs: Sequence[str], *, is_alone: bool) -> list[IdTrial]:
    """Return the ids to try a program with in which lookups are in the place of whole modules. Reads pieces of id columns.

    Args:
        finder: of the tables.
        program: the score program.
        inputs: their names, in call order.
        is_alone: whether there is one rank. With several, one may refuse a row number while others wait for it.
    """
    by_input = find_id_inputs(program, inputs)
    trials = [IdTrial("with other ids of the tables", choose_ids(finder, by_input))]
    if is_alone:
        parts = choose_numbers_beyond(finder, by_input)
        whole = {name: numbers for part in parts for name, numbers in part.items()}
        trials.append(IdTrial("with row numbers that the tables lack", whole, parts if len(parts) > 1 else ()))
    return [trial for trial in trials if trial.chosen]


def put_ids(
    tensors: Mapping[str, torch.Tensor], chosen: Mapping[str, Sequence[int]], *, seed: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch with other ids in three quarters of their elements."""
    random = np.random.default_rng(seed)
    changed = dict(tensors)
    for name, ids in chosen.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
            continue
        info = torch.iinfo(tensor.dtype)
        fitting = np.array([number for number in ids if info.min <= number <= info.max], np.int64)
        if not len(fitting):
            continue
        others = torch.from_numpy(np.resize(random.permutation(fitting), tensor.numel())).reshape(tensor.shape)
        is_kept = torch.from_numpy(random.integers(0, 4, tensor.numel()) == 0).reshape(tensor.shape)
        changed[name] = torch.where(is_kept, tensor.cpu(), others.to(tensor.dtype)).to(tensor.device)
    return changed
