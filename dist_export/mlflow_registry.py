"""MLflow's model registry: ``models:/<name>/<version>`` and ``models:/<name>@<alias>``.

Needs ``mlflow-skinny`` (with ``sqlalchemy`` and ``alembic`` for a database as the store). The registry's address is
MLflow's own business: ``MLFLOW_REGISTRY_URI`` or ``MLFLOW_TRACKING_URI``, or the option ``registry_uri``.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dist_export.errors import ConfigError
from dist_export.registries import Registered, Resolved
from dist_export.storage import Directory

if TYPE_CHECKING:
    from mlflow import MlflowClient

_URI = re.compile(r"models:/+([^/@]+)(?:/([^/@]+)|@([^/@]+))?")
_LOCATION_TAG = "dist_export.location"
_DIGEST_TAG = "dist_export.digest"
_MAX_TAG_CHARS = 4000
"""MLflow 2 takes 5,000 in a tag's value."""


class MlflowRegistry:
    """One registry; see :class:`~dist_export.registries.Registry`."""

    def __init__(self, registry_uri: str | None = None, location: str | None = None) -> None:
        """Connect when asked.

        Args:
            registry_uri: address of the registry; by default MLflow's settings.
            location: directory or URL below which packages of new versions go, as ``<location>/<name>/<key>``; by default
                the registered model's tag ``dist_export.location``.
        """
        self._registry_uri = registry_uri
        self._location = location

    def resolve(self, uri: str) -> Resolved:
        """Return the source of a version. ConfigError where there is no such version, or nothing at its source."""
        name, version, alias = _parse(uri)
        if version is None and alias is None:
            raise ConfigError(f"{uri}: give a version or an alias: models:/{name}/<version> or models:/{name}@<alias>")
        client = self._client()
        from mlflow.exceptions import MlflowException

        try:
            if alias is not None:
                found = client.get_model_version_by_alias(name, alias)
            elif version == "latest":
                found = self._latest(client, name)
            else:
                found = client.get_model_version(name, str(version))
        except MlflowException as error:
            raise ConfigError(f"{uri}: {error.message}") from None
        pinned = f"models:/{name}/{found.version}"
        directory = (found.source or "").removeprefix("file://")
        if not directory:
            raise ConfigError(f"{uri} is {pinned}, which has no source")
        if not Directory(directory).exists():
            raise ConfigError(
                f"{uri} is {pinned}, whose source {directory} is not there; MLflow does not look when a version is made"
            )
        return Resolved(directory, pinned)

    def place(self, uri: str, *, key: str) -> str:
        """Return ``<location>/<name>/<key>``. ConfigError without a location."""
        name, version, alias = _parse(uri)
        if version is not None or alias is not None:
            raise ConfigError(f"{uri}: a package becomes a new version, so give the name alone: models:/{name}")
        location = self._location
        client = self._client()
        from mlflow.exceptions import MlflowException

        if location is None:
            try:
                location = client.get_registered_model(name).tags.get(_LOCATION_TAG)
            except MlflowException:
                location = None  # a model that is not there yet has no tags
        if not location:
            raise ConfigError(
                f"{uri}: where do its packages go? Set registry_options: {{location: DIRECTORY}}, or the tag "
                f"{_LOCATION_TAG} of the registered model"
            )
        return f"{location.rstrip('/')}/{name}/{key}"

    def register(self, uri: str, package: Registered) -> str:
        """Make a new version that refers to the package; the one that has its digest already if there is one."""
        name, *_ = _parse(uri)
        client = self._client()
        from mlflow.exceptions import MlflowException

        try:
            client.get_registered_model(name)
        except MlflowException:
            client.create_registered_model(name)
        for known in client.search_model_versions(f"name='{name}'"):
            if known.source == package.directory and known.tags.get(_DIGEST_TAG) == package.digest:
                return f"models:/{name}/{known.version}"
        tags = {
            _DIGEST_TAG: package.digest,
            "dist_export.source": package.source,
            "dist_export.outputs": ",".join(output for output, _, _ in package.outputs),
            "dist_export.signature": json.dumps(
                {"inputs": _columns(package.inputs), "outputs": _columns(package.outputs)}, separators=(",", ":")
            ),
            "dist_export.version": package.versions.get("dist_export", ""),
        }
        made = client.create_model_version(
            name, source=package.directory, tags={tag: _fitting(value) for tag, value in tags.items() if value}
        )
        return f"models:/{name}/{made.version}"

    def _client(self) -> MlflowClient:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            packages = "mlflow-skinny sqlalchemy alembic"  # the extra [mlflow]
            raise ConfigError(f"models:/ URIs need MLflow: pip install {packages} ({error})") from None
        return MlflowClient(registry_uri=self._registry_uri)

    def _latest(self, client: MlflowClient, name: str) -> Any:
        versions = client.search_model_versions(f"name='{name}'")
        if not versions:
            raise ConfigError(f"models:/{name} has no version")
        return max(versions, key=lambda found: int(found.version))


def _parse(uri: str) -> tuple[str, str | None, str | None]:
    match = _URI.fullmatch(uri)
    if match is None:
        raise ConfigError(f"{uri} is no URI of MLflow's registry: models:/<name>/<version> or models:/<name>@<alias>")
    return match[1], match[2], match[3]


def _columns(tensors: tuple[tuple[str, str, tuple[int | str, ...]], ...]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": dtype, "shape": [-1 if isinstance(d, str) else d for d in shape]}
        for name, dtype, shape in tensors
    ]


def _fitting(value: str) -> str:
    return value if len(value) <= _MAX_TAG_CHARS else value[: _MAX_TAG_CHARS - 3] + "..."
