"""Which tensors of a checkpoint are tables, by the model that they are of. Pure: names alone.

Names are those within the model, without the path elements that wrappers put in. A weight may have several names, where
modules share it; a checkpoint may hold it under one of them, as ``safetensors.torch.save_model`` writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dist_export.errors import CheckpointError

WRAPPER_ELEMENTS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_dmp_wrapped_module", "_checkpoint_wrapped_module"}
)
"""Path elements that DDP, ``torch.compile``, FSDP, torchrec's DistributedModelParallel and activation checkpointing put into
names."""


_MODEL_ROOTS = ("model", "state_dict", "model_state_dict")
"""Keys under which a training loop saves the model itself, and under which it would not save a copy of it."""


def plain_name(path: str) -> str:
    """Return a path without the elements of wrappers."""
    return ".".join(element for element in path.split(".") if element not in WRAPPER_ELEMENTS)


def distinct_names(paths: Iterable[str]) -> dict[str, str]:
    """Return a name for each path: without the elements of wrappers, unless two paths would have the same name.

    A module of the caller's may be called ``module`` too.
    """
    every = list(paths)
    counts = Counter(map(plain_name, every))
    return {path: plain if counts[plain := plain_name(path)] == 1 else path for path in every}


class ModelWeights(NamedTuple):
    """What a model says of the tensors of its checkpoint. The same on all ranks."""

    sparse_name: str
    dense_name: str
    """The plain paths of sparse and dense arch within the model; empty for the model itself."""
    tables: frozenset[str]
    """Weights of embeddings within the sparse arch."""
    elsewhere: frozenset[str]
    """Weights of embeddings that are in neither arch."""
    ties: frozenset[tuple[str, ...]] = frozenset()
    """Names of one and the same weight, two or more each and in order."""
    embeddings: frozenset[str] = frozenset()
    """Plain paths of the ``nn.Embedding`` and ``nn.EmbeddingBag`` within the sparse arch."""
    computed: tuple[tuple[str, str], ...] = ()
    """Of the embeddings, those whose weight is computed from other parameters, and by what."""
    dense_names: frozenset[str] = frozenset()
    """Plain names, within the dense arch, of its parameters and of the buffers that are saved."""

    def sort(self, names: Iterable[str]) -> Roles:
        """Say what the tensors of these names, as a checkpoint has them, are to the model.

        Raises:
            CheckpointError: two of them differ by elements of wrappers alone, and are a table of the model.
        """
        begin = f"{self.sparse_name}."
        by_plain: dict[str, str] = {}
        for name in names:
            plain = plain_name(name)
            other = by_plain.setdefault(plain, name)
            if other != name and not self.tables.isdisjoint((plain, begin + plain)):
                raise CheckpointError(
                    f"the checkpoint has both {other!r} and {name!r}: without the path elements of wrappers "
                    f"({', '.join(sorted(WRAPPER_ELEMENTS))}) they are one table of the model. Save it under one name, or give "
                    "the submodule another name"
                )
        self._refuse_second_state(by_plain)
        # a checkpoint may be of the sparse arch alone
        is_sparse_alone = bool(self.sparse_name) and not any(name.startswith(begin) for name in by_plain)
        within = {begin + name if is_sparse_alone else name: name for name in by_plain}
        held = {full: by_plain[name] for full, name in within.items()} | by_plain
        tables = {held[name] for name in self.tables if name in held}
        aliases = [
            (name, next(held[other] for other in tie if other in held))
            for tie in self.ties
            if any(name in held for name in tie)
            for name in tie
            if name not in held
        ]
        return Roles(
            tables=frozenset(tables),
            dense=frozenset(held[name] for name in held if self._stays(name)),
            both=frozenset(held[name] for name in self.tables if name in held and is_below(name, self.dense_name)),
            elsewhere=frozenset(held[name] for name in self.elsewhere if name in held) - tables,
            table_aliases=tuple(sorted(pair for pair in aliases if pair[0] in self.tables)),
            dense_aliases=tuple(sorted(pair for pair in aliases if is_below(pair[0], self.dense_name))),
        )

    def _refuse_second_state(self, by_plain: Mapping[str, str]) -> None:
        """Refuse a state below an element of wrappers, such as ``module``, beside another whole state of the model."""
        begun = {name: by_plain[name] for name in self.tables if name in by_plain}
        wrapped = [name for name, full in begun.items() if full.split(".")[0] in WRAPPER_ELEMENTS]
        if not wrapped or len(wrapped) < len(begun):
            return
        first = min(wrapped)
        for root in _MODEL_ROOTS:
            if all(f"{root}.{name}" in by_plain for name in wrapped):
                raise CheckpointError(
                    f"the checkpoint has both {begun[first]!r} and {by_plain[f'{root}.{first}']!r}, and either could be the "
                    f"model's. Nothing was written. Set state_root: {begun[first].split('.')[0]}, or state_root: {root}"
                )

    def _stays(self, name: str) -> bool:
        """Whether something is in the program and nowhere else; what a part of the dense arch, the sparse arch, has may be."""
        is_in_sparse = is_below(self.sparse_name, self.dense_name) and is_below(name, self.sparse_name)
        return is_below(name, self.dense_name) and not is_in_sparse


class Roles(NamedTuple):
    """What the tensors of a checkpoint are to a model, by their names there."""

    tables: frozenset[str] = frozenset()
    dense: frozenset[str] = frozenset()
    """Within the dense arch: they stay in the program, and are no tables."""
    both: frozenset[str] = frozenset()
    """Tables that the program needs too, for the sparse arch is a part of the dense arch."""
    elsewhere: frozenset[str] = frozenset()
    table_aliases: tuple[tuple[str, str], ...] = ()
    """(table, tensor): a weight of the sparse arch that the checkpoint holds under another name of it."""
    dense_aliases: tuple[tuple[str, str], ...] = ()
    """(parameter, tensor): the same for the dense arch."""

    @property
    def exported(self) -> frozenset[str]:
        """Tensors that are tables by what the model says, under whatever name."""
        return self.tables | frozenset(source for _, source in self.table_aliases)

    @property
    def taken(self) -> frozenset[str]:
        """Tensors, also under further names of theirs, that are a table or in the program by what the model says."""
        aliases = [name for pair in (*self.table_aliases, *self.dense_aliases) for name in pair]
        return self.tables | self.dense | frozenset(aliases)

    def is_table(self, name: str, *, is_asked: bool, is_in_collection: bool) -> bool:
        """Whether a tensor is a table.

        Args:
            name: as the checkpoint has it.
            is_asked: whether a pattern of the setting ``treat_as_tables`` matches it.
            is_in_collection: whether its name is that of a weight of an embedding collection.
        """
        if name in self.tables:
            return True
        if name in self.dense:
            return False
        return is_asked or (is_in_collection and name not in self.elsewhere)


def is_below(name: str, path: str) -> bool:
    """Whether a name is that of something within the module at a path; within the model itself everything is."""
    return not path or name == path or name.startswith(f"{path}.")


def merge_weights(found: Sequence[ModelWeights]) -> ModelWeights:
    """Put together what the ranks see of the same model: of a sharded one each may hold other tables."""
    first = found[0]
    return first._replace(
        tables=frozenset().union(*(its.tables for its in found)),
        elsewhere=frozenset().union(*(its.elsewhere for its in found)),
        embeddings=frozenset().union(*(its.embeddings for its in found)),
        ties=frozenset().union(*(its.ties for its in found)),
    )
