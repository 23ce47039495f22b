"""What a manifest says of the values that a program has from the caller's model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

OWN_VALUES = "own_values"
"""Under it ``run`` names what the program has from the model itself, which no identity tells of."""

OWN_DIGEST = "own_values_digest"
"""Under it ``run`` has a digest of these values, where they could be read; else it is not there."""


class OwnValues(NamedTuple):
    """The values that a program has from the caller's model."""

    model: Any = None
    dense_model_name: str = ""

    def digest(self, names: Sequence[str]) -> str | None:
        """Return the digest of the values of these names as the model has them; None where one cannot be read. Rank 0."""
        if self.model is None:
            return None
        from dist_export.dense.own_values import digest_own_values
        from dist_export.model.unwrap import find_arch

        dense_arch = find_arch(self.model, self.dense_model_name, "dense_model_name")
        steps = self.dense_model_name.split(".") if self.dense_model_name else []
        above = [find_arch(self.model, ".".join(steps[:length]), "dense_model_name") for length in range(len(steps))]
        return digest_own_values(dense_arch, names, skip=frozenset(map(id, above)))
