"""A training run's directory in the place of a checkpoint: find its latest complete checkpoint, or that of one step.

Sources: RecIS's CheckpointManager leaves ``<run>/ckpt_<step>/`` and ``<run>/checkpoint``, one name a line, the last one
newest, written when all ranks have saved. Trainers on DCP leave ``step-<n>``, Hugging Face's ``checkpoint-<n>``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dist_export.checkpoint.detect import (
    AUTO,
    DCP,
    DCP_AND_DUMP,
    DYNAMICEMB,
    PACKAGE,
    RECIS,
    detect_format,
    find_nothing,
    holds_tables,
    list_candidates,
    open_dense,
    open_reader,
)
from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.config.source_needs import RunOfCheckpoints
from dist_export.errors import CheckpointError, UnaskedError
from dist_export.formats.recis import DENSE_STATE, INDEX
from dist_export.pipeline.planning import tensor_settings_of
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_place

LIST = "checkpoint"
"""RecIS's list of finished checkpoints."""

_CHILD = re.compile(r"(?:[A-Za-z]+[A-Za-z_.]*[_-])?(\d{1,18})")
_SHOWN = 6


class Wanted(NamedTuple):
    """What is to be read from a checkpoint."""

    asked: str
    """Its format, or ``auto``."""
    settings: TensorSettings
    needs_sparse: bool
    """Whether one without tables is of no use."""
    needs_dense: bool


class ListedCheckpoint(NamedTuple):
    """A checkpoint of a run."""

    name: str
    step: int
    is_complete: bool | None
    """None where that depends on what is still to be told of its tensors."""
    why: str
    """Why it is not complete, or what it lacks all the same; may be empty."""


class FoundCheckpoint(NamedTuple):
    """The checkpoint that is meant."""

    directory: str | None
    """Path or URL; None for a model in memory."""
    step: int | None
    """None where ``ckpt_dir`` is a checkpoint itself, and no step was asked for."""
    notes: tuple[str, ...]
    """Newer ones that were passed over, each with the reason, and what the one that is taken lacks."""


def find_checkpoint(
    config: RunOfCheckpoints,
    url: str,
    *,
    step: int | None = None,
    needs_dense: bool = False,
    weights: ModelWeights | None = None,
) -> FoundCheckpoint:
    """Return the checkpoint that ``url`` and the setting ``step`` mean. One rank; reads the headers of a run's checkpoints alone.

    Of a run the latest is meant that has all that the export reads; with ``needs_dense`` the dense parameters too.

    Raises:
        CheckpointError: no checkpoint of that step, or none that is complete; a newest one that the settings do not fit;
            two complete ones of the step that is meant.
    """
    directory = open_place(url, config.storage_options, follow_links=config.follow_links)
    children = _list_run(directory, config.format, has_step=step is not None)
    if not children:
        if step is not None:
            _refuse_other_step(directory, step)
        return FoundCheckpoint(url, step, ())
    if step is not None:
        return _pick(directory, children, step)
    wanted = Wanted(config.format, tensor_settings_of(config, weights), config.need_export_sparse, needs_dense)
    listed = read_list(directory)
    notes: list[str] = []
    by_age = sorted(children, reverse=True)

    def why_not(name: str) -> str | None:
        return _why_unlisted(listed, name) or _why_incomplete(wanted, directory, name)

    for place, (its_step, name) in enumerate(by_age):
        why = why_not(name)
        if why is None:
            others = [other for step_of, other in by_age[place + 1 :] if step_of == its_step and why_not(other) is None]
            if others:
                raise _refuse_twins(directory, its_step, [name, *others])
            notes += _note_no_dense(directory, name, by_age[place + 1 :][:1])
            return FoundCheckpoint(directory.locate(name), its_step, tuple(notes))
        notes.append(f"{directory.describe(name)} is passed over: {why}")
    raise CheckpointError(f"{directory.url}: none of its {len(children)} checkpoints is complete; {notes[0]}")


