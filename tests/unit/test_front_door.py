"""What users may rely on, and that one module alone talks to torch.distributed."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import dist_export

PACKAGE = Path(dist_export.__file__).parent


def test_the_front_door_holds_what_it_lists() -> None:
    for name in dist_export.__all__:
        assert getattr(dist_export, name) is not None
    assert sorted(dist_export.__all__) == dir(dist_export)


def test_one_module_talks_to_torch_distributed() -> None:
    """Payload never goes through collectives, and nobody waits in one that the others do not know of.

    ``ranks.py`` issues them, in the group that ``joining.py`` makes.
    """
    collectives = ("all_gather", "all_reduce", "broadcast", "barrier", "scatter", "all_to_all")
    groups = ("init_process_group", "new_group")
    for file in PACKAGE.rglob("*.py"):
        if file.name == "ranks.py":
            continue
        calls = collectives if file.name == "joining.py" else collectives + groups
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "scatter_reduce":
                continue  # of a tensor
            if isinstance(node, ast.Attribute) and node.attr.startswith(calls):
                owner = ast.unparse(node.value)  # the ranks of an export have verbs of the same names
                assert owner.rpartition(".")[2].strip("_") == "ranks", f"{file.name}: {owner}.{node.attr}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                assert not [name.name for name in node.names if name.name.startswith(calls)], file.name


def test_the_exporter_takes_the_parameters_of_the_reference_in_its_order() -> None:
    """Source: the signature of RecIS's ``recis.framework.Exporter``."""
    names = list(inspect.signature(dist_export.Exporter).parameters)
    assert names[:16] == [
        "model",
        "sparse_model_name",
        "dense_model_name",
        "dataset",
        "ckpt_dir",
        "export_dir",
        "dense_optimizer",
        "export_folder_name",
        "export_model_name",
        "export_outputs",
        "fg",
        "fg_conf_or_path",
        "mc_conf_or_path",
        "filter_sparse_opt",
        "add_subfolder",
        "need_export_sparse",
    ]
