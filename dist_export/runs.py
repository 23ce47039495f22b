"""A training run's directory in the place of a checkpoint: find its latest complete checkpoint, or that of one step.

Sources: RecIS's CheckpointManager leaves ``<run>/ckpt_<step>/`` and ``<run>/checkpoint``, one name a line, the last one
newest, written when all ranks have saved. Trainers on DCP leave ``step-<n>``, Hugging Face's ``checkpoint-<n>``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dist_export.checkpoint.formats import (
    AUTO,
    DCP,
    DCP_AND_DUMP,
    DYNAMICEMB,
    RECIS,
    detect_format,
    holds_tables,
    list_candidates,
    open_dense,
    open_reader,
)
from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.config import ExportConfig
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.layout.recis import DENSE_STATE, INDEX
from dist_export.source import tensor_settings_of
from dist_export.storage import Directory, open_place

LIST = "checkpoint"
"""RecIS's list of finished checkpoints."""

_CHILD = re.compile(r"(?:[A-Za-z]+[A-Za-z_.]*[_-])?(\d{1,18})")
_SHOWN = 6


class FoundCheckpoint(NamedTuple):
    """The checkpoint that is meant."""

    directory: str | None
    """Path or URL; None for a model in memory."""
    step: int | None
    """None where ``ckpt_dir`` is a checkpoint itself, and no step was asked for."""
    notes: tuple[str, ...]
    """Newer ones that were passed over, each with the reason, and what the one that is taken lacks."""


def find_checkpoint(
    config: ExportConfig, url: str, *, needs_dense: bool = False, weights: ModelWeights | None = None
) -> FoundCheckpoint:
    """Return the checkpoint that ``url`` and ``step`` mean. One rank; reads the headers of a run's checkpoints alone.

    Of a run the latest is meant that has all that the export reads; with ``needs_dense`` the dense parameters too.

    Raises:
        CheckpointError: no checkpoint of that step, or none that is complete; a newest one that the settings do not fit.
    """
    directory = open_place(url, config.storage_options, follow_links=config.follow_links)
    try:
        names = set(directory.names())
        children = _list_children(directory)
        is_checkpoint = not children or _is_checkpoint(directory, config)
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error
    if is_checkpoint:
        if config.step is not None:
            _refuse_other_step(directory, config.step)
        return FoundCheckpoint(url, config.step, ())
    listed = _read_list(directory) if LIST in names else None
    if config.step is not None:
        return _pick(directory, children, config.step)
    notes: list[str] = []
    by_age = sorted(children, reverse=True)
    for place, (step, name) in enumerate(by_age):
        why = (
            f"{LIST} does not list it, so its save did not finish"
            if listed is not None and name not in listed
            else _why_incomplete(config, directory, name, needs_dense=needs_dense, weights=weights)
        )
        if why is None:
            notes += _note_no_dense(directory, name, by_age[place + 1 :][:1])
            return FoundCheckpoint(directory.locate(name), step, tuple(notes))
        notes.append(f"{directory.describe(name)} is passed over: {why}")
    raise CheckpointError(f"{directory.url}: none of its {len(children)} checkpoints is complete; {notes[0]}")


def _is_checkpoint(directory: Directory, config: ExportConfig) -> bool:
    """Whether a directory that has children like a run's is a checkpoint itself.

    Trainers leave loose tensors in a run's directory, such as the best metric or a last save: these count only where asked for.
    """
    found = list_candidates(directory)
    if config.format not in (AUTO, RECIS, DCP, DCP_AND_DUMP):
        return config.step is None and config.format in found
    return not {RECIS, DCP, DYNAMICEMB}.isdisjoint(found)


def _list_children(directory: Directory) -> list[tuple[int, str]]:
    """Return (step, name) of the directories that look like checkpoints of a run."""
    found = ((_CHILD.fullmatch(name), name) for name in directory.folders())
    return [(int(match[1]), name) for match, name in found if match is not None]


def _read_list(directory: Directory) -> set[str]:
    lines = directory.read_text(LIST).decode(errors="replace").splitlines()
    return {line.strip() for line in lines if line.strip()}


def _refuse_other_step(directory: Directory, step: int) -> None:
    """Refuse a step that is not that of the checkpoint ``ckpt_dir``, as far as its own name tells."""
    named = _CHILD.fullmatch(directory.path.rpartition("/")[2])
    if named is None:
        raise CheckpointError(
            f"step is {step}, but ckpt_dir {directory.url} is no run: it has no children such as ckpt_<step>. "
            "Give the directory above it, or leave step out"
        )
    if int(named[1]) != step:
        raise CheckpointError(
            f"step is {step}, but ckpt_dir {directory.url} is by its name the checkpoint of step {int(named[1])}. "
            "Give the directory above it, or leave step out"
        )


def _note_no_dense(directory: Directory, name: str, before: list[tuple[int, str]]) -> list[str]:
    """Return a note where a RecIS checkpoint has no ``model.pt`` though the one ``before`` it has: the save may be cut off."""
    child = directory.child(name)
    if INDEX not in child.names() or child.exists(DENSE_STATE):
        return []
    return [
        f"{child.describe(DENSE_STATE)} is missing, which {older} has: the tables are exported without dense parameters; "
        f"step: {step} takes the checkpoint before"
        for step, older in before
        if directory.child(older).exists(DENSE_STATE)
    ]


def _pick(directory: Directory, children: list[tuple[int, str]], step: int) -> FoundCheckpoint:
    names = [name for number, name in children if number == step]
    if len(names) == 1:
        return FoundCheckpoint(directory.locate(names[0]), step, ())
    if names:
        raise CheckpointError(
            f"{directory.url}: step {step} is that of {', '.join(names)}; give one of these as ckpt_dir"
        )
    steps = sorted({number for number, _ in children}, reverse=True)
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    raise CheckpointError(
        f"{directory.url}: no checkpoint of step {step}; there are {', '.join(map(str, steps[:_SHOWN]))}{more}"
    )


def _why_incomplete(
    config: ExportConfig, directory: Directory, name: str, *, needs_dense: bool, weights: ModelWeights | None
) -> str | None:
    """Return why a checkpoint cannot be exported as far as indexes and headers tell, None where it can."""
    child = directory.child(name)
    settings = tensor_settings_of(config, weights)
    try:
        found = detect_format(child, asked=config.format)
        if config.need_export_sparse or holds_tables(child, found, settings):
            reader = open_reader(child, asked=config.format, settings=settings)
            reader.read_headers(range(len(reader.files)))
        # an export of the tables alone reads these too, for the merged manifest: what is cut short would stop it
        open_dense(child, found, settings).describe()
        if needs_dense and found in (RECIS, None) and not child.exists(DENSE_STATE):
            return f"{child.describe(DENSE_STATE)} is missing, and the dense arch needs its parameters"
    except UnaskedError:
        raise  # an older one may fit the settings, and would be exported in the place of the one that is meant
    except (CheckpointError, OSError) as error:
        return str(error)
    return None
