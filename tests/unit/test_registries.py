"""Model registries: MLflow's own, on a SQLite file, and a resolver of somebody else's behind an entry point."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torchrec_shape
from recis_writer import make_tables, write_checkpoint

import dist_export
from dist_export import cli, locations, registries
from dist_export.errors import ConfigError, ExportError
from dist_export.mlflow_registry import MlflowRegistry
from dist_export.package.verify import verify
from dist_export.registries import Registered, Resolved

SETTINGS = {"model": "tiny_model:build_model", "dataset": "tiny_model:build_dataset", "filter_sparse_opt": True}

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and its database layer warn of their own dependencies


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Making the tables takes a second, so once; each test has models of its own."""
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/registry.db"


@pytest.fixture
def client(database: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    return MlflowClient(registry_uri=database)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.name.replace("[", "_").replace("]", "")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model.write_tiny_checkpoint(tmp_path / "ckpt")


def make_version(client: Any, name: str, source: Path | str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name)
    return client.create_model_version(name, source=str(source)).version


def test_a_version_an_alias_and_the_latest_are_resolved_to_what_they_are_now(
    client: Any, name: str, checkpoint: Path, database: str
) -> None:
    first = make_version(client, name, checkpoint)
    second = make_version(client, name, f"file://{checkpoint}")
    client.set_registered_model_alias(name, "champion", first)
    registry = MlflowRegistry(registry_uri=database)
    assert registry.resolve(f"models:/{name}/{second}") == Resolved(str(checkpoint), f"models:/{name}/{second}")
    assert registry.resolve(f"models:/{name}@champion").uri == f"models:/{name}/{first}"
    assert registry.resolve(f"models:/{name}/latest").uri == f"models:/{name}/{second}"


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("/99", "not found"),
        ("@nobody", "alias nobody not found"),
        ("", "give a version or an alias"),
        ("/1/2", "is no URI of MLflow's registry"),
    ],
)
def test_what_the_registry_does_not_have(client: Any, name: str, end: str, message: str, tmp_path: Path) -> None:
    model = name.split("_", maxsplit=1)[0]
    make_version(client, model, "/nowhere")
    with pytest.raises(ConfigError, match=message):
        dist_export.export({"ckpt_dir": f"models:/{model}{end}", "export_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_a_version_whose_source_is_gone_is_refused(client: Any, name: str, tmp_path: Path) -> None:
    make_version(client, name, tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"whose source .*/gone is not there"):
        dist_export.export({"ckpt_dir": f"models:/{name}/1", "export_dir": str(tmp_path / "out")})


def test_from_a_version_to_a_new_version(client: Any, name: str, checkpoint: Path, tmp_path: Path) -> None:
    """By alias in; out under a name, by reference, with what a reader of the registry wants to know."""
    make_version(client, name, checkpoint)
    client.set_registered_model_alias(name, "champion", "1")
    config = {
        "ckpt_dir": f"models:/{name}@champion",
        "export_dir": f"models:/{name}_serving",
        "registry_options": {"location": str(tmp_path / "packages")},
        **SETTINGS,
    }
    manifest = dist_export.export(config)
    assert manifest.source.uri == f"models:/{name}/1"
    made = client.get_model_version(f"{name}_serving", "1")
    package = Path(made.source)
    assert package.parent == tmp_path / "packages" / f"{name}_serving"
    assert verify(str(package)).findings == []
    assert dist_export.open_package(package).manifest.digest == manifest.digest == made.tags["dist_export.digest"]
    assert made.tags["dist_export.source"] == f"models:/{name}/1"
    signature = json.loads(made.tags["dist_export.signature"])
    assert [column["name"] for column in signature["inputs"]] == [entry.name for entry in manifest.dense.inputs]
    assert all(column["shape"][0] == -1 for column in signature["inputs"])
    assert made.tags["dist_export.outputs"] == ",".join(entry.name for entry in manifest.dense.outputs)
    assert cli.main(["verify", f"models:/{name}_serving/1"]) == 0
    with pytest.raises(ConfigError, match="holds a committed package"):
        dist_export.export(config)  # the same checkpoint with the same settings is the same package


def test_a_package_that_could_not_be_registered_is_whole_and_a_rerun_registers_it_alone(
    client: Any, name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "ckpt_dir": str(checkpoint),
        "export_dir": str(tmp_path / "out"),
        "register": f"models:/{name}",
        "filter_sparse_opt": True,
    }
    with monkeypatch.context() as broken:
        broken.setattr(MlflowRegistry, "register", lambda *_: (_ for _ in ()).throw(ConnectionError("gone away")))
        with pytest.raises(
            ExportError, match=r"whole and committed, but could not be registered .*gone away.*Run the same"
        ):
            dist_export.export(config)
    assert verify(str(tmp_path / "out")).findings == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    manifest = dist_export.export(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")} == before
    assert client.get_model_version(name, "1").tags["dist_export.digest"] == manifest.digest
    assert not (tmp_path / "out" / ".dist_export").exists()


def test_a_live_model_that_could_not_be_registered_is_not_exported_again(
    client: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MlflowRegistry, "register", lambda *_: (_ for _ in ()).throw(ConnectionError("gone away")))
    exporter = dist_export.Exporter(
        torchrec_shape.build_trained(),
        "sparse_arch",
        "dense_arch",
        None,
        None,
        tmp_path / "out",
        register=f"models:/{name}",
    )
    with pytest.raises(ExportError, match=r"could not be registered .*Register it by hand"):
        exporter.export()


def test_packages_of_a_live_model_never_share_a_place(client: Any, name: str, tmp_path: Path) -> None:
    settings = {"registry_options": {"location": str(tmp_path)}}
    places = {
        dist_export.Exporter(
            torchrec_shape.build_trained(), "sparse_arch", "dense_arch", None, None, f"models:/{name}", **settings
        ).export()
        and client.get_model_version(name, str(version)).source
        for version in (1, 2)
    }
    assert len(places) == 2


def test_the_order_of_patterns_makes_another_package() -> None:
    first = {"a*": "float16", "*": "int8"}
    keys = {
        locations._key_of(dist_export.ExportConfig(ckpt_dir="c", export_dir="e", filter_sparse_opt=True, dtype=d), "c")
        for d in (first, dict(reversed(first.items())))
    }
    assert len(keys) == 2


def test_a_package_is_registered_once(client: Any, name: str, database: str, tmp_path: Path) -> None:
    registry = MlflowRegistry(registry_uri=database)
    package = Registered(
        directory=str(tmp_path), source="somewhere", digest="xxh3:1", inputs=(), outputs=(), versions={}
    )
    assert registry.register(f"models:/{name}", package) == f"models:/{name}/1"
    assert registry.register(f"models:/{name}", package) == f"models:/{name}/1"
    assert registry.register(f"models:/{name}", package._replace(digest="xxh3:2")) == f"models:/{name}/2"


def test_a_registry_that_is_not_told_where_packages_go_says_how_to(client: Any, name: str, checkpoint: Path) -> None:
    config = {"ckpt_dir": str(checkpoint), "export_dir": f"models:/{name}", "filter_sparse_opt": True}
    with pytest.raises(
        ConfigError, match=r"registry_options: \{location: DIRECTORY\}, or the tag dist_export.location"
    ):
        dist_export.export(config)
    client.create_registered_model(name, tags={"dist_export.location": str(checkpoint.parent / "packages")})
    dist_export.export(config)
    assert Path(client.get_model_version(name, "1").source).parent == checkpoint.parent / "packages" / name


def test_mlflow_that_is_not_installed_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    monkeypatch.setitem(__import__("sys").modules, "mlflow.exceptions", None)
    with pytest.raises(ConfigError, match=r"pip install mlflow-skinny sqlalchemy alembic"):
        dist_export.export({"ckpt_dir": "models:/ctr/1", "export_dir": str(tmp_path / "out")})


class ToyMos:
    """A resolver as a team with Mos would write it: versions are directories below a root."""

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def resolve(self, uri: str) -> Resolved:
        name, _, rest = uri.partition("/")
        version = rest.removeprefix("version=") or max(path.name for path in (self._root / name).iterdir())
        if not (self._root / name / version).is_dir():
            raise ConfigError(f"{uri}: Mos has no version {version}")
        return Resolved(str(self._root / name / version), f"{name}/version={version}")

    def place(self, uri: str, *, key: str) -> str:
        return str(self._root / uri / key)

    def register(self, uri: str, package: Registered) -> str:
        (self._root / f"{uri}.registered").write_text(package.digest)
        return f"{uri}/version={Path(package.directory).name}"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package with this entry point were installed."""
    real = importlib.metadata.entry_points
    entry = SimpleNamespace(name="mos", value="test_registries:ToyMos", load=lambda: ToyMos)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **given: [*real(**given), *([entry] if given else [])]
    )


def test_a_resolver_of_ones_own(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version in ("1", "2"):
        write_checkpoint(tmp_path / "model.ads.ctr" / version, make_tables({"t": int(version)}, num_parts=1))
    settings = [
        "--filter_sparse_opt=true",
        f"--registry_options.root={tmp_path}",
        "--ckpt_dir=model.ads.ctr",
        "--export_dir=model.ads.serving",
    ]
    assert cli.main(["plan", *settings]) == 0
    assert str(tmp_path / "model.ads.ctr" / "2") in capsys.readouterr().out
    assert cli.main(settings) == 0
    told = capsys.readouterr().out
    package = next((tmp_path / "model.ads.serving").iterdir())
    assert f"  version  model.ads.serving/version={package.name}" in told
    manifest = dist_export.open_package(package).manifest
    assert manifest.source.uri == "model.ads.ctr/version=2"
    assert (tmp_path / "model.ads.serving.registered").read_text() == manifest.digest
    assert cli.main([*settings[:2], "--ckpt_dir=model.ads.ctr/version=9", f"--export_dir={tmp_path / 'x'}"]) == 2
    assert "Mos has no version 9" in capsys.readouterr().err


def test_mos_without_a_resolver_says_how_to_plug_one_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--ckpt_dir=model.ads.ctr/version=3", f"--export_dir={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert 'project.entry-points."dist_export.registries"] mos = "your_package:YourResolver"' in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        ("models:/ctr/1", "models"),
        ("model.ads.ctr", "mos"),
        ("model.ads.ctr/version=3/ckpt_id=7", "mos"),
        ("s3://bucket/model.ads.ctr", "s3"),
        ("/data/model.ads.ctr", None),
        ("runs/ckpt_3", None),
        ("model.pt", None),
    ],
)
def test_which_registry_is_meant(uri: str, scheme: str | None) -> None:
    assert registries.scheme_of(uri) == scheme


def test_a_directory_that_is_there_is_no_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ads.ctr").mkdir()
    assert registries.scheme_of("model.ads.ctr") is None


def test_options_that_the_resolver_does_not_take(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MlflowRegistry cannot be used: .*locaton"):
        dist_export.export(
            {"ckpt_dir": "models:/ctr/1", "export_dir": str(tmp_path / "o"), "registry_options": {"locaton": "x"}}
        )


def test_register_must_name_a_registry(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/tmp/x is no URI of a registry; there are resolvers for models"):
        dist_export.export({"ckpt_dir": str(checkpoint), "export_dir": str(tmp_path / "o"), "register": "/tmp/x"})
    assert not (tmp_path / "o").exists()
