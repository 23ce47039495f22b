"""Reader of what ``torch.save`` wrote: one file, or several with ``pytorch_model.bin.index.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.checkpoint.raw_ids import Piece
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.checkpoint.tensors.classify import Unread, join_pieces
from dist_export.checkpoint.tensors.common import PlainFacts, make_checkpoint, open_files, stat_files
from dist_export.checkpoint.tensors.torch_file import TorchFile, is_torch_file, read_extra_states, read_torch_file
from dist_export.checkpoint.tensors.weight_map import match_weight_map, note_missing_parts, read_weight_map
from dist_export.checkpoint.torch_items import Item
from dist_export.errors import CheckpointError
from dist_export.storage.directory import Directory

INDEX_JSON = "pytorch_model.bin.index.json"
SUFFIXES = (".pt", ".pth", ".ckpt")
"""Of files that torch wrote, as a rule; ``.bin`` can be anything, and is looked into."""


class TorchShare(NamedTuple):
    """What one rank read."""

    files: tuple[TorchFile, ...]


class TorchReader:
    """Reads one checkpoint of ``torch.save``. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(
        self,
        directory: Directory,
        settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
        *,
        names: Sequence[str] = (),
    ) -> None:
        """Find the files; ``names`` are those that are meant, where that is known.

        CheckpointError where there is none, or it cannot be told which one counts.
        """
        self.directory = directory
        self._settings = settings
        has_index = not names and directory.exists(INDEX_JSON)
        self._weight_map = read_weight_map(directory, INDEX_JSON) if has_index else None
        if not names:
            index = self._weight_map
            names = find_torch_files(directory) if index is None else sorted(set(index.values()))
        if not names:
            raise CheckpointError(
                f"{directory.url}: no file of torch.save among its {len(directory.names())} files; looked for "
                f"{INDEX_JSON} and *.pt, *.pth, *.ckpt, *.bin"
            )
        self._notes = () if self._weight_map is not None else note_missing_parts(directory, names)
        if self._weight_map is None and len(names) > 1:
            _refuse_shards(directory, names)
            raise CheckpointError(
                f"{directory.url} holds several files of torch.save ({', '.join(names[:4])}); give the one that is meant as "
                f"ckpt_dir, such as {directory.describe(names[0])}"
            )
        self.files: tuple[SourceFile, ...] = stat_files(directory, names)

    def read_headers(self, files: range) -> TorchShare:
        """Find the tensors in these files."""
        try:
            with open_files(self.directory, self.files) as readers:
                found = [read_torch_file(readers[number], self.files[number].size, number) for number in files]
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror or error}") from None
        return TorchShare(tuple(found))

    def join(self, shares: Sequence[TorchShare]) -> PlainFacts:
        """Put together what all files hold. CheckpointError where a name stands twice, or the index says otherwise."""
        found = [file for share in shares for file in share.files]
        if self._weight_map is not None:
            held = ((tensor.name, self.files[tensor.piece.file].name) for file in found for tensor in file.tensors)
            match_weight_map(self._weight_map, held, where=self.directory.describe(INDEX_JSON))
        paths = [self.directory.describe(file.name) for file in self.files]
        located = [tensor for file in found for tensor in file.tensors]
        pieces = ((its.name, its.dtype, its.piece.sizes, its.piece) for its in located)
        tensors = join_pieces(pieces, where=self.directory.url, paths=paths)
        unread = Unread(
            paths={its.name: its.path for its in located},
            reasons={its.name: its.reason for its in located if its.reason},
            extra=tuple(path for file in found for path in file.extra),
        )
        rest = tuple(tensor for file in found for tensor in file.rest)
        notes = (*self._notes, *(note for file in found for note in file.notes))
        return PlainFacts(tensors, notes, rest, unread)

    def read_extra_states(self, make_tensor: Callable[[str, Piece], Any]) -> dict[tuple[str, ...], Any]:
        """Return the extra state of modules, by the keys that lead to it; of one that is not read, why.

        ``make_tensor`` returns the tensor of a dtype (torch's name) that lies at a place.
        """
        states: dict[tuple[str, ...], Any] = {}
        with open_files(self.directory, self.files) as readers:
            for number, file in enumerate(self.files):

                def make(dtype: str, shape: tuple[int, ...], item: Item, number: int = number) -> Any:
                    return make_tensor(dtype, Piece((0,) * len(shape), shape, number, item.offset, item.strides))

                states |= read_extra_states(readers[number], file.size, make)
        return states

    def assemble(self, shares: Sequence[TorchShare]) -> Checkpoint:
        """Build the metadata from what all files hold."""
        return make_checkpoint(self.directory, self.files, self.join(shares), self._settings, kind="torch")


def _refuse_shards(directory: Directory, names: Sequence[str]) -> None:
    """Refuse files of which each holds the shards of one rank: none of them is the checkpoint."""
    try:
        with directory.open_reader(names[0]) as reader:
            found = read_torch_file(reader, directory.stat(names[0]).size, 0).tensors
    except (CheckpointError, OSError):
        return  # what is there is told in another way
    sharded = [tensor for tensor in found if "one rank's shards" in tensor.reason]
    if sharded:
        raise CheckpointError(
            f"{directory.url} holds {len(names)} files of torch.save ({', '.join(names[:4])}), and in {names[0]} "
            f"{sharded[0].name!r} is {sharded[0].reason}"
        )


def find_torch_files(directory: Directory) -> list[str]:
    """Return the files that ``torch.save`` wrote, by name; by how they begin those called ``.bin``, and one that was named."""

    def is_one(name: str) -> bool:
        is_doubtful = name.endswith(".bin") or directory.is_file
        return name.endswith(SUFFIXES) or (is_doubtful and is_torch_file(_head(directory, name)))

    return list(filter(is_one, directory.names()))


def holds_model(directory: Directory, names: Sequence[str]) -> bool:
    """Whether one of these files holds a model: a matrix that is no optimizer state. Reads no payload.

    What trainers keep for themselves beside a checkpoint of another format (arguments, optimizer, random state) holds none,
    whatever it is called; nor does what cannot be read. OSError where a file cannot be looked at.
    """
    for name in names:
        with directory.open_reader(name) as reader:
            try:
                found = read_torch_file(reader, directory.stat(name).size, 0).tensors
            except CheckpointError:
                continue
        if any(len(tensor.piece.sizes) > 1 and "state" not in tensor.name.split(".") for tensor in found):
            return True
    return False


def _head(directory: Directory, name: str) -> bytes:
    head = bytearray(min(directory.stat(name).size, 16))
    with directory.open_reader(name) as reader:
        reader.read_into(memoryview(head), 0)
    return bytes(head)
