"""Turn a distributed recommender checkpoint into a package that serving loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_export._version import VERSION
from dist_export.errors import DistExportError, ExportError, PackageError, StepFailedError, UserError

if TYPE_CHECKING:
    from dist_export.api import Exporter, compact, export
    from dist_export.config.schema import ExportConfig
    from dist_export.manifest import Manifest
    from dist_export.package.reader import Package, open_package

__version__ = VERSION

__all__ = [
    "DistExportError",
    "ExportConfig",
    "ExportError",
    "Exporter",
    "Manifest",
    "Package",
    "PackageError",
    "StepFailedError",
    "UserError",
    "__version__",
    "compact",
    "export",
    "open_package",
]

_MODULE_OF = {
    "Exporter": "dist_export.api",
    "compact": "dist_export.api",
    "export": "dist_export.api",
    "ExportConfig": "dist_export.config.schema",
    "Manifest": "dist_export.manifest",
    "Package": "dist_export.package.reader",
    "open_package": "dist_export.package.reader",
}


def __getattr__(name: str) -> Any:
    """Import an exported name at its first use, so that a process that only opens a package does not import the exporter."""
    if name in _MODULE_OF:
        import importlib

        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
