"""What users may rely on, and which room may import which."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import dist_export

PACKAGE = Path(dist_export.__file__).parent
FORBIDDEN = {
    "layout": {"storage", "checkpoint", "plan", "transfer", "dense", "package", "collective", "commit", "exporter"},
    "checkpoint": {"plan", "transfer", "dense", "package", "collective", "commit", "exporter"},
    "plan": {"transfer", "dense", "package", "collective", "commit", "exporter"},
    "transfer": {"dense", "package", "commit", "exporter"},
    "dense": {"transfer", "package", "commit", "exporter"},
    "package": {"plan", "transfer", "dense", "commit", "exporter"},
    "archive": {"checkpoint", "plan", "transfer", "dense", "package", "collective", "commit", "exporter"},
}

ALLOWED = {
    ("verify/verify.py", "dist_export.runtime.ranks"),  # several ranks share its work
    ("verify/metadata_checks.py", "dist_export.checkpoint.recis.model_pt"),  # it also verifies checkpoints
    ("verify/combine.py", "dist_export.checkpoint.recis.model_pt"),
}


def imports_of(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_the_front_door_holds_what_it_lists() -> None:
    for name in dist_export.__all__:
        assert getattr(dist_export, name) is not None
    assert sorted(dist_export.__all__) == dir(dist_export)


def test_a_room_imports_only_rooms_upstream_of_it() -> None:
    for room, forbidden in FORBIDDEN.items():
        for file in (PACKAGE / room).glob("*.py"):
            for module in imports_of(file):
                parts = module.split(".")
                is_allowed = (f"{room}/{file.name}", module) in ALLOWED
                if parts[0] == "dist_export" and len(parts) > 1 and not is_allowed:
                    assert parts[1] not in forbidden, f"{room}/{file.name} imports {module}"


def test_one_module_talks_to_torch_distributed() -> None:
    """Payload never goes through collectives, and nobody waits in one that the others do not know of."""
    calls = (
        "all_gather",
        "all_reduce",
        "broadcast",
        "barrier",
        "scatter",
        "all_to_all",
        "init_process_group",
        "new_group",
    )
    for file in PACKAGE.rglob("*.py"):
        if file.name == "collective.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith(calls), f"{file.name}: {node.attr}"


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
