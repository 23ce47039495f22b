"""What is said of a score program that cannot be, where the settings require one."""

from __future__ import annotations

from typing import NoReturn

from dist_export.errors import ModelError, ParityError


def reason_of(error: ParityError) -> str:
    """Return what an error says of the program, without what follows for the package."""
    return str(error).split(". No manifest")[0]


def refuse(reason: str) -> NoReturn:
    """Raise ModelError: there can be no program."""
    raise ModelError(
        f"score_program is require, but there can be none: {reason}. Nothing was written. Change the model there, name the "
        "modules that are lookups in lookup_modules, or set score_program: auto"
    )


def fail(reason: str) -> NoReturn:
    """Raise ParityError: the written program is not the model."""
    raise ParityError(f"{reason}. No manifest was written, so there is no package")
