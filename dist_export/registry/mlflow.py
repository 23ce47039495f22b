"""MLflow's model registry: ``models:/<name>/<version>`` and ``models:/<name>@<alias>``.

Needs ``mlflow-skinny`` (with ``sqlalchemy`` and ``alembic`` if the store is a database). MLflow's own settings give the
registry's address: ``MLFLOW_REGISTRY_URI`` or ``MLFLOW_TRACKING_URI``. The option ``registry_uri`` overrides them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from dist_export.errors import ConfigError
from dist_export.redact import first_line
from dist_export.registry.base import Registered, Resolved
from dist_export.storage.urls import open_directory

if TYPE_CHECKING:
    from mlflow import MlflowClient

_URI = re.compile(r"models:/+([^/@]+)(?:/([^/@]+)|@([^/@]+))?")
_LOCATION_TAG = "dist_export.location"
_DIGEST_TAG = "dist_export.digest"
_NOT_THERE = "RESOURCE_DOES_NOT_EXIST"
_NO_RUNS = ("databricks", "uc:")
"""Registries that do not store runs too."""
_MAX_TAG_CHARS = 4000
"""MLflow 2 allows 5,000 characters in a tag's value."""


class MlflowRegistry:
    """One registry; see :class:`~dist_export.registry.base.Registry`."""

    def __init__(self, registry_uri: str | None = None, location: str | None = None) -> None:
        """Keep the options. The connection is made by the first call.

        Args:
            registry_uri: address of the registry; by default MLflow's settings.
            location: directory or URL below which packages of new versions go, as ``<location>/<name>/<key>``; by default
                the registered model's tag ``dist_export.location``.
        """
        self._registry_uri = registry_uri
        self._location = location

    def resolve(self, uri: str) -> Resolved:
        """Return the source of a version. ConfigError if the version or the directory at its source does not exist."""
        name, version, alias = _parse(uri)
        if version is None and alias is None:
            raise ConfigError(f"{uri}: give a version or an alias: models:/{name}/<version> or models:/{name}@<alias>")
        _import_client()
        self._refuse_empty(uri)
        with self._asking(uri) as client:
            if alias is not None:
                found = client.get_model_version_by_alias(name, alias)
            elif version == "latest":
                found = self._latest(client, name)
            else:
                found = client.get_model_version(name, str(version))
        pinned = f"models:/{name}/{found.version}"
        directory = (found.source or "").removeprefix("file://")
        if not directory:
            raise ConfigError(f"{uri} is {pinned}, which has no source")
        if not open_directory(directory).exists():
            raise ConfigError(
                f"{uri} is {pinned}, whose source {directory} is not there; MLflow does not look when a version is made"
            )
        return Resolved(directory, pinned)

    def check(self, uri: str) -> None:
        """Refuse a URI that is no name of a model, or that names a version. ConfigError."""
        name, version, alias = _parse(uri)
        if version is not None or alias is not None:
            raise ConfigError(f"{uri}: a package becomes a new version, so give the name alone: models:/{name}")
        _import_client()

    def place(self, uri: str, *, key: str) -> str:
        """Return ``<location>/<name>/<key>``. ConfigError without a location."""
        self.check(uri)
        name, *_ = _parse(uri)
        location = self._location
        if location is None and self._has_database():
            with self._asking(uri) as client:
                model = _find_model(client, name)
            location = None if model is None else model.tags.get(_LOCATION_TAG)
        if not location:
            raise ConfigError(
                f"{uri}: where do its packages go? Set registry_options: {{location: DIRECTORY}}, or the tag "
                f"{_LOCATION_TAG} of the registered model; {self._where()}"
            )
        return f"{location.rstrip('/')}/{name}/{key}"

    def register(self, uri: str, package: Registered) -> str:
        """Make a new version that refers to the package. If a version with its digest exists, return that one."""
        name, *_ = _parse(uri)
        tags = {
            _DIGEST_TAG: package.digest,
            "dist_export.source": package.source,
            "dist_export.outputs": ",".join(output for output, _, _ in package.outputs),
            "dist_export.signature": json.dumps(
                {"inputs": _columns(package.inputs), "outputs": _columns(package.outputs)}, separators=(",", ":")
            ),
            "dist_export.version": package.versions.get("dist_export", ""),
        }
        with self._asking(uri) as client:
            if _find_model(client, name) is None:
                client.create_registered_model(name)
            for known in client.search_model_versions(f"name='{name}'"):
                if known.source == package.directory and known.tags.get(_DIGEST_TAG) == package.digest:
                    return f"models:/{name}/{known.version}"
            made = client.create_model_version(
                name, source=package.directory, tags={tag: _fitting(value) for tag, value in tags.items() if value}
            )
        return f"models:/{name}/{made.version}"

    @contextlib.contextmanager
    def _asking(self, uri: str) -> Iterator[MlflowClient]:
        """Yield a client. Exceptions of MLflow and its stores become a ConfigError that names the registry's address."""
        make = _import_client()
        from mlflow.exceptions import MlflowException

        try:
            yield make(self._tracking_uri(), self._registry_uri)
        except ConfigError:
            raise
        except Exception as error:
            what = (
                error.message if isinstance(error, MlflowException) else f"{type(error).__name__}: {first_line(error)}"
            )
            raise ConfigError(f"{uri}: {what}; {self._where()}") from error

    def _tracking_uri(self) -> str | None:
        """Return the address for runs. They are not used, but without an address MLflow would make a database for them."""
        from mlflow import is_tracking_uri_set

        if is_tracking_uri_set():  # type: ignore[no-untyped-call]
            return None
        address = self._address()
        return None if address.startswith(_NO_RUNS) else address

    def _address(self) -> str:
        from mlflow import get_registry_uri

        return self._registry_uri or str(get_registry_uri())

    def _where(self) -> str:
        """Return the registry's address, and how to change it; for messages, which show no credentials."""
        if self._registry_uri:
            return f"the registry asked is {self._address()}, as registry_options say"
        return (
            f"the registry asked is {self._address()}, as MLflow is set; MLFLOW_REGISTRY_URI, MLFLOW_TRACKING_URI or "
            "registry_options: {registry_uri: ADDRESS} set another"
        )

    def _refuse_empty(self, uri: str) -> None:
        """Refuse an SQLite file that does not exist: MLflow would make an empty one, by default in the working directory."""
        if not self._has_database():
            raise ConfigError(f"{uri}: the registry's database is not there; {self._where()}")

    def _has_database(self) -> bool:
        """Return whether the registry is no SQLite file, or its file exists."""
        address = self._address()
        file = unquote(address.partition("?")[0].removeprefix("sqlite:///"))
        return not address.startswith("sqlite:///") or os.path.exists(file)

    def _latest(self, client: MlflowClient, name: str) -> Any:
        versions = client.search_model_versions(f"name='{name}'")
        if not versions:
            raise ConfigError(f"models:/{name} has no version")
        return max(versions, key=lambda found: int(found.version))


def _import_client() -> type[MlflowClient]:
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError(
            f"models:/ URIs need MLflow: pip install mlflow-skinny sqlalchemy alembic ({error})"
        ) from None
    return MlflowClient


def _find_model(client: MlflowClient, name: str) -> Any:
    """Return a registered model; None if there is none of this name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != _NOT_THERE:
            raise  # if the registry does not answer, it is unknown whether the model exists
        return None


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
