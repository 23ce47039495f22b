"""What a manifest says of the values that a program has from the caller's model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OWN_VALUES = "own_values"
"""Under it ``run`` names what the program has from the model itself, which no identity tells of."""

OWN_DIGEST = "own_values_digest"
"""Under it ``run`` has a digest of these values, where they could be read; else it is not there."""

SPARSE_VALUES = "sparse_own_values"
"""Under it ``run`` names what the sparse arch of the sample had from the model itself, besides tables."""

SPARSE_DIGEST = "sparse_own_values_digest"
"""Under it ``run`` has a digest of these values."""


class OwnValues(NamedTuple):
    """The values that a program, or its sample, has from the caller's model."""

    model: Any = None
    dense_model_name: str = ""
    sparse_model_name: str = ""

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

    def digest_sparse(self, names: Sequence[str]) -> str | None:
        """Return the digest of the values of these names in the sparse arch; None where one cannot be read. Rank 0."""
        if self.model is None:
            return None
        from dist_export.dense.own_values import digest_sparse_values
        from dist_export.model.unwrap import find_arch

        sparse_arch = find_arch(self.model, self.sparse_model_name, "sparse_model_name")
        return digest_sparse_values(self.model, sparse_arch, names, dense_model_name=self.dense_model_name)

    def find_difference(self, run: Mapping[str, Any]) -> str:
        """Return why the values are not those of a package, from its manifest's ``run``; empty where they are. Rank 0."""
        for whose, key, digest_key, digest in (
            ("its program has values of the model itself", OWN_VALUES, OWN_DIGEST, self.digest),
            ("its sample has values of the model's own sparse arch", SPARSE_VALUES, SPARSE_DIGEST, self.digest_sparse),
        ):
            names = run.get(key)
            known, now = run.get(digest_key), digest(names) if names else None
            if names and (known is None or known != now):
                is_unknown = known is None or now is None
                why = "and nothing tells whether they are the same" if is_unknown else "which are others now"
                return f"{whose} (run.{key} names them), {why}"
        return ""