def list_checkpoints(directory: Directory, *, asked: str, settings: TensorSettings) -> list[ListedCheckpoint]:
    """Return all checkpoints of a run, the newest first; none where ``directory`` is no run. One rank; reads all headers.

    They are complete as :func:`find_checkpoint` has it of an export that takes what is there.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    children = sorted(_list_run(directory, asked, has_step=False), reverse=True)
    wanted = Wanted(asked, settings, needs_sparse=False, needs_dense=False)
    listed = read_list(directory) if children else None
    found = []
    for step, name in children:
        is_complete: bool | None = False
        try:
            why = _why_unlisted(listed, name) or _why_incomplete(wanted, directory, name)
        except UnaskedError as error:
            is_complete, why = None, str(error)
        if why is None:
            is_complete, why = True, _why_no_dense(directory.child(name), asked) or ""
        found.append(ListedCheckpoint(name, step, is_complete, why))
    return found


def _list_run(directory: Directory, asked: str, *, has_step: bool) -> list[tuple[int, str]]:
    """Return (step, name) of the checkpoints of a run; none where the directory is a checkpoint itself. CheckpointError."""
    try:
        children = list_children(directory)
        return [] if not children or is_checkpoint(directory, asked, has_step=has_step) else children
    except OSError as error:
        raise CheckpointError(f"{directory.url} cannot be read: {error.strerror or error}") from error


def is_checkpoint(directory: Directory, asked: str, *, has_step: bool) -> bool:
    """Whether a directory that has children like a run's is a checkpoint itself.

    Trainers leave loose tensors in a run's directory, such as the best metric or a last save: these count only where asked for.
    """
    found = list_candidates(directory)
    if asked not in (AUTO, RECIS, DCP, DCP_AND_DUMP):
        return not has_step and asked in found
    return not {RECIS, DCP, DYNAMICEMB, PACKAGE}.isdisjoint(found)


def list_children(directory: Directory) -> list[tuple[int, str]]:
    """Return (step, name) of the directories that look like checkpoints of a run."""
    found = ((_CHILD.fullmatch(name), name) for name in directory.folders())
    return [(int(match[1]), name) for match, name in found if match is not None]


def read_list(directory: Directory) -> list[str] | None:
    """Return the names of the checkpoints whose saves have finished, the newest last; None where nothing says so."""
    if not directory.exists(LIST):
        return None
    lines = directory.read_text(LIST).decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


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


def _refuse_twins(directory: Directory, step: int, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{directory.url}: step {step} is that of {', '.join(names)}; give one of these as ckpt_dir, or remove the others"
    )


def _pick(directory: Directory, children: list[tuple[int, str]], step: int) -> FoundCheckpoint:
    names = [name for number, name in children if number == step]
    if len(names) == 1:
        return FoundCheckpoint(directory.locate(names[0]), step, ())
    if names:
        raise _refuse_twins(directory, step, names)
    steps = sorted({number for number, _ in children}, reverse=True)
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    raise CheckpointError(
        f"{directory.url}: no checkpoint of step {step}; there are {', '.join(map(str, steps[:_SHOWN]))}{more}"
    )


def _why_unlisted(listed: list[str] | None, name: str) -> str | None:
    return f"{LIST} does not list it, so its save did not finish" if listed is not None and name not in listed else None


def _why_incomplete(wanted: Wanted, directory: Directory, name: str) -> str | None:
    """Return why a checkpoint cannot be exported as far as indexes and headers tell, None where it can."""
    child = directory.child(name)
    try:
        found = detect_format(child, asked=wanted.asked)
        if found is None and not child.exists(DENSE_STATE):
            return str(find_nothing(child, asked=wanted.asked))
        if wanted.needs_sparse or holds_tables(child, found, wanted.settings):
            reader = open_reader(child, asked=wanted.asked, settings=wanted.settings)
            reader.read_headers(range(len(reader.files)))
        # an export of the tables alone reads these too, for the merged manifest: what is cut short would stop it
        open_dense(child, found, wanted.settings).describe()
        if wanted.needs_dense:
            return _why_no_dense(child, wanted.asked)
    except UnaskedError:
        raise  # an older one may fit the settings, and would be exported in the place of the one that is meant
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def _why_no_dense(child: Directory, asked: str) -> str | None:
    """Return why a checkpoint has no dense parameters, None where it may have them."""
    if detect_format(child, asked=asked) not in (RECIS, None) or child.exists(DENSE_STATE):
        return None
    return f"{child.describe(DENSE_STATE)} is missing, and the dense arch needs its parameters"
