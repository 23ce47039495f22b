"""What a reader refuses: the error says which file, what was found, and what to do next."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dist_export
from dist_export.errors import CheckpointError
from tests.support.dynamicemb_writer import make_table, write_dump
from tests.support.recis_writer import make_tables, write_checkpoint

ROOT = Path(dist_export.__file__).parent
NEXT = re.compile(
    r"\b([Ss]ave|[Cc]opy|[Tt]ake|[Gg]ive|[Ss]et|[Ss]ay|[Ll]eave|[Ee]xport|[Rr]un|[Rr]ename|[Rr]emove|[Ll]oad|[Dd]ump|drop_tables"
    r"|verify|must be one shared directory|looked for|ckpt_dir must be|state_root takes|format: auto takes)\b"
)
"""A word of what to do, or of what is expected where."""
OF_THE_SYSTEM = re.compile(
    r"cannot be read: \.\.\.$|^(\.\.\.: )?\.\.\.( \.\.\.)*$|: \.\.\.: \.\.\.$|^\.\.\.: \.{6}$|; \.\.\.$|no tensor\.\.\.$"
)
"""What another text says: the system's, or that of a function of its own."""


def find_refusals() -> Iterator[tuple[str, str]]:
    """Yield (place, text) of each error of the readers, with ``...`` for values."""
    for folder in ("checkpoint", "formats"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
                if is_call and node.func.id in ("CheckpointError", "UnaskedError"):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", _text_of(node.args[0])


def _text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)  # type: ignore[misc]
    return str(node.value) if isinstance(node, ast.Constant) else "..."


def test_each_refusal_of_a_reader_says_what_to_do() -> None:
    found = list(find_refusals())
    assert len(found) > 120
    assert [its for its in found if not NEXT.search(its[1]) and not OF_THE_SYSTEM.search(its[1])] == []


def save_dcp(folder: Path) -> Path:
    dcp.save({"ebc.embedding_bags.t.weight": torch.randn(200, 8)}, checkpoint_id=folder, no_dist=True)
    return next(folder.glob("*.distcp"))


def save_torch(folder: Path) -> Path:
    folder.mkdir()
    torch.save({"ebc.embedding_bags.t.weight": torch.randn(200, 8)}, folder / "last.pt")
    return folder / "last.pt"


def save_recis(folder: Path) -> Path:
    write_checkpoint(folder, make_tables({"t": 60}, 2))
    return min(folder.glob("model-*.safetensors"))


def save_dump(folder: Path) -> Path:
    write_dump(folder, "t", make_table(list(range(1, 41)), 4), world_size=2)
    return min(folder.rglob("*_emb_values.rank_0*"))


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("save", [save_dcp, save_torch, save_recis, save_dump], ids=lambda save: save.__name__)
def test_a_file_that_is_cut_or_gone_is_one_line_that_says_what_to_do(save, damage: str, tmp_path: Path) -> None:
    file = save(tmp_path / "ckpt")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError) as refused:
        dist_export.export({"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out")})
    said = str(refused.value)
    assert "\n" not in said
    assert str(tmp_path / "ckpt") in said
    assert re.search(r"[Cc]opy|looked for", said)
    assert not (tmp_path / "out").exists()
