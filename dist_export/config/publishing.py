"""Checks of the settings of a directory of versions."""

from __future__ import annotations

from dist_export.errors import ConfigError

VERSIONS = "versions:"
"""Begins the URI of a directory of versions; see ``registry/versions.py``."""


def resolve_export_dir(
    *, publish: str | None, export_dir: str, keep_versions: int | None, register: str | None, add_subfolder: bool
) -> str:
    """Return ``export_dir``, or the URI that ``publish`` stands for. ConfigError for what does not go together."""
    if publish is not None:
        if export_dir:
            raise ConfigError(f"publish is {publish!r} and export_dir {export_dir!r}; give one of the two")
        if not publish:
            raise ConfigError("publish is empty; give a directory or an fsspec URL")
        export_dir = f"{VERSIONS}{publish}"
    is_published = export_dir.startswith(VERSIONS)
    if is_published and add_subfolder:
        raise ConfigError("add_subfolder puts the package into a folder of the day, and publish into one of its own")
    if keep_versions is not None and keep_versions < 1:
        raise ConfigError(f"keep_versions is {keep_versions}; give a number from 1 up, or null to keep all")
    if keep_versions is not None and not is_published and not (register or "").startswith(VERSIONS):
        raise ConfigError("keep_versions is for a directory of versions; set publish")
    return export_dir
