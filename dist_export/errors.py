"""Every error that dist_export raises on purpose. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations

from dist_export.redact import conceal

_MAX_LINE = 4_000
"""A foreign name may be as long as its file. What was expected and what to do stand at the end, so the middle goes."""


def printable(text: str) -> str:
    """Return ``text`` as one line that a terminal may be given: what is not printable becomes an escape, as in ``repr``.

    Names in checkpoints and packages are other people's: they may hold line breaks, terminal escape codes, marks that
    turn the direction of writing, or half a surrogate pair, which cannot be written out at all. Credentials go, too.
    """
    text = conceal(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class DistExportError(Exception):
    """The root of the tree. ``exit_code`` is what the command line returns: 1, or 2 where the user can mend it.

    Each argument is one line, made printable here, whatever foreign name is in it.
    """

    exit_code = 1

    def __init__(self, *lines: str) -> None:
        super().__init__(*(_shorten(printable(line)) for line in lines))

    def __str__(self) -> str:
        return "\n  ".join(self.args)


class UserError(DistExportError):
    """The user's mistake, or a source that cannot be read. Nothing was written."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class CheckpointError(UserError):
    """The source checkpoint is missing, truncated or contradicts itself."""


class UnaskedError(CheckpointError):
    """The checkpoint may be whole, but does not tell what is asked of it: a pattern finds nothing, a format is not said."""


class PlanError(UserError):
    """The settings ask for something that this checkpoint cannot give."""


class ModelError(UserError):
    """The model, its dataset or its dense parameters do not fit each other or what serving can load."""


class ExportError(DistExportError):
    """The export failed after it had begun. No manifest was written, so there is no package."""


class TransferError(ExportError):
    """A shard could not be written as planned."""


class EndedError(TransferError):
    """A file ends before bytes that were to be read. ``fact`` is that alone, for whom its advice is not meant."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}; {advice}")
        self.fact = fact


class TraceError(ExportError):
    """``torch.export`` refused the dense arch, or what it wrote cannot be loaded."""


class ParityError(ExportError):
    """The written program does not give what the model gives."""


class DriftError(ExportError):
    """Scores of the package are further from the unmodified model's than ``max_drift`` allows."""


class CommitError(ExportError):
    """What was written is not what was planned. The message says what is on disk."""


class PackageError(DistExportError):
    """An exported directory is unsound."""


class StepFailedError(DistExportError):
    """A step failed on at least one rank. Raised on every rank, with the text of each failure by rank."""

    def __init__(self, step: str, failures: dict[int, str], *, world_size: int, exit_code: int = 1) -> None:
        self.step = step
        self.failures = failures
        self.exit_code = exit_code
        told = list(dict.fromkeys(failures[rank] for rank in sorted(failures)))
        if len(told) == 1 and len(failures) == world_size:
            super().__init__(*told[0].split("\n  "))  # everyone met the same fault: no rank is special
        else:
            ranks = ", ".join(str(rank) for rank in sorted(failures))
            lines = "; ".join(told).split("\n  ")
            super().__init__(f"'{step}' failed on rank {ranks} of {world_size}: {lines[0]}", *lines[1:])


def _shorten(line: str) -> str:
    if len(line) <= _MAX_LINE:
        return line
    half = _MAX_LINE // 2 - 40  # so that what comes out stays as it is, when it is told again
    return f"{line[:half]} ... ({len(line):,} characters) ... {line[-half:]}"
