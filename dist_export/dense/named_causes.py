"""What in the dense arch may be the cause where the program gives other scores than the model: put into the error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from dist_export.dense.load_hooks import naming_hooks
from dist_export.dense.origins import hidden_parameters
from dist_export.errors import ModelError, ParityError
from dist_export.humanize import few


@contextlib.contextmanager
def naming_causes(copied: nn.Module, path: str, model: nn.Module) -> Iterator[None]:
    """Within this block, a ModelError or ParityError names what in the dense arch may be the cause.

    Args:
        copied: the copy of the dense arch that is exported.
        path: of the dense arch within the model.
        model: the caller's own.
    """
    with naming_hooks(copied, path):
        try:
            yield
        except (ModelError, ParityError) as error:
            own = {id(parameter) for parameter in model.parameters()}
            hidden = hidden_parameters(copied, path, with_classes=True)
            names = [name for name, parameter in hidden if id(parameter) in own]
            if not names:
                raise
            raise type(error)(
                f"{error}. The dense arch reaches parameters of the model in another way than through a module that it registers "
                f"({few(names)}), which may be the cause: the copy that is exported has the model's own values there. If its "
                "forward uses them, register their module in the dense arch and call it through self"
            ) from error
