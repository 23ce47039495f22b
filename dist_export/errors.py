"""Every error that dist_export raises on purpose. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

from dist_export.redact import redact_text

_MAX_LINE = 4_000
"""A foreign name may be as long as its file. The expected value and the advice are at the end, so the middle is cut out."""


def printable(text: str) -> str:
    """Return ``text`` as one printable line for a terminal. Other characters become escapes, as in ``repr``.

    Names in checkpoints and packages come from other people. They may contain line breaks, terminal escape codes, marks that
    reverse the direction of writing, or half a surrogate pair, which cannot be encoded. Credentials are removed too.
    """
    text = redact_text(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class DistExportError(Exception):
    """The base class. ``exit_code`` is the exit code of the command line: 1, or 2 if the user can correct the mistake.

    Each argument is one line. It is made printable here, whatever foreign name it contains.
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
    """The checkpoint may be whole, but lacks something that was requested: a pattern finds nothing, or no format is known."""


class PlanError(UserError):
    """The settings request something that this checkpoint does not have."""


class ModelError(UserError):
    """The model, its dataset or its dense parameters do not match each other, or serving cannot load them."""


class ExportError(DistExportError):
    """The export failed after it had begun. No manifest was written, so there is no package."""


class TransferError(ExportError):
    """A shard could not be written as planned."""


class EndedError(TransferError):
    """A file ends before bytes that were to be read. ``fact`` is the text without the advice, for callers with other advice."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}; {advice}")
        self.fact = fact


class TraceError(ExportError):
    """``torch.export`` refused the dense arch, or cannot load what it wrote."""


class ParityError(ExportError):
    """The written program and the model give different outputs."""


class DriftError(ExportError):
    """Scores of the package are further from the unmodified model's than ``max_drift`` allows."""


class CommitError(ExportError):
    """The written files differ from the plan. The message says what is on disk."""


class PackageError(DistExportError):
    """An exported directory is unsound."""


class WrongBaseError(UserError, PackageError):
    """The package that was given as the base of a delta package is another one, or cannot be read."""


class StepFailedError(DistExportError):
    """A step failed on at least one rank. It is raised on every rank, with the text of each failure by rank."""

    def __init__(self, step: str, failures: dict[int, str], *, world_size: int, exit_code: int = 1) -> None:
        self.step = step
        self.failures = failures
        self.exit_code = exit_code
        told = list(dict.fromkeys(failures[rank] for rank in sorted(failures)))
        if len(told) == 1 and len(failures) == world_size:
            super().__init__(*told[0].split("\n  "))  # all ranks have the same error, so no rank is named
        else:
            ranks = ", ".join(str(rank) for rank in sorted(failures))
            lines = "; ".join(told).split("\n  ")
            super().__init__(f"'{step}' failed on rank {ranks} of {world_size}: {lines[0]}", *lines[1:])


def _shorten(line: str) -> str:
    if len(line) <= _MAX_LINE:
        return line
    half = _MAX_LINE // 2 - 40  # the result is short enough to stay unchanged when it is shortened again
    return f"{line[:half]} ... ({len(line):,} characters) ... {line[-half:]}"
